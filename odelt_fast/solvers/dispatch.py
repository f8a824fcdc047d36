"""The one dispatch over all solvers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .adaptive import integrate_adaptive
from .fixed import integrate_fixed
from .options import SolverOptions
from .solution import Field, Hook, Solution
from .torchdiffeq import integrate_torchdiffeq


def solve(
    field: Field,
    x: Tensor,
    log2_steps: float,
    solver: str | SolverOptions = "dopri5",
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
    **options: Any,
) -> Solution:
    """State at t1 of x (B, ...) at t0, forward or backward in time.

    Args:
        field: (t, x, step index) -> dx/dt.
        log2_steps: the step index that the field is fed.
        solver: a solver's name, whose `options` are then those of `SolverOptions`, or such options
            (an `Operation` is one). Backward in time, equal steps take the same grid from its end.
        on_step: called with the number of each step that was taken, or tried.
        save_at: as in `integrate_adaptive`.

    Raises:
        ValueError: for an unknown solver and for what the solver refuses.
    """
    how = SolverOptions(solver=solver, **options) if isinstance(solver, str) else solver
    low, high = min(t0, t1), max(t0, t1)
    times = [low, *(low + (high - low) * u for u in how.times[1:-1]), high]
    times = times if t1 >= t0 else times[::-1]
    if how.torchdiffeq:
        return integrate_torchdiffeq(
            field, x, times, log2_steps, how.torchdiffeq, how.limits, on_step, save_at
        )
    if not how.adaptive:
        return integrate_fixed(field, x, times, log2_steps, how.tableau, on_step, save_at)
    return integrate_adaptive(
        field, x, log2_steps, how.tableau, how.limits,
        span=(t0, t1), on_step=on_step, save_at=save_at,
    )  # fmt: skip
