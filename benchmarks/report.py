"""Tables and plots of what `benchmarks.card` found.

    python -m benchmarks.report DIR [--out FOLDER]

Prints markdown: what went wrong; for every part a table; what ran in one call; the runs, with
device and command; and the project's targets beside what was measured, met or missed. With --out
also FOLDER/report.md and
the plots latency.png and memory.png (against l), batch.png (latency of an evaluation against the
batch) and floor.png (share of the floor), where DIR has what they show.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .measure import Record, command_parser
from .solver_report import solver_tables
from .steps import read_log
from .tables import mebibytes, not_run, seconds, spread, table
from .targets import Parts, samples, targets

NAME = "card.jsonl"
_SAMPLING = (
    "configuration | variant | median (10 % to 90 %) | evaluation | rate | share of floor"
    " | to plain PyTorch | first call"
)
_DISPATCH = "scaled_dot_product_attention of | operators | kernels | backends that can run"
_MEMORY = "memory | variant | live blocks | weights of blocks | of the ends | peak | reserved"
_PLOTS = {  # name -> axes, and whether they are logarithmic
    "latency.png": ("active blocks l", "ms an evaluation and image (T = 4)", False),
    "memory.png": ("active blocks l", "MiB", False),
    "batch.png": ("batch", "ms an evaluation (T = 4)", True),
    "floor.png": ("active blocks l", "share of the floor (T = 4)", False),
}


def load(folder: Path) -> Parts:
    """The steps by part; ValueError if there are none.

    {part: {"runs": [...], "configurations": {step: its record and, beside that, its results}}}
    """
    runs, found = read_log(folder / NAME)
    if not found:
        raise ValueError(
            f"{folder} holds no results: make them with python -m benchmarks.card --out {folder}"
        )
    parts: Parts = {}
    for key, record in found.items():
        part, _, name = key.partition(": ")
        content = parts.setdefault(part, {"part": part, "runs": runs, "configurations": {}})
        content["configurations"][name] = record | record["result"]
        if "ceilings" in record["result"]:
            runs[record["run"]] |= record["result"]
    return parts


def part_table(content: Record) -> str:
    """One part as markdown tables; a variant that did not run stands there with its reason."""
    makers = {"correctness": correctness_table, "training": training_table, "look": look_table}
    makers |= {"solvers": solver_tables, "tuning": tuning_table}
    return makers.get(content["part"], sampling_tables)(content["configurations"])


def wrong(parts: Parts) -> list[tuple[str, ...]]:
    """(step, state, reason) of what is not done, and of what its checks have not proven."""
    rows: list[tuple[str, ...]] = []
    for part, content in parts.items():
        for name, record in content["configurations"].items():
            if record["state"] != "done":
                rows.append((f"{part}: {name}", record["state"], record.get("reason", "")))
            for variant, keys in record.get("unproven", {}).items():
                rows.append((f"{part}: {name}", "unproven", f"{variant}: {', '.join(keys)}"))
    return rows


def summary(parts: Parts) -> str:
    """What went wrong, and the targets."""
    lines = ["## Targets", "", table(" | target | measured | ", targets(parts)), ""]
    if rows := wrong(parts):
        lines = ["## What went wrong", "", table("step | state | why", rows), "", *lines]
    return "\n".join(lines)


def correctness_table(found: Record) -> str:
    counts = ("passed", "failed", "skipped")
    rows = []
    for key, each in found.items():
        numbers = (str(each.get(name, "")) for name in counts)
        rows.append((key, each["state"], *numbers, seconds(each["seconds"])))
    return table("check | state | passed | failed | skipped | time", rows)


def look_table(found: Record) -> str:
    """What PyTorch's attention dispatches to; then the other steps with their time."""
    rows, steps = [], []
    for key, each in found.items():
        steps.append((key, each["state"], seconds(each["seconds"])))
        for shape, seen in each.get("dispatch", {}).items():
            can = ", ".join(name for name, reason in seen["backends"].items() if not reason)
            ran = (", ".join(seen[what]) for what in ("operators", "kernels"))
            rows.append((shape, *ran, can))
    text = table("step | state | time", steps)
    return f"{table(_DISPATCH, rows)}\n\n{text}" if rows else text


def tuning_table(found: Record) -> str:
    rows = [(key, each["state"], each.get("entries", 0)) for key, each in found.items()]
    return table("network | state | shapes that this step added to tuning.json", rows)


def profile_tables(found: Record) -> Iterator[str]:
    """What took longest in one call of each variant."""
    for key, each in found.items():
        for variant, profiled in each.get("profiles", {}).items():
            rows = [
                (f"`{row['name'][:90]}`", row["calls"], seconds(row["us"] / 1e6))
                for row in profiled[:12]
            ]
            yield table(f"{key}: a call of {variant} | launches | in all", rows)


def training_table(found: Record) -> str:
    rows = [
        {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in row.items()
            if not isinstance(value, list)
        }
        for each in found.values()
        for row in each.get("rows", ())
    ]
    return table(" | ".join(rows[0]) if rows else "", [row.values() for row in rows])


def sampling_tables(found: Record) -> str:
    """Of kernels and sampling cells; then of their memory, if it was measured."""
    rows: list[tuple[str, ...]] = []
    memory: list[tuple[str, ...]] = []
    for key, configuration in found.items():
        variants = configuration.get("variants", {})
        plain = variants.get("eager", variants.get("pytorch", {})).get("median_s")
        for variant, row in variants.items():
            if "weights" in row and "reason" not in row:
                size = row["weights"]
                held = size["blocks"], size["ends"], row["peak_bytes"], row.get("reserved_bytes")
                blocks = str(size["live_blocks"])
                name = key.removeprefix("memory ")
                memory.append((name, variant, blocks, *map(mebibytes, held)))
            elif "median_s" not in row:
                rows.append((key, variant, *not_run(row, 6)))
            else:
                tflops = row["tflops"]
                rate = f"{tflops:.3g} TFLOP/s" if tflops else f"{row['gigabytes_per_s']:.3g} GB/s"
                each = seconds(row["per_evaluation_s"]) if "per_evaluation_s" in row else ""
                gain = f"{plain / row['median_s']:.2f}x" if plain else ""
                share, setup = f"{row['share_of_floor']:.0%}", seconds(row["setup_s"])
                rows.append((key, variant, spread(row), each, rate, share, gain, setup))
    text = table(_SAMPLING, rows)
    return f"{text}\n\n{table(_MEMORY, memory)}" if memory else text


def weights_in_proportion(parts: Parts) -> list[str]:
    """For each network and dtype, whether a live block weighs the same at every l, the ends too."""
    found: dict[tuple[str, str], set[tuple[float, int]]] = defaultdict(set)
    for cell, _, row in samples(parts, *parts, memory=True):
        if size := row.get("weights"):
            each = size["blocks"] / size["live_blocks"], size["ends"]
            found[cell["network"], cell["dtype"]].add(each)
    lines = []
    for (network, dtype), sizes in sorted(found.items()):
        verdict = "NOT in proportion to the live blocks"
        if len(sizes) == 1:
            verdict = f"{min(sizes)[0]:.0f} bytes a live block at every l"
        lines.append(f"Weights of {network} in {dtype}: {verdict}")
    return lines


def run_line(number: int, run: Record) -> str:
    """One run: command, device, versions, commit, ceilings."""
    how = f"{run['threads']} threads"
    if smi := run.get("nvidia_smi"):
        how = f"driver {smi['driver_version']}, {smi['clocks.sm']} MHz"
    ceilings = ", ".join(
        f"{key} {value / 1e12:.4g} T/s" for key, value in run.get("ceilings", {}).items()
    )
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "jax", "python"))
    return (
        f"Run {number}: `{run['command']}` on {run['device']}, {how}; {versions};"
        f" commit {run['commit']}; {run['time']}. {ceilings}"
    )


def markdown(parts: Parts) -> str:
    lines = [summary(parts), *weights_in_proportion(parts), ""]
    for name, content in parts.items():
        lines += [f"## {name}", "", part_table(content), ""]
    lines += ["## What one call ran", ""]
    for content in parts.values():
        for text in profile_tables(content["configurations"]):
            lines += [text, ""]
    runs = next(iter(parts.values()))["runs"]
    lines += ["## Runs", "", *(run_line(number, run) + "\n" for number, run in enumerate(runs))]
    return "\n".join(lines)


def plots(parts: Parts, folder: Path) -> list[Path]:
    """Writes the plots that the parts have data for; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # plot -> label of a line -> its points
    lines: Record = {name: defaultdict(dict) for name in _PLOTS}
    for cell, variant, row in samples(parts, "latency", "throughput", "xl"):
        if "median_s" in row and (cell["solver"], cell["steps"]) == ("euler", 4):
            label, each = f"{cell['network']} {variant}", row["per_evaluation_s"] * 1e3
            depth, batch = cell["depth"], cell["batch"]
            lines["latency.png"][f"{label}, batch {batch}"][depth] = each / batch
            lines["batch.png"][f"{label}, l = {depth}"][batch] = each
            lines["floor.png"][f"{label}, batch {batch}"][depth] = row["share_of_floor"]
    for cell, variant, row in samples(parts, *parts, memory=True):
        if "weights" in row and "reason" not in row:
            total, what = row["peak_bytes"], "peak"
            if not total:
                total, what = row["weights"]["blocks"] + row["weights"]["ends"], "weights"
            label = f"{cell['network']} {variant}, batch {cell['batch']}, {what}"
            lines["memory.png"][label][cell["depth"]] = total / 2**20
    made = []
    for name, (x, y, log) in _PLOTS.items():
        shown = {label: points for label, points in lines[name].items() if len(points) > 1}
        if not shown:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for label, points in sorted(shown.items()):
            axes.plot(*zip(*sorted(points.items())), marker="o", label=label)
        scale = {"xscale": "log", "yscale": "log"} if log else {"ylim": (0, None)}
        axes.set(xlabel=x, ylabel=y, xticks=sorted(set().union(*shown.values())), **scale)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
        made.append(folder / name)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("report", __doc__)
    text = "what --out of benchmarks.card was"
    parser.add_argument("folder", type=Path, metavar="DIR", help=text)
    parser.add_argument("--out", type=Path, help="folder for report.md and the plots")
    options = parser.parse_args(arguments)
    try:
        parts = load(options.folder)
        text = markdown(parts)
        print(text)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "report.md").write_text(text)
            print("\n".join(map(str, plots(parts, options.out))))
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
