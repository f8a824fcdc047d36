"""How to sample, as one object: equal ones are equal, impossible ones are refused, and a Sampler
holds the one that it was given."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

from odelt_fast import Sampler
from odelt_fast.operation import Operation, check_schedule, parse_schedule, show_schedule
from tests.helpers.engine_cases import run_fused_on_the_cpu
from tests.helpers.small_model import random_model


def test_equal_operations_are_one_key() -> None:
    pairs = [
        (Operation(solver="dopri5", steps=4), Operation(solver="dopri5", steps=99)),
        (
            Operation(depth_schedule=[(0, 2), (0.5, 4)]),
            Operation(depth_schedule=((0.0, 2), (0.5, 4))),
        ),
        (Operation(rtol=1), Operation(rtol=1.0)),
    ]
    for a, b in pairs:
        assert a == b
        assert hash(a) == hash(b)
    assert Operation(steps=4) != Operation(steps=8)


@pytest.mark.parametrize(
    ("scale", "rows", "mixing"),
    [(None, 1, None), (0, 1, None), (1, 1, None), (1.5, 2, 1.5), (-1, 2, -1.0)],
)
def test_two_rows_are_evaluated_where_velocities_are_mixed(
    scale: float | None, rows: int, mixing: float | None
) -> None:
    operation = Operation(guidance_scale=scale, steps=3, solver="heun2")
    assert (operation.rows_per_image, operation.mixing_scale) == (rows, mixing)
    assert operation.evaluations_per_image == 3 * 2 * rows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": None}, "steps must be a whole number of at least 1, not None"),
        ({"solver": "eulr"}, "perhaps euler"),
        ({"solver": "torchdiffeq:x"}, "must be followed by one of"),
        ({"rtol": -1}, "rtol must be a finite number of at least 0"),
        ({"rtol": 0, "atol": 0}, "must not both be 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number or None"),
        ({"guidance_scale": True}, "guidance_scale must be a finite number or None"),
        ({"time_grid": "shift"}, "time_grid must be uniform, or shift:S"),
        ({"solver": "tsit5", "time_grid": "shift:2"}, "tsit5 chooses its own"),
        ({"depth": 4, "depth_schedule": [(0, 4)]}, "depth 4 and depth_schedule are both given"),
        ({"depth_schedule": [(0.1, 4)]}, "depth_schedule must be a function t -> depth, or pairs"),
        ({"depth_schedule": 4}, "depth_schedule must be a function t -> depth, or pairs"),
        ({"depth_schedule": [(0, 4)], "solver": "dopri5"}, "needs error_norm='batch'"),
        ({"error_norm": "image"}, "error_norm must be one of per_sample, batch"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Operation(**values)


def test_a_schedule_holds_each_depth_until_the_next() -> None:
    schedule = parse_schedule("0:4,0.25:8,0.5:12")
    assert parse_schedule(show_schedule(schedule)) == schedule
    length = Operation(depth_schedule=schedule).length
    assert callable(length)
    assert [length(t) for t in (0, 0.2, 0.25, 0.49, 0.5, 1.0)] == [4, 4, 8, 8, 12, 12]
    assert Operation(depth_schedule=schedule).deepest == 12
    for wrong in ([], [(0, 4), (0, 8)], [(0.5, 4)], [(0, 0)], [(0, 4, 1)], "0:4", [(0, True)]):
        with pytest.raises(ValueError, match="must"):
            check_schedule(wrong)


def test_a_sampler_of_an_operation_is_that_of_its_keywords() -> None:
    model = random_model()
    values = {"depth": 2, "steps": 3, "solver": "heun2", "guidance_scale": 1.5}
    sampler = Sampler.of(model, Operation(**values))
    assert torch.equal(sampler(3, seed=1), Sampler(model, **values)(3, seed=1))
    assert sampler.operation == Operation(**values)
    assert Sampler(model).operation == replace(Operation(), depth=4)


def test_noise_passes_four_calls_to_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call that comes again. Sampler, its shape, fused backend, its graphs, a graph: whoever
    reads the code follows no more."""
    from odelt_fast.engine.graphs import Captured, GraphCache
    from tests.engine.test_graphs import replayed

    stack: list[str] = []

    def replay(self: Captured, inputs: tuple, asked: object = None) -> tuple:
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("odelt_fast."):
                stack.append(frame.f_code.co_name)
            frame = frame.f_back
        return original(self, inputs, asked)

    original = Captured.replay
    monkeypatch.setattr(Captured, "replay", replay)
    device = torch.device("cpu")
    run_fused_on_the_cpu(monkeypatch, lambda: GraphCache(device, capture=replayed))
    sampler = Sampler(random_model())
    for _ in range(3):  # launched, captured, and from then on replayed
        stack.clear()
        sampler(4, seed=1)
    assert stack[-1] == "__call__"
    assert len(stack) <= 4
