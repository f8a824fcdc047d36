"""The tables of the suite's part "solvers": ours beside the paper's Table 3, the race against
torchdiffeq, and what a solve launches."""

from __future__ import annotations

from typing import Any

from benchmarks.report import mebibytes, seconds, spread, table
from odelt_fast.evaluation.paper import TABLE_3

LEAST_GAIN = {1: 3.0, 128: 1.15}  # over torchdiffeq on the same compiled network, by batch


def solver_tables(content: dict[str, Any]) -> str:
    """Three tables as markdown; what did not run stands there with its reason."""
    found = content["configurations"]
    cells = [
        each
        for key, each in found.items()
        if "race" not in each and "proof" not in each and not key.startswith("memory ")
    ]
    weights = {
        each["cell"]["depth"]: each for key, each in found.items() if key.startswith("memory ")
    }
    parts = [
        (("l", "solver", "T or tolerance", "variant", "median (10 % to 90 %)", "evaluations", "each", "peak memory", "weights",
          "paper: time", "evaluations", "memory"), [row for each in cells for row in paper_rows(each, weights)]),
        (("batch", "tolerance", "solver and network", "median (10 % to 90 %)", "evaluations", "error", "first call",
          "over torchdiffeq", "wanted"), [row for each in found.values() if "race" in each for row in race_rows(each)]),
        (("a solve of", "launches", "waits", "graph"), [proof_row(each) for each in found.values() if "proof" in each]),
    ]  # fmt: skip
    return "\n\n".join(table(header, rows) for header, rows in parts if rows)


def paper_rows(
    configuration: dict[str, Any], weights: dict[int, dict[str, Any]]
) -> list[tuple[str, ...]]:
    """The paper's evaluations are its time over that of its Euler step at the same length (both
    include little else)."""
    cell, rows = configuration["cell"], []
    fixed = cell["solver"] == "euler"
    setting = cell["steps"] if fixed else cell["tolerance"]
    said = (
        TABLE_3.get((cell["depth"], cell["solver"], setting))
        if cell["network"] == "DiT-B/2"
        else None
    )
    step = TABLE_3[cell["depth"], "euler", 128][1] / 128 if said else 1.0
    paper = (seconds(said[1]), f"{said[1] / step:.0f}", f"{said[2]:g}x") if said else ("", "", "")
    for variant, row in configuration["variants"].items():
        begin = (str(cell["depth"]), cell["solver"], f"{setting:g}", variant)
        if "median_s" not in row:
            rows.append(
                (*begin, f"did not run: {row.get('reason', 'no reason')}", "", "", "", "", *paper)
            )
            continue
        held = (
            weights.get(cell["depth"], {}).get("variants", {}).get(variant, {}).get("weights", {})
        )
        size = mebibytes(held["blocks"] + held["ends"]) if held else ""
        each = (
            f"{row['evaluations']:g}",
            seconds(row["per_evaluation_s"]),
            mebibytes(row.get("peak_bytes")),
            size,
        )
        rows.append((*begin, spread(row), *each, *paper))
    return rows


def race_rows(configuration: dict[str, Any]) -> list[tuple[str, ...]]:
    """Gains are over torchdiffeq on the compiled network, the first that ran."""
    cell, race, rows = configuration["cell"], configuration["race"], []
    theirs = next(
        (
            row["median_s"]
            for name, row in race.items()
            if name.startswith("torchdiffeq") and "median_s" in row
        ),
        None,
    )
    wanted = LEAST_GAIN.get(cell["batch"]) if cell["network"] == "DiT-B/2" else None
    for name, row in race.items():
        begin = (str(cell["batch"]), f"{cell['tolerance']:g}", name)
        if "median_s" not in row:
            rows.append(
                (*begin, f"did not run: {row.get('reason', 'no reason')}", "", "", "", "", "")
            )
            continue
        gain = theirs / row["median_s"] if theirs else None
        verdict = ""
        if name.startswith("one launch") and wanted and gain:
            verdict = f"at least {wanted:g}x: {'met' if gain >= wanted else 'missed'}"
        each = (f"{row['evaluations']:g}", f"{row['relative_error']:.1e}", seconds(row["setup_s"]))
        rows.append((*begin, spread(row), *each, f"{gain:.2f}x" if gain else "", verdict))
    return rows


def proof_row(configuration: dict[str, Any]) -> tuple[str, ...]:
    cell, proof = configuration["cell"], configuration["proof"]
    what = (
        f"{cell['network']} batch {cell['batch']} l={cell['depth']} {cell['solver']}"
        f" {cell['tolerance']:g}"
    )
    if "reason" in proof:
        return what, f"did not run: {proof['reason']}", "", ""
    launches, waits = (
        ", ".join(f"{count} {name}" for name, count in proof[key].items()) or "none"
        for key in ("launches", "waits")
    )
    return what, launches, waits, proof["graph"]
