"""Budget -> (l, T, solver): the best of what was measured, within a latency and an amount of
memory.

What an operation costs comes from a profile (`odelt-fast profile`), what it is worth from a table
of quality (`odelt-fast evaluate`). Nothing is estimated: with a table, only operations whose
quality was measured, at the guidance scale that is asked for, are candidates.
`evidence.find_evidence` finds the profile and the table of a model, `evidence.deadline_planner`
makes a function of deadlines of them.

Without a table the order is that of the arithmetic: live blocks times network evaluations. Along
each dial alone that is the order of quality in the paper's tables (2, 3 and 6), in nearly every row
and column; how one dial trades against the other is what nobody can know without measuring, so that
the order is a stand-in, and every choice made by it says so. Solvers are not comparable in this way
(a shortcut model is trained for Euler's equal steps): of equal steps only Euler's are then
considered, and no adaptive solver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.evaluation.results import higher_is_better
from odelt_fast.planning.profile import Measurement, Operation, Profile, profile_command
from odelt_fast.planning.quality import Quality, Value


@dataclass(frozen=True)
class Point:
    """A candidate: an operation, what it costs for `batch` images, and what it is worth.

    latency: seconds. memory: peak bytes (None: not known). Both were measured with `measured_batch`
    images, which is `batch` or the next larger one that was measured: then they are upper bounds.
    quality: of `metric`, measured in `quality_dtype`; None: not measured. score: what candidates
    are ordered by, larger is better.
    """

    operation: Operation
    batch: int
    measured_batch: int
    latency: float
    memory: int | None
    evaluations: float
    quality: Value | None
    metric: str | None
    quality_dtype: str | None
    score: float

    @property
    def is_bound(self) -> bool:
        """Whether latency and memory are those of a larger batch."""
        return self.measured_batch != self.batch

    def cost(self) -> str:
        """Latency and memory for people."""
        least = "at most " if self.is_bound else ""
        images = f"{self.batch} image{'' if self.batch == 1 else 's'}"
        measured = f" (measured with {self.measured_batch})" if self.is_bound else ""
        memory = "" if self.memory is None else f" and {show_memory(self.memory)}"
        return f"{least}{show_seconds(self.latency)}{memory} for {images}{measured}"


@dataclass(frozen=True)
class Choice:
    """The best candidate within the budget, and why it was taken, in one line."""

    point: Point
    why: str

    @property
    def operation(self) -> Operation:
        return self.point.operation


class BudgetError(ValueError):
    """No candidate is within the budget. nearest: the one that exceeds it by the smallest
    factor."""

    def __init__(self, message: str, nearest: Point) -> None:
        super().__init__(message)
        self.nearest = nearest


def candidates(
    profile: Profile,
    quality: Quality | None = None,
    *,
    batch: int = 1,
    precision: str = "float32",
    guidance_scale: float | None = None,
    metric: str | None = None,
    weights: str | None = None,
) -> list[Point]:
    """What may be chosen for `batch` images, best first (of equal ones the faster first). Never
    empty.

    A batch that was not measured takes the latency and memory of the next larger one as upper
    bounds: fewer images are no more work in any part of the computation. Batches above the largest
    measured one are not extrapolated. precision: one of `profiles.PRECISIONS`; the quality that was
    measured in one dtype stands for all but fp8, which is lossy: it has no quality here. weights:
    SHA-256 of the model, for adaptive solvers (None: measurements of any weights are taken). The
    caller sees to it that profile and table belong to the machine and the model (`Profile.check`,
    `Quality.check`; `evidence.find_evidence` does).

    ValueError if nothing fits, naming what was measured.
    """
    command = f"{profile_command(profile.model)} --dtypes {precision}"
    if guidance_scale not in (None, 1):
        command += f" --guidance-scale {guidance_scale:g}"
    fitting = [
        m
        for m in profile.measurements
        if m.precision == precision and m.holds_for(guidance_scale, weights)
    ]
    if not fitting:
        known = (
            ", ".join(sorted({_asked(m.precision, m.guidance_scale) for m in profile.measurements}))
            or "nothing"
        )
        raise ValueError(
            f"the profile has {known}, not {_asked(precision, guidance_scale)}: measure it with"
            f" {command}"
        )
    measured = sorted({m.batch for m in fitting if m.batch >= batch})
    if not measured:
        sizes = ", ".join(str(size) for size in sorted({m.batch for m in fitting}))
        raise ValueError(
            f"a batch of {batch} was not measured, nor a larger one, only {sizes}: {command}"
            f" --batches {batch}"
        )
    by_operation: dict[Operation, Measurement] = {}
    for measurement in sorted(fitting, key=lambda m: m.batch):
        if measurement.batch >= batch:
            by_operation.setdefault(measurement.operation, measurement)
    name = None if quality is None else quality.metric(metric)
    found = []
    for operation, m in by_operation.items():
        value = (
            None
            if quality is None or precision == "fp8"
            else quality.of(operation, guidance_scale, name)
        )
        if quality is None:
            if operation.solver not in ("euler", "fixed:euler") or operation.schedule:
                continue
            score = (
                float(profile.config.live_blocks(profile.config.check_depth(operation.depth)))
                * m.evaluations
            )
        elif value is None:
            continue
        else:
            score = value.mean if higher_is_better(str(name)) else -value.mean
        dtype = None if quality is None else quality.dtype
        found.append(
            Point(
                operation,
                batch,
                m.batch,
                m.latency,
                m.peak_memory,
                m.evaluations,
                value,
                name,
                dtype,
                score,
            )
        )
    if not found:
        if quality is None:
            raise ValueError(
                "without a table of quality only equal steps of euler can be ordered, and the"
                " profile has none: measure with it"
            )
        raise ValueError(
            f"{quality.path} has no quality of what the profile has in"
            f" {_asked(precision, guidance_scale)}: it is never guessed; run odelt-fast evaluate"
            " on it"
        )
    return sorted(
        found,
        key=lambda point: (
            -point.score,
            point.latency,
            -1 if point.memory is None else point.memory,
        ),
    )


def frontier(points: Iterable[Point], *, with_memory: bool = False) -> list[Point]:
    """The points that no other one beats: none is at least as good and as fast (with_memory: and as
    small), and better in one. By latency.

    Of points that are equal in all of that the first is kept. Memory that is not known counts as
    the most there can be.
    """
    kept: list[Point] = []
    order = sorted(points, key=lambda point: (point.latency, -point.score, _bytes(point)))
    for point in order:  # whoever beats a point comes before it
        memory = _bytes(point)
        beaten = any(
            other.score >= point.score and (not with_memory or _bytes(other) <= memory)
            for other in kept
        )
        if not beaten:
            kept.append(point)
    return kept


def best(
    points: Sequence[Point], max_latency: float | None = None, max_memory: float | None = None
) -> Choice:
    """The best of the candidates within the budget: seconds for the batch, bytes at the peak (None:
    no limit).

    `points` as `candidates` orders them. Errors: BudgetError where there is none, with the
    candidate that is nearest: the one for which the larger of the two factors, by which it exceeds
    its limit, is the smallest. ValueError for limits that are not above 0, for no candidates, and
    for a limit on memory where none was measured.
    """
    for name, limit in (("max_latency", max_latency), ("max_memory", max_memory)):
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise ValueError(f"{name} must be above 0, not {limit}")
    if not points:
        raise ValueError("there are no candidates to choose from")
    if max_memory is not None and all(point.memory is None for point in points):
        raise ValueError(
            "the profile says nothing of memory, which cannot be measured on this system: leave the"
            " limit on it out"
        )
    budget = " and ".join(
        text
        for text, limit in (
            (show_seconds(max_latency or 0), max_latency),
            (show_memory(max_memory or 0), max_memory),
        )
        if limit is not None
    )
    within = [point for point in points if _excess(point, max_latency, max_memory) <= 1]
    if not within:
        nearest = min(
            points, key=lambda point: (_excess(point, max_latency, max_memory), point.latency)
        )
        raise BudgetError(
            f"nothing that was measured is within {budget}; the nearest is {nearest.operation}:"
            f" {nearest.cost()}",
            nearest,
        )
    first = within[0]
    among = f"of {len(within)} measured {'way' if len(within) == 1 else 'ways'}" + (
        f" within {budget}" if budget else ""
    )
    if first.quality is None:
        reason = f"the most blocks times evaluations {among}; quality was not measured"
    else:
        reason = (
            f"the best {first.metric} ({first.quality}, measured in {first.quality_dtype}) {among}"
        )
    return Choice(first, f"{first.operation}: {reason}; {first.cost()}")


def _excess(point: Point, max_latency: float | None, max_memory: float | None) -> float:
    """The factor by which the point exceeds the tighter of its limits; at most 1 within them."""
    latency = 0.0 if max_latency is None else point.latency / max_latency
    memory = 0.0 if max_memory is None else _bytes(point) / max_memory
    return max(latency, memory)


def _bytes(point: Point) -> float:
    return math.inf if point.memory is None else point.memory


def _asked(precision: str, scale: float | None) -> str:
    return (
        f"{precision}"
        f" {'without guidance' if scale in (None, 1) else f'with guidance scale {scale:g}'}"
    )
