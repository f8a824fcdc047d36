"""The study's numbers: every evaluation as JSON, and the tables in the documents.

A table stands in a document between `<!-- table SET NAME -->` and `<!-- end -->`; what stands there
is replaced. The documents can be written again from the JSON alone: `write_tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Record, write_json, write_text

from .campaign import Study
from .figures import draw
from .latency import latency_of
from .tables import Results, tables

_TIMES = ("machine", "latency", "parameters", "training", "training_machine")
_NO_TIMES: Record = {name: {} for name in _TIMES}


def report(study: Study) -> None:
    """Writes everything that the finished evaluations are enough for. What the study's folder has
    not measured stays as it was published."""
    times, costs, real = (
        _read(study.out / f"{name}.json") for name in ("latency", "costs", "real")
    )
    folder = study.options.results / f"study-{study.options.set}"  # of the committed numbers
    before = _read(folder / "study.json")
    times = _NO_TIMES | {name: before[name] for name in _NO_TIMES if name in before} | times
    for name, results in study.results().items():
        write_json(folder / f"{name}.json", published(name, results, times["latency"]))
    if costs:
        known = before.get("training_machine", {})
        same = all(known.get(name) == costs["machine"][name] for name in ("device", "torch"))
        training = before["training"] if same else {}  # what another machine takes says nothing
        times |= {
            "training": training | costs["training"],
            "training_machine": costs["machine"],
        }
    budget = {**vars(study.budget), "data": Path(study.budget.data).name}
    real = before.get("real", {}) | real
    content = {"set": study.options.set, "budget": budget, "real": real, **times}
    write_json(folder / "study.json", content)
    write_tables(study.options.documents, folder)
    draw(study, folder, read_published(folder).get("odelt"))


def _read(path: Path) -> Record:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def published(name: str, results: Results, latency: Record) -> Record:
    """An evaluation as it is committed.

    Latencies are those of the latency stage (None until it ran), and no path of this machine stays.
    """
    kept = dict(json.loads(json.dumps(results)))
    for key in ("model", "data"):
        if value := kept["settings"][key]:
            kept["settings"][key] = Path(value).name
    for row in kept["rows"]:
        row["latency"] = latency_of(latency, name, row)
        row["peak_memory"] = None  # of a process on a CPU: says little at this size
    return kept


def read_published(folder: Path) -> dict[str, Record]:
    """The committed results by name.

    "study" has the budget, the latencies' machine and what training costs.
    """
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def write_tables(documents: Sequence[Path], folder: Path) -> None:
    """Writes the tables of the results in `folder` wherever the documents have a place for them.

    Raises:
        ValueError: for a place that no table belongs to: its name is wrong, or its results are
            missing.
    """
    found = read_published(folder)
    made, data = tables(found), found["study"]["set"]
    for document in documents:
        text = document.read_text()
        for name in re.findall(rf"<!-- table {data} (\S+) -->", text):
            if name not in made:
                raise ValueError(
                    f"{document} has a place for the table {name!r}; there are results for"
                    f" {', '.join(map(repr, made))}"
                )
            first, last = f"<!-- table {data} {name} -->\n", "<!-- end -->"
            before, *rest = text.split(first)
            if len(rest) != 1 or last not in rest[0]:
                raise ValueError(
                    f"{document}: the place of the table {name!r} must stand there once and end"
                    f" with {last}"
                )
            text = f"{before}{first}\n{made[name]}\n{last}{rest[0].partition(last)[2]}"
        write_text(document, text)
