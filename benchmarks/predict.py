"""What an evaluation should take, beside what a card measured.

    python -m benchmarks.predict [--device H200] [--fp8]
    python -m benchmarks.predict --card DIR

The plans' times by the model of cost (cost.py) at each network, batch and l, as markdown; with
--card, by the ceilings that `benchmarks.card` measured there, beside the times that it measured,
and with the model's error.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from odelt_fast.config import PRESETS

from .cost import CARDS, PLANS, Card, Shape, evaluation, measured_card, serves
from .measure import command_parser
from .report import load
from .tables import seconds, table
from .targets import samples

CELLS = tuple(
    (network, batch, depth)
    for network, batches, depths in (
        ("DiT-B/2", (1, 8, 128), (4, 12)), ("DiT-XL/2", (1, 64), (12, 28))
    )
    for batch in batches
    for depth in depths
)  # fmt: skip


def measured_times(folder: Path) -> tuple[Card, dict[tuple[Any, ...], float]]:
    """The card of the results in a folder, and {(network, batch, l, float8, plan): seconds of an
    evaluation}; ValueError if there are none."""
    parts, times = load(folder), dict[tuple[Any, ...], float]()
    runs = [run for part in parts.values() for run in part["runs"] if "ceilings" in run]
    if not runs:
        raise ValueError(f"{folder} holds no ceilings: run benchmarks.card there first")
    for cell, variant, row in samples(parts, "latency", "throughput", "xl", "peers"):
        ours = variant.partition("-")[0] == "fused" and cell["dtype"] == "bfloat16"
        if not ours or "per_evaluation_s" not in row:
            continue
        plan = row.get("explain", {}).get("plan", "seven")
        key = cell["network"], cell["batch"], cell["depth"], variant.endswith("fp8"), plan
        times[key] = min(times.get(key, math.inf), row["per_evaluation_s"])
    return measured_card(runs[-1]), times


def rows(
    card: Card, float8: bool, times: Mapping[tuple[Any, ...], float]
) -> Iterator[tuple[str, ...]]:
    """Lines of the table: a cell and a plan each."""
    for network, batch, depth in CELLS:
        shape = Shape(PRESETS[network], batch, depth, float8)
        plans = [plan for plan in PLANS if serves(plan, shape)]
        for plan, overlapped in (("seven", False), *((plan, True) for plan in plans)):
            cost = evaluation(card, shape, plan, overlapped)
            name = plan + "+pdl" * (overlapped and plan != "whole")
            found = times.get((network, batch, depth, float8, name))
            rate = cost.flops / cost.seconds / card.rates["float8_e4m3fn" if float8 else "bfloat16"]
            yield (
                f"{network} batch {batch} l={depth}", name, str(cost.kernels), str(cost.barriers),
                f"{cost.memory / 1e6:.0f} MB", f"{cost.flops / 1e9:.0f} GFLOP",
                seconds(cost.seconds), f"{rate:.0%}",
                *((seconds(found), f"{cost.seconds / found - 1:+.0%}") if found else ("", "")),
            )  # fmt: skip


def main() -> int:
    parser = command_parser("predict", __doc__)
    parser.add_argument("--device", choices=sorted(CARDS), default="H200")
    parser.add_argument("--card", type=Path, help="folder of benchmarks.card's results")
    parser.add_argument("--fp8", action="store_true", help="products on float8")
    options = parser.parse_args()
    card, times = CARDS[options.device], dict[tuple[Any, ...], float]()
    if options.card:
        try:
            card, times = measured_times(options.card)
        except ValueError as error:
            parser.error(str(error))
    print(
        f"Predicted for {card.name}: {card.rates['bfloat16'] / 1e12:.0f} TFLOP/s bfloat16,"
        f" {card.bandwidth / 1e12:.2f} TB/s, {card.processors} processors\n"
    )
    header = (
        "an evaluation | plan | launches | barriers | memory | operations | predicted | of rate"
    )
    lines = list(rows(card, options.fp8, times))
    print(table(f"{header} | measured | error", lines) if times else table(header, (
        line[:8] for line in lines
    )))  # fmt: skip
    errors = [abs(float(line[9].rstrip("%"))) for line in lines if line[9]]
    if errors:
        print(f"\nMedian error {statistics.median(errors):.0f} %, largest {max(errors):.0f} %.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
