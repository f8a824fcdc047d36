"""The solvers' kernels: a seeded sample of `kernel_cases.py`, plain steps, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast.kernels.adaptive_step import (
    MOST_SAMPLES,
    adaptive_step_update,
    adaptive_step_update_reference,
    first_attempt,
)
from odelt_fast.solvers.step_control import STATUSES
from odelt_fast.solvers.tableau import Tableau, find_tableau
from tests.helpers.kernel_cases_solver import (
    TABLEAUS,
    both_solutions,
    hard_field,
    rules_tensor,
    tableau_tensors,
)

DOPRI5 = find_tableau("dopri5")[0]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CASES = 6
# In a child: the interpreter must be asked for before Triton is imported, and the rest of the suite
# runs without it.
RUN = (
    "import sys; from tests.stress import kernel_cases; kernel_cases.REGISTRIES ="
    " ('tests.helpers.kernel_cases_solver',); sys.exit(kernel_cases.main())"
)


@pytest.fixture(scope="module")
def sample() -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, "--interpret", "--cases", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return "\n" + run.stdout + run.stderr


@pytest.mark.parametrize("kernel", ["combine_stages", "adaptive_step", "adaptive_solve"])
def test_kernel_is_right(sample: str, kernel: str) -> None:
    assert f"\n{kernel}: {CASES} of {CASES} cases right" in sample, sample


def states(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(
        (batch, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda tableau: tableau.name)
@pytest.mark.parametrize("error_norm", ["per_sample", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.9, -0.3)])
def test_plain_form_takes_the_hosts_steps_bit_by_bit(
    tableau: Tableau, error_norm: str, dtype: torch.dtype, t0: float, t1: float
) -> None:
    x = states(7, dtype)
    tolerances = {"rtol": 1e-3, "atol": 1e-2, "max_steps": 60}
    device, host = both_solutions(
        adaptive_step_update_reference, hard_field, x, tableau, t0, t1, error_norm, **tolerances
    )
    for name in ("x", "status", "accepted", "rejected", "evaluations"):
        assert torch.equal(getattr(device, name), getattr(host, name)), name
    assert len(set(host.accepted.tolist())) > 1 or error_norm == "batch"
    assert int(host.rejected.sum()) or t1 < t0


def test_hard_field_ends_in_every_way() -> None:
    seen = set()
    for max_steps, x in (
        (12, states(7, torch.float32)),
        (4000, states(7, torch.float32)),
        (4000, 1e30 * states(7, torch.float32)),
    ):
        tolerances = {"rtol": 1e-3, "atol": 1e-3, "max_steps": max_steps}
        for tableau in TABLEAUS[1:3]:
            device, host = both_solutions(
                adaptive_step_update_reference,
                hard_field,
                x,
                tableau,
                0.0,
                1.0,
                "per_sample",
                **tolerances,
            )
            assert torch.equal(device.status, host.status)
            seen |= set(host.status.tolist())
    assert {STATUSES[status] for status in seen} >= {"done", "max_steps", "non_finite"}


def test_step_is_as_long_as_what_is_left_at_the_end() -> None:
    nodes, _, _ = tableau_tensors(DOPRI5, CPU)
    for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
        rules = rules_tensor(DOPRI5, t0, t1, 1e-2, 100, CPU)
        halfway = torch.tensor([t0, 0.5, 0.5, t1], dtype=torch.float64)
        control = torch.stack(
            [
                halfway,
                torch.tensor([0.1, 0.2, 0.4999, 0.3], dtype=torch.float64),
                *torch.ones(3, 4, dtype=torch.float64),
            ]
        )
        step, times, last = first_attempt(control, nodes, rules)
        sign = t1 - t0
        assert torch.allclose(
            step * sign, torch.tensor([0.1, 0.2, 0.5, 0.0], dtype=torch.float64), rtol=1e-15, atol=0
        )
        assert last.tolist() == [False, False, True, True]
        assert times[-1, 2:].tolist() == [t1, t1]  # no rounding of t + h
        assert torch.allclose(times[1], halfway + 0.2 * step, rtol=1e-15, atol=0)


def operands(batch: int = 2, **changes: Tensor | None) -> dict[str, object]:
    nodes, error, error3 = tableau_tensors(DOPRI5, CPU)
    x, f64 = torch.zeros(batch, 3), torch.float64
    given: dict[str, object] = {
        "x": x, "x_new": x.clone(), "stages": torch.zeros(7, batch, 3),
        "control": torch.ones(5, batch, dtype=f64),
        "counters": torch.zeros(4, batch, dtype=torch.int64),
        "step": torch.zeros(batch, dtype=f64), "times": torch.zeros(7, batch, dtype=f64),
        "running": torch.ones(1, dtype=torch.int32), "nodes": nodes, "error": error,
        "error3": error3, "rules": rules_tensor(DOPRI5, 0.0, 1.0, 1e-2, 100, CPU),
        "shared": False, "fsal": True,
    }  # fmt: skip
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_new": torch.zeros(2, 4)}, r"x_new must be contiguous \(2, 3\)"),
        ({"x": torch.zeros(3, 2).t()}, "x must be contiguous .* of strides"),
        (
            {"stages": torch.zeros(7, 2, 3).half()},
            "stages must be .* in torch.float32, not .* in torch.float16",
        ),
        ({"control": torch.ones(5, 2)}, "control must be .* in torch.float64"),
        ({"times": torch.zeros(6, 2, dtype=torch.float64)}, r"times must be contiguous \(7, 2\)"),
        ({"error": torch.zeros(6, dtype=torch.float64)}, r"error must be contiguous \(7,\)"),
        ({"rules": torch.zeros(3, dtype=torch.float64)}, r"rules must be contiguous \(11,\)"),
        ({}, "adaptive_step_update: the kernel runs on CUDA tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive_step_update(**operands(**changes))


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=f"B up to {MOST_SAMPLES}"):
        adaptive_step_update(**operands(MOST_SAMPLES + 1))
