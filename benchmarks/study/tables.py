"""The study's tables as markdown, shaped like the paper's, from the published results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.tables import table
from odelt_fast.evaluation import paper
from odelt_fast.evaluation.paper import STEPS
from odelt_fast.evaluation.results import number

from .runs import BY_NAME, RUNS, Run

METHODS = {  # rows of Table 2, and what they are called in `paper`
    "diffusion": "reference: diffusion",
    "flow": "reference: RFM",
    "progressive": "reference: progressive distillation",
    "reflow": "reference: Reflow",
    "consistency": "reference: consistency training",
    "live-reflow": "reference: live Reflow",
    "shortcut": "reference: shortcut",
}
# Methods under the length dial beside `odelt`, and one change of mean-flow or alpha-flow each.
DIALS = ("odelt-live", "mean-flow", "mean-flow-time", "alpha-flow")
_OF = {"mf": "mean-flow", "af": "alpha-flow"}
CHANGES = {run.name: of for run in RUNS if (of := _OF.get(run.name.partition("-")[0]))}
_PAIR_STEPS = 128  # Euler steps that make a pair
_OF_TABLE_3 = (("odelt", "euler"), ("odelt-flow", "dopri5"))
_GROUPS = {"G = 1": "g1", "G = 2": "g2", "G = 4": "odelt"}
_LENGTHS = {"K = 0": "k0", "K = 1/8": "odelt", "K = 1/4": "k4"}
_T = " | ".join(f"T = {steps}" for steps in STEPS)
_AT_T = ", ".join(map(str, STEPS))
Results = Mapping[str, Any]
Found = Mapping[str, Results]
Row = Sequence[object]


def tables(found: Found) -> dict[str, str]:
    """Every table that the results are enough for, by the name of its place."""
    study = found["study"]
    real, machine = study["real"], study["machine"]
    made: dict[str, str] = {}
    for name, (needed, make) in _OF_RUNS.items():
        if needed <= found.keys():
            made[name] = make(found)
    for name in ("odelt", "odelt-flow", "bundled-digits", "mnist"):
        if name in found:
            made[name] = _everything(found[name], real.get("mnist" if name == "mnist" else "data"))
    if study["training"]:
        made["training"] = _training(study)
    made = {name: f"{text}\n" for name, text in made.items()}
    if costs := study.get("training_machine"):
        made["training-machine"] = (
            f"Time and memory of a step: {costs['device']}, 1 thread, torch {costs['torch']},"
            " float32."
        )
    if machine:
        made["machine"] = (
            f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, float32;"
            f" other programs' load on the machine: {machine['load']:.1f}."
        )
    return made


def _cells(results: Results) -> dict[tuple[int, str, float], Results]:
    """(depth, solver, T or tolerance) -> row."""
    return {(row["depth"], row["solver"], _setting(row)): row for row in results["rows"]}


def _setting(row: Results) -> float:
    """T or tolerance."""
    return float(row["steps"] or row["tolerance"])


def _at_steps(results: Results, depth: int) -> list[Results]:
    """The rows of Euler's solver at T = 128, 4, 1."""
    cells = _cells(results)
    return [cells[depth, "euler", steps] for steps in STEPS]


def _metric(results: Results) -> str:
    return str(next(iter(results["rows"][0]["metrics"])))


def _mean(row: Results, metric: str) -> float:
    return float(row["metrics"][metric]["mean"])


def _distance(row: Results) -> str:
    return number(next(iter(row["metrics"].values())))


def _share(row: Results) -> str:
    return _percent(_mean(row, "recognised"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _recall(row: Results) -> str:
    return f"{_mean(row, 'recall'):.2f}"


def _seconds(row: Results) -> str:
    return "" if row["latency"] is None else f"{row['latency']:.3g}"


def _listed(values: Iterable[str | float]) -> str:
    return ", ".join(value if isinstance(value, str) else f"{value:g}" for value in values)


def _rows_of_methods(found: Found) -> list[tuple[str, str, list[Results], str]]:
    """(run, title, its rows at T = 128, 4, 1, the paper's FIDs there) for the rows of Table 2."""
    rows = [(name, BY_NAME[name].title, 12, of) for name, of in METHODS.items() if name in found]
    rows += [
        (name, f"{BY_NAME[name].title}, l = {depth}", depth, f"l = {depth}" * (name == "odelt"))
        for name in ("odelt", *DIALS)
        if name in found
        for depth in (12, 8, 4)
    ]
    return [
        (name, title, _at_steps(found[name], depth), _listed(paper.TABLE_2.get(of, ())))
        for name, title, depth, of in rows
    ]


def _methods(found: Found) -> str:
    metric, real = _metric(found["odelt"]), found["study"]["real"].get("data")
    shares = f"recognised at {_AT_T} | recall at {_AT_T} | the paper's FID at {_AT_T}"
    body: list[Row] = []
    for name, title, mine, theirs in _rows_of_methods(found):
        stages = 2 if BY_NAME[name].teacher else 1
        quality = (_listed(map(show, mine)) for show in (_share, _recall))
        body.append((title, stages, *map(_distance, mine), *quality, theirs))
    if real:
        distance, share = f"{real[metric]:.3f}", _percent(real["recognised"])
        body.append(("real images, half against half", "", distance, "", "", share, "", ""))
    return table(f"{metric} | stages | {_T} | {shares}", body)


def _main(found: Found) -> str:
    metric = _metric(found["odelt"])
    body = [
        (title, *(f"{_mean(row, metric):.2f}, {_recall(row)}" for row in mine))
        for name, title, mine, _ in _rows_of_methods(found)
        if name in (*METHODS, "odelt", "mean-flow") and not title.endswith("l = 8")
    ]
    return table(f"distance, recall | {_T}", body)


def _guided(found: Found) -> str:
    plain, guided = found["odelt"], found["odelt-guided"]
    head = (
        f"{_metric(plain)} | 128 steps | recognised, recall | 64 steps of two passes,"
        f" w = {guided['settings']['guidance_scale']:g} | recognised, recall"
        " | seconds a batch, both"
    )
    body = []
    for depth in (12, 8, 4):
        rows = [_cells(results)[depth, "euler", 128] for results in (plain, guided)]
        first, second = ((_distance(row), f"{_share(row)}, {_recall(row)}") for row in rows)
        body.append((f"l = {depth}", *first, *second, _listed(map(_seconds, rows))))
    return table(head, body)


def _solvers(found: Found) -> str:
    """Table 3: the shortcut model, then the shortcuts in equal steps and the flow in Dopri5's."""
    head = (
        f" | weights | solver | T or tol | passes | {_metric(found['odelt'])} | recognised"
        " | seconds a batch | the paper's FID, seconds"
    )
    body: list[Row] = []
    parameters = found["study"]["parameters"]

    def add(name: str, title: str, depth: int, solver: str, *values: float) -> None:
        weights = f"{parameters[str(depth)] / parameters['12']:.2f}x" if parameters else ""
        for at in values:
            row = _cells(found[name])[depth, solver, at]
            theirs = _listed(paper.TABLE_3.get((depth, solver, at), ())[:2])
            cost = (title, weights, solver, f"{at:g}", f"{row['evaluations']:.4g}")
            shown = _distance(row), _share(row), _seconds(row)
            body.append((*cost, *shown, theirs if (name, solver) in _OF_TABLE_3 else ""))

    add("shortcut", "shortcut (SM)", 12, "euler", 128, 4)
    for depth in (12, 8, 4):
        for name, title, steps in (
            ("odelt", "ODE_T(ODE_l), shortcuts", (128, 64, 32, 4)),
            ("odelt-flow", "ODE_t(ODE_l), RFM", (128, 32)),
        ):
            add(name, f"{title}, l = {depth}", depth, "euler", *steps)
            add(name, f"{title}, l = {depth}", depth, "dopri5", 1e-4, 1e-2)
    return table(head, body)


def _ablation(runs: Mapping[str, str], theirs: Mapping[Any, Sequence[float]], found: Found) -> str:
    """Tables 4 and 5. A cell: the mean over training seeds, then each of them.

    Args:
        runs: the values' labels and their runs.
        theirs: the paper's FIDs, of all runs at l = 8, then at l = 4.
    """
    fids = [*map(_listed, theirs.values())]
    metric = _metric(found["odelt"])
    head = f"{metric} | {_T} | recognised at {_AT_T} | the paper's FID at {_AT_T}"
    body: list[Row] = []
    for depth in (8, 4):
        for label, run in runs.items():
            names = (run, *(each.name for each in RUNS if each.repeats == run))
            seeds = [_at_steps(found[name], depth) for name in names if name in found]
            at_steps = list(zip(*seeds))
            shares = (fmean(_mean(row, "recognised") for row in rows) for rows in at_steps)
            quality = (_over_seeds(rows, metric) for rows in at_steps)
            shown = _listed(map(_percent, shares)), fids[len(body)]
            body.append((f"l = {depth}, {label}", *quality, *shown))
    return table(head, body)


def _few_steps(found: Found) -> str:
    """Methods under the length dial and changes of two of them, at few steps. A cell: the mean over
    training seeds, then each of them."""
    metric = _metric(found["odelt"])
    shares, costs = "recognised, recall at T = 1", found["study"]["training"]
    head = f"{metric} | l | T = 128 | T = 4 | T = 2 | T = 1 | {shares} | a step's time, memory"
    body: list[Row] = []
    for name in ("odelt", *DIALS, *CHANGES):
        seeds = [
            found[each.name]
            for each in RUNS
            if name in (each.name, each.repeats) and each.name in found
        ]
        for depth in (12, 8, 4) if seeds else ():
            cells = [_cells(results) for results in seeds]
            at_steps = [
                [rows[depth, "euler", steps] for rows in cells if (depth, "euler", steps) in rows]
                for steps in (128, 4, 2, 1)
            ]
            recognised, recall = (
                fmean(_mean(row, each) for row in at_steps[-1]) for each in ("recognised", "recall")
            )
            shown = f"{_percent(recognised)}, {recall:.2f}", _cost(costs, name)
            title = _title(BY_NAME[name])
            body.append((title, depth, *(_over_seeds(rows, metric) for rows in at_steps), *shown))
    return table(head, body)


def _title(run: Run) -> str:
    """With the method that it changes, if it does."""
    return f"{CHANGES[run.name]}, {run.title}" if run.name in CHANGES else run.title


def _cost(costs: Results, name: str) -> str:
    """Of a training step: time over that of `odelt`, and peak memory."""
    if name not in costs or "peak_bytes" not in costs[name]:
        return ""
    ratio = costs[name]["seconds"] / costs[name]["odelt_seconds"]
    return f"{ratio:.2f}x, {_memory(costs[name])}"


def _memory(cost: Results) -> str:
    return f"{cost['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in cost else ""


def _over_seeds(rows: Sequence[Results], metric: str) -> str:
    if len(rows) == 1:
        return _distance(rows[0])
    means = [_mean(row, metric) for row in rows]
    return f"{fmean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})"


_OF_RUNS: dict[str, tuple[set[str], Callable[[Found], str]]] = {
    "methods": ({"odelt", "flow", "shortcut"}, _methods),
    "main": ({"odelt", "flow", "shortcut"}, _main),
    "solvers": ({"odelt", "odelt-flow", "shortcut"}, _solvers),
    "guided": ({"odelt", "odelt-guided"}, _guided),
    "few-steps": ({"odelt", "mean-flow"}, _few_steps),
    "groups": (set(_GROUPS.values()), partial(_ablation, _GROUPS, paper.TABLE_4)),
    "lengths": (set(_LENGTHS.values()), partial(_ablation, _LENGTHS, paper.TABLE_5)),
}


def _everything(results: Results, real: Mapping[str, float] | None) -> str:
    """All metrics of all rows of one evaluation."""
    names = list(results["rows"][0]["metrics"])
    body: list[Row] = []
    for row in results["rows"]:
        quality = [number(row["metrics"][name]) for name in names]
        cost = f"{row['evaluations']:.4g}", _seconds(row)
        body.append((row["depth"], row["solver"], f"{_setting(row):g}", *quality, *cost))
    if real:
        quality = [f"{real[name]:.4g}" if name in real else "" for name in names]
        body.append(("real", "", "", *quality, "", ""))
    head = f"l | solver | T or tol | {' | '.join(names)} | passes | seconds a batch"
    return table(head, body)


def _training(study: Results) -> str:
    """What each method costs with its teacher and its pairs.

    Passes: of one image through all twelve blocks, in millions.
    """
    head = (
        " | steps | images learnt from | passes, forward and back | passes for targets"
        " | CPU minutes | a step's memory"
    )
    body: list[Row] = []
    budget, costs = study["budget"], study["training"]
    for run in RUNS:
        if not run.depths or run.name not in costs:
            continue
        stages = [BY_NAME[run.teacher], run] if run.teacher else [run]
        cost = [costs[each.name] for each in stages]
        steps = [int(budget["steps"] * each.share) for each in stages]
        images = [each["batch"] * count for count, each in zip(steps, cost)]
        learnt, targets = (
            f"{sum(count * each[kind] for count, each in zip(images, cost)) / 1e6:.2f}"
            for kind in ("learnt", "targets")
        )
        minutes = f"{sum(count * each['seconds'] for count, each in zip(steps, cost)) / 60:.1f}"
        if run.needs_pairs:
            targets += f" + {_PAIR_STEPS * budget['pairs'] / 1e6:.2f} for pairs"
            minutes += " + pairs"
        count, memory = " + ".join(map(str, steps)), _memory(costs[run.name])
        body.append((_title(run), count, sum(images), learnt, targets, minutes, memory))
    return table(head, body)
