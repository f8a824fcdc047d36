"""Formats of shards of images: tar files as WebDataset reads them, .npz as evaluators do, Lance."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, BinaryIO, Protocol

import numpy as np

from odelt_fast.images.pixels import num_threads
from odelt_fast.storage.places import Place

from .shards import Shards, write_member

_SMALL = 1 << 14  # pixels of an image that is encoded sooner than handed to another thread


@dataclass(frozen=True)
class Images:
    """Consecutive images from index `first` on: pixels (N, H, W, C) uint8, or latents (N, C, H, W)
    float32; labels (N,) int64, or None of a model without classes."""

    first: int
    arrays: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def indices(self) -> range:
        return range(self.first, self.first + len(self))

    def encoded(self) -> list[bytes]:
        """A file of each: .png of pixels, .npy of latents."""
        encode = _png if self.arrays.dtype == np.uint8 else _npy
        if math.prod(self.arrays.shape[1:]) < _SMALL or num_threads() == 1:
            return list(map(encode, self.arrays))
        with ThreadPoolExecutor(num_threads()) as pool:
            return list(pool.map(encode, self.arrays))

    @property
    def ending(self) -> str:
        return "png" if self.arrays.dtype == np.uint8 else "npy"


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(file, "png", compress_level=1)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Format(Protocol):
    """How shards are written. form: names of the files that say that a shard is whole."""

    form: str

    def check(self, place: Place) -> None:
        """ValueError where it cannot be used there."""

    def write(self, shards: Shards, shard: int, images: Iterator[Images]) -> None:
        """Writes a shard of all these images."""

    def finish(self, shards: Shards) -> str:
        """Called once when all shards are there; says what to open."""


class WebDataset:
    """Tar files with 000000042.png (.npy for latents) and 000000042.cls of image 42.

    The same images give the same bytes.
    """

    form = "images-{:06d}.tar"

    def check(self, place: Place) -> None:
        pass

    def write(self, shards: Shards, shard: int, images: Iterator[Images]) -> None:
        def write(file: BinaryIO) -> None:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for batch in images:
                    for row, content in enumerate(batch.encoded()):
                        key = f"{batch.first + row:09d}"
                        _add(tar, f"{key}.{batch.ending}", content)
                        if batch.labels is not None:
                            _add(tar, f"{key}.cls", str(batch.labels[row]).encode())

        shards.place.write(shards.name(shard), write, flushed=True)

    def finish(self, shards: Shards) -> str:
        return shards.place.name


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of no user, made at no time
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


class Npz:
    """.npz files with arr_0, the images (N, H, W, C) uint8 or the latents (N, H, W, C) float32, and
    arr_1, the labels (N,)."""

    form = "images-{:06d}.npz"

    def check(self, place: Place) -> None:
        pass

    def write(self, shards: Shards, shard: int, images: Iterator[Images]) -> None:
        count, labels = len(shards.images(shard)), list[np.ndarray]()

        def arrays() -> Iterator[np.ndarray]:
            for batch in images:
                if batch.labels is not None:
                    labels.append(batch.labels)
                pixels = batch.arrays.dtype == np.uint8
                yield batch.arrays if pixels else np.moveaxis(batch.arrays, 1, -1)

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                write_member(archive, "arr_0", count, arrays())
                if labels:
                    write_member(archive, "arr_1", count, iter(labels))

        shards.place.write(shards.name(shard), write, flushed=True)

    def finish(self, shards: Shards) -> str:
        return shards.place.name


class Lance:
    """A Lance table `images.lance` of image (a file), label and index, one fragment a shard.

    A shard's file names its fragment, which is part of the table when all are there.
    """

    form = "fragment-{:06d}.json"
    table = "images.lance"

    def check(self, place: Place) -> None:
        try:
            import lance  # noqa: F401
        except ImportError:
            raise ValueError(
                "--format lance needs pylance: pip install 'odelt-fast[lance]'"
            ) from None

    def write(self, shards: Shards, shard: int, images: Iterator[Images]) -> None:
        import pyarrow as pa
        from lance.fragment import write_fragments

        first = next(images)
        schema = _schema(("image", *["label"] * (first.labels is not None), "index"))

        def rows() -> Iterator[Any]:
            for batch in chain([first], images):
                columns = (batch.encoded(), batch.labels, batch.indices)
                given = [column for column in columns if column is not None]
                yield pa.record_batch([pa.array(column) for column in given], schema.names).cast(
                    schema
                )

        fragments = write_fragments(
            pa.RecordBatchReader.from_batches(schema, rows()),
            shards.place.full(self.table),
            schema,
            mode="create",
            max_rows_per_file=shards.length,
        )
        record = {"columns": schema.names, "fragments": [each.to_json() for each in fragments]}
        content = json.dumps(record).encode()
        shards.place.write(shards.name(shard), lambda file: file.write(content), flushed=True)

    def finish(self, shards: Shards) -> str:
        from lance import FragmentMetadata, LanceDataset, LanceOperation, dataset

        name = shards.place.full(self.table)
        with contextlib.suppress(ValueError, OSError):  # it is not there yet
            if dataset(name).count_rows() == shards.num_images:
                return name
        records = [
            json.loads(shards.place.read(shards.name(shard))) for shard in range(shards.count)
        ]
        fragments = [
            FragmentMetadata.from_json(json.dumps(fragment))
            for record in records
            for fragment in record["fragments"]
        ]
        schema = _schema(records[0]["columns"])
        table = LanceDataset.commit(name, LanceOperation.Overwrite(schema, fragments))
        # what killed runs were writing
        table.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
        return name


def _schema(names: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.schema(
        [(name, pa.large_binary() if name == "image" else pa.int64()) for name in names]
    )


FORMATS: dict[str, Format] = {"webdataset": WebDataset(), "npz": Npz(), "lance": Lance()}
