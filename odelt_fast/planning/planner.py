"""Budget -> (l, T, solver): the best of what was measured within a latency and a memory.

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
from dataclasses import dataclass, replace

from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.evaluation.results import higher_is_better
from odelt_fast.operation import Operation

from .profile import Measurement, Profile, profile_command
from .quality import Quality, Value


@dataclass(frozen=True)
class Candidate:
    """An operation, what it costs for `batch` images, and what it is worth.

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

    @property
    def bytes(self) -> float:
        """Peak memory, which counts as the most there can be where it is not known."""
        return math.inf if self.memory is None else self.memory

    def cost(self) -> str:
        """Latency and memory for people."""
        least = "at most " if self.is_bound else ""
        images = f"{self.batch} image{'' if self.batch == 1 else 's'}"
        measured = f" (measured with {self.measured_batch})" if self.is_bound else ""
        memory = "" if self.memory is None else f" and {show_memory(self.memory)}"
        return f"{least}{show_seconds(self.latency)}{memory} for {images}{measured}"

    def excess(self, max_latency: float | None, max_memory: float | None) -> float:
        """The factor by which it exceeds the tighter of its limits; at most 1 within them."""
        latency = 0.0 if max_latency is None else self.latency / max_latency
        return max(latency, 0.0 if max_memory is None else self.bytes / max_memory)


@dataclass(frozen=True)
class Choice:
    """The best candidate within the budget, and why it was taken, in one line."""

    candidate: Candidate
    why: str

    @property
    def operation(self) -> Operation:
        """How to sample."""
        return self.candidate.operation


class BudgetError(ValueError):
    """No candidate is within the budget.

    nearest: the one that exceeds it by the smallest factor.
    """

    def __init__(self, message: str, nearest: Candidate) -> None:
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
) -> list[Candidate]:
    """What may be chosen for a batch of images.

    A batch that was not measured takes the latency and memory of the next larger one as upper
    bounds: fewer images are no more work in any part of the computation. Batches above the largest
    measured one are not extrapolated. The quality that was measured in one dtype stands for all but
    fp8, which is lossy: it has no quality here. The caller sees to it that profile and table belong
    to the machine and the model (`evidence.find_evidence` does).

    Args:
        profile: what operations cost.
        quality: what they are worth (None: not measured).
        batch: images.
        precision: one of `profile.PRECISIONS`.
        guidance_scale: w; only what was evaluated at it is a candidate.
        metric: what counts (None: the first of the table).
        weights: SHA-256 of the model, for adaptive solvers (None: measurements of any are taken).

    Returns:
        The candidates, best first, of equal ones the faster first; never none.

    Raises:
        ValueError: if nothing fits, naming what was measured.
    """
    if quality is None and metric is not None:
        raise ValueError(
            f"metric {metric}: there is no table of quality that has it: give --quality, or leave"
            " it out"
        )
    name = None if quality is None else quality.metric(metric)
    found = []
    for operation, m in _measured(profile, batch, precision, guidance_scale, weights).items():
        value, dtype = None, None
        if quality is not None:
            value, dtype = quality.of(operation, name), quality.dtype
            if value is None or precision == "fp8":
                continue
            score = value.mean if higher_is_better(str(name)) else -value.mean
        elif operation.solver in ("euler", "fixed:euler") and operation.depth is not None:
            score = profile.config.live_blocks(operation.depth) * m.evaluations
        else:
            continue
        costs = m.latency, m.peak_memory, m.evaluations
        found.append(Candidate(operation, batch, m.batch, *costs, value, name, dtype, score))
    if not found and quality is None:
        raise ValueError(
            "without a table of quality only equal steps of euler can be ordered, and the profile"
            " has none: measure with it"
        )
    if not found:
        assert quality is not None
        raise ValueError(
            f"{quality.path} has no quality of what the profile has in"
            f" {_kind(precision, guidance_scale)}: it is never guessed; run odelt-fast evaluate"
            " on it"
        )

    def place(candidate: Candidate) -> tuple[float, float, float]:
        memory = -1 if candidate.memory is None else candidate.memory
        return -candidate.score, candidate.latency, memory

    return sorted(found, key=place)


def _measured(
    profile: Profile,
    batch: int,
    precision: str,
    guidance_scale: float | None,
    weights: str | None,
) -> dict[Operation, Measurement]:
    """Operations at this guidance scale, with the cost of the smallest batch bounding `batch`."""
    command = f"{profile_command(profile.model)} --dtypes {precision}"
    if guidance_scale not in (None, 1):
        command += f" --guidance-scale {guidance_scale:g}"
    fitting = [
        m
        for m in profile.measurements
        if m.precision == precision and m.holds_for(guidance_scale, weights)
    ]
    if not fitting:
        kinds = {_kind(m.precision, m.guidance_scale) for m in profile.measurements}
        raise ValueError(
            f"the profile has {', '.join(sorted(kinds)) or 'nothing'}, not"
            f" {_kind(precision, guidance_scale)}: measure it with {command}"
        )
    bounding = [m for m in fitting if m.batch >= batch]
    if not bounding:
        sizes = ", ".join(map(str, sorted({m.batch for m in fitting})))
        raise ValueError(
            f"a batch of {batch} was not measured, nor a larger one, only {sizes}: {command}"
            f" --batches {batch}"
        )
    smallest: dict[Operation, Measurement] = {}
    for m in sorted(bounding, key=lambda m: m.batch):
        smallest.setdefault(replace(m.operation, guidance_scale=guidance_scale), m)
    return smallest


def frontier(found: Iterable[Candidate], *, with_memory: bool = False) -> list[Candidate]:
    """The candidates that no other one beats, by latency.

    None is at least as good and as fast (with_memory: and as small), and better in one.

    Of candidates that are equal in all of that the first is kept.
    """
    kept: list[Candidate] = []
    # Whoever beats a candidate comes before it.
    for each in sorted(found, key=lambda each: (each.latency, -each.score, each.bytes)):
        if not any(
            other.score >= each.score and (not with_memory or other.bytes <= each.bytes)
            for other in kept
        ):
            kept.append(each)
    return kept


def best(
    found: Sequence[Candidate], max_latency: float | None = None, max_memory: float | None = None
) -> Choice:
    """The best of the candidates within the budget.

    Args:
        found: as `candidates` orders them.
        max_latency: seconds for the batch (None: no limit).
        max_memory: bytes at the peak (None: no limit).

    Raises:
        BudgetError: where none is within it, with the candidate that is nearest: the one for which
            the larger of the two factors, by which it exceeds its limit, is the smallest.
        ValueError: for limits that are not above 0, for no candidates, and for a limit on memory
            where none was measured.
    """
    for name, limit in (("max_latency", max_latency), ("max_memory", max_memory)):
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise ValueError(f"{name} must be above 0, not {limit}")
    if not found:
        raise ValueError("there are no candidates to choose from")
    if max_memory is not None and all(each.memory is None for each in found):
        raise ValueError(
            "the profile says nothing of memory, which cannot be measured on this system: leave the"
            " limit on it out"
        )
    limits = [] if max_latency is None else [show_seconds(max_latency)]
    limits += [] if max_memory is None else [show_memory(max_memory)]
    budget = " and ".join(limits)
    within = [each for each in found if each.excess(max_latency, max_memory) <= 1]
    if not within:
        nearest = min(found, key=lambda each: (each.excess(max_latency, max_memory), each.latency))
        raise BudgetError(
            f"nothing that was measured is within {budget}; the nearest is {nearest.operation}:"
            f" {nearest.cost()}",
            nearest,
        )
    first, ways = within[0], f"{len(within)} measured {'way' if len(within) == 1 else 'ways'}"
    among = f"of {ways} within {budget}" if budget else f"of {ways}"
    if first.quality is None:
        reason = f"the most blocks times evaluations {among}; quality was not measured"
    else:
        reason = (
            f"the best {first.metric} ({first.quality}, measured in {first.quality_dtype}) {among}"
        )
    return Choice(first, f"{first.operation}: {reason}; {first.cost()}")


def _kind(precision: str, scale: float | None) -> str:
    guided = "without guidance" if scale in (None, 1) else f"with guidance scale {scale:g}"
    return f"{precision} {guided}"
