"""Partial state of an evaluation: a file for every batch, so that a kill loses only one in flight.

A file appears under its name complete or not at all, and holds what the batch gave (features,
times, ...). Batches are numbered by their images alone: any number of processes, killed and resumed
in any way, leaves the same files, and what is summed over them in order is bitwise the same.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from odelt_fast.files import write_whole


@dataclass(frozen=True)
class BatchFiles:
    """Batch b holds images [b * batch_size, (b + 1) * batch_size) in `folder`/b.npz."""

    folder: Path
    num_images: int
    batch_size: int

    @property
    def count(self) -> int:
        return -(-self.num_images // self.batch_size)

    def images(self, batch: int) -> range:
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def missing(self, index: int = 0, processes: int = 1) -> list[int]:
        """The batches of process `index` (every `processes`-th) that have no file yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = range(index, self.count, processes)
        return [batch for batch in mine if not self._path(batch).exists()]

    def write(self, batch: int, **arrays: Any) -> None:
        write_whole(self._path(batch), lambda file: np.savez(file, **arrays))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """The array `name` of every batch, in order.

        Raises:
            ValueError: naming a file that is missing or damaged.
        """
        for batch in range(self.count):
            try:
                with np.load(self._path(batch), allow_pickle=False) as file:
                    yield file[name]
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{self._path(batch)} cannot be read ({error}): delete it, and its images are"
                    " made again"
                ) from None

    def rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """Rows `wanted` (rising image indices) of the array `name`: a row for each image."""
        batches, rows = np.divmod(wanted, self.batch_size)
        found = [part[rows[batches == batch]] for batch, part in enumerate(self.parts(name))]
        return np.concatenate(found)

    def write_npz(self, path: Path, images: str, labels: str) -> None:
        """All images (N, H, W, C) uint8 as arr_0 and labels as arr_1, a batch at a time."""

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                for entry, name, dtype in (
                    ("arr_0", images, np.uint8),
                    ("arr_1", labels, np.int64),
                ):
                    shape = (self.num_images, *next(self.parts(name)).shape[1:])
                    with archive.open(f"{entry}.npy", "w", force_zip64=True) as out:
                        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(out, header)
                        for part in self.parts(name):
                            out.write(np.ascontiguousarray(part, dtype).tobytes())

        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.npz"
