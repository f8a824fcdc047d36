"""The study's tables as markdown, shaped like the paper's, from the published results alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.study.runs import BY_NAME, RUNS
from benchmarks.tables import table
from odelt_fast.evaluation import paper
from odelt_fast.evaluation.paper import STEPS
from odelt_fast.evaluation.results import number

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
_T = tuple(f"T = {steps}" for steps in STEPS)
_AT_T = ", ".join(map(str, STEPS[:-1])) + f", {STEPS[-1]}"
Results = Mapping[str, Any]
Row = Sequence[object]


def tables(found: Mapping[str, Results]) -> dict[str, str]:
    """Every table that the results are enough for, by the name of its place."""
    study = found["study"]
    real, machine = study["real"], study["machine"]
    made: dict[str, str] = {}
    if {"odelt", "flow", "shortcut"} <= set(found):
        made |= {"methods": _methods(found, real.get("data")), "main": _main(found)}
    if {"odelt", "odelt-flow", "shortcut"} <= set(found):
        made["solvers"] = _solvers(found, study["parameters"])
    if {"odelt", "odelt-guided"} <= set(found):
        made["guided"] = _guided(found)
    groups = {"G = 1": "g1", "G = 2": "g2", "G = 4": "odelt"}
    if set(groups.values()) <= set(found):
        made["groups"] = _ablation(found, groups, list(paper.TABLE_4.values()))
    lengths = {"K = 0": "k0", "K = 1/8": "odelt", "K = 1/4": "k4"}
    if set(lengths.values()) <= set(found):
        made["lengths"] = _ablation(found, lengths, list(paper.TABLE_5.values()))
    for name in ("odelt", "odelt-flow", "bundled-digits", "mnist"):
        if name in found:
            data = None if name == "mnist" else real.get("data")
            made[name] = _everything(found[name], real.get(name, data))
    if study["training"]:
        made["training"] = _training(study)
    if machine:
        made["machine"] = (
            f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, float32;"
            f" other programs' load on the machine: {machine['load']:.1f}."
        )
    return made


def _markdown(head: Row, body: Iterable[Row]) -> str:
    return table(head, body) + "\n"


def _cells(results: Results) -> dict[tuple[int, str, float], Results]:
    """(depth, solver, T or tolerance) -> row."""
    return {(row["depth"], row["solver"], _setting(row)): row for row in results["rows"]}


def _setting(row: Results) -> float:
    """T or tolerance."""
    return float(row["tolerance"] if row["steps"] is None else row["steps"])


def _at_steps(results: Results, depth: int) -> list[Results]:
    """The rows of Euler's solver at T = 128, 4, 1."""
    cells = _cells(results)
    return [cells[depth, "euler", steps] for steps in STEPS]


def _metric(results: Results) -> str:
    return str(next(iter(results["rows"][0]["metrics"])))


def _distance(row: Results) -> str:
    return number(next(iter(row["metrics"].values())))


def _share(row: Results) -> str:
    return _percent(row["metrics"]["recognised"]["mean"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _recall(row: Results) -> str:
    return f"{row['metrics']['recall']['mean']:.2f}"


def _seconds(row: Results) -> str:
    return "" if row["latency"] is None else f"{row['latency']:.3g}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(
        f"{value:g}" if isinstance(value, float | int) else str(value) for value in values
    )


def _rows_of_methods(found: Mapping[str, Results]) -> list[tuple[str, str, list[Results], str]]:
    """(run, title, its rows at T = 128, 4, 1, the paper's FIDs there) for the rows of Table 2."""
    rows = [(name, BY_NAME[name].title, 12, of) for name, of in METHODS.items() if name in found]
    rows += [("odelt", f"ODE_t(ODE_l), l = {depth}", depth, f"l = {depth}") for depth in (12, 8, 4)]
    return [
        (name, title, _at_steps(found[name], depth), _listed(paper.TABLE_2[of][0]))
        for name, title, depth, of in rows
    ]


def _methods(found: Mapping[str, Results], real: Results | None) -> str:
    metric = _metric(found["odelt"])
    shares = (f"recognised at {_AT_T}", f"recall at {_AT_T}", f"the paper's FID at {_AT_T}")
    body: list[Row] = []
    for name, title, mine, theirs in _rows_of_methods(found):
        stages = 2 if BY_NAME[name].teacher else 1
        quality = (_listed(map(show, mine)) for show in (_share, _recall))
        body.append((title, stages, *map(_distance, mine), *quality, theirs))
    if real:
        share = _percent(real["recognised"])
        title = "real images, half against half"
        body.append((title, "", f"{real[metric]:.3f}", "", "", share, "", ""))
    return _markdown((metric, "stages", *_T, *shares), body)


def _main(found: Mapping[str, Results]) -> str:
    metric = _metric(found["odelt"])
    body = [
        (title, *(f"{row['metrics'][metric]['mean']:.2f}, {_recall(row)}" for row in mine))
        for _, title, mine, _ in _rows_of_methods(found)
    ]
    return _markdown(("distance, recall", *_T), body)


def _guided(found: Mapping[str, Results]) -> str:
    plain, guided = _cells(found["odelt"]), _cells(found["odelt-guided"])
    scale = found["odelt-guided"]["settings"]["guidance_scale"]
    quality = "recognised, recall"
    passes = f"64 steps of two passes, w = {scale:g}"
    head = (_metric(found["odelt"]), "128 steps", quality, passes, quality, "seconds a batch, both")
    body = []
    for depth in (12, 8, 4):
        rows = [cells[depth, "euler", 128] for cells in (plain, guided)]
        shown = [(_distance(row), f"{_share(row)}, {_recall(row)}") for row in rows]
        body.append((f"l = {depth}", *shown[0], *shown[1], _listed(map(_seconds, rows))))
    return _markdown(head, body)


def _solvers(found: Mapping[str, Results], parameters: Mapping[str, int]) -> str:
    """Table 3: the shortcut model, then the shortcuts in equal steps and the flow in Dopri5's."""
    head = (
        *("", "weights", "solver", "T or tol", "passes", _metric(found["odelt"])),
        *("recognised", "seconds a batch", "the paper's FID, seconds"),
    )
    body: list[Row] = []

    def add(name: str, title: str, depth: int, solver: str, *values: float) -> None:
        weights = f"{parameters[str(depth)] / parameters['12']:.2f}x" if parameters else ""
        for at in values:
            row = _cells(found[name])[depth, solver, at]
            theirs = paper.TABLE_3.get((depth, solver, at), ())[:2]
            numbers = _listed(theirs) if (name, solver) in _OF_TABLE_3 else ""
            cost = (title, weights, solver, f"{at:g}", f"{row['evaluations']:.4g}")
            body.append((*cost, _distance(row), _share(row), _seconds(row), numbers))

    add("shortcut", "shortcut (SM)", 12, "euler", 128, 4)
    for depth in (12, 8, 4):
        for name, title, steps in (
            ("odelt", "ODE_T(ODE_l), shortcuts", (128, 64, 32, 4)),
            ("odelt-flow", "ODE_t(ODE_l), RFM", (128, 32)),
        ):
            add(name, f"{title}, l = {depth}", depth, "euler", *steps)
            add(name, f"{title}, l = {depth}", depth, "dopri5", 1e-4, 1e-2)
    return _markdown(head, body)


def _ablation(
    found: Mapping[str, Results], runs: Mapping[str, str], theirs: Sequence[Sequence[float]]
) -> str:
    """Tables 4 and 5. A cell: the mean over training seeds, then each of them.

    Args:
        runs: the values' labels and their runs.
        theirs: the paper's FIDs, of all runs at l = 8, then at l = 4.
    """
    metric = _metric(found[next(iter(runs.values()))])
    head = (metric, *_T, f"recognised at {_AT_T}", f"the paper's FID at {_AT_T}")
    body: list[Row] = []
    for depth in (8, 4):
        for label, run in runs.items():
            names = (run, *(each.name for each in RUNS if each.repeats == run))
            seeds = [_at_steps(found[name], depth) for name in names if name in found]
            at_steps = list(zip(*seeds))
            shares = (
                _percent(fmean(row["metrics"]["recognised"]["mean"] for row in rows))
                for rows in at_steps
            )
            quality = (_over_seeds(rows, metric) for rows in at_steps)
            fids = _listed(theirs[len(body)])
            body.append((f"l = {depth}, {label}", *quality, _listed(shares), fids))
    return _markdown(head, body)


def _over_seeds(rows: Sequence[Results], metric: str) -> str:
    if len(rows) == 1:
        return _distance(rows[0])
    means = [row["metrics"][metric]["mean"] for row in rows]
    return f"{fmean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})"


def _everything(results: Results, real: Mapping[str, float] | None) -> str:
    """All metrics of all rows of one evaluation."""
    names = list(results["rows"][0]["metrics"])
    body: list[Row] = []
    for row in results["rows"]:
        quality = (number(row["metrics"][name]) for name in names)
        cost = (f"{row['evaluations']:.4g}", _seconds(row))
        body.append((row["depth"], row["solver"], f"{_setting(row):g}", *quality, *cost))
    if real:
        quality = (f"{real[name]:.4g}" if name in real else "" for name in names)
        body.append(("real", "", "", *quality, "", ""))
    return _markdown(("l", "solver", "T or tol", *names, "passes", "seconds a batch"), body)


def _training(study: Results) -> str:
    """What each method costs with its teacher and its pairs.

    Passes: of one image through all twelve blocks, in millions.
    """
    head = (
        *("", "steps", "images learnt from", "passes, forward and back"),
        *("passes for targets", "CPU minutes"),
    )
    body: list[Row] = []
    budget, costs = study["budget"], study["training"]
    for run in RUNS:
        if not run.depths or run.name not in costs:
            continue
        stages = [*([BY_NAME[run.teacher]] if run.teacher else []), run]
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
        count = " + ".join(map(str, steps))
        body.append((run.title, count, sum(images), learnt, targets, minutes))
    return _markdown(head, body)
