"""How a Sampler draws: depth, steps, solver, guidance, tolerances, checked against the model and
against each other."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from odelt_fast.engine.operators import ATTENTIONS, PRECISIONS
from odelt_fast.model import DiT
from odelt_fast.sampling.velocity import (
    DepthSchedule,
    check_depth_schedule,
    check_guidance,
    step_index,
)
from odelt_fast.solvers.adaptive import Limits
from odelt_fast.solvers.fixed import (
    ERROR_NORMS,
    check_solver,
    check_time_grid,
    check_tolerances,
    is_adaptive,
)

BACKENDS = ("auto", "eager", "compile", "fused")


@dataclass(frozen=True)
class SamplerSettings:
    """The arguments of `Sampler`, checked (`of`), and what follows from them.

    depth: all blocks that are loaded where a schedule decides. adaptive: whether the solver chooses
    its steps. shift: of the time grid. step_index: what a step-conditioned network is fed.
    """

    depth: int
    steps: int
    solver: str
    limits: Limits
    guidance_scale: float | None
    backend: str
    batch_size: int | None
    attention: str
    precision: str | None
    time_grid: str | tuple[str, float]
    depth_schedule: Callable[[float], int] | None
    adaptive: bool
    shift: float
    step_index: int

    @classmethod
    def of(
        cls,
        model: DiT,
        depth: int | None,
        steps: int,
        solver: str,
        *,
        rtol: float,
        atol: float,
        guidance_scale: float | None,
        backend: str,
        batch_size: int | None,
        attention: str,
        precision: str | None,
        max_steps: int,
        error_norm: str,
        time_grid: str | tuple[str, float],
        depth_schedule: DepthSchedule | None,
    ) -> SamplerSettings:
        """Raises ValueError for every value that cannot be used with this model, naming what is
        allowed."""
        blocks, steps = model.check_depth(depth), whole("steps", steps)
        adaptive, shift = is_adaptive(check_solver(solver)), check_time_grid(time_grid)
        if adaptive and shift != 1:
            raise ValueError(
                f"time_grid {time_grid!r} is for solvers with fixed steps: {solver} chooses its own"
            )
        if solver.endswith("_adams") and shift != 1:
            raise ValueError(
                f"time_grid {time_grid!r} does not go with {solver}, whose weights hold for equal"
                " steps only"
            )
        if model.config.sampling == "consistency" and (solver != "euler" or shift != 1):
            raise ValueError(
                "a consistency model predicts the data and adds noise anew, in equal steps: solver"
                " euler, time_grid uniform only"
            )
        jumps = solver in ("euler", "fixed:euler", "torchdiffeq:euler") and shift == 1
        tolerances = check_tolerances(rtol, atol)
        limits = Limits(
            *tolerances,
            whole("max_steps", max_steps),
            one_of("error_norm", error_norm, ERROR_NORMS),
        )
        schedule = None if depth_schedule is None else check_depth_schedule(model, depth_schedule)
        if schedule and depth is not None:
            raise ValueError(f"depth {depth} and depth_schedule are both given: leave one out")
        if (
            schedule
            and adaptive
            and error_norm == "per_sample"
            and not solver.startswith("torchdiffeq:")
        ):
            raise ValueError(
                f"depth_schedule with {solver} needs error_norm='batch': with per_sample every"
                " image has its own time"
            )
        return cls(
            blocks, steps, solver, limits, check_guidance(guidance_scale), one_of("backend", backend, BACKENDS),
            None if batch_size is None else whole("batch_size", batch_size), one_of("attention", attention, ATTENTIONS),
            one_of("precision", precision, PRECISIONS), time_grid, schedule, adaptive, shift,
            step_index(model.config.sampling, None if adaptive else steps, jumps),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows that the network evaluates for one image."""
        return 1 if self.guidance_scale in (None, 0, 1) else 2

    @property
    def torchdiffeq(self) -> str | None:
        """The name of torchdiffeq's solver if it is one of those."""
        return (
            self.solver.removeprefix("torchdiffeq:")
            if self.solver.startswith("torchdiffeq:")
            else None
        )


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """`value`; ValueError unless it is one of `allowed`."""
    if not any(
        value is option or (isinstance(value, str) and value == option) for option in allowed
    ):
        listed = ", ".join(map(str, allowed))
        raise ValueError(
            f"{name} must be {'one of ' if len(allowed) > 1 else ''}{listed}, not {value!r}"
        )
    return value
