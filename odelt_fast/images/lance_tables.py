"""Lance tables of images, here or in an object store: rows are fetched by number, many at once."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from odelt_fast.files import one_line
from odelt_fast.storage.places import patiently

from .listing import check_split
from .pixels import Opened, Unreachable
from .tables import (
    NO_CHOICE,
    Choice,
    check_image_type,
    find_columns,
    label_values,
    number_labels,
)

_ROWS = 1 << 16  # labels that are read at once


def need_lance(name: str) -> Any:
    """The package; ValueError where it is missing."""
    try:
        import lance
    except ImportError:
        raise ValueError(f"{name} needs pylance: pip install 'odelt-fast[lance]'") from None
    return lance


def open_table(name: str) -> Any:
    """A `lance.LanceDataset`; ValueError in one line where there is none, or pylance is missing."""
    lance = need_lance(name)
    try:
        return lance.dataset(name)
    except Exception as error:  # its errors come from many packages
        raise ValueError(f"the table {name} cannot be read: {lance_reason(error)}") from None


def lance_reason(error: BaseException) -> str:
    """Why Lance failed, in one line without the places in its code."""
    return one_line(re.sub(r",?\s*[^\s,]+\.rs:\d+(:\d+)?", "", str(error)))


def open_lance(name: str, split: str, choice: Choice = NO_CHOICE) -> Opened:
    """A table with a column of encoded images (bytes, or {bytes, path}) and one of labels.

    Returns:
        The images, labels (N,) int64 and class names.

    Raises:
        ValueError: in one line, for what cannot be used.
    """
    check_split(name, split)
    table = open_table(name)
    columns = find_columns(table.schema, name, choice)
    check_image_type(table.schema.field(columns.image).type, f"{name}: column {columns.image}")
    count = table.count_rows()
    if not count:
        raise ValueError(f"{name} has no rows")
    store = LanceStore(name, columns.image, table.version, count)
    if columns.label is None:
        only = os.path.basename(name.rstrip("/")).removesuffix(".lance")
        return store, np.zeros(count, np.int64), (only,)
    try:
        column = table.to_table(columns=[columns.label], batch_size=_ROWS)[columns.label]
    except Exception as error:  # its errors come from many packages
        raise ValueError(f"the table {name} cannot be read: {lance_reason(error)}") from None
    labels = label_values(column, columns.class_names, name)
    return store, *number_labels(labels, columns.class_names, None)


class LanceRows:
    """Rows of one version of a table, opened on first use in each process."""

    def __init__(self, name: str, version: int) -> None:
        self.table, self.version = name, version

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    @cached_property
    def _table(self) -> Any:
        return open_table(self.table).checkout_version(self.version)

    def take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> Any:
        """These rows in this order, as an Arrow table.

        Raises:
            Unreachable: where the table cannot be read.
        """
        try:
            return patiently(
                lambda: self._table.take([int(row) for row in rows], columns=list(columns))
            )
        except Exception as error:  # its errors come from many packages
            raise Unreachable(
                f"the table {self.table} cannot be read: {lance_reason(error)}"
            ) from None


class LanceStore(LanceRows):
    """The image column of a table."""

    def __init__(self, name: str, column: str, version: int, count: int) -> None:
        super().__init__(name, version)
        self.column, self._count = column, count
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        return f"{self.table} {self.version} {self.column} {self._table.latest_version}"

    def name(self, row: int) -> str:
        return f"row {row} of {os.path.basename(self.table.rstrip('/'))}"

    def encoded(self, row: int) -> bytes:
        return self.together([row])(row)

    def together(self, rows: Sequence[int] | np.ndarray) -> Callable[[int], bytes]:
        """`encoded` of these rows, which are fetched at once, and of others."""
        there = dict(zip(map(int, rows), self.take(rows, [self.column])[self.column]))

        def encoded(row: int) -> bytes:
            if row not in there:
                return self.encoded(row)
            value = there[row].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if not content:
                raise ValueError("the row has no image")
            return bytes(content)

        return encoded
