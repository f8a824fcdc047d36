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

from .batch_files import BatchFiles
from .cells import Cell
from .measuring import Processes
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
        bound, path = json.loads(json.dumps(bound)), self.path / "settings.json"
        if self.processes.index == 0 and not path.exists():
            write_json(path, bound)
        self.processes.barrier()
        try:
            there = json.loads(path.read_text())
        except (OSError, ValueError):
            raise ValueError(f"{path} is damaged: name another --out") from None
        for name in bound:
            if there.get(name) != bound[name]:
                raise ValueError(
                    f"{self.path} holds an evaluation with {name} {there.get(name)!r}, not"
                    f" {bound[name]!r}: name another --out"
                )

    @contextlib.contextmanager
    def alone(self, cells: Iterable[Cell]) -> Iterator[None]:
        """Holds the folder, and clears away what killed runs were writing.

        Raises:
            ValueError: if another run is in it.
        """
        import fcntl

        with (self.path / ".lock").open("w") as lock:
            if self.processes.index == 0:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"another evaluation is running in {self.path}: name another --out"
                    ) from None
                for path in self.path.rglob(".odelt-fast-*"):
                    path.unlink(missing_ok=True)
                for cell in cells:
                    if self.record(cell).exists():
                        self.batches(cell.key, 0).delete()
            self.processes.barrier()
            yield

    def batches(self, name: str, num_images: int) -> BatchFiles:
        """The batches of an unfinished cell by its key, or of the reference."""
        return BatchFiles(self.path / "partial" / name, num_images, self.batch_size)

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
