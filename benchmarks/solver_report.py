"""The tables of the part "solvers".

Ours beside the paper's Table 3, the race against torchdiffeq, and what a solve launches.
"""

from __future__ import annotations

from odelt_fast.evaluation.paper import TABLE_3

from .measure import Record
from .tables import mebibytes, not_run, seconds, spread, table

LEAST_GAIN = {1: 3.0, 128: 1.15}  # over torchdiffeq on the same compiled network, by batch
_TABLE_3 = (
    "l | solver | T or tolerance | variant | median (10 % to 90 %) | evaluations | each"
    " | peak memory | weights | paper: time | evaluations | memory"
)
_RACE = (
    "batch | tolerance | solver and network | median (10 % to 90 %) | evaluations | error"
    " | first call | over torchdiffeq | wanted"
)
_PROOF = "a solve of | launches | waits | graph"
Row = tuple[str, ...]


def solver_tables(found: Record) -> str:
    """Three tables as markdown of {key: configuration}; what did not run has its reason."""
    found = {key: each for key, each in found.items() if "cell" in each}
    sizes = {
        each["cell"]["depth"]: each["variants"]
        for key, each in found.items()
        if key.startswith("memory ")
    }
    rows: dict[str, list[Row]] = {_TABLE_3: [], _RACE: [], _PROOF: []}
    for key, each in found.items():
        if "race" in each:
            rows[_RACE] += race_rows(each["cell"], each["race"])
        elif "proof" in each:
            rows[_PROOF].append(proof_row(each["cell"], each["proof"]))
        elif not key.startswith("memory "):
            held = sizes.get(each["cell"]["depth"], {})
            rows[_TABLE_3] += paper_rows(each["cell"], each["variants"], held)
    return "\n\n".join(table(header, body) for header, body in rows.items() if body)


def paper_rows(cell: Record, variants: Record, sizes: Record) -> list[Row]:
    """Rows of Table 3.

    The paper's evaluations are its time over that of its Euler step at the same length (both
    include little else).
    """
    rows: list[Row] = []
    depth, solver = cell["depth"], cell["solver"]
    setting = cell["steps"] if solver == "euler" else cell["tolerance"]
    theirs = TABLE_3.get((depth, solver, setting)) if cell["network"] == "DiT-B/2" else None
    paper: Row = ("", "", "")
    if theirs:
        step = TABLE_3[depth, "euler", 128][1] / 128
        paper = seconds(theirs[1]), f"{theirs[1] / step:.0f}", f"{theirs[2]:g}x"
    for variant, row in variants.items():
        cost: Row = not_run(row, 5)
        if "median_s" in row:
            held = sizes.get(variant, {}).get("weights")
            weights = held and held["blocks"] + held["ends"]
            memory = map(mebibytes, (row.get("peak_bytes"), weights))
            each = seconds(row["per_evaluation_s"])
            cost = spread(row), f"{row['evaluations']:g}", each, *memory
        rows.append((str(depth), solver, f"{setting:g}", variant, *cost, *paper))
    return rows


def race_rows(cell: Record, race: Record) -> list[Row]:
    """Gains are over torchdiffeq on the compiled network, the first that ran."""
    rows: list[Row] = []
    times = {name: row["median_s"] for name, row in race.items() if "median_s" in row}
    theirs = next((time for name, time in times.items() if name.startswith("torchdiffeq")), None)
    wanted = LEAST_GAIN.get(cell["batch"]) if cell["network"] == "DiT-B/2" else None
    for name, row in race.items():
        cost = not_run(row, 6)
        if name in times:
            gain = theirs / times[name] if theirs else None
            verdict = ""
            if name.startswith("one launch") and wanted and gain:
                verdict = f"at least {wanted:g}x: {'met' if gain >= wanted else 'missed'}"
            cost = spread(row), f"{row['evaluations']:g}", f"{row['relative_error']:.1e}"
            cost += seconds(row["setup_s"]), f"{gain:.2f}x" if gain else "", verdict
        rows.append((str(cell["batch"]), f"{cell['tolerance']:g}", name, *cost))
    return rows


def proof_row(cell: Record, proof: Record) -> Row:
    what = (
        f"{cell['network']} batch {cell['batch']} l={cell['depth']} {cell['solver']}"
        f" {cell['tolerance']:g}"
    )
    if "reason" in proof:
        return what, *not_run(proof, 3)
    calls = (
        ", ".join(f"{count} {name}" for name, count in proof[kind].items()) or "none"
        for kind in ("launches", "waits")
    )
    return what, *calls, proof["graph"]
