"""What the page of `odelt-fast demo` may be asked for.

Values come from a browser, or from whoever posts to it: nothing is believed.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from odelt_fast.config import DiTConfig, TrainedOn
from odelt_fast.operation import Operation, effective_guidance
from odelt_fast.sampling.labels import labels_from_text

STEPS = tuple(2**k for k in range(8))
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
# A grid, so that the operations whose latency is kept are few.
GUIDANCE_STEP, LARGEST_GUIDANCE = 0.25, 8.0
LARGEST_SEED = 2**53 - 1  # whole numbers above it do not survive a browser
LONGEST_TEXT = 400  # characters of labels
_FIXED, _ADAPTIVE = ("euler", "midpoint", "heun2", "rk4"), ("dopri5", "tsit5")


class Dials(NamedTuple):
    """Values of the page's dials as they were sent. T is 2 to the `exponent`."""

    depth: Any
    exponent: Any
    solver: Any = "euler"
    tolerance: Any = 1e-2
    guidance: Any = 1.0
    seed: Any = 0
    labels: Any = ""


@dataclass(frozen=True)
class Setting:
    """What a picture is drawn with. labels (): counted through."""

    operation: Operation
    seed: int = 0
    labels: tuple[int, ...] = ()


def time_label(operation: Operation) -> str:
    """T or the tolerance, as figures name it."""
    return f"tol={operation.rtol:g}" if operation.adaptive else f"T={operation.steps}"


def solvers(config: DiTConfig) -> tuple[str, ...]:
    """Solvers that the page offers for a model.

    Consistency models have a rule of their own in Euler's place.
    """
    return ("euler",) if config.sampling == "consistency" else _FIXED + _ADAPTIVE


def guidance_range(config: DiTConfig) -> tuple[float, float]:
    """Guidance scales that the page offers: of a model that is told them, those it knows."""
    if config.guidance_max is None:
        return 0.0, LARGEST_GUIDANCE
    return 1.0, min(LARGEST_GUIDANCE, config.guidance_max)


def offered(
    depth: int, steps: int | None, solver: str, tolerance: float | None, guidance: float | None
) -> Operation:
    """The operation of dials: steps count where the solver's are equal, else the tolerance."""
    limits = {"rtol": tolerance, "atol": tolerance} if solver in _ADAPTIVE else {"steps": steps}
    return Operation(depth=depth, solver=solver, guidance_scale=guidance, **limits)  # type: ignore[arg-type]


def check_setting(
    config: DiTConfig,
    num_images: int,
    dials: Dials,
    trained_on: TrainedOn = TrainedOn(),  # noqa: B008 (frozen)
) -> Setting:
    """The setting that the dials mean, for a model that was trained on that.

    Raises:
        ValueError: names the first value that is not allowed.
    """
    depth, power = _number(dials.depth), _number(dials.exponent)
    if depth not in config.depths:
        allowed = ", ".join(map(str, config.depths))
        raise _wrong("depth l", f"one of {allowed}", dials.depth)
    if power not in range(len(STEPS)):
        allowed = f"a power of two from 1 to {STEPS[-1]}, so its exponent 0 to {len(STEPS) - 1}"
        raise _wrong("T", allowed, dials.exponent)
    if not isinstance(dials.solver, str) or dials.solver not in solvers(config):
        raise _wrong("solver", f"one of {', '.join(solvers(config))}", dials.solver)
    if (tolerance := _number(dials.tolerance)) not in TOLERANCES:
        allowed = ", ".join(f"{value:g}" for value in TOLERANCES)
        raise _wrong("tolerance", f"one of {allowed}", dials.tolerance)
    scale, seed = _number(dials.guidance), _number(dials.seed)
    least, most = guidance_range(config)
    if not least <= scale <= most or scale % GUIDANCE_STEP:
        allowed = f"from {least:g} to {most:g} in steps of {GUIDANCE_STEP:g}"
        raise _wrong("guidance", allowed, dials.guidance)
    if not 0 <= seed <= LARGEST_SEED or seed % 1:
        raise _wrong("seed", f"a whole number from 0 to {LARGEST_SEED}", dials.seed)
    guidance = None if config.num_classes == 1 else effective_guidance(scale)
    operation = offered(int(depth), STEPS[int(power)], dials.solver, tolerance, guidance)
    labels = _labels(dials.labels, trained_on, config.num_classes, num_images)
    return Setting(operation, int(seed), labels)


def _wrong(name: str, allowed: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {allowed}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """A value from outside in a few characters, however long or deep it is."""
    return "nothing" if value is None else reprlib.repr(value)


def _number(value: Any) -> float:
    """A number as it is; not a number (which no comparison accepts) for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return value if abs(value) < 2**63 else math.nan


def _labels(text: Any, trained_on: TrainedOn, classes: int, num_images: int) -> tuple[int, ...]:
    """Labels from numbers and names, separated by blanks or commas."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return ()
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise _wrong("labels", f"at most {LONGEST_TEXT} characters of numbers and names", text)
    try:
        labels = labels_from_text(trained_on, [text], classes)
    except ValueError:
        # Numbers and names without commas between them.
        labels = labels_from_text(trained_on, text.replace(",", " ").split(), classes)
    if len(labels) > num_images:
        raise ValueError(f"{len(labels)} labels for {num_images} images: give at most one for each")
    return tuple(labels)
