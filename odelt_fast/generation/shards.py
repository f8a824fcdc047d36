"""Images by index in files of equally many, so that a kill loses only files in flight.

A file appears under its name complete or not at all. Which images are in it follows from its number
alone: any number of processes, killed and resumed in any way, leaves the same files, and what is
summed over them in order is bitwise the same.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from odelt_fast.files import PARTIAL, parse_object, write_whole
from odelt_fast.storage.places import Place

from .processes import Processes


@dataclass(frozen=True)
class Shards:
    """Shard s holds images [s * length, (s + 1) * length) in the file `form`.format(s) of
    `place`."""

    place: Place
    num_images: int
    length: int
    form: str = "{:06d}.npz"

    @property
    def count(self) -> int:
        return -(-self.num_images // self.length)

    def name(self, shard: int) -> str:
        return self.form.format(shard)

    def images(self, shard: int) -> range:
        return range(shard * self.length, min((shard + 1) * self.length, self.num_images))

    def missing(self, index: int = 0, processes: int = 1) -> list[int]:
        """The shards of process `index` (every `processes`-th) that have no file yet."""
        there = self.place.names()
        mine = range(index, self.count, processes)
        return [shard for shard in mine if self.name(shard) not in there]

    def delete(self) -> None:
        self.place.delete()

    # Shards of named arrays

    def write(self, shard: int, **arrays: Any) -> None:
        self.place.write(self.name(shard), lambda file: np.savez(file, **arrays))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """The array `name` of every shard, in order.

        Raises:
            ValueError: naming a file that is missing or damaged.
        """
        for shard in range(self.count):
            try:
                with (
                    self.place.open(self.name(shard)) as opened,
                    np.load(opened, allow_pickle=False) as file,
                ):
                    yield file[name]
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{self.place.full(self.name(shard))} cannot be read ({error}): delete it, and"
                    " its images are made again"
                ) from None

    def write_npy(self, path: Path, name: str) -> None:
        """The array `name` of all shards as one .npy file, a shard at a time."""
        write_whole(path, lambda out: write_array(out, self.num_images, self.parts(name)))

    def write_npz(self, path: Path, *names: str) -> None:
        """The arrays of these names of all shards as arr_0, arr_1, ..., a shard at a time."""

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                for number, name in enumerate(names):
                    write_member(archive, f"arr_{number}", self.num_images, self.parts(name))

        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)

    def rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """Rows `wanted` (rising image indices) of the array `name`: a row for each image."""
        shards, rows = np.divmod(wanted, self.length)
        found = [part[rows[shards == shard]] for shard, part in enumerate(self.parts(name))]
        return np.concatenate(found)


def write_array(out: Any, count: int, parts: Iterator[np.ndarray]) -> None:
    """Writes an array of `count` rows as .npy, a part at a time."""
    first = next(parts)
    descr = np.lib.format.dtype_to_descr(first.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (count, *first.shape[1:])}
    np.lib.format.write_array_header_1_0(out, header)
    for part in chain([first], parts):
        out.write(np.ascontiguousarray(part).tobytes())


def write_member(
    archive: zipfile.ZipFile, name: str, count: int, parts: Iterator[np.ndarray]
) -> None:
    """`write_array` into an .npz file. The same numbers give the same bytes."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
        write_array(out, count, parts)


def bind(
    place: Place, file: str, settings: Mapping[str, Any], processes: Processes, what: str
) -> None:
    """Writes settings to a file of `place`, or compares with those that are there.

    what: names what has them, with its article.

    Raises:
        ValueError: naming the first setting that is another there.
    """
    wanted = json.loads(json.dumps(settings))
    if processes.first and file not in place.names():
        write_record(place, file, wanted)
    processes.barrier()
    try:
        there = parse_object(place.read(file))
    except (OSError, ValueError):
        raise ValueError(f"{place.full(file)} is damaged: name another --out") from None
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(
                f"{place.name} holds {what} with {name} {there.get(name)!r}, not {value!r}: name"
                " another --out"
            )


def write_record(place: Place, file: str, values: Mapping[str, Any]) -> None:
    """Writes values as JSON to a file of `place`."""
    content = json.dumps(values, indent=1).encode() + b"\n"
    place.write(file, lambda out: out.write(content))


@contextlib.contextmanager
def alone(folder: Path, processes: Processes, what: str) -> Iterator[None]:
    """Holds a folder, and clears away what killed runs were writing.

    Raises:
        ValueError: if another run, which is called `what`, is in it.
    """
    import fcntl

    with (folder / ".lock").open("w") as lock:
        if processes.first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another {what} is running in {folder}: name another --out"
                ) from None
            for path in folder.rglob(f"{PARTIAL}*"):
                path.unlink(missing_ok=True)
        yield
