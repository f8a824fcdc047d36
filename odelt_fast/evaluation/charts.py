"""Figures of results (matplotlib, extra `eval`): quality against latency, latency and memory
against l, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from odelt_fast.evaluation import paper
from odelt_fast.evaluation.results import higher_is_better, number

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
)  # Okabe and Ito: told apart by everyone
_MOST_NAMED = 16  # points of a panel
_MARKERS = {"euler": "o", "dopri5": "s"}


class Point(NamedTuple):
    """One row of results: a better point has lower latency (seconds a batch) and lower quality
    value."""

    latency: float
    value: float
    depth: int
    solver: str
    label: str
    std: float | None


def points(results: Mapping[str, Any], metric: str | None = None) -> list[Point]:
    """The rows of an evaluation as points. metric: a name in its tables (None: the first).
    ValueError for a name that is not there."""
    rows = results["rows"]
    name = _metric(results, metric)
    found = []
    for row in rows:
        at = f"T={row['steps']}" if row["steps"] is not None else f"tol={row['tolerance']:g}"
        if "schedule" in row:
            at += " " + ",".join(f"{time:g}:{depth}" for time, depth in row["schedule"])
        value = row["metrics"][name]
        found.append(
            Point(row["latency"], value["mean"], row["depth"], row["solver"], at, value["std"])
        )
    return found


def paper_points() -> list[Point]:
    """Table 3 of the paper, and T = 1 with the FID of Table 2 and the latency of Figure 2."""
    found = []
    for (depth, solver, at), (value, latency, _) in paper.TABLE_3.items():
        label = f"T={at:g}" if solver == "euler" else f"tol={at:g}"
        found.append(Point(latency, value, depth, solver, label, None))
    for depth, latency in paper.ONE_STEP_LATENCY.items():
        found.append(
            Point(latency, paper.TABLE_2[f"l = {depth}"][0][2], depth, "euler", "T=1", None)
        )
    return found


def frontier(found: Sequence[Point], higher_is_better: bool = False) -> list[Point]:
    """The points that no other one beats in both latency and quality (or equals in one and beats in
    the other), by latency."""
    sign = -1 if higher_is_better else 1
    kept: list[Point] = []
    for point in sorted(found, key=lambda point: (point.latency, sign * point.value)):
        if not kept or sign * point.value < sign * kept[-1].value:
            kept.append(point)
    return kept


def pareto(
    results: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    metric: str | None = None,
    with_paper: bool = False,
) -> Any:
    """Figure 2: quality against latency, colours for l, with the frontier of all evaluations
    marked; the paper's own beside it.

    The paper's are of another data set, network and GPU: they have their own axes, and show the
    shape.
    """
    plt = _pyplot()
    name = _metric(results[0], metric)
    panels = 2 if with_paper else 1
    figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 4.8), squeeze=False)
    mine = [
        (point, label) for result, label in zip(results, names) for point in points(result, name)
    ]
    _pareto_panel(axes[0, 0], mine, higher_is_better(name))
    environment = results[0]["environment"]
    axes[0, 0].set(
        ylabel=name,
        title=(
            f"{', '.join(dict.fromkeys(names))} on {environment['device']}, {environment['dtype']}"
        ),
    )
    axes[0, 0].set_xlabel(f"seconds to sample {results[0]['settings']['batch_size']} images")
    if with_paper:
        _pareto_panel(axes[0, 1], [(point, "") for point in paper_points()], False)
        axes[0, 1].set(
            ylabel="FID-50K",
            title=f"{paper.SOURCE}: DiT-B, CelebA-HQ-256, A6000",
            xlabel="seconds to sample 128 images",
        )
    figure.tight_layout()
    return figure


def explored(found: Sequence[Point], current: Point | None, metric: str | None, images: int) -> Any:
    """Points measured one by one, `current` ringed: metric against latency with the frontier, or,
    of metric None, evaluations against it.

    images: those of a batch, whose seconds the latencies are. A figure of its own, with no state of
    matplotlib's: for any thread.
    """
    _pyplot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    _pareto_panel(
        axes,
        [(point, "") for point in found],
        metric is not None and higher_is_better(metric),
        "frontier" if metric else None,
    )
    if current is not None:
        axes.plot(
            current.latency,
            current.value,
            "o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor="black",
            markeredgewidth=1.6,
        )
    axes.set(
        xlabel=f"seconds to sample {images} images, measured here",
        ylabel=metric or "network evaluations an image",
    )
    return figure


def _pareto_panel(
    axes: Any,
    found: Sequence[tuple[Point, str]],
    higher_is_better: bool,
    line: str | None = "frontier",
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    depths = sorted({point.depth for point, _ in found}, reverse=True)
    several = len({label for _, label in found}) > 1
    best = frontier([point for point, _ in found], higher_is_better)
    for point, label in found:
        style = {
            "marker": _MARKERS.get(point.solver, "^"),
            "color": _COLOURS[depths.index(point.depth) % len(_COLOURS)],
        }
        axes.errorbar(
            point.latency,
            point.value,
            yerr=point.std,
            linestyle="none",
            markersize=6,
            capsize=2,
            **style,
        )
        if line is not None and len(found) > _MOST_NAMED and point not in best:
            continue  # many names lie on each other
        text = f"{label} {point.label}" if several else point.label
        axes.annotate(
            text,
            (point.latency, point.value),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=7,
        )
    if line is not None:
        axes.plot(
            [point.latency for point in best],
            [point.value for point in best],
            color="grey",
            linewidth=1,
            zorder=0,
        )
    _keys(axes, depths, sorted({point.solver for point, _ in found}), line)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1)
    if all(point.value > 0 for point, _ in found) and not higher_is_better:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _keys(axes: Any, depths: Sequence[int], solvers: Sequence[str], line: str | None) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=_COLOURS[i % len(_COLOURS)],
            marker="o",
            linestyle="none",
            label=f"l = {depth}",
        )
        for i, depth in enumerate(depths)
    ]
    handles += [
        Line2D(
            [], [], color="grey", marker=_MARKERS.get(solver, "^"), linestyle="none", label=solver
        )
        for solver in solvers
    ]
    handles += [Line2D([], [], color="grey", linewidth=1, label=line)] if line is not None else []
    axes.legend(handles=handles, fontsize=8)


def scaling(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Latency (of every T and tolerance) and peak memory against l, relative to the greatest l,
    with the proportional line."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    for result, label in zip(results, names):
        prefix = f"{label}: " if len(results) > 1 else ""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in _of_one_depth(result):
            at = (
                f"{row['solver']} T={row['steps']}"
                if row["steps"] is not None
                else f"{row['solver']} tol={row['tolerance']:g}"
            )
            groups.setdefault(at, []).append(row)
        for i, (at, rows) in enumerate(groups.items()):
            rows.sort(key=lambda row: row["depth"])
            depths = [row["depth"] for row in rows]
            style = {"marker": "o", "color": _COLOURS[i % len(_COLOURS)]}
            slowest = rows[-1]["latency"]
            left.plot(
                depths,
                [row["latency"] / slowest for row in rows],
                label=f"{prefix}{at} ({slowest:.3g} s)",
                **style,
            )
            if all(row["peak_memory"] for row in rows):
                peak = rows[-1]["peak_memory"]
                right.plot(
                    depths,
                    [row["peak_memory"] / peak for row in rows],
                    label=f"{prefix}{at} ({peak / 2**20:.0f} MiB)",
                    **style,
                )
    depths = sorted({row["depth"] for result in results for row in _of_one_depth(result)})
    for axes, title in ((left, "latency"), (right, "peak memory of sampling")):
        axes.plot(
            depths,
            [depth / depths[-1] for depth in depths],
            color="grey",
            linestyle="--",
            linewidth=1,
            label="proportional to l",
        )
        axes.set(
            xlabel="active blocks l", ylabel=f"{title}, relative to l = {depths[-1]}", xticks=depths
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def ablation(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> Any:
    """Tables 4 and 5: one panel a depth l, quality against T, a line for every evaluation (G = 1,
    2, 4, or K = 0, 1/8, 1/4)."""
    plt = _pyplot()
    name, table = _metric(results[0], metric), ablation_cells(results, names, metric)
    depths = sorted({depth for depth, _, _ in table}, reverse=True)
    figure, panels = plt.subplots(
        1, len(depths), figsize=(4.6 * len(depths), 4), squeeze=False, sharey=True
    )
    for axes, depth in zip(panels[0], depths):
        for i, label in enumerate(names):
            found = sorted(
                (steps, spread)
                for (d, each, steps), spread in table.items()
                if (d, each) == (depth, label)
            )
            if found:
                means, stds = (
                    [spread["mean"] for _, spread in found],
                    [spread["std"] or 0 for _, spread in found],
                )
                colour = _COLOURS[i % len(_COLOURS)]
                axes.errorbar(
                    [steps for steps, _ in found],
                    means,
                    yerr=stds,
                    marker="o",
                    capsize=2,
                    label=label,
                    color=colour,
                )
        axes.set(title=f"l = {depth}", xlabel="time steps T")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0, 0].set_ylabel(name)
    figure.tight_layout()
    return figure


def ablation_cells(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> dict[tuple[int, str, int], Mapping[str, Any]]:
    """(depth, name, T) -> mean and std, of the depths that at least two evaluations have.
    ValueError if there are none."""
    name = _metric(results[0], metric)
    cells = {
        (row["depth"], label, row["steps"]): row["metrics"][name]
        for result, label in zip(results, names)
        for row in _of_one_depth(result)
        if row["steps"] is not None and name in row["metrics"]
    }
    shared = {
        depth for depth, _, _ in cells if len({label for d, label, _ in cells if d == depth}) > 1
    }
    if not shared:
        raise ValueError(
            "an ablation compares at least two evaluations that have a depth in common"
        )
    return {key: value for key, value in cells.items() if key[0] in shared}


def ablation_table(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> str:
    """The same numbers in Markdown, shaped like Tables 4 and 5."""
    cells = ablation_cells(results, names, metric)
    steps = sorted({count for _, _, count in cells}, reverse=True)
    head = [_metric(results[0], metric), *(f"T = {count}" for count in steps)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for depth in sorted({depth for depth, _, _ in cells}, reverse=True):
        for label in names:
            row = [
                number(cells[depth, label, count]) if (depth, label, count) in cells else ""
                for count in steps
            ]
            if any(row):
                lines.append("| " + " | ".join([f"l = {depth}, {label}", *row]) + " |")
    return "\n".join(lines) + "\n"


def _of_one_depth(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows without those of schedules, which belong to no l. ValueError if there are no
    others."""
    rows = [row for row in results["rows"] if "schedule" not in row]
    if not rows:
        raise ValueError(
            "this figure is over depths, and the evaluation has only depth schedules: use pareto"
        )
    return rows


def _metric(results: Mapping[str, Any], metric: str | None) -> str:
    names = list(results["rows"][0]["metrics"])
    if metric is not None and metric not in names:
        raise ValueError(f"--metric must be one of {', '.join(map(repr, names))}, not {metric!r}")
    return metric or names[0]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'odelt-fast[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
