"""Kills evaluations at random moments and checks that nothing is lost: `python -m
tests.stress.kill_evaluate --kills 50 [--processes 2]`.

Every run is killed with SIGKILL again and again, at random moments, and resumed until it is
finished; then the next one starts, until there were `kills` kills. A batch whose file was written
must never be generated again, so that a kill loses at most the batch in flight, and a finished run
must equal the uninterrupted one bitwise: metrics, evaluations, and every image.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.generation.shards import Shards
from odelt_fast.model import DiT
from tests.helpers.forked import start, wait

MODEL = DiTConfig(
    image_size=8,
    channels=1,
    hidden_size=16,
    depth=4,
    depth_min=2,
    depth_group=2,
    num_heads=2,
    num_classes=10,
)


def random_model(folder: Path, config: DiTConfig = MODEL) -> str:
    """A model folder with random weights in every tensor."""
    model, generator = DiT(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return str(save_model(model, folder))


def evaluation(model: str, **changes: Any) -> Evaluation:
    """Small and quick: 2 depths of 2 and 1 steps, 2 seeds, 8 batches each."""
    chosen: dict[str, Any] = {
        "data": "digits",
        "features": "digits",
        "steps": (2, 1),
        "num_images": 120,
        "batch_size": 16,
        "seeds": 2,
    }
    return Evaluation(
        **{
            "model": model,
            "npz": True,
            "metrics": ("frechet", "kid", "recognised"),
            **chosen,
            **changes,
        }
    )


def run(settings: Evaluation, out: Path) -> None:
    Evaluator(settings, out, device="cpu", show=False).run()


def watched_run(settings: Evaluation, out: Path, journal: Path) -> Callable[[], None]:
    """A run that appends to `journal` when it begins to generate a batch, and when the batch's file
    has been written."""

    def child() -> None:
        timed, write = Evaluator._timed, Shards.write

        def note(*words: object) -> None:
            with journal.open("a") as file:
                file.write(" ".join(map(str, [*words, time.monotonic()])) + "\n")

        def watched_timed(
            self: Evaluator, sampler: Any, noise: Any, labels: Any, seed: int, first: int
        ) -> Any:
            key = f"{sampler.operation.depth}-{sampler.operation.steps}-{seed}"
            if first < settings.num_images:
                note("begun", key, first)
            return timed(self, sampler, noise, labels, seed, first)

        def watched_write(self: Shards, batch: int, **arrays: Any) -> None:
            write(self, batch, **arrays)
            if "seconds" in arrays:
                found = re.fullmatch(r"l(\d+)-\w+-T(\d+)-seed(\d+)", self.place.path.name)
                assert found is not None
                note("written", "-".join(found.groups()), self.images(batch).start)

        Evaluator._timed, Shards.write = watched_timed, watched_write  # type: ignore[method-assign, assignment]
        run(settings, out)

    return child


def check_journal(journal: Path) -> int:
    """The number of batches that were generated in vain; AssertionError for one that was generated
    although it had been written."""
    written: set[str] = set()
    begun = 0
    for line in journal.read_text().splitlines() if journal.exists() else []:
        kind, *batch, _ = line.split()
        if kind == "begun":
            assert " ".join(batch) not in written, f"batch {batch} was generated twice"
            begun += 1
        else:
            written.add(" ".join(batch))
    return begun - len(written)


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same bitwise: metrics and evaluations of every row, every image and
    label."""
    from odelt_fast.evaluation.results import read_results

    rows = read_results(out)["rows"]
    found = {
        f"{row['depth']} {row['steps']}": (row["metrics"], row["evaluations"], row["seeds"])
        for row in rows
    }
    arrays = {
        path.name: [array.tobytes() for array in dict(np.load(path)).values()]
        for path in (out / "samples").glob("*.npz")
    }
    assert not list((out / "partial").glob("*/*")), "state is left over"
    return {"rows": found, "images": arrays}


def wait_for_work(journal: Path, size: int, until: float) -> None:
    """Returns when the journal is longer than `size` bytes: most of a run is its start, in which
    little can be lost."""
    while time.monotonic() < until and (not journal.exists() or journal.stat().st_size <= size):
        time.sleep(0.0005)


def torture(kills: int, seed: int, processes: int, folder: Path) -> dict[str, int]:
    """Does it all in `folder`; returns counts. Raises AssertionError for the first thing that is
    lost or differs."""
    torch.set_num_threads(1)
    chance, settings, log = (
        random.Random(seed),
        evaluation(random_model(folder / "model")),
        folder / "log",
    )
    out, journal = folder / "whole", folder / "journal-whole"
    assert wait(
        start(watched_run(settings, out, journal), processes, log), time.monotonic() + 900, log
    )
    times = [float(line.split()[-1]) for line in journal.read_text().splitlines()]
    busy, expected = times[-1] - times[0], outcome(out)
    counts = {"kills": 0, "finished runs": 0, "batches lost": 0}
    out, journal = folder / "out", folder / "journal"
    while counts["kills"] < kills or counts["finished runs"] == 0:
        size = journal.stat().st_size if journal.exists() else 0
        children = start(watched_run(settings, out, journal), processes, log)
        last = counts["kills"] >= kills
        if not last and chance.random() < 0.8:
            wait_for_work(journal, size, time.monotonic() + 60)
        if not wait(
            children, time.monotonic() + (900 if last else chance.uniform(0, 0.4 * busy)), log
        ):
            counts["kills"] += 1
            print(f"{counts['kills']} kills", end="\r", file=sys.stderr)
            continue
        counts["finished runs"] += 1
        counts["batches lost"] += check_journal(journal)
        assert outcome(out) == expected, "results differ from the uninterrupted run's"
        shutil.rmtree(out)
        journal.unlink()
    assert counts["batches lost"] <= processes * counts["kills"], (
        f"{counts}: a kill lost more than the batch in flight"
    )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            counts = torture(options.kills, options.seed, options.processes, Path(folder))
        except AssertionError:
            traceback.print_exc()
            raise SystemExit(1) from None
    print(
        ", ".join(f"{value} {name}" for name, value in counts.items())
        + ": nothing lost, every finished run bitwise the same"
    )


if __name__ == "__main__":
    main()
