"""What the page of `odelt-fast demo` may be asked for. Values come from a browser, or from whoever
posts to it: nothing is believed."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from odelt_fast.config import DiTConfig

STEPS = tuple(2**k for k in range(8))
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
GUIDANCE_STEP, LARGEST_GUIDANCE = (
    0.25,
    8.0,
)  # a grid, so that the settings whose latency is kept are few
LARGEST_SEED = 2**53 - 1  # whole numbers above it do not survive a browser
LONGEST_TEXT = 400  # characters of labels
_FIXED, _ADAPTIVE = ("euler", "midpoint", "heun2", "rk4"), ("dopri5", "tsit5")


@dataclass(frozen=True)
class Setting:
    """One way to draw: depth l, steps T of a solver (or its tolerance, if it chooses its steps),
    guidance scale, seed, labels.

    guidance_scale None: labels only. labels (): counted through.
    """

    depth: int
    steps: int
    solver: str
    tolerance: float
    guidance_scale: float | None
    seed: int
    labels: tuple[int, ...]

    @property
    def adaptive(self) -> bool:
        return self.solver in _ADAPTIVE

    @property
    def at(self) -> str:
        """T or the tolerance, as figures name it."""
        return f"tol={self.tolerance:g}" if self.adaptive else f"T={self.steps}"

    @property
    def cost_key(self) -> tuple[str, int, str, float | None]:
        """What latency and quality depend on."""
        return self.solver, self.depth, self.at, self.guidance_scale


def solvers(config: DiTConfig) -> tuple[str, ...]:
    """Solvers that the page offers for a model; consistency models have a rule of their own in
    Euler's place."""
    return ("euler",) if config.sampling == "consistency" else _FIXED + _ADAPTIVE


def check_setting(
    config: DiTConfig,
    num_images: int,
    depth: Any,
    exponent: Any,
    solver: Any = "euler",
    tolerance: Any = 1e-2,
    guidance: Any = 1.0,
    seed: Any = 0,
    labels: Any = "",
) -> Setting:
    """The setting that values from outside mean, T = 2^exponent; ValueError that names the first
    one that is not allowed."""
    if (wanted := _number(depth)) not in config.depths:
        raise ValueError(
            f"depth l must be one of {', '.join(map(str, config.depths))}, not {_shown(depth)}"
        )
    power = _number(exponent)
    if power not in range(len(STEPS)):
        raise ValueError(
            f"T must be a power of two from 1 to {STEPS[-1]}, so its exponent 0 to"
            f" {len(STEPS) - 1}, not {_shown(exponent)}"
        )
    if not isinstance(solver, str) or solver not in solvers(config):
        raise ValueError(
            f"solver must be one of {', '.join(solvers(config))}, not {_shown(solver)}"
        )
    if (allowed := _number(tolerance)) not in TOLERANCES:
        raise ValueError(
            f"tolerance must be one of {', '.join(f'{value:g}' for value in TOLERANCES)}, not"
            f" {_shown(tolerance)}"
        )
    scale = _number(guidance)
    if not 0 <= scale <= LARGEST_GUIDANCE or scale % GUIDANCE_STEP:
        raise ValueError(
            f"guidance must be from 0 to {LARGEST_GUIDANCE:g} in steps of {GUIDANCE_STEP:g}, not"
            f" {_shown(guidance)}"
        )
    start = _number(seed)
    if not 0 <= start <= LARGEST_SEED or start % 1:
        raise ValueError(
            f"seed must be a whole number from 0 to {LARGEST_SEED}, not {_shown(seed)}"
        )
    guided = None if scale == 1 or config.num_classes == 1 else scale
    chosen = _labels(labels, config.num_classes, num_images)
    return Setting(int(wanted), STEPS[int(power)], solver, allowed, guided, int(start), chosen)


def _shown(value: Any) -> str:
    """A value from outside in a few characters, however long or deep it is."""
    return "nothing" if value is None else reprlib.repr(value)


def _number(value: Any) -> float:
    """A number as it is; not a number (which no comparison accepts) for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return value if abs(value) < 2**63 else math.nan


def _labels(text: Any, classes: int, num_images: int) -> tuple[int, ...]:
    """Labels from words of digits, separated by blanks or commas."""
    if text is None or text == "":
        return ()
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise ValueError(
            f"labels must be at most {LONGEST_TEXT} characters of whole numbers, not {_shown(text)}"
        )
    words = text.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit()) or len(word) > 9 or int(word) > classes:
            raise ValueError(
                f"label {_shown(word)} is not allowed: labels go from 0 to {classes - 1}, {classes}"
                " is the null label"
            )
    if len(words) > num_images:
        raise ValueError(f"{len(words)} labels for {num_images} images: give at most one for each")
    return tuple(map(int, words))
