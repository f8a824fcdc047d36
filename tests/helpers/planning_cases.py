"""Operations, profiles and tables of quality for the tests of planning."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from odelt_fast.checkpoints.folder import read_config
from odelt_fast.cli import main
from odelt_fast.evaluation.machine import Machine, this_machine
from odelt_fast.operation import Operation, Schedule
from odelt_fast.planning.profile import (
    Measurement,
    Profile,
    default_path,
)
from odelt_fast.planning.profiler import operations_of
from odelt_fast.planning.quality import Quality, Value
from tests.stress.kill_evaluate import MODEL

WEIGHTS = "a" * 64
SOLVERS = ("euler", "heun2", "dopri5")


def steps_of(depth: int, steps: int) -> Operation:
    """Equal steps of Euler's."""
    return Operation(depth=depth, steps=steps)


def at_tolerance(depth: int, solver: str, tolerance: float) -> Operation:
    return Operation(depth=depth, solver=solver, rtol=tolerance, atol=tolerance)


def scheduled(steps: int, schedule: Schedule = ((0.0, 2), (0.5, 4))) -> Operation:
    return Operation(depth_schedule=schedule, steps=steps)


def cost(
    operation: Operation, batch: int, latency: float, peak: int | None = 1, **changes: Any
) -> Measurement:
    weights = WEIGHTS if operation.steps is None else None
    found = Measurement(
        operation,
        batch,
        "float32",
        latency,
        latency,
        latency,
        5,
        float(operation.steps or 20),
        peak,
        weights,
    )
    return replace(found, **changes)


def profile_of(*measurements: Measurement) -> Profile:
    return Profile(Machine("a machine", 1, "odelt-fast 0", "eager"), MODEL, "digits", measurements)


def table(
    values: dict[Operation, float], metric: str = "a Frechet distance", scale: float | None = None
) -> Quality:
    rows = {
        replace(operation, guidance_scale=scale): {metric: Value(value, None)}
        for operation, value in values.items()
    }
    return Quality(rows, (metric,), 100, 1, MODEL, WEIGHTS, "float32", Path("quality.json"))


def random_evidence(draw: random.Random) -> tuple[Profile, Quality]:
    """A profile and a table that share some operations, with many equal values."""
    operations = operations_of((2, 4), SOLVERS, (1, 2, 4, 8), (1e-1, 1e-2))
    measured = [op for op in operations if draw.random() < 0.8]
    ms = [
        cost(op, batch, draw.choice((1, 2, 3, 5, 8, 13)) * 1e-3, draw.choice((None, 1, 2, 3)))
        for op in measured
        for batch in (1, 4)
    ]
    valued = {
        op: draw.choice((0.1, 0.2, 0.3, 0.5, 0.9)) for op in operations if draw.random() < 0.8
    }
    return profile_of(*ms), table(valued, draw.choice(("recognised", "a Frechet distance")))


def profiled(model: str, *options: str) -> Path:
    arguments = [
        "--model",
        model,
        "--dtypes",
        "float32",
        "--batches",
        "1",
        "3",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--json",
        *options,
    ]
    assert main(["profile", *arguments]) == 0
    return default_path(this_machine("cpu"), read_config(model))
