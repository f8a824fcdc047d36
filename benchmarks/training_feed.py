"""What a training step costs its process before it computes: batch and draws, made by itself and by
workers.

    python -m benchmarks.training_feed

A step takes its images, labels and every number that its objective draws, as `Trainer` does, and
then sleeps for as long as a device computes. Own time is the process's processor time, wall time is
until all is there. Both ways must give the same bits.

    python -m benchmarks.training_feed --train --precision bf16

trains on the device in place of sleeping, and reports whole steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import Trainer
from odelt_fast.train.objectives.targets import Networks, StepBatch
from odelt_fast.train.recipes import RECIPES

from .measure import Record, device_record, summary, synchronize, write_json
from .training_speed import Precision, random_latents


@dataclass(frozen=True)
class Options:
    batch: int = 256
    """Latents of a step, 4x32x32."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of workers to compare; the first is what others are held to."""
    prefetch: int = 2
    """Steps that each has ready at most."""
    step_ms: float = 100.0
    """How long a step sleeps."""
    steps: int = 40
    """Measured steps; as many as are under way at the start come before."""
    train: bool = False
    """Whole training steps of DiT-B/2."""
    precision: Precision = "no"
    """Of these."""
    out: Path | None = None
    """JSON file for the results."""


def config_of(options: Options, folder: Path, workers: int) -> TrainConfig:
    """The recipe of ImageNet latents; without --train with a small network, which is not called."""
    recipe = RECIPES["imagenet256-b"]
    model = recipe.model
    if not options.train:
        model = replace(model, hidden_size=16, num_heads=1)
    return replace(
        recipe,
        model=model,
        data=random_latents(folder, model, 2048),
        output_dir=folder / "run",
        log_with=(),
        train_batch_size=options.batch,
        mixed_precision=options.precision,
        dataloader_num_workers=workers,
        prefetch=options.prefetch if workers else TrainConfig.prefetch,
    )


@contextmanager
def trainer_of(options: Options, folder: Path, workers: int) -> Iterator[Trainer]:
    trainer = Trainer(config_of(options, folder, workers))
    try:
        yield trainer
    finally:
        trainer.feed.close()


def zero(x: Tensor, *inputs: Any, **told: Any) -> Tensor:
    """A network that costs nothing."""
    return torch.zeros_like(x)


def taken(batch: StepBatch, requests: set[Any]) -> list[Tensor]:
    """All that the step takes of its batch."""
    drawn = []
    for kind, name, start, stop, argument in sorted(requests, key=str):
        arguments = () if argument is None else (argument,)
        drawn.append(getattr(batch.draws, kind)(name, slice(start, stop), *arguments))
    return [batch.images, batch.labels, *drawn]


def feed_times(
    options: Options, folder: Path, workers: int
) -> tuple[list[float], list[float], list[Tensor]]:
    """Own and wall seconds of the measured steps, and what the last one took."""
    with trainer_of(options, folder, workers) as trainer:
        feed, networks = trainer.feed, Networks(zero, zero)
        (first,) = feed.parts(0)
        trainer.objective(networks, first)
        requests = set(first.draws.asked)
        warm = 1 + workers * options.prefetch
        own, wall, last = [], [], []
        for step in range(1, warm + options.steps):
            time.sleep(options.step_ms / 1e3)
            begin, before = time.perf_counter(), time.process_time()
            (batch,) = feed.parts(step)
            last = taken(batch, requests)
            own.append(time.process_time() - before)
            wall.append(time.perf_counter() - begin)
        return own[-options.steps :], wall[-options.steps :], last


def step_times(options: Options, folder: Path, workers: int) -> list[float]:
    """Seconds of whole training steps, the device idle before and after all of them."""
    with trainer_of(options, folder, workers) as trainer:
        device = trainer.accelerator.device
        for _ in range(3 + workers * options.prefetch):
            trainer.step()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(options.steps):
            trainer.step()
        synchronize(device)
        return [(time.perf_counter() - begin) / options.steps]


def measure(options: Options, folder: Path) -> list[Record]:
    """One row for each number of workers. RuntimeError if they make different batches."""
    rows: list[Record] = []
    expected: list[Tensor] = []
    for workers in options.workers:
        row: Record = {"workers": workers, "prefetch": options.prefetch, "batch": options.batch}
        if options.train:
            row["step"] = summary(step_times(options, folder, workers))
        else:
            steps = replace(options, steps=options.steps - workers * options.prefetch)
            own, wall, last = feed_times(steps, folder, workers)
            expected = expected or last
            if not all(map(torch.equal, last, expected)):
                raise RuntimeError(f"{workers} workers make other batches: not measured")
            ready = statistics.mean(seconds < options.step_ms / 2e3 for seconds in wall)
            row |= {"own": summary(own), "wall": summary(wall), "ready": ready}
        rows.append(row)
    return rows


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    for row in rows:
        kinds = [name for name in ("own", "wall", "step") if name in row]
        times = ", ".join(
            f"{name} {1e3 * row[name]['median_s']:.2f} ms"
            f" ({1e3 * row[name]['low_s']:.2f} to {1e3 * row[name]['high_s']:.2f})"
            for name in kinds
        )
        print(f"{row['workers']} workers, {row['batch']} latents: {times}")
    if options.out:
        write_json(options.out, {"device": device_record(), "results": rows})
    else:
        print(json.dumps(device_record()))


if __name__ == "__main__":
    main()
