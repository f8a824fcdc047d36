"""Parquet files of images in the layout of Hugging Face `datasets`, read with pyarrow alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from odelt_fast.files import one_line, problem_of
from odelt_fast.storage import cache
from odelt_fast.storage.places import Version, is_url, reason, version_of

from .listing import check_split, files_of_split, urls_of_split
from .pixels import Opened, Unreachable, image_endings
from .tables import (
    NO_CHOICE,
    Choice,
    Columns,
    check_image_type,
    find_columns,
    is_text,
    label_values,
    number_labels,
)

# Bytes of Parquet; larger tables are unpacked once into the cache folder and memory-mapped. Copies
# of a table, in workers, share the mapped one sooner.
_IN_MEMORY, _IN_COPIES = 1 << 30, 64 << 20


def open_parquet(place: str | Path, split: str, choice: Choice = NO_CHOICE) -> Opened:
    """A Parquet file, or those of a split below a folder, with the same columns. Behind URLs they
    are copied into the cache folder.

    Returns:
        The images, labels (N,) int64 and class names.

    Raises:
        ValueError: in one line, for what cannot be used.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install 'odelt-fast[eval]'") from None
    left_out: Counter[str] = Counter()
    if is_url(str(place)) and not str(place).lower().endswith(".parquet"):
        files = urls_of_split(str(place), "Parquet", split, left_out)
    elif os.path.isdir(place):
        files = files_of_split(Path(place), "Parquet", split, left_out)
    else:
        files = [str(place)]
    if len(files) == 1:
        check_split(files[0], split)
    columns: Columns | None = None
    labels, unpacked = [], 0
    versions = [_version(file) for file in files]
    for file, version in zip(files, versions):
        try:
            with _table(file, version) as table:
                schema, facts = table.schema_arrow, table.metadata
                unpacked += sum(
                    facts.row_group(group).total_byte_size for group in range(facts.num_row_groups)
                )
                found = find_columns(schema, file, choice)
                if columns is not None and found != columns:
                    raise ValueError(
                        f"{files[0]} and {file} differ in their columns or class names"
                    )
                columns = found
                check_image_type(schema.field(found.image).type, f"{file}: column {found.image}")
                if found.label is None:
                    labels.append(np.zeros(facts.num_rows, np.int64))
                else:
                    column = table.read(columns=[found.label])[found.label]
                    labels.append(label_values(column, found.class_names, file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as Parquet: {problem_of(Path(file), error)}"
            ) from None
        if labels[0].dtype != labels[-1].dtype:
            raise ValueError(f"{files[0]} and {file} differ in the types of their labels")
    assert columns is not None
    together = np.concatenate(labels)
    if not len(together):
        raise ValueError(f"{files[0]} has no rows")
    lengths = [*map(len, labels)]
    store = ParquetStore(files, versions, columns.image, lengths, unpacked, left_out)
    try:
        store.open()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{files[0]}: the images cannot be read: {one_line(error)}") from None
    only = None if columns.label else Path(files[0]).stem
    return store, *number_labels(together, columns.class_names, only)


def _version(file: str) -> Version:
    try:
        return version_of(file)
    except Exception as error:  # file systems raise most kinds
        raise ValueError(f"{file} cannot be read: {reason(error)}") from None


@contextlib.contextmanager
def _table(file: str, version: Version) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`."""
    import pyarrow.parquet as pq

    try:
        opened = cache.local(file, version) if is_url(file) else open(file, "rb")  # noqa: SIM115
    except ValueError as error:
        raise Unreachable(str(error)) from None
    with opened:
        yield pq.ParquetFile(opened)


class ParquetStore:
    """The image column of Parquet files as one run of bytes with offsets.

    In memory, or unpacked into the cache folder and memory-mapped; opened on first use in each
    process. A row without bytes names a file, which must lie below the folder of its Parquet file.
    Files behind URLs are copied.
    """

    def __init__(
        self,
        files: Sequence[str],
        versions: Sequence[Version],
        column: str,
        lengths: Sequence[int],
        unpacked: int,
        left_out: Counter[str],
    ) -> None:
        self.files, self.column, self.left_out = files, column, left_out
        self._ends, self._in_memory = np.cumsum(lengths), _IN_MEMORY
        self._versions, self._unpacked = versions, unpacked

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_content", "_paths")}
        return state | {"_in_memory": min(self._in_memory, _IN_COPIES)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> str:
        facts = [self.column, [version.text for version in self._versions]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _place(self, row: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return index, row - (int(self._ends[index - 1]) if index else 0)

    def name(self, row: int) -> str:
        index, inside = self._place(row)
        path, place = self._path(row), f"row {inside} of {os.path.basename(self.files[index])}"
        return f"{path} ({place})" if path else place

    def open(self) -> None:
        """Unpacks or maps the images now, instead of at the first read."""
        if not np.diff(self._content[1]).all():  # files beside the table are its images
            for ending in image_endings():
                self.left_out.pop(ending, None)

    def encoded(self, row: int) -> bytes | str:
        data, offsets = self._content
        content: bytes = data[offsets[row] : offsets[row + 1]].tobytes()
        if content:
            return content
        table, path = self.files[self._place(row)[0]], self._path(row)
        if not path:
            raise ValueError("the row has no image")
        folder = Path(table).parent.resolve()
        file = (folder / path).resolve()
        if is_url(table) or not file.is_relative_to(folder) or not file.is_file():
            raise ValueError(f"no file {one_line(path)} below the folder of the table")
        return str(file)

    def _path(self, row: int) -> str | None:
        index, inside = self._place(row)
        paths = self._paths[index]
        return None if paths is None else paths[inside].as_py()

    @cached_property
    def _paths(self) -> list[Any]:
        """The column of paths of each file; None where it has none."""
        import pyarrow as pa

        columns = []
        for file, version in zip(self.files, self._versions):
            with _table(file, version) as table:
                type_ = table.schema_arrow.field(self.column).type
                fields = {f.name: f.type for f in type_} if pa.types.is_struct(type_) else {}
                paths = None
                if is_text(fields.get("path")):
                    column = table.read(columns=[f"{self.column}.path"])[self.column]
                    paths = column.combine_chunks().field("path")
                columns.append(paths)
        return columns

    @cached_property
    def _content(self) -> tuple[np.ndarray, np.ndarray]:
        """All images' bytes, and where each begins; ValueError if the cache folder cannot be
        written."""
        if sum(version.size for version in self._versions) <= self._in_memory:
            memory = io.BytesIO()
            starts = self._unpack(memory)
            return np.frombuffer(memory.getbuffer(), np.uint8), starts

        def unpack(file: BinaryIO) -> None:
            file.write(self._unpack(file).tobytes())

        size = self._unpacked + 8 * (len(self) + 1)
        try:
            file = cache.object_of(f"unpacked {self.fingerprint()}", size, unpack)
        except OSError as error:
            raise Unreachable(
                f"the images of {self.files[0]} cannot be unpacked into the cache folder (choose"
                f" another with ODELT_FAST_CACHE): {one_line(error)}"
            ) from None
        if file is None:
            raise Unreachable(cache.needed(f"the images of {self.files[0]}, unpacked,", size))
        with file:
            data = np.memmap(file, np.uint8, mode="r")
        end = len(data) - 8 * (len(self) + 1)
        return data[:end], np.array(data[end:]).view(np.int64)

    def _unpack(self, file: Any) -> np.ndarray:
        """Writes all images one after another; where each begins, and the end (N + 1,) int64."""
        from tqdm import tqdm

        ends = [0]
        look: dict[str, Any] = {"unit": "image", "delay": 2, "disable": None, "leave": False}
        progress = tqdm(total=len(self), desc="unpacking images", **look)
        with progress:
            for source, version in zip(self.files, self._versions):
                with _table(source, version) as table:
                    for batch in table.iter_batches(batch_size=256, columns=[self.column]):
                        for item in batch.column(0).to_pylist():
                            content = item.get("bytes") if isinstance(item, dict) else item
                            file.write(content or b"")
                            ends.append(ends[-1] + len(content or b""))
                        progress.update(len(batch))
        return np.array(ends, np.int64)
