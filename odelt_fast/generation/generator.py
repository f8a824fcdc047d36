"""A sampler's images by index, as shards in a folder or an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from odelt_fast.checks import check_seed, one_of, whole
from odelt_fast.sampling.batches import default_batch
from odelt_fast.sampling.noise import drawn_labels, stack_noise
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.storage.places import Place

from .formats import FORMATS, Images
from .processes import Processes
from .shards import Shards, alone, bind, write_record
from .streams import ahead, consumed

RECORD = "generation.json"
_WHAT = "generation"


@dataclass(frozen=True)
class Generation:
    """Which images are generated: 0 to num_images - 1 of a seed, shard_length in a file.

    labels: given in turn; none: drawn from the seed.
    """

    num_images: int
    seed: int = 0
    labels: tuple[int, ...] = ()
    format: str = "webdataset"
    shard_length: int = 10_000

    def __post_init__(self) -> None:
        whole("--num-images", self.num_images)
        whole("--shard-length", self.shard_length)
        check_seed(self.seed, "--seed")
        one_of("--format", self.format, tuple(FORMATS))

    def shards(self, place: Place) -> Shards:
        return Shards(place, self.num_images, self.shard_length, FORMATS[self.format].form)


def generate(
    sampler: Sampler,
    wanted: Generation,
    out: str,
    processes: Processes,
    *,
    about: Mapping[str, Any],
    show: bool = True,
) -> tuple[int, str]:
    """Generates the shards that are missing in a folder or behind a URL.

    Every process of a run calls it. A shard appears whole or not at all, and an image depends on
    (seed, index) alone: the number of processes, kills and resumptions change nothing, the
    sampler's batch size no more than it changes its pictures.

    Args:
        about: what else ties the folder to these images (the model, how it is sampled).
        show: progress on stderr, of the first process.

    Returns:
        How many images were missing, and what to open (nothing in processes after the first).

    Raises:
        ValueError: the folder holds something else; files that cannot be written; samples that are
            not finite.
    """
    place, form = Place(out), FORMATS[wanted.format]
    form.check(place)
    there = place.names()
    if RECORD not in there and any(not name.startswith(".") for name in there):
        raise ValueError(f"--out {out} holds other files: name a new or empty folder")
    processes.barrier()  # all have looked
    shards = wanted.shards(place)
    settings = {**about, **asdict(wanted)}
    bind(place, RECORD, settings, processes, "images")
    here = contextlib.nullcontext() if place.path is None else alone(place.path, processes, _WHAT)
    with here:
        processes.barrier()
        missing = shards.missing()
        todo = missing[processes.index :: processes.count]
        count = sum(len(shards.images(shard)) for shard in missing)
        processes.barrier()  # all have looked
        hidden = None if show and processes.first else True
        with tqdm(total=count, unit="image", leave=False, disable=hidden) as bar:
            for number in _made(sampler, wanted, shards, todo):
                bar.update(min(number * processes.count, count - bar.n))
        processes.barrier()
        opened = ""
        if processes.first:
            if lost := shards.missing():
                raise ValueError(
                    f"{place.full(shards.name(lost[0]))} is missing though every process is done:"
                    " do they all see the same folder?"
                )
            opened = form.finish(shards)
            write_record(place, RECORD, {**settings, "complete": True})
        processes.barrier()
    return count, opened


def _made(sampler: Sampler, wanted: Generation, shards: Shards, todo: list[int]) -> Iterator[int]:
    """Makes these shards; gives the number of images of each batch.

    Noise is drawn, and images are encoded and written, beside what the device does.
    """
    config, form = sampler.model.config, FORMATS[wanted.format]
    size = sampler.batch_size or default_batch(sampler, config.image_shape)
    batches = [list(_batches(shards.images(shard), size)) for shard in todo]

    def write(images: Iterator[Images]) -> None:
        for shard, parts in zip(todo, batches):
            form.write(shards, shard, islice(images, len(parts)))

    def draw(rows: range) -> tuple[Tensor, np.ndarray]:
        if wanted.labels:
            labels = np.take(wanted.labels, rows, mode="wrap").astype(np.int64)
        else:
            labels = drawn_labels(wanted.seed, rows, config.num_classes)
        return stack_noise(wanted.seed, rows, config.image_shape), labels

    every = (rows for parts in batches for rows in parts)
    with consumed(write) as put:
        for rows, (noise, labels) in ahead(every, draw):
            made = sampler(
                noise=noise.to(sampler.model.device),
                labels=labels,
                seed=wanted.seed,
                first_image=rows.start,
            )
            pixels = made.shape[1] in (1, 3)
            arrays = to_uint8(made) if pixels else made.float().cpu().numpy()
            put(Images(rows.start, arrays, labels if config.num_classes > 1 else None))
            yield len(rows)


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, size):
        yield range(start, min(start + size, rows.stop))
