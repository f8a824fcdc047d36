"""Latents in a Lance table: a row of posterior moments a sample, written by `encode`.

Columns `moments` (copies * 2 * C * S * S) float16, as the shards of `shards.py` have them, and
`label` int64; the schema's metadata hold what `manifest.json` does. A table is finished when it has
as many rows as they say.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np

from odelt_fast.files import one_line, parse_object
from odelt_fast.storage.places import Place

from .lance_tables import LanceRows, lance_reason, need_lance, open_table
from .latents import LatentSource, Moments
from .shards import LatentWriter, Manifest
from .sources import Batch, Flips, Indices, check_indices
from .tables import check_labels

_KEY = b"odelt-fast"


def is_latents_table(name: str) -> bool:
    """Whether a Lance table holds latents; ValueError where it cannot be read."""
    return _KEY in (open_table(name).schema.metadata or {})


class LanceLatents(LatentSource, LanceRows):
    """A table of latents; the rows of a batch are fetched at once.

    Raises:
        ValueError: in one line, for a table that is not finished or is damaged.
    """

    posterior = True

    def __init__(self, name: str) -> None:
        table = open_table(name)
        super().__init__(name, table.version)
        self.name, count = name, table.count_rows()
        try:
            values = parse_object(table.schema.metadata[_KEY])
            shard = {"moments": "moments-00000.npy", "length": count}
            manifest = Manifest.of({**values, "shards": [shard] if count else []})
            expected = values["facts"]["count"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"the table {name} cannot be read: {one_line(error)}") from None
        if count != expected:
            raise ValueError(
                f"the latents in {name} are not finished, {count} of {expected} are there: run"
                " `odelt-fast encode` again, it continues where it stopped"
            )
        self.channels, self.image_size = manifest.channels, manifest.size
        self.class_names, self.flippable = manifest.class_names, manifest.copies == 2
        self.latents, self._copies = manifest.latents, manifest.copies
        try:
            self.labels = table.to_table(columns=["label"])["label"].to_numpy().astype(np.int64)
        except Exception as error:  # Lance's errors come from many packages
            raise ValueError(f"the table {name} cannot be read: {lance_reason(error)}") from None
        check_labels(self.labels, self.class_names, self.sample_name)
        self._held = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        left = ("_table", "_held")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _held=threading.local())

    def sample_name(self, index: int) -> str:
        return f"row {index} of {self.name}"

    def read_many(self, indices: Indices, flips: Flips = None, noise: Any = None) -> Batch:
        self._held.rows = self._fetch(check_indices(indices, len(self)))
        try:
            return super().read_many(indices, flips, noise)
        finally:
            self._held.rows = {}

    def moments(self, index: int, flip: bool) -> Moments:
        held = getattr(self._held, "rows", {})
        row = held[index] if index in held else self._fetch(np.array([index]))[index]
        mean, std = row[int(flip)].astype(np.float32)
        return mean, std

    def _fetch(self, indices: np.ndarray) -> dict[int, np.ndarray]:
        """Moments (copies, 2, C, S, S) float16 by index."""
        rows = np.unique(indices)
        if not len(rows):
            return {}
        column = self.take(rows, ["moments"])["moments"].combine_chunks()
        shape = (len(rows), self._copies, 2, *self.image_shape)
        try:
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(shape)
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{self.name} is damaged: {one_line(error)}") from None
        return dict(zip(rows.tolist(), values))


class LanceLatentWriter(LatentWriter):
    """Appends moments to a Lance table, shard by shard, as `LatentWriter` does to a folder.

    A shard is part of the table when all of it is there. facts must have the `count` of all
    samples.
    """

    def _begin(self) -> None:
        need_lance(self.name)
        if "_versions" not in Place(self.name).names():
            return
        table = open_table(self.name)
        try:
            before = parse_object((table.schema.metadata or {})[_KEY])
        except (ValueError, LookupError):
            raise ValueError(f"{self.name} is a table of something else: name another") from None
        self._check(before)
        self._lengths = [table.count_rows()]
        self.finished = self.completed == self._settings["facts"]["count"]

    def _put(self, shard: int, moments: np.ndarray, labels: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(moments.reshape(-1))
        width = moments.size // len(moments)
        columns = [pa.FixedSizeListArray.from_arrays(flat, width), pa.array(labels)]
        table = pa.table(columns, names=["moments", "label"])
        table = table.replace_schema_metadata({_KEY: json.dumps(self._settings).encode()})
        mode = "append" if self._lengths else "create"
        try:
            need_lance(self.name).write_dataset(table, self.name, mode=mode)
        except Exception as error:  # its errors come from many packages
            raise OSError(lance_reason(error)) from None

    def _end(self) -> None:
        pass
