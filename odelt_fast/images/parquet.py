"""Parquet files of images in the layout of Hugging Face `datasets`, read with pyarrow alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from odelt_fast.files import cache_folder, locked, one_line, problem_of, write_atomically
from odelt_fast.storage.places import fetched, is_url

from .listing import check_split, files_of_split, urls_of_split
from .pixels import Opened, image_endings
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
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install 'odelt-fast[eval]'") from None
    left_out: Counter[str] = Counter()
    if is_url(str(place)):
        alone = str(place).lower().endswith(".parquet")
        urls = [str(place)] if alone else urls_of_split(str(place), "Parquet", split, left_out)
        files = [str(fetched(url)) for url in urls]
    elif os.path.isdir(place):
        files = files_of_split(Path(place), "Parquet", split, left_out)
    else:
        files = [str(place)]
    if len(files) == 1:
        check_split(files[0], split)
    columns: Columns | None = None
    labels = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            found = find_columns(schema, file, choice)
            if columns is not None and found != columns:
                raise ValueError(f"{files[0]} and {file} differ in their columns or class names")
            columns = found
            check_image_type(schema.field(found.image).type, f"{file}: column {found.image}")
            if found.label is None:
                labels.append(np.zeros(pq.read_metadata(file).num_rows, np.int64))
            else:
                column = pq.ParquetFile(file).read(columns=[found.label])[found.label]
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
    store = ParquetStore([*map(Path, files)], columns.image, [*map(len, labels)], left_out)
    try:
        store.open()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{files[0]}: the images cannot be read: {one_line(error)}") from None
    only = None if columns.label else Path(files[0]).stem
    return store, *number_labels(together, columns.class_names, only)


class ParquetStore:
    """The image column of Parquet files as one run of bytes with offsets.

    In memory, or unpacked into the cache folder and memory-mapped; opened on first use in each
    process. A row without bytes names a file, which must lie below the folder of its Parquet file.
    """

    def __init__(
        self, files: Sequence[Path], column: str, lengths: Sequence[int], left_out: Counter[str]
    ) -> None:
        self.files, self.column, self.left_out = files, column, left_out
        self._ends, self._in_memory = np.cumsum(lengths), _IN_MEMORY

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_content", "_paths")}
        return state | {"_in_memory": min(self._in_memory, _IN_COPIES)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> str:
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(json.dumps([self.column, facts]).encode()).hexdigest()

    def _place(self, row: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return index, row - (int(self._ends[index - 1]) if index else 0)

    def name(self, row: int) -> str:
        index, inside = self._place(row)
        path, place = self._path(row), f"row {inside} of {self.files[index].name}"
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
        folder, path = self.files[self._place(row)[0]].parent.resolve(), self._path(row)
        if not path:
            raise ValueError("the row has no image")
        file = (folder / path).resolve()
        if not file.is_relative_to(folder) or not file.is_file():
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
        import pyarrow.parquet as pq

        columns = []
        for file in self.files:
            type_ = pq.read_schema(file).field(self.column).type
            fields = {f.name: f.type for f in type_} if pa.types.is_struct(type_) else {}
            paths = None
            if is_text(fields.get("path")):
                table = pq.ParquetFile(file).read(columns=[f"{self.column}.path"])
                paths = table[self.column].combine_chunks().field("path")
            columns.append(paths)
        return columns

    @cached_property
    def _content(self) -> tuple[np.ndarray, np.ndarray]:
        """All images' bytes, and where each begins; ValueError if the cache folder cannot be
        written."""
        if sum(file.stat().st_size for file in self.files) <= self._in_memory:
            memory = io.BytesIO()
            starts = self._unpack(memory)
            return np.frombuffer(memory.getbuffer(), np.uint8), starts
        base = cache_folder() / f"table-{self.fingerprint()[:32]}"
        content, offsets = base.with_suffix(".images"), base.with_suffix(".offsets")
        with locked(base.with_suffix(".lock")):
            if not offsets.is_file():
                try:
                    ends = write_atomically(content, self._unpack)
                    write_atomically(offsets, lambda file: file.write(ends.tobytes()))
                except OSError as error:
                    where = f"{base.parent} (choose another with ODELT_FAST_CACHE)"
                    raise ValueError(
                        f"the images cannot be unpacked into {where}: {one_line(error)}"
                    ) from None
        return np.memmap(content, np.uint8, mode="r"), np.fromfile(offsets, np.int64)

    def _unpack(self, file: Any) -> np.ndarray:
        """Writes all images one after another; where each begins, and the end (N + 1,) int64."""
        import pyarrow.parquet as pq
        from tqdm import tqdm

        ends = [0]
        look: dict[str, Any] = {"unit": "image", "delay": 2, "disable": None, "leave": False}
        progress = tqdm(total=len(self), desc="unpacking images", **look)
        with progress:
            for source in self.files:
                table = pq.ParquetFile(source)
                for batch in table.iter_batches(batch_size=256, columns=[self.column]):
                    for item in batch.column(0).to_pylist():
                        content = (item.get("bytes") if isinstance(item, dict) else item) or b""
                        file.write(content)
                        ends.append(ends[-1] + len(content))
                    progress.update(len(batch))
        return np.array(ends, np.int64)
