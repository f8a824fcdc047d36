"""The folder of an evaluation.

`settings.json` ties it to what it measures, `cells/*.json` are finished cells, `partial` has the
batches of unfinished ones, `results.*` the tables.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odelt_fast.files import write_json, write_whole
from odelt_fast.generation.processes import Processes
from odelt_fast.generation.shards import Shards, alone, bind
from odelt_fast.storage.places import Place

from .cells import Cell
from .results import to_markdown


@dataclass(frozen=True)
class Folder:
    """The files of an evaluation at `path`, which `processes` write in batches of batch_size."""

    path: Path
    processes: Processes
    batch_size: int

    def bind(self, bound: Mapping[str, Any]) -> None:
        """Writes settings.json, or compares with what is there.

        A folder holds one evaluation, which may get more cells.

        Raises:
            ValueError: naming the first thing that is another there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        bind(Place(self.path), "settings.json", bound, self.processes, "an evaluation")

    @contextlib.contextmanager
    def alone(self, cells: Iterable[Cell]) -> Iterator[None]:
        """Holds the folder, and clears away what killed runs were writing.

        Raises:
            ValueError: if another run is in it.
        """
        with alone(self.path, self.processes, "evaluation"):
            if self.processes.first:
                for cell in cells:
                    if self.record(cell).exists():
                        self.batches(cell.key, 0).delete()
            self.processes.barrier()
            yield

    def batches(self, name: str, num_images: int) -> Shards:
        """The batches of an unfinished cell by its key, or of the reference."""
        return Shards(Place(self.path / "partial" / name), num_images, self.batch_size)

    def record(self, cell: Cell) -> Path:
        """The file of a finished cell."""
        return self.path / "cells" / f"{cell.key}.json"

    def write_record(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Writes the file that says that a cell is finished."""
        self.record(cell).parent.mkdir(exist_ok=True)
        write_json(self.record(cell), values)

    def records(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """What is known of the finished ones of the cells."""
        paths = filter(Path.exists, map(self.record, cells))
        return [json.loads(path.read_text()) for path in paths]

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json and, in Markdown, results.md."""
        write_json(self.path / "results.json", results)
        text = to_markdown(results).encode()
        write_whole(self.path / "results.md", lambda file: file.write(text))
