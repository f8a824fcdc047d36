"""The adaptive solve on the device: the host loop's numbers to the last bit, and nothing in it that
a CUDA graph could not repeat."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from odelt_fast.engine import operators
from odelt_fast.engine.device_adaptive import DeviceAdaptive, repeat
from odelt_fast.solvers.options import Limits
from odelt_fast.solvers.solution import Solution
from odelt_fast.solvers.step_control import DONE, MAX_STEPS, NON_FINITE, STEP_UNDERFLOW
from odelt_fast.solvers.tableau import find_tableau
from tests.helpers.solving import solve_adaptive

MATRIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
SOLVERS = ("dopri5", "tsit5", "bosh3", "dop853", "adaptive_heun")
PARTS = ("x", "status", "accepted", "rejected", "evaluations")


@functools.cache
def matrix(dtype: torch.dtype, device: torch.device) -> Tensor:
    """MATRIX where it is wanted, copied once: a capture must not copy from the host."""
    return MATRIX.to(device, dtype)


def smooth(t: Tensor, x: Tensor, log2_steps: int) -> Tensor:
    return torch.tanh(x @ matrix(x.dtype, x.device)) * torch.cos(7 * t[:, None].to(x.dtype))


def brittle(t: Tensor, x: Tensor, log2_steps: int) -> Tensor:
    """NaN for some samples after t = 0.5."""
    return torch.where((t[:, None] > 0.5) & (x[:, :1] > 1.0), torch.nan, smooth(t, x, log2_steps))


def stiff(t: Tensor, x: Tensor, log2_steps: int) -> Tensor:
    return torch.where(
        t[:, None] < 0.4, x, 1e40 * torch.sign(x) * torch.sin(1e9 * t[:, None].to(x.dtype))
    )


def states(seed: int = 1) -> Tensor:
    """(5, 6) of very different sizes, one row of zeros: the samples take different numbers of
    steps."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [[0.1], [1], [3], [10], [0]]
    )


def device_adaptive(
    field: Any,
    x: Tensor,
    solver: str,
    t0: float = 0.0,
    t1: float = 1.0,
    ops: Any = None,
    **limits: Any,
) -> DeviceAdaptive:
    return DeviceAdaptive(field, x, 7, find_tableau(solver)[0], Limits(**limits), (t0, t1), ops)


def on_device(
    field: Any, x: Tensor, solver: str, **settings: Any
) -> tuple[Solution, DeviceAdaptive]:
    solve = device_adaptive(field, x, solver, **settings)
    solve.start()
    while solve.flag.item():
        solve.attempt()
    return solve.solution(), solve


def assert_same(one: Solution, other: Solution) -> None:
    for part in PARTS:
        torch.testing.assert_close(
            getattr(one, part), getattr(other, part), rtol=0, atol=0, equal_nan=True, msg=part
        )


@pytest.mark.parametrize("field", [smooth, brittle], ids=lambda field: field.__name__)
@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_host_loop_to_the_last_bit(solver: str, norm: str, field: Any) -> None:
    for rtol, (t0, t1), max_steps in itertools.product(
        (1e-1, 1e-4), ((0.0, 1.0), (1.0, 0.0)), (4096, 7)
    ):
        settings = {
            "t0": t0,
            "t1": t1,
            "rtol": rtol,
            "atol": rtol,
            "max_steps": max_steps,
            "error_norm": norm,
        }
        host = solve_adaptive(field, states(), 7, find_tableau(solver)[0], **settings)
        assert_same(host, on_device(field, states(), solver, **settings)[0])


def test_every_status_comes_about() -> None:
    seen = set()
    for field, norm, max_steps in itertools.product(
        (smooth, brittle, stiff), ("per_sample", "batch"), (4096, 3)
    ):
        x = states()
        x[3, 2] = torch.inf if field is smooth else x[3, 2]
        host = solve_adaptive(
            field, x, 7, find_tableau("dopri5")[0], max_steps=max_steps, error_norm=norm
        )
        assert_same(host, on_device(field, x, "dopri5", max_steps=max_steps, error_norm=norm)[0])
        seen |= set(host.status.tolist())
    assert {DONE, MAX_STEPS, NON_FINITE} <= seen <= {DONE, MAX_STEPS, NON_FINITE, STEP_UNDERFLOW}


def test_no_time_to_cross_ends_at_once() -> None:
    solution, solve = on_device(smooth, states(), "dopri5", t0=0.3, t1=0.3)
    assert solution.status.tolist() == [DONE] * 5
    assert torch.equal(solution.x, states())
    assert solve.attempts.item() == 0


def test_a_second_start_forgets_the_first_solve() -> None:
    first, solve = on_device(smooth, states(1), "dopri5")
    solve.x0.copy_(states(2))
    solve.start()
    while solve.flag.item():
        solve.attempt()
    assert_same(solve.solution(), on_device(smooth, states(2), "dopri5")[0])
    assert_same(
        first, on_device(smooth, states(1), "dopri5")[0]
    )  # what was given out is not overwritten


def test_attempts_after_the_end_change_nothing() -> None:
    """So the flag may be read late: the replayed step runs on until the host has seen it."""
    x = states()
    x[0, 0] = torch.nan
    expected, reference = on_device(brittle, x, "tsit5")
    solve = DeviceAdaptive(brittle, x, 7, find_tableau("tsit5")[0])
    solve.start()
    calls = 0

    def attempt() -> None:
        nonlocal calls
        calls += 1
        solve.attempt()

    repeat(attempt, solve.flag)
    assert_same(expected, solve.solution())
    assert solve.attempts.item() == reference.attempts.item()
    assert 0 < calls - reference.attempts.item() <= 2


class NoHost(TorchDispatchMode):
    """Fails on a value that is read on the host, and on data that comes from there."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        assert not any(
            word in name
            for word in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "lift_fresh")
        ), name
        if name in ("aten::_to_copy", "aten::copy_"):
            named = (kwargs or {}).get("device")
            devices = {given.device.type for given in args if isinstance(given, Tensor)} | (
                {torch.device(named).type} if named else set()
            )
            assert len(devices) == 1, f"{name} between {devices}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_read_on_the_host_and_all_state_stays_in_place(solver: str, norm: str) -> None:
    x = states()
    solve = device_adaptive(smooth, x, solver, error_norm=norm)
    places = {
        name: value.data_ptr() for name, value in vars(solve).items() if isinstance(value, Tensor)
    }
    with NoHost():
        solve.start()
        solve.attempt()
    assert {
        name: value.data_ptr() for name, value in vars(solve).items() if isinstance(value, Tensor)
    } == places
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHost():
        solve.flag.item()


def test_the_evaluations_are_counted() -> None:
    calls = 0

    def counted(t: Tensor, x: Tensor, log2_steps: int) -> Tensor:
        nonlocal calls
        calls += 1
        return smooth(t, x, log2_steps)

    for solver in SOLVERS:
        calls = 0
        _, solve = on_device(counted, states(), solver)
        assert calls == 2 + solve.attempts.item() * solve.evaluations_per_attempt


def test_mistakes_are_refused() -> None:
    x, dopri5 = states(), "dopri5"
    for message, tableau, settings in (
        ("no error estimate", "rk4", {}),
        ("error_norm must be one of", dopri5, {"error_norm": "max"}),
        ("rtol must be", dopri5, {"rtol": -1.0}),
        ("max_steps must be", dopri5, {"max_steps": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            device_adaptive(smooth, x, tableau, **settings)
    with pytest.raises(ValueError, match="field gave shape"):
        on_device(lambda t, x, i: x[:, :3], x, "dopri5")


@pytest.mark.parametrize("field", [smooth, brittle], ids=lambda field: field.__name__)
@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_kernels_form_of_a_step_takes_the_same_steps(
    solver: str, norm: str, field: Any
) -> None:
    """On whatever the operators are given in plain PyTorch; `test_kernels_solver` holds the kernels
    to those."""
    ops = operators.load_operators("reference")
    for tolerance, (t0, t1) in itertools.product((1e-1, 1e-3), ((0.0, 1.0), (1.0, 0.0))):
        settings = {"t0": t0, "t1": t1, "rtol": tolerance, "atol": tolerance, "error_norm": norm}
        host = solve_adaptive(field, states().double(), 7, find_tableau(solver)[0], **settings)
        device, solve = on_device(field, states().double(), solver, ops=ops, **settings)
        for part in PARTS:
            near = (
                {"rtol": 1e-9, "atol": 1e-9 * tolerance} if part == "x" else {"rtol": 0, "atol": 0}
            )
            torch.testing.assert_close(
                getattr(device, part), getattr(host, part), **near, equal_nan=True, msg=part
            )
        solve.attempt()  # after the end it changes nothing
        assert_same(device, solve.solution())


def test_many_samples_go_without_the_kernels() -> None:
    ops = operators.load_operators("reference")
    assert device_adaptive(smooth, torch.zeros(ops.MOST_SAMPLES, 1), "dopri5", ops=ops).ops is ops
    assert (
        device_adaptive(smooth, torch.zeros(ops.MOST_SAMPLES + 1, 1), "dopri5", ops=ops).ops is None
    )
