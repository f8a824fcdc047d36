"""Holds the planner to what then happens: `python -m tests.stress.check_planner [--budgets 20]`, on
a machine that does nothing else.

Profiles what a model's table of quality has, then draws budgets, every second one with a limit on
memory. For each, the planner's choice must be the best that a search over all measurements by brute
force finds within the budget; if there is nothing, it must answer with the nearest. The choice then
runs alone, and the predicted latency must be within 15 % of the median of what happens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.evaluation.machine import this_machine
from odelt_fast.evaluation.measuring import timed
from odelt_fast.evaluation.results import higher_is_better
from odelt_fast.operation import Operation
from odelt_fast.planning.evidence import Evidence, find_quality
from odelt_fast.planning.planner import BudgetError
from odelt_fast.planning.profile import Measurement
from odelt_fast.planning.profiler import Profiler
from odelt_fast.sampling.sampler import Sampler

TOLERANCE = 0.15


class Budget(NamedTuple):
    """Seconds for a batch; bytes, or no limit on them."""

    latency: float
    memory: float | None
    batch: int

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {show_memory(self.memory)}"
        return f"{show_seconds(self.latency)}{memory} for {self.batch}"


def random_budgets(measurements: list[Measurement], count: int, seed: int) -> list[Budget]:
    """Latencies spread evenly, in their logarithm, from a little below the fastest to a little
    above the slowest."""
    draw, found = random.Random(seed), []
    for index in range(count):
        batch = draw.choice(sorted({m.batch for m in measurements}))
        mine = [m for m in measurements if m.batch == batch]
        low, high = min(m.latency for m in mine), max(m.latency for m in mine)
        memories = sorted(m.peak_memory for m in mine if m.peak_memory is not None)
        memory = (
            draw.uniform(0.95 * memories[0], 1.05 * memories[-1])
            if index % 2 and memories
            else None
        )
        found.append(Budget(0.8 * low * (1.5 * high / low) ** draw.random(), memory, batch))
    return found


def brute_force(evidence: Evidence, metric: str, budget: Budget) -> tuple[float | None, float]:
    """The best quality within the budget (None: nothing is), and the least factor by which anything
    exceeds it: every measurement, one by one, without the planner."""
    assert evidence.quality is not None
    best, nearest = None, float("inf")
    for m in evidence.profile.measurements:
        row = evidence.quality.rows.get(m.operation)
        if m.batch != budget.batch or row is None:
            continue
        memory = float("inf") if m.peak_memory is None else m.peak_memory
        excess = max(
            m.latency / budget.latency, 0 if budget.memory is None else memory / budget.memory
        )
        nearest = min(nearest, excess)
        value = row[metric].mean
        if excess <= 1 and (
            best is None or (value > best if higher_is_better(metric) else value < best)
        ):
            best = value
    return best, nearest


def measure(model: Any, operation: Operation, batch: int, seconds: float) -> float:
    """Median seconds of a warm call, alone, not taking turns as in the profile: at least 5 of them,
    for so many seconds."""
    sampler = Sampler.of(model, operation, batch_size=batch)
    for seed in range(2):
        sampler(batch, seed=seed)
    samples: list[float] = []
    while len(samples) < 5 or sum(samples) < seconds:
        call = partial(sampler, batch, seed=len(samples))
        samples.append(timed(call, model.device)[1])
    return statistics.median(samples)


def check(options: argparse.Namespace) -> int:
    """Prints a line a budget; returns how many things were wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        profiler = Profiler(
            options.model,
            device,
            options.profile or Path(folder) / "profile.json",
            seconds=options.seconds,
        )
        quality = find_quality(
            options.model, profiler.profile.config, profiler.weights, options.quality
        )
        if quality is None:
            raise ValueError(f"{options.model} has no table of quality: give --quality")
        batches = tuple(options.batches)
        evidence = Evidence(
            options.model,
            profiler.run(
                quality.operations(), batches, report=lambda line: print(line, flush=True)
            ),
            quality,
            profiler.weights,
        )
    mine = [
        m
        for m in evidence.profile.measurements
        if m.batch in batches and m.precision == "float32" and m.guidance_scale is None
    ]
    metric, model = quality.metric(), load_model(options.model, device, torch.float32)
    print(f"{len(mine)} measurements on {this_machine(device).device}, {metric}")
    print("| budget | choice | best | predicted | happened | off |\n|---|---|---|---|---|---|")
    happened: dict[tuple[Operation, int], float] = {}
    for budget in random_budgets(mine, options.budgets, options.seed):
        best, nearest = brute_force(evidence, metric, budget)
        try:
            point = evidence.choose(budget.latency, budget.memory, batch=budget.batch).candidate
            assert point.quality is not None
            right = point.quality.mean == best and point.latency <= budget.latency
            right = right and (budget.memory is None or (point.memory or 0) <= budget.memory)
            found = f"{point.quality.mean:.4g}"
        except BudgetError as error:
            point = error.nearest
            excess = max(
                point.latency / budget.latency,
                0 if budget.memory is None else (point.memory or float("inf")) / budget.memory,
            )
            right, found = best is None and excess == nearest, "impossible, the nearest"
        key = point.operation, budget.batch
        if key not in happened:
            happened[key] = measure(model, *key, options.alone)
        off = happened[key] / point.latency - 1
        failures += (not right) + (abs(off) > TOLERANCE)
        said = (
            f"{found if right else f'WRONG: {found}, not {best}'} | {show_seconds(point.latency)} |"
            f" {show_seconds(happened[key])}"
        )
        print(
            f"| {budget} | {point.operation} | {said} |"
            f" {off:+.1%}{' WRONG' if abs(off) > TOLERANCE else ''} |",
            flush=True,
        )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--quality", help="folder of an evaluation, or its results.json")
    parser.add_argument(
        "--profile", type=Path, help="file to keep the profile in, or to go on from"
    )
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="of profiling a batch size")
    parser.add_argument("--alone", type=float, default=2.0, help="seconds of running a choice")
    parser.add_argument("--seed", type=int, default=0)
    failures = check(parser.parse_args())
    print("all as planned" if not failures else f"{failures} things were wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
