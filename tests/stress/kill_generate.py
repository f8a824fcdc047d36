"""Kills `odelt-fast generate` at random moments and checks that nothing is lost: `python -m
tests.stress.kill_generate --images 200000 --kills 30 [--processes 2] [--format lance] [--s3]`.

Every run is killed with SIGKILL again and again, at random moments, and started anew until it is
finished; then the next one starts, until there were `kills` kills. A shard that is there must never
be made again, every picture must be there once, and equal the `Sampler`'s. --s3: in an object store
on this machine. At the end the peak memory of a tenth of the images and of all of them: it must not
grow with their number.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.cli import main as command
from odelt_fast.generation.formats import FORMATS, Images
from odelt_fast.generation.shards import Shards
from odelt_fast.sampling.noise import drawn_labels
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.storage.places import Place
from tests.helpers.forked import start, wait
from tests.helpers.object_store import object_store

SEED, BATCH, GROWTH = 3, 500, 0.05
Picture = tuple[int, np.ndarray, int]  # index, (H, W, 1), label


@dataclass(frozen=True)
class Torture:
    """What is generated: images in shards, by processes; format as --format."""

    images: int
    shard_length: int
    format: str = "webdataset"
    processes: int = 1

    def command(self, out: str, images: int | None = None) -> list[str]:
        """The arguments of `odelt-fast`."""
        dials = ["--depth", "4", "--steps", "1", "--device", "cpu", "--dtype", "float32", "--quiet"]
        sizes = ["--batch-size", str(BATCH), "--shard-length", str(self.shard_length)]
        count = ["--num-images", str(images or self.images), "--seed", str(SEED)]
        return ["generate", *dials, *sizes, *count, "--format", self.format, "--out", out]

    def shards(self, out: str) -> Shards:
        form = FORMATS[self.format].form
        return Shards(Place(out), self.images, self.shard_length, form)


def watched_run(torture: Torture, out: str, journal: Path) -> Callable[[], None]:
    """A run that appends to `journal` when a shard is begun, and when it is there."""

    def note(*words: object) -> None:
        with journal.open("a") as file:
            file.write(" ".join(map(str, [*words, time.monotonic()])) + "\n")

    def child() -> None:
        kind = type(FORMATS[torture.format])
        write = kind.write

        def watched(self: object, shards: Shards, shard: int, images: Iterator[Images]) -> None:
            note("begun", shard)
            write(self, shards, shard, images)
            note("written", shard)

        kind.write = watched  # type: ignore[method-assign]
        assert command(torture.command(out)) == 0

    return child


def pictures(torture: Torture, out: str) -> Iterator[Picture]:
    """All pictures that lie in `out`, by the readers of each format, a shard at a time."""
    place, shards = Place(out), torture.shards(out)
    if torture.format == "lance":
        import lance

        for batch in lance.dataset(place.full("images.lance")).to_batches():
            for row in batch.to_pylist():
                yield row["index"], _decoded(row["image"]), row["label"]
        return
    for shard in range(shards.count):
        content = io.BytesIO(place.read(shards.name(shard)))
        if torture.format == "npz":
            arrays = np.load(content)
            yield from zip(shards.images(shard), arrays["arr_0"], arrays["arr_1"].tolist())
            continue
        with tarfile.open(fileobj=content) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".png"):
                key = name.removesuffix(".png")
                yield int(key), _decoded(data), int(members[f"{key}.cls"])


def _decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))[:, :, None]


def check(torture: Torture, out: str) -> None:
    """AssertionError unless every picture is there once, in order, as the Sampler draws it."""
    sampler = Sampler(load_model("digits", "cpu", depth=4), 4, 1, batch_size=BATCH)
    every = pictures(torture, out)
    step = 20 * BATCH
    for first in range(0, torture.images, step):
        count = min(step, torture.images - first)
        wanted = to_uint8(sampler(count, seed=SEED, first_image=first))
        labels = drawn_labels(SEED, range(first, first + count), 10)
        found = [next(every) for _ in range(count)]
        assert [index for index, _, _ in found] == list(range(first, first + count))
        assert np.array_equal(np.array([image for _, image, _ in found]), wanted)
        assert [label for _, _, label in found] == labels.tolist()
    assert next(every, None) is None, "there are more pictures than were wanted"
    names = Place(out).names() - {"generation.json", ".lock", "images.lance"}
    shards = torture.shards(out)
    assert names == {shards.name(shard) for shard in range(shards.count)}, "something is left over"


def check_journal(journal: Path) -> int:
    """The number of shards that were begun in vain; AssertionError for one that was begun although
    it had been written."""
    written, begun = set[str](), 0
    for line in journal.read_text().splitlines():
        kind, shard, _ = line.split()
        assert shard not in written, f"shard {shard} was made twice"
        begun += kind == "begun"
        if kind == "written":
            written.add(shard)
    return begun - len(written)


def torment(torture: Torture, kills: int, seed: int, root: str, folder: Path) -> dict[str, int]:
    """Does it all below `root`; returns counts. Raises AssertionError for what is lost or
    differs."""
    torch.set_num_threads(1)
    chance, log, journal = random.Random(seed), folder / "log", folder / "journal-whole"
    whole = start(watched_run(torture, f"{root}/whole", journal), torture.processes, log)
    assert wait(whole, time.monotonic() + 3600, log)
    times = [float(line.split()[-1]) for line in journal.read_text().splitlines()]
    busy = times[-1] - times[0]
    counts = {"kills": 0, "finished runs": 0, "shards begun in vain": 0}
    while counts["kills"] < kills or counts["finished runs"] == 0:
        out = f"{root}/out-{counts['finished runs']}"
        journal = folder / f"journal-{counts['finished runs']}"
        size = journal.stat().st_size if journal.exists() else 0
        children = start(watched_run(torture, out, journal), torture.processes, log)
        last = counts["kills"] >= kills
        if not last and chance.random() < 0.8:  # most of a run's time may be its start
            until = time.monotonic() + 60
            while time.monotonic() < until and (
                not journal.exists() or journal.stat().st_size <= size
            ):
                time.sleep(0.0005)
        if not wait(
            children, time.monotonic() + (3600 if last else chance.uniform(0, 0.2 * busy)), log
        ):
            counts["kills"] += 1
            print(f"{counts['kills']} kills", end="\r", file=sys.stderr)
            continue
        counts["finished runs"] += 1
        counts["shards begun in vain"] += check_journal(journal)
        # In a process of its own: what it starts would not survive the next fork.
        checked = start(lambda out=out: check(torture, out), 1, log)  # type: ignore[misc]
        assert wait(checked, time.monotonic() + 3600, log)
    assert counts["shards begun in vain"] <= torture.processes * counts["kills"]
    return counts


def growth(torture: Torture, root: str) -> float:
    """By how much the peak memory of all images is above that of a tenth of them."""
    peaks = []
    for images in (torture.images // 10, torture.images):
        arguments = torture.command(f"{root}/memory-{images}", images)
        child = subprocess.Popen([sys.executable, "-m", "odelt_fast.cli", *arguments])
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, "the generation failed"
        peaks.append(usage.ru_maxrss)
        print(f"{images} images: peak {peaks[-1] / 2**10:.1f} MiB", flush=True)
    return peaks[-1] / peaks[0] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--shard-length", type=int, default=5_000)
    parser.add_argument("--format", default="webdataset", choices=tuple(FORMATS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    torture = Torture(options.images, options.shard_length, options.format, options.processes)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = stack.enter_context(object_store()) if options.s3 else folder
        try:
            counts = torment(torture, options.kills, options.seed, root, Path(folder))
        except AssertionError:
            traceback.print_exc()
            raise SystemExit(1) from None
        said = ", ".join(f"{value} {name}" for name, value in counts.items())
        print(f"{said}: every picture once, and the Sampler's")
        grown = growth(torture, root)
    print(f"peak memory of ten times as many images: {100 * grown:+.1f} %")
    raise SystemExit(grown > GROWTH)


if __name__ == "__main__":
    main()
