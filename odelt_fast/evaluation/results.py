"""Results of `odelt-fast evaluate`: rows of cells, and Markdown shaped like Tables 2 and 3."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odelt_fast.checks import show_size
from odelt_fast.files import one_line

FORMAT = 1


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric of `odelt-fast evaluate` is a better one."""
    return metric in ("recognised", "precision", "recall", "inception score")


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for every (solver, depth or schedule, steps or tolerance): mean and deviation.

    They are over seeds, the rows in the order of their first cell. The standard deviation is that
    of a sample (divided by the number of seeds - 1), None for one seed.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        key = [cell.get(name) for name in ("solver", "depth", "steps", "tolerance", "schedule")]
        groups.setdefault(json.dumps(key), []).append(cell)
    rows = []
    for members in groups.values():
        first = members[0]
        peaks = [cell["peak_memory"] for cell in members if cell["peak_memory"] is not None]
        metrics = {
            name: _spread([cell["metrics"][name] for cell in members]) for name in first["metrics"]
        }
        named = ["solver", "depth"]
        named += [name for name in ("schedule", "guidance_interval") if name in first]
        named += ["live_blocks", "steps", "tolerance", "guidance_scale"]
        row = {name: first[name] for name in named} | {
            "seeds": [cell["seed"] for cell in members],
            "evaluations": statistics.fmean(cell["evaluations"] for cell in members),
            "metrics": metrics,
            "latency": statistics.median(cell["latency"] for cell in members),
            "peak_memory": max(peaks, default=None),
        }
        rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def read_results(path: str | Path) -> dict[str, Any]:
    """The results of an evaluation, from its folder or its results.json.

    Raises:
        ValueError: for anything else.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = json.loads(path.read_text())
        if "samples" in results:
            raise ValueError("is of images alone: it says nothing of what they cost")
        if results["format"] != FORMAT or not results["rows"]:
            raise ValueError("is of another version, or empty")
        for row in results["rows"]:
            row["solver"], row["depth"], row["latency"], next(iter(row["metrics"].values()))["mean"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} holds no results of odelt-fast evaluate: {one_line(error, 200)}"
        ) from None
    return dict(results)


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables: for equal steps depths by T (Table 2); then cost and quality of every row. Of
    existing images (`existing`) one row."""
    if "samples" in results:
        return _existing(results)
    rows, settings = results["rows"], results["settings"]
    names = list(rows[0]["metrics"])
    lines = [f"# {settings['model']}", "", *_description(results), ""]
    fixed = [row for row in rows if row["steps"] is not None and "schedule" not in row]
    for solver in dict.fromkeys(row["solver"] for row in fixed):
        mine = [row for row in fixed if row["solver"] == solver]
        steps, depths = _distinct(mine, "steps"), _distinct(mine, "depth")
        for name in names:
            cells = {(row["depth"], row["steps"]): number(row["metrics"][name]) for row in mine}
            body = [
                [f"l = {depth}", *(cells.get((depth, count), "") for count in steps)]
                for depth in depths
            ]
            lines += _table([f"{name}, {solver}", *(f"T = {count}" for count in steps)], body)
    largest, body = max(row["peak_memory"] or 0 for row in rows), []
    for row in rows:
        at = row["steps"] if row["steps"] is not None else f"{row['tolerance']:g}"
        quality = [number(row["metrics"][name]) for name in names]
        cost = [f"{row['latency']:.3g}", f"{row['evaluations']:.4g}"]
        memory = row["peak_memory"]
        cost += [f"{memory / 2**20:.0f} MiB", f"{memory / largest:.2f}x"] if memory else ["", ""]
        body.append([depth_text(row), row["solver"], at, *quality, *cost])
    cost = [f"WCT, s per {settings['batch_size']}", "evaluations", "MEM", "relative"]
    lines += _table(["l", "solver", "T or tol", *names, *cost], body)
    return "\n".join(lines).rstrip() + "\n"


def depth_text(row: Mapping[str, Any], between: str = ", ") -> str:
    """The depth of a row, or its schedule, such as 0:4, 0.5:12."""
    if "schedule" not in row:
        return str(row["depth"])
    return between.join(f"{time:g}:{depth}" for time, depth in row["schedule"])


def number(spread: Mapping[str, Any]) -> str:
    """Mean and standard deviation as in the paper's tables, e.g. 5.93 ± 0.11."""
    mean, std = spread["mean"], spread["std"]
    digits = 1 if abs(mean) >= 100 else 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _existing(results: Mapping[str, Any]) -> str:
    settings, samples = results["settings"], results["samples"]
    size, device = show_size(samples["image_size"]), results["environment"]["device"]
    left_out = f", {samples['left_out']} left out" if samples["left_out"] else ""
    lines = [f"{settings['num_images']} images of {size} pixels{left_out}, {_by(results)}"]
    lines += [f"Features computed on {device}.", *_remarks(results)]
    metrics = results["metrics"]
    values = [number({"mean": value, "std": None}) for value in metrics.values()]
    text = [f"# {settings['samples']}", "", *_broken(lines), "", *_table(list(metrics), [values])]
    return "\n".join(text).rstrip() + "\n"


def _by(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    against = settings["data"] or settings["stats"]
    compared = f"against {against}; " if against else ""
    return f"{compared}features: {results['features']['name']}, protocol {settings['protocol']}."


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """What to know of the distances."""
    name, lines = results["features"]["name"], []
    if name != "inception-v3":
        lines.append(
            f"**Not an FID**: every distance is of {name}, and compares only with its like."
        )
    if results["settings"]["num_images"] <= results["features"]["dimensions"]:
        lines.append("**Fewer images than features**: the distance depends on their number.")
    return lines


def _broken(lines: Sequence[str]) -> list[str]:
    """A paragraph in which each of the lines stays one."""
    return [f"{line}  " for line in lines[:-1]] + [*lines[-1:]]


def _description(results: Mapping[str, Any]) -> list[str]:
    settings, environment = results["settings"], results["environment"]
    seeds = "1 seed"
    if settings["seeds"] != 1:
        seeds = f"{settings['seeds']} seeds, mean ± standard deviation"
    lines = [
        f"{settings['num_images']} images of each of {seeds}, {_by(results)}",
        (
            f"Latency: median wall-clock time of a batch of {settings['batch_size']} on"
            f" {environment['device']} in {environment['dtype']}, {environment['processes']},"
            f" without the decoder, warm. Memory: the sampler's peak. torch {environment['torch']}."
        ),
        *_remarks(results),
    ]
    if settings["paper_guidance"]:
        lines.append(
            "T = 128 is 64 steps of two evaluations, guided with w ="
            f" {settings['guidance_scale']:g}; other T are not guided."
        )
    elif settings["guidance_scale"] is not None:
        interval = settings.get("guidance_interval")
        at = f", for t from {interval[0]:g} to {interval[1]:g}" if interval else ""
        lines.append(f"Guided with w = {settings['guidance_scale']:g}{at}.")
    return _broken(lines)


def _distinct(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return sorted({row[name] for row in rows}, reverse=True)


def _table(head: Sequence[object], body: Sequence[Sequence[object]]) -> list[str]:
    lines = (head, ["---"] * len(head), *body)
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]
