"""The study's numbers: every evaluation as JSON, and the tables of the documents, shaped like the
paper's.

A table stands in a document between `<!-- table SET NAME -->` and `<!-- end -->`; what stands there
is replaced. The documents can be written again from the JSON alone: `write_tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import write_json
from benchmarks.study.latency import latency_of
from benchmarks.study.runs import BY_NAME, RUNS
from odelt_fast.evaluation import paper
from odelt_fast.evaluation.results import number
from odelt_fast.files import write_whole

if TYPE_CHECKING:
    from benchmarks.study.study import Study

STEPS = (128, 4, 1)
METHODS = {  # rows of Table 2, and what they are called in `paper`
    "diffusion": "reference: diffusion",
    "flow": "reference: RFM",
    "progressive": "reference: progressive distillation",
    "reflow": "reference: Reflow",
    "consistency": "reference: consistency training",
    "live-reflow": "reference: live Reflow",
    "shortcut": "reference: shortcut",
}
_PAIR_STEPS = 128  # Euler steps that make a pair
_OF_TABLE_3 = (("odelt", "euler"), ("odelt-flow", "dopri5"))
Results = Mapping[str, Any]
_NO_TIMES: dict[str, Any] = {"machine": {}, "latency": {}, "training": {}, "parameters": {}}


def report(study: Study) -> None:
    """Writes everything that the finished evaluations are enough for."""
    from benchmarks.study.figures import draw

    times, real = (_read(study.out / name) for name in ("latency.json", "real.json"))
    folder = results_folder(study)
    for name, results in study.results().items():
        write_json(folder / f"{name}.json", published(name, results, times.get("latency", {})))
    budget = {**vars(study.budget), "data": Path(study.budget.data).name}
    write_json(
        folder / "study.json",
        {"set": study.options.set, "budget": budget, "real": real, **_NO_TIMES, **times},
    )
    write_tables(study.options.documents, folder)
    draw(study, folder)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def results_folder(study: Study) -> Path:
    """Where the committed numbers are."""
    return study.options.results / f"study-{study.options.set}"


def published(name: str, results: Results, latency: dict[str, Any]) -> dict[str, Any]:
    """An evaluation as it is committed: latencies of the latency stage (None until it ran), and no
    paths of this machine."""
    kept = json.loads(json.dumps(results))
    kept["settings"] |= {
        key: Path(value).name for key in ("model", "data") if (value := kept["settings"][key])
    }
    for row in kept["rows"]:
        row["latency"] = latency_of(latency, name, row)
        row["peak_memory"] = None  # of a process on a CPU: says little at this size
    return dict(kept)


def read_published(folder: Path) -> dict[str, dict[str, Any]]:
    """The committed results by name; "study" has the budget, the latencies' machine and what
    training costs."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def write_tables(documents: Sequence[Path], folder: Path) -> None:
    """Writes the tables of the results in `folder` wherever the documents have a place for them.

    Raises ValueError for a place that no table belongs to: its name is wrong, or its results are
    missing.
    """
    found = read_published(folder)
    sets, made = found["study"]["set"], tables(found)
    for document in documents:
        text = document.read_text()
        for name in re.findall(rf"<!-- table {sets} (\S+) -->", text):
            if name not in made:
                raise ValueError(
                    f"{document} has a place for the table {name!r}; there are results for"
                    f" {', '.join(map(repr, made))}"
                )
            place = re.compile(rf"(<!-- table {sets} {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text, count = place.subn(
                lambda match, table=made[name]: f"{match[1]}\n{table}\n{match[2]}", text
            )  # type: ignore[misc]
            if count != 1:
                raise ValueError(
                    f"{document}: the place of the table {name!r} must stand there once and end"
                    " with <!-- end -->"
                )
        write_whole(document, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def tables(found: Mapping[str, Results]) -> dict[str, str]:
    """Every table that the results are enough for, by the name of its place."""
    study = found["study"]
    made: dict[str, str] = {}
    if {"odelt", "flow", "shortcut"} <= set(found):
        made |= {"methods": _methods(found, study), "main": _main(found)}
    if {"odelt", "odelt-flow", "shortcut"} <= set(found):
        made["solvers"] = _solvers(found, study["parameters"])
    if {"odelt", "odelt-guided"} <= set(found):
        made["guided"] = _guided(found)
    for name, runs, theirs in (
        ("groups", {"G = 1": "g1", "G = 2": "g2", "G = 4": "odelt"}, paper.TABLE_4),
        ("lengths", {"K = 0": "k0", "K = 1/8": "odelt", "K = 1/4": "k4"}, paper.TABLE_5),
    ):
        if set(runs.values()) <= set(found):
            made[name] = _ablation(
                {label: _seeds(found, run) for label, run in runs.items()}, theirs
            )
    for name in ("odelt", "odelt-flow", "bundled-digits", "mnist"):
        if name in found:
            made[name] = _everything(
                found[name],
                study["real"].get(name, study["real"].get("data") if name != "mnist" else None),
            )
    if study["training"]:
        made["training"] = _training(study)
    if study["machine"]:
        machine = study["machine"]
        busy = f"other programs' load on the machine: {machine['load']:.1f}"
        made["machine"] = (
            f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, float32;"
            f" {busy}."
        )
    return made


def _cells(results: Results) -> dict[tuple[int, str, int | float], Results]:
    """(depth, solver, T or tolerance) -> row."""
    return {
        (
            row["depth"],
            row["solver"],
            row["tolerance"] if row["steps"] is None else row["steps"],
        ): row
        for row in results["rows"]
    }


def _metric(results: Results) -> str:
    return str(next(iter(results["rows"][0]["metrics"])))


def _distance(row: Results) -> str:
    return number(next(iter(row["metrics"].values())))


def _share(row: Results) -> str:
    return f"{100 * row['metrics']['recognised']['mean']:.1f} %"


def _recall(row: Results) -> str:
    return f"{row['metrics']['recall']['mean']:.2f}"


def _seconds(row: Results) -> str:
    return "" if row["latency"] is None else f"{row['latency']:.3g}"


def _rows_of_methods(found: Mapping[str, Results]) -> list[tuple[str, str, int, tuple[float, ...]]]:
    """(run, title, depth, the paper's FID at T = 128, 4, 1) for the rows of Table 2."""
    rows = [
        (name, BY_NAME[name].title, 12, paper.TABLE_2[of][0])
        for name, of in METHODS.items()
        if name in found
    ]
    return rows + [
        ("odelt", f"ODE_t(ODE_l), l = {depth}", depth, paper.TABLE_2[f"l = {depth}"][0])
        for depth in (12, 8, 4)
    ]


def _methods(found: Mapping[str, Results], study: Results) -> str:
    metric = _metric(found["odelt"])
    shares = ("recognised at 128, 4, 1", "recall at 128, 4, 1")
    head = [
        metric,
        "stages",
        *(f"T = {steps}" for steps in STEPS),
        *shares,
        "the paper's FID at 128, 4, 1",
    ]
    body = []
    for name, title, depth, theirs in _rows_of_methods(found):
        mine = [_cells(found[name])[depth, "euler", steps] for steps in STEPS]
        stages, numbers = (
            2 if BY_NAME[name].teacher else 1,
            ", ".join(f"{value:g}" for value in theirs),
        )
        body.append(
            [
                title,
                stages,
                *map(_distance, mine),
                ", ".join(map(_share, mine)),
                ", ".join(map(_recall, mine)),
                numbers,
            ]
        )
    if real := study["real"].get("data"):
        body.append(
            [
                "real images, half against half",
                "",
                f"{real[metric]:.3f}",
                "",
                "",
                f"{100 * real['recognised']:.1f} %",
                "",
                "",
            ]
        )
    return _markdown(head, body)


def _main(found: Mapping[str, Results]) -> str:
    body = []
    for name, title, depth, _ in _rows_of_methods(found):
        mine = [_cells(found[name])[depth, "euler", steps] for steps in STEPS]
        body.append(
            [
                title,
                *(
                    f"{row['metrics'][_metric(found['odelt'])]['mean']:.2f}, {_recall(row)}"
                    for row in mine
                ),
            ]
        )
    return _markdown(["distance, recall", *(f"T = {steps}" for steps in STEPS)], body)


def _guided(found: Mapping[str, Results]) -> str:
    plain, guided = _cells(found["odelt"]), _cells(found["odelt-guided"])
    scale = found["odelt-guided"]["settings"]["guidance_scale"]
    guided_head = (
        f"64 steps of two passes, w = {scale:g}",
        "recognised, recall",
        "seconds a batch, both",
    )
    head = [_metric(found["odelt"]), "128 steps", "recognised, recall", *guided_head]
    body = []
    for depth in (12, 8, 4):
        a, b = (cells[depth, "euler", 128] for cells in (plain, guided))
        first, second = ((_distance(row), f"{_share(row)}, {_recall(row)}") for row in (a, b))
        body.append([f"l = {depth}", *first, *second, f"{_seconds(a)}, {_seconds(b)}"])
    return _markdown(head, body)


def _solvers(found: Mapping[str, Results], parameters: Mapping[str, int]) -> str:
    """Table 3: the shortcut model, then at each l the shortcuts in equal steps and the flow in
    steps of Dopri5's choice."""
    cost = ("weights", "solver", "T or tol", "passes")
    head = [
        "",
        *cost,
        _metric(found["odelt"]),
        "recognised",
        "seconds a batch",
        "the paper's FID, seconds",
    ]
    body = []

    def add(name: str, title: str, depth: int, solver: str, values: Sequence[float]) -> None:
        for at in values:
            row = _cells(found[name])[depth, solver, at]
            weights = f"{parameters[str(depth)] / parameters['12']:.2f}x" if parameters else ""
            theirs = (
                paper.TABLE_3.get((depth, solver, at)) if (name, solver) in _OF_TABLE_3 else None
            )
            numbers = f"{theirs[0]:g}, {theirs[1]:g}" if theirs else ""
            measured = [
                f"{row['evaluations']:.4g}",
                _distance(row),
                _share(row),
                _seconds(row),
                numbers,
            ]
            body.append([title, weights, solver, f"{at:g}", *measured])

    add("shortcut", "shortcut (SM)", 12, "euler", (128, 4))
    for depth in (12, 8, 4):
        add("odelt", f"ODE_T(ODE_l), shortcuts, l = {depth}", depth, "euler", (128, 64, 32, 4))
        add("odelt", f"ODE_T(ODE_l), shortcuts, l = {depth}", depth, "dopri5", (1e-4, 1e-2))
        add("odelt-flow", f"ODE_t(ODE_l), RFM, l = {depth}", depth, "euler", (128, 32))
        add("odelt-flow", f"ODE_t(ODE_l), RFM, l = {depth}", depth, "dopri5", (1e-4, 1e-2))
    return _markdown(head, body)


def _seeds(found: Mapping[str, Results], run: str) -> list[Results]:
    """The run's evaluations, of all its training seeds."""
    return [
        found[name]
        for name in (run, *(each.name for each in RUNS if each.repeats == run))
        if name in found
    ]


def _ablation(
    found: Mapping[str, Sequence[Results]], theirs: Mapping[tuple[int, float], Sequence[float]]
) -> str:
    """Tables 4 and 5. A cell: the mean over training seeds, then each of them."""
    metric = _metric(next(iter(found.values()))[0])
    head = [
        metric,
        *(f"T = {steps}" for steps in STEPS),
        "recognised at 128, 4, 1",
        "the paper's FID at 128, 4, 1",
    ]
    values = list(dict.fromkeys(value for _, value in theirs))
    body = []
    for depth in (8, 4):
        for (label, seeds), value in zip(found.items(), values):
            rows = [
                [_cells(results)[depth, "euler", steps] for results in seeds] for steps in STEPS
            ]
            shares = ", ".join(
                f"{100 * _mean(row['metrics']['recognised']['mean'] for row in each):.1f} %"
                for each in rows
            )
            numbers = ", ".join(f"{fid:g}" for fid in theirs[depth, value])
            body.append(
                [
                    f"l = {depth}, {label}",
                    *(_over_seeds(each, metric) for each in rows),
                    shares,
                    numbers,
                ]
            )
    return _markdown(head, body)


def _over_seeds(rows: Sequence[Results], metric: str) -> str:
    if len(rows) == 1:
        return _distance(rows[0])
    means = [row["metrics"][metric]["mean"] for row in rows]
    return f"{_mean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})"


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _everything(results: Results, real: Mapping[str, float] | None) -> str:
    """All metrics of all rows of one evaluation."""
    names = list(results["rows"][0]["metrics"])
    head = ["l", "solver", "T or tol", *names, "passes", "seconds a batch"]
    body: list[list[object]] = []
    for row in results["rows"]:
        at = row["steps"] if row["steps"] is not None else row["tolerance"]
        quality = [number(row["metrics"][name]) for name in names]
        body.append(
            [
                row["depth"],
                row["solver"],
                f"{at:g}",
                *quality,
                f"{row['evaluations']:.4g}",
                _seconds(row),
            ]
        )
    if real:
        body.append(
            [
                "real",
                "",
                "",
                *(f"{real[name]:.4g}" if name in real else "" for name in names),
                "",
                "",
            ]
        )
    return _markdown(head, body)


def _training(study: Results) -> str:
    """What each method costs with its teacher and its pairs. Passes: of one image through all
    twelve blocks, in millions."""
    head = [
        "",
        "steps",
        "images learnt from",
        "passes, forward and back",
        "passes for targets",
        "CPU minutes",
    ]
    body, budget, costs = [], study["budget"], study["training"]
    for run in RUNS:
        if not run.depths or run.name not in costs:
            continue
        stages = [*([BY_NAME[run.teacher]] if run.teacher else []), run]
        steps = [int(budget["steps"] * each.share) for each in stages]
        images = [costs[each.name]["batch"] * count for count, each in zip(steps, stages)]
        learnt, targets = (
            sum(n * costs[each.name][kind] for n, each in zip(images, stages)) / 1e6
            for kind in ("learnt", "targets")
        )
        pairs = _PAIR_STEPS * budget["pairs"] / 1e6 if run.needs_pairs else 0.0
        minutes = (
            sum(count * costs[each.name]["seconds"] for count, each in zip(steps, stages)) / 60
        )
        passes = [
            f"{learnt:.2f}",
            f"{targets:.2f}" + (f" + {pairs:.2f} for pairs" if pairs else ""),
        ]
        body.append(
            [
                run.title,
                " + ".join(map(str, steps)),
                sum(images),
                *passes,
                f"{minutes:.1f}" + (" + pairs" if pairs else ""),
            ]
        )
    return _markdown(head, body)


def _markdown(head: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    return (
        "\n".join(
            "| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *body)
        )
        + "\n"
    )
