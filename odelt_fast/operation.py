"""How to sample a model: the dials depth l and steps T (or any solver), and guidance.

This is the only place with their defaults and checks. Sampler, evaluation cells, profiles, the
planner, the service and the commands each hold an `Operation`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from odelt_fast.checks import is_finite, number, shown, whole
from odelt_fast.config import NUM_STEP_INDICES
from odelt_fast.solvers.options import SolverOptions

if TYPE_CHECKING:
    from odelt_fast.model import DiT

Schedule = tuple[tuple[float, int], ...]  # (t, l): l blocks from the time t on
DepthSchedule = Sequence[tuple[float, int]] | Callable[[float], int]


@dataclass(frozen=True, kw_only=True)
class Operation(SolverOptions):
    """One way to sample a model. Equal operations draw equal images, and cost the same.

    depth: number of active blocks l; None: all that are loaded. depth_schedule, in its place: pairs
    (t, l) with t rising from 0, each holding until the next, or a function t -> l; an adaptive
    solver then needs error_norm "batch", since the images of a batch must agree on the time.
    guidance_scale w: None or 1 use the labels alone, 0 the null label alone, otherwise the velocity
    is v_null + w (v_label - v_null). guidance_interval (t_lo, t_hi): only at times from t_lo to
    t_hi, and at others by the labels alone; None: at all times. told: the network is told the
    scale, and mixes nothing (`for_model` sets it). The rest: `SolverOptions`.

    Raises:
        ValueError: for a value that cannot be used, alone or with the others. What a model cannot
            do is said by `for_model`.
    """

    depth: int | None = None
    guidance_scale: float | None = None
    depth_schedule: DepthSchedule | None = None
    guidance_interval: tuple[float, float] | None = None
    told: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.guidance_scale
        if scale is not None:
            if not is_finite(scale):
                raise ValueError(f"guidance_scale must be a finite number or None, not {scale!r}")
            object.__setattr__(self, "guidance_scale", float(scale))
        if self.guidance_interval is not None:
            interval = check_interval(self.guidance_interval)
            if not self.is_guided:
                raise ValueError(
                    "guidance_interval needs guidance: set guidance_scale, to another value than 0"
                    " and 1"
                )
            object.__setattr__(self, "guidance_interval", None if interval == (0, 1) else interval)
        if self.depth_schedule is None:
            return
        if not callable(self.depth_schedule):
            object.__setattr__(self, "depth_schedule", _pairs(self.depth_schedule))
        if self.depth is not None:
            raise ValueError(f"depth {self.depth} and depth_schedule are both given: leave one out")
        if self.adaptive and self.error_norm == "per_sample" and not self.torchdiffeq:
            raise ValueError(
                f"depth_schedule with {self.solver} needs error_norm='batch': with per_sample every"
                " image has its own time"
            )

    def for_model(self, model: DiT) -> Operation:
        """This operation with the depth that it means for `model`.

        Raises:
            ValueError: for a depth that the model does not have, a guidance scale that it cannot be
                told, and solvers and time grids that do not go with the way in which it is sampled.
        """
        most, told = model.config.guidance_max, model.config.guidance_max is not None
        if most is not None and self.guidance_scale and not 1 <= self.guidance_scale <= most:
            raise ValueError(
                f"guidance_scale {self.guidance_scale:g}: this model is told scales from 1 to"
                f" {most:g}, or 0 for the null label alone"
            )
        if model.config.sampling == "consistency" and (self.solver != "euler" or self.shift != 1):
            raise ValueError(
                "a consistency model predicts the data and adds noise anew, in equal steps: solver"
                " euler, time_grid uniform only"
            )
        schedule = self.depth_schedule
        if schedule is None:
            return replace(self, depth=model.check_depth(self.depth), told=told)
        if callable(schedule):
            return replace(self, depth_schedule=lambda t: model.check_depth(schedule(t)), told=told)
        for _, depth in schedule:
            model.check_depth(depth)
        return replace(self, told=told)

    @property
    def length(self) -> int | Callable[[float], int] | None:
        """The depth l, or the function t -> l of a schedule."""
        if self.depth_schedule is None or callable(self.depth_schedule):
            return self.depth_schedule or self.depth
        times, depths = zip(*self.depth_schedule, strict=True)
        return lambda t: depths[max(bisect.bisect_right(times, t) - 1, 0)]

    @property
    def deepest(self) -> int | None:
        """The largest l that is used; None where that is known only to the model or a function."""
        if self.depth_schedule is None or callable(self.depth_schedule):
            return self.depth
        return max(depth for _, depth in self.depth_schedule)

    @property
    def tolerance(self) -> float | None:
        """rtol, which is atol too in measurements, of an adaptive solver; None of equal steps."""
        return self.rtol if self.adaptive else None

    @property
    def is_guided(self) -> bool:
        """Whether velocities are others than those of one label."""
        return self.guidance_scale not in (None, 0, 1)

    @property
    def mixing_scale(self) -> float | None:
        """The guidance scale, where velocities of label and null label are mixed; else None."""
        return self.guidance_scale if self.is_guided and not self.told else None

    @property
    def rows_per_image(self) -> int:
        """Rows that the network evaluates for one image."""
        return 1 if self.mixing_scale is None else 2

    @property
    def evaluations_per_image(self) -> int | None:
        """Evaluations of the network for one image; None where the solver decides."""
        if self.adaptive or self.torchdiffeq not in (None, "euler"):
            return None
        stages = 1 if self.torchdiffeq else self.tableau.stages - self.tableau.fsal
        rows = (self.steps or 0) * stages * self.rows_per_image
        if self.guidance_interval is None or self.torchdiffeq or self.told:
            return rows
        asked = [
            start if c == 0 else end if c == 1 else start + c * (end - start)
            for start, end in itertools.pairwise(self.times)
            for c in self.tableau.c[:stages]
        ]
        return rows - sum(not self.guides(t) for t in asked)

    def network_evaluations(self, evaluations: int) -> int:
        """Evaluations of the network in that many of the velocity."""
        each = self.evaluations_per_image
        if self.guidance_interval is None or each is None or self.torchdiffeq:
            return evaluations * self.rows_per_image
        stages = self.tableau.stages - self.tableau.fsal
        return round(evaluations * each / ((self.steps or 1) * stages))

    def guides(self, t: float) -> bool:
        """Whether velocities at time t are guided."""
        first, last = self.guidance_interval or (-math.inf, math.inf)
        return self.is_guided and first <= t <= last

    def told_scale(self, t: Any) -> Any:
        """The guidance scale that a network is told at time t, a number or a tensor of them."""
        if not self.is_guided:
            return 1.0
        first, last = self.guidance_interval or (-math.inf, math.inf)
        return 1 + ((t >= first) & (t <= last)) * ((self.guidance_scale or 1) - 1)

    def step_index(self, sampling: str) -> float:
        """Step index that a network of `DiTConfig.sampling` is fed (`step_index`)."""
        jumps = self.solver in ("euler", "fixed:euler", "torchdiffeq:euler") and self.shift == 1
        return step_index(sampling, self.steps, jumps)

    def __str__(self) -> str:
        depth: Any = self.depth
        if self.depth_schedule is not None:
            scheduled = not callable(self.depth_schedule)
            depth = show_schedule(self.depth_schedule) if scheduled else "by schedule"
        if self.adaptive:
            return f"depth {depth}, {self.solver} at tolerance {self.tolerance:g}"
        return f"depth {depth}, {self.steps} step{'' if self.steps == 1 else 's'} of {self.solver}"


def step_index(sampling: str, steps: int | None, jumps: bool = True) -> float:
    """Step index that the network is fed when `steps` time steps are taken: 0 (one step) to 7.

    `sampling` is `DiTConfig.sampling`. shortcut, consistency: floor(log2 steps), at most 7 (128
    steps). mean_flow: log2 steps, which may be a fraction, at most 7. flow: 7 at any number of
    steps. live_reflow: 0 below 128 steps, else 7. diffusion: 7, of
    no effect. (A network that is not step-conditioned replaces it by 0 itself.) steps None (an
    adaptive solver): 7, the instantaneous velocity. jumps False (a solver other than Euler's, or
    steps of unequal length): 7 for shortcut too, because what it learnt below 7 is the mean
    velocity over one Euler step of length 1/steps, not the velocity.
    """
    finest = NUM_STEP_INDICES - 1
    if steps is None or (sampling in ("shortcut", "mean_flow") and not jumps):
        return finest
    if sampling == "mean_flow":
        return min(math.log2(steps), finest)
    if sampling in ("shortcut", "consistency"):
        return min(steps.bit_length() - 1, finest)
    if sampling == "live_reflow":
        return 0 if steps < 2**finest else finest
    return finest


def effective_guidance(scale: float | None) -> float | None:
    """The scale as measurements name it: None and 1 both use the labels alone."""
    return None if scale in (None, 1) else float(scale)


def check_interval(value: Any) -> tuple[float, float]:
    """(t_lo, t_hi) in [0, 1]; ValueError for anything else."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(is_finite(time) for time in pair) or not (
        0 <= pair[0] <= pair[1] <= 1
    ):  # fmt: skip
        raise ValueError(
            "guidance_interval must be two times in [0, 1], the first not above the second, such as"
            f" (0.3, 1), not {shown(value)}"
        )
    return float(pair[0]), float(pair[1])


def check_schedule(pairs: Any) -> Schedule:
    """Pairs (t, l) as a schedule: t in [0, 1], rising from 0; l from 1 to 4096.

    Raises:
        ValueError: for anything else, in words that follow the name of what it is.
    """
    if not isinstance(pairs, (list, tuple)) or not 0 < len(pairs) <= 1000:
        raise ValueError(f"must be pairs of a time and a depth, not {shown(pairs)}")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"must be pairs of a time and a depth, not {shown(pairs)}")
    schedule = tuple(
        (number("time", time, 0, 1), whole("depth", depth, 1, 4096)) for time, depth in pairs
    )
    times = [time for time, _ in schedule]
    if times[0] != 0 or any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"must have times rising from 0, not {shown(times)}")
    return schedule


def parse_schedule(text: str) -> Schedule:
    """Pairs (t, l) of "0:4,0.5:12"; ValueError for anything else."""
    try:
        pairs = [
            (float(time), int(depth))
            for time, depth in (pair.split(":") for pair in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"must be times and depths such as 0:4,0.5:12, not {text!r}") from None
    return check_schedule(pairs)


def show_schedule(schedule: DepthSchedule) -> str:
    """What `parse_schedule` reads, exactly, of pairs (t, l)."""
    assert not callable(schedule)
    return ",".join(f"{time!r}:{depth}".replace(".0:", ":") for time, depth in schedule)


def _pairs(schedule: Any) -> Schedule:
    try:
        return check_schedule(list(schedule))
    except (TypeError, ValueError):
        raise ValueError(
            "depth_schedule must be a function t -> depth, or pairs (t, depth) with t rising from"
            f" 0, such as [(0, 4), (0.5, 12)], not {shown(schedule)}"
        ) from None
