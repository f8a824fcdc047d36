"""Figures of results (extra `eval`): quality against latency, cost against l, ablations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from odelt_fast.evaluation import paper
from odelt_fast.evaluation.results import depth_text, higher_is_better, number

# Okabe and Ito's: told apart by everyone.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
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
    """The rows of an evaluation as points.

    Args:
        results: as `results.read_results` reads them.
        metric: a name in its tables (None: the first).

    Raises:
        ValueError: for a metric that is not there.
    """
    name, found = _metric(results, metric), []
    for row in results["rows"]:
        value, schedule = (
            row["metrics"][name],
            f" {depth_text(row, ',')}" if "schedule" in row else "",
        )
        label = f"{_at(row)}{schedule}"
        found.append(
            Point(row["latency"], value["mean"], row["depth"], row["solver"], label, value["std"])
        )
    return found


def paper_points() -> list[Point]:
    """Table 3 of the paper, and T = 1 with the FID of Table 2 and the latency of Figure 2."""
    found = []
    for (depth, solver, at), (value, latency, _) in paper.TABLE_3.items():
        label = f"T={at:g}" if solver == "euler" else f"tol={at:g}"
        found.append(Point(latency, value, depth, solver, label, None))
    for depth, latency in paper.ONE_STEP_LATENCY.items():
        value = paper.TABLE_2[f"l = {depth}"][0][2]
        found.append(Point(latency, value, depth, "euler", "T=1", None))
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
    panels = 2 if with_paper else 1
    figure, axes = _pyplot().subplots(1, panels, figsize=(6.4 * panels, 4.8), squeeze=False)
    mine = [
        (point, label) for result, label in zip(results, names) for point in points(result, name)
    ]
    theirs = [(point, "") for point in paper_points()]
    machine = f"{environment['device']}, {environment['dtype']}"
    axes[0, 0].set(
        ylabel=name,
        title=f"{', '.join(dict.fromkeys(names))} on {machine}",
        xlabel=f"seconds to sample {results[0]['settings']['batch_size']} images",
    )
    drawn = [_pareto_panel(axes[0, 0], mine, higher_is_better(name))]
    if with_paper:
        axes[0, 1].set(
            ylabel="FID-50K",
            title=f"{paper.SOURCE}: DiT-B, CelebA-HQ-256, A6000",
            xlabel="seconds to sample 128 images",
        )
        drawn.append(_pareto_panel(axes[0, 1], theirs, False))
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
    axes, better = figure.add_subplot(), metric is not None and higher_is_better(metric)
    axes.set(
        xlabel=f"seconds to sample {images} images, measured here",
        ylabel=metric or "network evaluations an image",
    )
    line = "frontier" if metric else None
    texts = _pareto_panel(axes, [(point, "") for point in found], better, line)
    if current is not None:
        at = current.latency, current.value
        axes.plot(*at, "o", markersize=15, mfc="none", mec="black", markeredgewidth=1.6)
    figure.draw_without_rendering()  # the layout, which labels are placed in
    if texts:
        _spread_out(axes, texts)
    return figure


def _pareto_panel(
    axes: Any,
    found: Sequence[tuple[Point, str]],
    higher_is_better: bool,
    line: str | None = "frontier",
) -> list[Any]:
    """Draws the points of evaluations by name; their labels, to be spread out."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [point for point, _ in found]
    depths = sorted({point.depth for point in drawn}, reverse=True)
    colours = {depth: _COLOURS[i % len(_COLOURS)] for i, depth in enumerate(depths)}
    several, best = len({label for _, label in found}) > 1, frontier(drawn, higher_is_better)
    texts = []
    for point, label in found:
        style = {"color": colours[point.depth], "marker": _MARKERS.get(point.solver, "^")}
        at = point.latency, point.value
        axes.errorbar(*at, point.std, linestyle="none", markersize=6, capsize=2, **style)
        if line is None or len(found) <= _MOST_NAMED or point in best:
            text = f"{label} {point.label}" if several else point.label
            texts.append(axes.text(*at, text, fontsize=7))

    def key(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **{"color": "grey", "linestyle": "none", **style})

    handles = [key(f"l = {depth}", color=colours[depth], marker="o") for depth in depths]
    solvers = sorted({point.solver for point in drawn})
    handles += [key(solver, marker=_MARKERS.get(solver, "^")) for solver in solvers]
    if line is not None:
        track = {"color": "grey", "linewidth": 1}
        axes.plot([p.latency for p in best], [p.value for p in best], zorder=0, **track)
        handles.append(key(line, linestyle="-", linewidth=1))
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

    boxes = [
        Bbox.union([line.get_window_extent() for line in (marker, *caps)])
        for marker, caps, _ in axes.containers
    ]
    boxes.append(axes.get_legend().get_window_extent())
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
                if not all(values):
                    continue  # memory is not known everywhere
                most = f"{values[-1]:.3g} s" if axes is left else f"{values[-1] / 2**20:.0f} MiB"
                shares, text = [value / values[-1] for value in values], f"{prefix}{at} ({most})"
                axes.plot([row["depth"] for row in rows], shares, label=text, **style)
    depths = sorted({row["depth"] for result in results for row in _of_one_depth(result)})
    proportional = [depth / depths[-1] for depth in depths]
    for axes, title in ((left, "latency"), (right, "peak memory of sampling")):
        dashes = {"color": "grey", "linestyle": "--", "linewidth": 1}
        axes.plot(depths, proportional, label="proportional to l", **dashes)
        ylabel = f"{title}, relative to l = {depths[-1]}"
        axes.set(xlabel="active blocks l", ylabel=ylabel, xticks=depths)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def ablation(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> Any:
    """Tables 4 and 5: quality against T, one panel a depth l, one line an evaluation.

    Args:
        results: evaluations that differ in one thing, such as G or K.
        names: what to call each.
        metric: a name in their tables (None: the first).

    Returns:
        The figure of matplotlib.

    Raises:
        ValueError: for evaluations without a depth in common, and for a metric that is not there.
    """
    table = _ablation(results, names, metric)
    depths = sorted({depth for depth, _, _ in table}, reverse=True)
    size = (4.6 * len(depths), 4)
    figure, panels = _pyplot().subplots(1, len(depths), figsize=size, squeeze=False, sharey=True)
    for axes, depth in zip(panels[0], depths):
        for i, label in enumerate(names):
            line = {
                steps: at for (d, each, steps), at in table.items() if (d, each) == (depth, label)
            }
            steps = sorted(line)
            if steps:
                means = [line[count]["mean"] for count in steps]
                spreads = [line[count]["std"] or 0 for count in steps]
                style = {"marker": "o", "capsize": 2, "color": _COLOURS[i % len(_COLOURS)]}
                axes.errorbar(steps, means, spreads, label=label, **style)
        axes.set(title=f"l = {depth}", xlabel="time steps T")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0, 0].set_ylabel(_metric(results[0], metric))
    figure.tight_layout()
    return figure


def ablation_table(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None = None
) -> str:
    """The numbers of `ablation` in Markdown, shaped like Tables 4 and 5."""
    table = _ablation(results, names, metric)
    steps = sorted({count for _, _, count in table}, reverse=True)
    head = [_metric(results[0], metric), *(f"T = {count}" for count in steps)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for depth in sorted({depth for depth, _, _ in table}, reverse=True):
        for label in names:
            found = [table.get((depth, label, count)) for count in steps]
            if any(found):
                row = ["" if spread is None else number(spread) for spread in found]
                lines.append("| " + " | ".join([f"l = {depth}, {label}", *row]) + " |")
    return "\n".join(lines) + "\n"


def _ablation(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], metric: str | None
) -> dict[tuple[int, str, int], Mapping[str, Any]]:
    """(depth, name, T) -> mean and std, of the depths that at least two evaluations have.
    ValueError if there are none."""
    name = _metric(results[0], metric)
    table = {
        (row["depth"], label, row["steps"]): row["metrics"][name]
        for result, label in zip(results, names)
        for row in _of_one_depth(result)
        if row["steps"] is not None and name in row["metrics"]
    }
    owners = Counter(depth for depth, _ in {(depth, label) for depth, label, _ in table})
    if max(owners.values(), default=0) < 2:
        raise ValueError(
            "an ablation compares at least two evaluations that have a depth in common"
        )
    return {key: spread for key, spread in table.items() if owners[key[0]] > 1}


def _of_one_depth(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows without those of schedules, which belong to no l. ValueError if there are no
    others."""
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
