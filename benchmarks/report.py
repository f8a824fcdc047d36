"""Tables and plots of what `benchmarks.suite` measured: `python -m benchmarks.report DIR [--out
FOLDER]`.

Prints markdown: for every part a table, each row with its device and the command that made it; and
the project's targets beside what was measured, met or missed. With --out also FOLDER/report.md and
the plots latency.png and memory.png (against l), batch.png (latency of an evaluation against the
batch) and floor.png (share of the floor), where DIR has what they show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Parts = dict[str, dict[str, Any]]  # part -> content of its file
OURS = ("fused", "auto", "eager")  # in this order: the first that ran is what the package does here


@dataclass(frozen=True)
class Found:
    """One variant of one cell, as measured."""

    cell: dict[str, Any]
    variant: str
    row: dict[str, Any]
    run: dict[str, Any]


def load(folder: Path) -> Parts:
    """The parts' files in a folder; ValueError if there are none."""
    parts = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and {"part", "runs", "configurations"} <= set(content):
            parts[content["part"]] = content
    if not parts:
        raise ValueError(
            f"{folder} holds no results: make them with python -m benchmarks.suite --out {folder}"
        )
    return parts


def samples(parts: Parts, *names: str) -> Iterator[Found]:
    """Every measured variant of the sampling cells of the named parts."""
    for name in names or ("latency", "throughput", "xl", "peers"):
        content = parts.get(name, {"configurations": {}})
        for key, configuration in content["configurations"].items():
            if not key.startswith("memory ") and "cell" in configuration:
                for variant, row in configuration["variants"].items():
                    yield Found(
                        configuration["cell"], variant, row, content["runs"][configuration["run"]]
                    )


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(row: dict[str, Any]) -> str:
    return f"{seconds(row['median_s'])} ({seconds(row['low_s'])} to {seconds(row['high_s'])})"


def part_table(content: dict[str, Any]) -> str:
    """One part as a markdown table; a variant that did not run stands there with its reason."""
    part, rows = content["part"], []
    if part == "correctness":
        for key, found in content["configurations"].items():
            counts = tuple(str(found[name]) for name in ("passed", "failed", "skipped"))
            rows.append(
                (key, "green" if found["green"] else "RED", *counts, seconds(found["seconds"]))
            )
        return table(("group", "state", "passed", "failed", "skipped", "time"), rows)
    if part == "training":
        measured = [row for found in content["configurations"].values() for row in found["rows"]]
        names = (
            [name for name, value in measured[0].items() if not isinstance(value, list)]
            if measured
            else []
        )
        return table(
            tuple(names),
            [
                tuple(
                    f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
                    for name in names
                )
                for row in measured
            ],
        )
    if part == "solvers":
        from benchmarks.solver_report import solver_tables  # it uses this module's helpers

        return solver_tables(content)
    memory = []
    for key, configuration in content["configurations"].items():
        plain = (
            configuration["variants"]
            .get("eager", configuration["variants"].get("pytorch", {}))
            .get("median_s")
        )
        for variant, row in configuration["variants"].items():
            if "weights" in row and "reason" not in row:
                size = row["weights"]
                held = tuple(
                    mebibytes(value)
                    for value in (
                        size["blocks"],
                        size["ends"],
                        row["peak_bytes"],
                        row.get("reserved_bytes"),
                    )
                )
                memory.append(
                    (key.removeprefix("memory "), variant, str(size["live_blocks"]), *held)
                )
            elif "median_s" not in row:
                rows.append(
                    (
                        key,
                        variant,
                        f"did not run: {row.get('reason', 'no reason')}",
                        "",
                        "",
                        "",
                        "",
                        "",
                    )
                )
            else:
                rate = (
                    f"{row['tflops']:.3g} TFLOP/s"
                    if row.get("tflops")
                    else f"{row['gigabytes_per_s']:.3g} GB/s"
                )
                each = seconds(row["per_evaluation_s"]) if "per_evaluation_s" in row else ""
                setup = seconds(row["setup_s"]) if "setup_s" in row else ""
                gain = f"{plain / row['median_s']:.2f}x" if plain else ""
                rows.append(
                    (
                        key,
                        variant,
                        spread(row),
                        each,
                        rate,
                        f"{row['share_of_floor']:.0%}",
                        gain,
                        setup,
                    )
                )
    columns = (
        "configuration",
        "variant",
        "median (10 % to 90 %)",
        "evaluation",
        "rate",
        "share of floor",
        "to plain PyTorch",
        "first call",
    )
    text = table(columns, rows)
    if memory:
        header = (
            "memory",
            "variant",
            "live blocks",
            "weights of blocks",
            "of the ends",
            "peak",
            "reserved",
        )
        text += "\n\n" + table(header, memory)
    return text


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"


def best(
    parts: Parts,
    batch: int,
    depth: int,
    steps: int,
    network: str,
    names: tuple[str, ...],
    *sources: str,
) -> float | None:
    """The shortest median of the named variants in one cell."""
    medians = [
        found.row["median_s"]
        for found in samples(parts, *sources)
        if (found.cell["network"], found.cell["batch"], found.cell["depth"], found.cell["steps"]) == (network, batch, depth, steps)
        and found.cell["solver"] == "euler" and found.variant in names and "median_s" in found.row
    ]  # fmt: skip
    return min(medians, default=None)


def peak(parts: Parts, part: str, batch: int, depth: int, variant: str) -> float | None:
    for key, found in parts.get(part, {"configurations": {}})["configurations"].items():
        cell = found.get("cell", {})
        if key.startswith("memory ") and (cell["network"], cell["batch"], cell["depth"]) == (
            "DiT-B/2",
            batch,
            depth,
        ):
            return found["variants"].get(variant, {}).get("peak_bytes")
    return None


def ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def targets(parts: Parts) -> list[tuple[str, str, str, str]]:
    """(what, target, measured, verdict) of the goals for DiT-B/2 and DiT-XL/2 in bfloat16 on one
    GPU."""
    base, modes = "DiT-B/2", ("max-autotune", "reduce-overhead")
    rates = [
        run["ceilings"]["bfloat16"]
        for name in ("throughput", "xl", "peers")
        for run in parts.get(name, {"runs": []})["runs"]
        if "ceilings" in run
    ]

    def evaluation(batch: int, depth: int, steps: int, part: str) -> float | None:
        return ratio(best(parts, batch, depth, steps, base, ("fused",), part), steps)

    def against(
        batch: int, depth: int, peers: tuple[str, ...], ours: str = "fused"
    ) -> float | None:
        return ratio(
            best(parts, batch, depth, 4, base, peers, "peers"),
            best(parts, batch, depth, 4, base, (ours,), "peers"),
        )

    def rate(network: str, batch: int, depth: int, part: str) -> float | None:
        found = [f.row["tflops"] * 1e12 for f in samples(parts, part) if f.variant == "fused" and "tflops" in f.row
                 and (f.cell["network"], f.cell["batch"], f.cell["depth"]) == (network, batch, depth)]  # fmt: skip
        return ratio(max(found, default=None), max(rates, default=None))

    def line(
        what: str, bound: float, value: float | None, show: Callable[[float], str], least: bool
    ) -> tuple[str, str, str, str]:
        if value is None:
            return what, f"{'at least' if least else 'at most'} {show(bound)}", "not measured", ""
        met = value >= bound if least else value <= bound
        return (
            what,
            f"{'at least' if least else 'at most'} {show(bound)}",
            show(value),
            "met" if met else "missed",
        )

    def times(value: float) -> str:
        return f"{value:.2f}x"

    def percent(value: float) -> str:
        return f"{value:.1%}"

    def plain(value: float) -> str:
        return f"{value:.3f}"

    rows = [
        line(
            "batch 1, l = 12, evaluation in a trajectory (T = 128)",
            180e-6,
            evaluation(1, 12, 128, "latency"),
            seconds,
            False,
        ),
        line(
            "batch 1, l = 4, evaluation in a trajectory (T = 128)",
            70e-6,
            evaluation(1, 4, 128, "latency"),
            seconds,
            False,
        ),
        line(
            "batch 1, l = 4, one-step sample from call to result",
            120e-6,
            evaluation(1, 4, 1, "latency"),
            seconds,
            False,
        ),
        line(
            "batch 1, l = 12, over the better torch.compile mode",
            1.6,
            against(1, 12, modes),
            times,
            True,
        ),
        line(
            "batch 1, l = 4, over the better torch.compile mode",
            1.6,
            against(1, 4, modes),
            times,
            True,
        ),
        line(
            "batch 128, l = 12, of the matrix-product rate",
            0.75,
            rate(base, 128, 12, "throughput"),
            percent,
            True,
        ),
        line(
            "batch 128, l = 12, over the better torch.compile mode",
            1.15,
            against(128, 12, modes),
            times,
            True,
        ),
        line(
            "batch 128, l = 12, float8, over the better torch.compile mode",
            1.6,
            against(128, 12, modes, "fused-fp8"),
            times,
            True,
        ),
        line(
            "batch 128, l = 12, over the JAX reference",
            2.5,
            against(128, 12, ("jax",)),
            times,
            True,
        ),
        line(
            "DiT-XL/2, batch 64, l = 28, of the matrix-product rate",
            0.75,
            rate("DiT-XL/2", 64, 28, "xl"),
            percent,
            True,
        ),
    ]
    for depth in (4, 8):
        value = ratio(evaluation(128, depth, 4, "throughput"), evaluation(128, 12, 4, "throughput"))
        rows.append(
            line(
                f"batch 128, latency at l = {depth} over l = 12",
                depth / 12 + 0.03,
                value,
                plain,
                False,
            )
        )
    value = ratio(peak(parts, "latency", 1, 4, "fused"), peak(parts, "latency", 1, 12, "fused"))
    return [*rows, line("batch 1, peak memory at l = 4 over l = 12", 0.45, value, plain, False)]


def weights_in_proportion(parts: Parts) -> list[str]:
    """A line for each network and dtype: whether a live block weighs the same at every l, and the
    ends too."""
    found: dict[tuple[str, str], set[tuple[float, int]]] = {}
    for content in parts.values():
        for key, configuration in content["configurations"].items():
            if key.startswith("memory "):
                for row in configuration["variants"].values():
                    if "weights" in row:
                        size, cell = row["weights"], configuration["cell"]
                        found.setdefault((cell["network"], cell["dtype"]), set()).add(
                            (size["blocks"] / size["live_blocks"], size["ends"])
                        )
    return [
        f"Weights of {network} in {dtype}: "
        + (
            f"{sizes.copy().pop()[0]:.0f} bytes a live block at every l"
            if len(sizes) == 1
            else "NOT in proportion to the live blocks"
        )
        for (network, dtype), sizes in sorted(found.items())
    ]


def markdown(parts: Parts) -> str:
    lines = []
    for name, content in parts.items():
        lines += [f"## {name}", "", part_table(content), ""]
        for number, run in enumerate(content["runs"]):
            smi = run.get("nvidia_smi") or {}
            driver = (
                f", driver {smi['driver_version']}, {smi['clocks.sm']} MHz"
                if smi
                else f", {run['threads']} threads"
            )
            ceilings = ", ".join(
                f"{key} {value / 1e12:.4g} T/s" for key, value in run.get("ceilings", {}).items()
            )
            versions = (
                f"torch {run['torch']}, triton {run['triton']}, jax {run['jax']}, python"
                f" {run['python']}"
            )
            lines.append(
                f"Run {number}: `{run['command']}` on {run['device']}{driver}; {versions}; "
                f"commit {run['commit']}; {run['time']}. {ceilings}"
            )
        lines.append("")
    return "\n".join(
        [
            *lines,
            *weights_in_proportion(parts),
            "",
            "## Targets",
            "",
            table(("", "target", "measured", ""), targets(parts)),
            "",
        ]
    )


def plots(parts: Parts, folder: Path) -> list[Path]:
    """Writes the plots that the parts have data for; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made: list[Path] = []

    def draw(
        name: str, lines: dict[str, dict[float, float]], x: str, y: str, log: bool = False
    ) -> None:
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if not lines:
            return
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for label, points in sorted(lines.items()):
            axes.plot(*zip(*sorted(points.items())), marker="o", label=label)
        axes.set(
            xlabel=x,
            ylabel=y,
            xticks=sorted({value for points in lines.values() for value in points}),
        )
        if log:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(0)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
        made.append(folder / name)

    latency: dict[str, dict[float, float]] = {}
    batch: dict[str, dict[float, float]] = {}
    floor: dict[str, dict[float, float]] = {}
    for found in samples(parts, "latency", "throughput", "xl"):
        cell, row = found.cell, found.row
        if "median_s" in row and cell["solver"] == "euler":
            label, each = f"{cell['network']} {found.variant}", row["per_evaluation_s"] * 1e3
            if cell["steps"] == 4:
                latency.setdefault(f"{label}, batch {cell['batch']}", {})[cell["depth"]] = (
                    each / cell["batch"]
                )
                batch.setdefault(f"{label}, l = {cell['depth']}", {})[cell["batch"]] = each
                floor.setdefault(f"{label}, batch {cell['batch']}", {})[cell["depth"]] = row[
                    "share_of_floor"
                ]
    memory: dict[str, dict[float, float]] = {}
    for content in parts.values():
        for key, configuration in content["configurations"].items():
            for variant, row in configuration.get("variants", {}).items():
                if key.startswith("memory ") and "weights" in row and "reason" not in row:
                    cell = configuration["cell"]
                    total = row["peak_bytes"] or row["weights"]["blocks"] + row["weights"]["ends"]
                    what = "peak" if row["peak_bytes"] else "weights"
                    memory.setdefault(
                        f"{cell['network']} {variant}, batch {cell['batch']}, {what}", {}
                    )[cell["depth"]] = total / 2**20
    draw("latency.png", latency, "active blocks l", "ms an evaluation and image (T = 4)")
    draw("memory.png", memory, "active blocks l", "MiB")
    draw("batch.png", batch, "batch", "ms an evaluation (T = 4)", log=True)
    draw("floor.png", floor, "active blocks l", "share of the floor (T = 4)")
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="what --out of benchmarks.suite was"
    )
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
