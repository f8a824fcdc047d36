"""Figures of results (extra `eval`): quality against latency, cost against l, ablations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from odelt_fast.evaluation import paper

from .results import depth_text, higher_is_better, number

# Okabe and Ito's: told apart by everyone.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MOST_NAMED = 16  # points of a panel
_MARKERS = {"euler": "o", "dopri5": "s"}


class Point(NamedTuple):
    """One row of results: latency in seconds a batch, value of a metric, and what to call it."""

    latency: float
    value: float
    depth: int
    solver: str
    label: str
    std: float | None


def points(results: Mapping[str, Any], metric: str | None = None) -> list[Point]:
    """The rows of an evaluation as points.

    Args:
        results: as `results.read_results` reads them.
        metric: a name in its tables (None: the first).

    Raises:
        ValueError: for a metric that is not there.
    """
    name, found = _metric(results, metric), []
    for row in results["rows"]:
        value, schedule = row["metrics"][name], f" {depth_text(row, ',')}" * ("schedule" in row)
        at = row["depth"], row["solver"], f"{_at(row)}{schedule}"
        found.append(Point(row["latency"], value["mean"], *at, value["std"]))
    return found


def paper_points() -> list[Point]:
    """Table 3 of the paper, and T = 1 with the FID of Table 2 and the latency of Figure 2."""
    several = [
        Point(latency, value, depth, solver, f"{'T' if solver == 'euler' else 'tol'}={at:g}", None)
        for (depth, solver, at), (value, latency, _) in paper.TABLE_3.items()
    ]
    return several + [
        Point(latency, paper.TABLE_2[f"l = {depth}"][2], depth, "euler", "T=1", None)
        for depth, latency in paper.ONE_STEP_LATENCY.items()
    ]


def frontier(found: Sequence[Point], higher_is_better: bool = False) -> list[Point]:
    """The points that no other one beats in latency or quality without losing in the other.

    Returns:
        Those points, by latency.
    """
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
    """Figure 2: quality against latency, colours for l, with the frontier of all evaluations.

    The paper's points are of another data set, network and GPU: they have their own axes, and show
    the shape.

    Args:
        results: evaluations that are drawn together.
        names: what to call each.
        metric: a name in their tables (None: the first).
        with_paper: also the paper's own, beside them.

    Returns:
        The figure of matplotlib.
    """
    name, environment = _metric(results[0], metric), results[0]["environment"]
    mine = [
        (point, label) for result, label in zip(results, names) for point in points(result, name)
    ]
    machine = f"{environment['device']}, {environment['dtype']}"
    title, images = f"{', '.join(dict.fromkeys(names))} on {machine}", results[0]["settings"]
    panels = [(name, title, images["batch_size"], mine)]
    if with_paper:
        theirs = [(point, "") for point in paper_points()]
        panels.append(("FID-50K", f"{paper.SOURCE}: DiT-B, CelebA-HQ-256, A6000", 128, theirs))
    size = (6.4 * len(panels), 4.8)
    figure, axes = _pyplot().subplots(1, len(panels), figsize=size, squeeze=False)
    drawn = []
    for panel, (ylabel, title, count, found) in zip(axes[0], panels):
        panel.set(ylabel=ylabel, title=title, xlabel=f"seconds to sample {count} images")
        drawn.append(_pareto_panel(panel, found, higher_is_better(ylabel)))
    figure.tight_layout()
    for panel, texts in zip(axes[0], drawn):
        _spread_out(panel, texts)
    return figure


def explored(found: Sequence[Point], current: Point | None, metric: str | None, images: int) -> Any:
    """Points measured one by one, `current` ringed, in a figure without matplotlib's global state.

    Args:
        found: the points.
        current: the one that is looked at.
        metric: what their values are, drawn with the frontier (None: network evaluations).
        images: those of a batch, whose seconds the latencies are.

    Returns:
        The figure of matplotlib, which any thread may draw.
    """
    _pyplot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes, ylabel = figure.add_subplot(), metric or "network evaluations an image"
    axes.set(xlabel=f"seconds to sample {images} images, measured here", ylabel=ylabel)
    named = [(point, "") for point in found]
    texts = _pareto_panel(axes, named, higher_is_better(ylabel), metric is not None)
    if current is not None:
        ring: Any = {"markersize": 15, "mfc": "none", "mec": "black", "markeredgewidth": 1.6}
        axes.plot(*current[:2], "o", **ring)
    figure.draw_without_rendering()  # the layout, which labels are placed in
    if texts:
        _spread_out(axes, texts)
    return figure


def _pareto_panel(
    axes: Any, found: Sequence[tuple[Point, str]], higher_is_better: bool, line: bool = True
) -> list[Any]:
    """Draws the points of evaluations by name; their labels, to be spread out.

    line: draw the frontier.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [point for point, _ in found]
    depths = sorted({point.depth for point in drawn}, reverse=True)
    colours = {depth: _COLOURS[i % len(_COLOURS)] for i, depth in enumerate(depths)}
    several, best = len({label for _, label in found}) > 1, frontier(drawn, higher_is_better)
    texts = []
    for point, label in found:
        style = {"color": colours[point.depth], "marker": _MARKERS.get(point.solver, "^")}
        axes.errorbar(*point[:2], point.std, linestyle="none", markersize=6, capsize=2, **style)
        if not line or len(found) <= _MOST_NAMED or point in best:
            text = f"{label} {point.label}" if several else point.label
            texts.append(axes.text(*point[:2], text, fontsize=7))

    def key(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **{"color": "grey", "linestyle": "none", **style})

    handles = [key(f"l = {depth}", color=colours[depth], marker="o") for depth in depths]
    solvers = sorted({point.solver for point in drawn})
    handles += [key(solver, marker=_MARKERS.get(solver, "^")) for solver in solvers]
    if line:
        axes.plot(*zip(*[p[:2] for p in best]), zorder=0, color="grey", linewidth=1)
        handles.append(key("frontier", linestyle="-", linewidth=1))
    axes.legend(handles=handles, fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)
    if all(point.value > 0 for point in drawn) and not higher_is_better:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    return texts


def _spread_out(axes: Any, texts: Sequence[Any]) -> None:
    """Moves labels off each other, the points and the legend, once the axes are final."""
    from adjustText import adjust_text
    from matplotlib.transforms import Bbox

    shapes = [(marker, *caps) for marker, caps, _ in axes.containers] + [(axes.get_legend(),)]
    boxes = [Bbox.union([each.get_window_extent() for each in shape]) for shape in shapes]
    # It takes what stands in the way in the coordinates of the data. A limit on its time, which it
    # has by default, would draw another picture on another machine. The strong push up and down
    # at the start parts the labels of points that lie side by side.
    adjust_text(
        texts,
        ax=axes,
        objects=[box.padded(3).transformed(axes.transData.inverted()) for box in boxes],
        iter_lim=200,
        force_text=(0.3, 0.5),
        force_static=(0.3, 0.5),
        force_explode=(0.2, 3.0),
        arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
    )


def scaling(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Latency (of every T and tolerance) and peak memory against l, relative to the greatest l.

    Args:
        results: evaluations that are drawn together.
        names: what to call each.

    Returns:
        The figure of matplotlib, in which a line shows what is proportional to l.
    """
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.4))
    for result, label in zip(results, names):
        prefix = f"{label}: " if len(results) > 1 else ""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in _of_one_depth(result):
            groups.setdefault(f"{row['solver']} {_at(row)}", []).append(row)
        for i, (at, rows) in enumerate(groups.items()):
            rows.sort(key=lambda row: row["depth"])
            style = {"marker": "o", "color": _COLOURS[i % len(_COLOURS)]}
            for axes, name in ((left, "latency"), (right, "peak_memory")):
                values = [row[name] for row in rows]
                if all(values):  # memory is not known everywhere
                    *_, most = values
                    unit = f"{most:.3g} s" if axes is left else f"{most / 2**20:.0f} MiB"
                    style["label"] = f"{prefix}{at} ({unit})"
                    axes.plot([row["depth"] for row in rows], np.divide(values, most), **style)
    depths = sorted({row["depth"] for result in results for row in _of_one_depth(result)})
    dashes = {"color": "grey", "linestyle": "--", "linewidth": 1, "label": "proportional to l"}
    for axes, title in ((left, "latency"), (right, "peak memory of sampling")):
        axes.plot(depths, np.divide(depths, depths[-1]), **dashes)
        ylabel = f"{title}, relative to l = {depths[-1]}"
        axes.set(xlabel="active blocks l", ylabel=ylabel, xticks=depths)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def ablation(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> tuple[Any, str]:
    """Tables 4 and 5: quality against T, one panel a depth l, one line an evaluation.

    Args:
        results: evaluations that differ in one thing, such as G or K.
        names: what to call each.
        metric: a name in their tables (None: the first).

    Returns:
        The figure of matplotlib, and its numbers in Markdown, shaped like those tables.

    Raises:
        ValueError: for evaluations without a depth in common, and for a metric that is not there.
    """
    name = _metric(results[0], metric)
    table = _ablation(results, names, name)
    depths, counts = (sorted({key[i] for key in table}, reverse=True) for i in (0, 2))
    size, body = (4.6 * len(depths), 4), []
    figure, panels = _pyplot().subplots(1, len(depths), figsize=size, squeeze=False, sharey=True)
    for axes, depth in zip(panels[0], depths):
        for i, label in enumerate(names):
            line = {count: table.get((depth, label, count)) for count in counts}
            known = [(count, at["mean"], at["std"] or 0) for count, at in line.items() if at]
            if known:
                style = {"marker": "o", "capsize": 2, "color": _COLOURS[i % len(_COLOURS)]}
                axes.errorbar(*zip(*reversed(known)), label=label, **style)
                cells = [number(at) if at else "" for at in line.values()]
                body.append([f"l = {depth}, {label}", *cells])
        axes.set(title=f"l = {depth}", xlabel="time steps T")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0, 0].set_ylabel(name)
    figure.tight_layout()
    head = [name, *(f"T = {count}" for count in counts)]
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    lines.insert(1, "|---" * len(head) + "|")
    return figure, "\n".join(lines) + "\n"


def _ablation(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str
) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """(depth, name, T) -> mean and std, of the depths that at least two evaluations have.

    ValueError if there are none.
    """
    table = {
        (row["depth"], label, row["steps"]): row["metrics"][metric]
        for result, label in zip(results, names)
        for row in _of_one_depth(result)
        if row["steps"] is not None and metric in row["metrics"]
    }
    owners = Counter(depth for depth, _ in {(depth, label) for depth, label, _ in table})
    if max(owners.values(), default=0) < 2:
        raise ValueError(
            "an ablation compares at least two evaluations that have a depth in common"
        )
    return {key: spread for key, spread in table.items() if owners[key[0]] > 1}


def _of_one_depth(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows without those of schedules, which belong to no l. ValueError if none is left."""
    rows = [row for row in results["rows"] if "schedule" not in row]
    if not rows:
        raise ValueError(
            "this figure is over depths, and the evaluation has only depth schedules: use pareto"
        )
    return rows


def _at(row: Mapping[str, Any]) -> str:
    return f"T={row['steps']}" if row["steps"] is not None else f"tol={row['tolerance']:g}"


def _metric(results: Mapping[str, Any], metric: str | None) -> str:
    names = list(results["rows"][0]["metrics"])
    if metric is not None and metric not in names:
        raise ValueError(f"--metric must be one of {', '.join(map(repr, names))}, not {metric!r}")
    return metric or names[0]


def _pyplot() -> Any:
    try:
        import adjustText  # noqa: F401
        import matplotlib
    except ImportError as error:
        raise ValueError(
            f"figures need {error.name or 'matplotlib'}: pip install 'odelt-fast[eval]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
