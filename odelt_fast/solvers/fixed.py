"""Integration of a velocity field from noise (t = 0) to data (t = 1), or between any two times: the
solvers by name, and given steps.

A field is a function (t, x, step index) -> dx/dt of x's shape and dtype, x (B, ...). Fixed steps
pass t as a number; adaptive ones (`adaptive`) as a (B,) float64 tensor, since every sample has its
own time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.solvers.adaptive import ERROR_NORMS, check_tolerances, integrate_adaptive
from odelt_fast.solvers.solution import (
    DONE,
    MAX_STEPS,
    NON_FINITE,
    RUNNING,
    STATUSES,
    STEP_UNDERFLOW,
    Field,
    Hook,
    Solution,
    check_times,
    combine,
    hermite,
)
from odelt_fast.solvers.tableau import Tableau, find_tableau
from odelt_fast.solvers.torchdiffeq import (
    TORCHDIFFEQ_ADAPTIVE,
    TORCHDIFFEQ_FIXED,
    integrate_torchdiffeq,
)

__all__ = [
    "DONE",
    "ERROR_NORMS",
    "MAX_STEPS",
    "NON_FINITE",
    "RUNNING",
    "STATUSES",
    "STEP_UNDERFLOW",
    "TORCHDIFFEQ_ADAPTIVE",
    "TORCHDIFFEQ_FIXED",
    "Field",
    "Hook",
    "Solution",
    "check_solver",
    "check_time_grid",
    "check_tolerances",
    "integrate",
    "integrate_adaptive",
    "integrate_fixed",
    "integrate_torchdiffeq",
    "is_adaptive",
    "predict_and_renoise",
    "solve",
    "time_grid",
]


def check_solver(name: str) -> str:
    """`name` if it is a solver; otherwise ValueError that names those there are."""
    if isinstance(name, str) and name.startswith("torchdiffeq:"):
        allowed = (*TORCHDIFFEQ_ADAPTIVE, *TORCHDIFFEQ_FIXED)
        if name.removeprefix("torchdiffeq:") not in allowed:
            raise ValueError(
                f"solver torchdiffeq: must be followed by one of {', '.join(allowed)}, not {name!r}"
            )
    else:
        find_tableau(name)
    return name


def is_adaptive(solver: str) -> bool:
    """Whether a solver chooses its own steps."""
    if solver.startswith("torchdiffeq:"):
        return solver.removeprefix("torchdiffeq:") in TORCHDIFFEQ_ADAPTIVE
    return find_tableau(solver)[1]


def check_time_grid(grid: str | tuple[str, float]) -> float:
    """The shift s that a time grid asks for: 1 for "uniform"; "shift:3.0" or ("shift", 3.0) give 3.
    ValueError for anything else."""
    if isinstance(grid, str) and grid == "uniform":
        return 1.0
    try:
        name, value = grid.split(":", 1) if isinstance(grid, str) else grid
        shift = float(value) if name == "shift" and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        shift = math.nan
    if not 0 < shift < math.inf:
        raise ValueError(
            "time_grid must be uniform, or shift:S with a finite S above 0 (shift:3.0), not"
            f" {grid!r}"
        )
    return shift


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 0 to 1: t = u/(s - (s - 1) u) for u = i/steps.

    A shift s > 1 spends more steps near the noise, where images of high resolution need them. It is
    tau' = s tau/(1 + (s - 1) tau) of Esser et al. 2024 (equation 23, s = sqrt(m/n)) for their noise
    level tau = 1 - t.
    """
    return [u / (shift - (shift - 1) * u) for u in (i / steps for i in range(steps))] + [1.0]


def integrate(
    field: Field,
    x: Tensor,
    steps: int,
    log2_steps: int,
    solver: str = "euler",
    on_step: Hook | None = None,
    shift: float = 1.0,
) -> Tensor:
    """State at t = 1 after `steps` fixed steps of a tableau from t = 0; x (B, ...) is left as it
    is.

    log2_steps: the step index that the field is fed. on_step(i) is called after step i. shift: see
    `time_grid`. Raises ValueError for an unknown solver.
    """
    return integrate_fixed(
        field, x, time_grid(steps, shift), log2_steps, find_tableau(solver)[0], on_step
    ).x


def integrate_fixed(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    log2_steps: int,
    tableau: Tableau,
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """Steps of `tableau` between neighbouring `times`, rising or falling. save_at as in
    `integrate_adaptive`."""
    save = check_times(times[0], times[-1], save_at)
    saved = [x] * sum(s == times[0] for s in save)
    stages = (
        tableau.stages - tableau.fsal
    )  # the last stage of a FSAL method is the first of the next step
    weights = tableau.a[-1] if tableau.fsal else tableau.b
    evaluations, k_new = 0, None
    for i in range(len(times) - 1):
        t, t_new = times[i], times[i + 1]
        d, ks = t_new - t, [field(t, x, log2_steps) if k_new is None else k_new]
        evaluations += k_new is None
        for c, row in zip(tableau.c[1:stages], tableau.a[1:stages], strict=True):
            ks.append(field(t_new if c == 1 else t + c * d, x + d * combine(row, ks), log2_steps))
        evaluations += stages - 1
        x_new, k_new = x + d * combine(weights, ks), None
        inside = [s for s in save[len(saved) :] if (t < s <= t_new) or (t > s >= t_new)]
        if any(s != t_new for s in inside):
            k_new = field(t_new, x_new, log2_steps)
            evaluations += 1
        saved += [
            x_new if k_new is None else hermite((s - t) / d, d, x, x_new, ks[0], k_new)
            for s in inside
        ]
        x = x_new
        if on_step:
            on_step(i)
    return Solution.of_fixed_steps(
        x, len(times) - 1, evaluations, torch.stack(saved) if save else None
    )


def solve(
    field: Field,
    x: Tensor,
    log2_steps: int,
    solver: str = "dopri5",
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    steps: int = 4,
    shift: float = 1.0,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_steps: int = 4096,
    error_norm: str = "per_sample",
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """State at t1 of x (B, ...) at t0, forward or backward in time, by any solver's name.

    steps and shift are for solvers with fixed steps (backward, they take the same grid from its
    end); rtol, atol, max_steps and error_norm for adaptive ones; save_at as in
    `integrate_adaptive`. Raises ValueError for an unknown solver and for what the solver refuses.
    """
    check_solver(solver)
    low, high, grid = min(t0, t1), max(t0, t1), time_grid(steps, shift)
    times = [low, *(low + (high - low) * u for u in grid[1:-1]), high]
    times = times if t1 >= t0 else times[::-1]
    limits: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "max_steps": max_steps,
        "on_step": on_step,
        "save_at": save_at,
    }
    if solver.startswith("torchdiffeq:"):
        method = solver.removeprefix("torchdiffeq:")
        return integrate_torchdiffeq(field, x, times, log2_steps, method, **limits)
    tableau, adaptive = find_tableau(solver)
    if not adaptive:
        return integrate_fixed(field, x, times, log2_steps, tableau, on_step, save_at)
    return integrate_adaptive(
        field, x, log2_steps, tableau, t0=t0, t1=t1, error_norm=error_norm, **limits
    )


def predict_and_renoise(
    field: Field,
    x: Tensor,
    steps: int,
    log2_steps: int,
    noise: Callable[[int], Tensor],
    on_step: Hook | None = None,
) -> Tensor:
    """Sampling of consistency models: x1 = x + v (1-t), then x <- x1 (t+d) + eps (1-t-d), for t =
    i/T, d = 1/T.

    noise(i) gives eps (B, C, H, W) of step i; it is not asked for after the last step, where its
    weight is 0. on_step as in `integrate`.
    """
    for i in range(steps):
        data = x + field(i / steps, x, log2_steps) * ((steps - i) / steps)
        left = (steps - i - 1) / steps
        x = data * ((i + 1) / steps) + noise(i) * left if left else data
        if on_step:
            on_step(i)
    return x
