"""What a solver can be asked for: its name, equal steps on a grid of times, or limits of the steps
that it chooses. Knowing it takes no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from odelt_fast.checks import is_finite, one_of, shown, whole

from .tableau import Tableau, find_tableau

ERROR_NORMS = ("per_sample", "batch")
TORCHDIFFEQ = "torchdiffeq:"  # begins the name of a solver of that package
TORCHDIFFEQ_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
TORCHDIFFEQ_FIXED = (
    "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"
)  # fmt: skip

TimeGrid = str | tuple[str, float]


@dataclass(frozen=True)
class Limits:
    """How an adaptive solver takes its steps.

    rtol, atol: the estimated error of a step is at most atol + rtol |x|. max_steps: how many may be
    tried for a sample. error_norm: the error is a root mean square over a sample ("per_sample"), or
    over all samples, which then share time and step ("batch").

    Raises:
        ValueError: for a value that cannot be used.
    """

    rtol: float = 1e-2
    atol: float = 1e-2
    max_steps: int = 4096
    error_norm: str = "per_sample"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol must not both be 0: no step would be accurate enough")
        object.__setattr__(self, "max_steps", whole("max_steps", self.max_steps))
        one_of("error_norm", self.error_norm, ERROR_NORMS)


@dataclass(frozen=True, kw_only=True)
class SolverOptions(Limits):
    """How to integrate in time: a solver by name, with its equal steps or its limits.

    solver: euler, midpoint, heun2, ralston, kutta3, rk4, rk38 take `steps` steps; adaptive_heun,
    bosh3, dopri5, tsit5, dop853 choose theirs ("fixed:dopri5" takes equal ones); torchdiffeq:NAME
    is torchdiffeq's. steps: the number T of equal steps; None for solvers that choose theirs.
    time_grid: "uniform", or "shift:3.0" with more steps near t = 0 (`time_grid`).

    Raises:
        ValueError: for a value that cannot be used, alone or with the others.
    """

    solver: str = "euler"
    steps: int | None = 4
    time_grid: TimeGrid = "uniform"

    def __post_init__(self) -> None:
        check_solver(self.solver)
        steps = None if self.steps is None and self.adaptive else whole("steps", self.steps)
        object.__setattr__(self, "steps", None if self.adaptive else steps)
        if self.shift != 1 and self.adaptive:
            raise ValueError(
                f"time_grid {self.time_grid!r} is for solvers with fixed steps: {self.solver}"
                " chooses its own"
            )
        if self.shift != 1 and self.solver.endswith("_adams"):
            raise ValueError(
                f"time_grid {self.time_grid!r} does not go with {self.solver}, whose weights hold"
                " for equal steps only"
            )
        super().__post_init__()

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps by their error."""
        return is_adaptive(self.solver)

    @property
    def limits(self) -> Limits:
        """Those of the steps of an adaptive solver, alone."""
        return Limits(self.rtol, self.atol, self.max_steps, self.error_norm)

    @property
    def torchdiffeq(self) -> str | None:
        """The name of torchdiffeq's solver, if it is one of those."""
        name = self.solver.removeprefix(TORCHDIFFEQ)
        return None if name == self.solver else name

    @property
    def tableau(self) -> Tableau:
        """The Butcher tableau of a solver that is not torchdiffeq's."""
        return find_tableau(self.solver)[0]

    @property
    def shift(self) -> float:
        """The shift of the time grid; 1 for equal steps."""
        return check_time_grid(self.time_grid)

    @property
    def times(self) -> list[float]:
        """The T + 1 times of equal steps from 0 to 1."""
        return time_grid(self.steps or 1, self.shift)


def check_solver(name: str) -> str:
    """`name` if it is a solver; otherwise ValueError that names those there are."""
    if not isinstance(name, str) or not name.startswith(TORCHDIFFEQ):
        find_tableau(name)
    elif name.removeprefix(TORCHDIFFEQ) not in (*TORCHDIFFEQ_ADAPTIVE, *TORCHDIFFEQ_FIXED):
        allowed = ", ".join(TORCHDIFFEQ_ADAPTIVE + TORCHDIFFEQ_FIXED)
        raise ValueError(
            f"solver torchdiffeq: must be followed by one of {allowed}, not {shown(name)}"
        )
    return name


def is_adaptive(solver: str) -> bool:
    """Whether a solver chooses its own steps."""
    if solver.startswith(TORCHDIFFEQ):
        return solver.removeprefix(TORCHDIFFEQ) in TORCHDIFFEQ_ADAPTIVE
    return find_tableau(solver)[1]


def check_time_grid(grid: TimeGrid) -> float:
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
