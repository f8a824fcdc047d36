"""The adaptive solvers with their limits as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from odelt_fast.solvers.adaptive import integrate_adaptive
from odelt_fast.solvers.options import Limits
from odelt_fast.solvers.solution import Field, Hook, Solution
from odelt_fast.solvers.tableau import Tableau


def solve_adaptive(
    field: Field,
    x: Tensor,
    log2_steps: int,
    tableau: Tableau,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
    **limits: Any,
) -> Solution:
    """`integrate_adaptive` from t0 to t1 with Limits(**limits)."""
    how = Limits(**limits)
    hooks: dict[str, Any] = {"on_step": on_step, "save_at": save_at}
    return integrate_adaptive(field, x, log2_steps, tableau, how, span=(t0, t1), **hooks)
