"""Options of the mean-velocity objectives, mean-flow and alpha-flow. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from odelt_fast.checks import number

MEAN_VELOCITY = ("mean-flow", "alpha-flow")  # objectives


@dataclass(frozen=True)
class MeanVelocityOptions:
    """How mean velocities u(x, t, s), from t to s, are learnt."""

    tangent: Literal["data", "network"] = "network"
    """Velocity along which mean-flow takes the derivative of u: data, x1 - x0 (MeanFlow), or the
    teacher's own u(x, t, t) (improved MeanFlow)."""
    derivative: Literal["jvp", "difference"] = "difference"
    """How: jvp, forward-mode differentiation; difference, a central difference along the tangent,
    several times cheaper."""
    difference_step: float = 2e-3
    """Half the distance in time of the two sides of --derivative difference."""
    times: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of the times of pairs: uniform, or logit-normal with mean 0.4 and standard
    deviation 1 (MeanFlow's -0.4, whose time runs the other way)."""
    grid_share: float = 0.5
    """Share of the pairs that lie on the grids of 1, 2, 4, .. equal steps; the others are any."""
    cfg_beta: float = 1.0
    """beta of the guidance scales w that a network of --model.guidance-max is told, with density
    w^-beta from 1 to it."""
    alpha_min: float = 0.05
    """alpha-flow: the smallest alpha, to which it falls from 1 along a sigmoid."""
    alpha_fall: tuple[float, float] = (0.0, 0.7)
    """alpha-flow: shares of the run between which alpha falls."""
    time_share: float = 0.375
    """Share of the rows that learn mean velocities; of the rest --length-consistency-every says
    which learn length consistency, and the others the velocity itself."""

    def __post_init__(self) -> None:
        for name in ("grid_share", "time_share"):
            number(name, getattr(self, name), 0, 1)
        number("cfg_beta", self.cfg_beta, 0, 10)
        number("alpha_min", self.alpha_min, 1e-4, 1)
        number("difference_step", self.difference_step, 1e-6, 0.1)
        first, last = (number("each of alpha_fall", share, 0, 1) for share in self.alpha_fall)
        if not first < last:
            raise ValueError(f"alpha_fall must rise, not {first:g} {last:g}")

    def check(self, objective: str, compiled: bool, told: bool) -> None:
        """ValueError for what has no effect with an objective, or fails with compiled blocks."""
        used = {
            "mean-flow": ("tangent", "derivative", "difference_step"),
            "alpha-flow": ("alpha_",),
        }
        unused = {
            f"objective {objective}": [
                name for each, names in used.items() if each != objective for name in names
            ],
            "time_share 0": ["tangent", "derivative", "difference_", "times", "grid_", "alpha_"]
            * (not self.time_share),
            "derivative jvp": ["difference_step"] * (self.derivative == "jvp"),
            "grid_share 1": ["times"] * (self.grid_share == 1),
            "model.guidance_max unset": ["cfg_beta"] * (not told),
        }
        if objective not in MEAN_VELOCITY:
            unused = {f"objective {objective}": [""]}
        for why, names in unused.items():
            for field in fields(self):
                given = getattr(self, field.name) != field.default
                if given and field.name.startswith(tuple(names)):
                    raise ValueError(
                        f"mean_velocity.{field.name} has no effect with {why}: leave it out"
                    )
        if compiled and objective == "mean-flow" and self.derivative == "jvp":
            raise ValueError(
                "compiled blocks have no forward-mode derivative: --mean-velocity.derivative"
                " difference, or no --compile"
            )


MEAN_VELOCITY_DEFAULTS = MeanVelocityOptions()
