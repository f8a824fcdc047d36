"""What every integration in time has in common: fields, the result and its status, sums of stages,
interpolation inside a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .step_control import DONE, NON_FINITE

Field = Callable[[Any, Tensor, float], Tensor]
Hook = Callable[[int], None]
Noise = Callable[[int], Tensor]  # fresh noise (B, ...) of a step


@dataclass(frozen=True)
class Solution:
    """Result of an integration. x (B, ...): the last state that was accepted. status (B,) int64:
    index into `step_control.STATUSES`. accepted, rejected, evaluations (B,) int64: steps of each
    sample, and evaluations that it needed (a batch is evaluated as long as one of it needs more).
    trajectory (S, B, ...): states at the S times of save_at, NaN where a sample did not get there;
    None if none were asked for.
    """

    x: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    trajectory: Tensor | None = None

    @classmethod
    def of_fixed_steps(
        cls,
        x: Tensor,
        accepted: int,
        evaluations: int,
        trajectory: Tensor | None = None,
        rejected: int = 0,
    ) -> Solution:
        """What steps of the whole batch led to: done where x is finite."""
        status = torch.where(finite_rows(x), DONE, NON_FINITE)
        taken, refused, needed = (
            torch.full_like(status, count) for count in (accepted, rejected, evaluations)
        )
        return cls(x, status, taken, refused, needed, trajectory)


@dataclass(frozen=True)
class Counts:
    """The counts of a batch's `Solution` as lists on the host, one entry a sample.

    calls: evaluations of the velocity that the batch took; `evaluations` of a sample are those that
    it needed.
    """

    status: list[int]
    accepted: list[int]
    rejected: list[int]
    evaluations: list[int]
    calls: int

    @classmethod
    def of_fixed_steps(cls, batch: int, steps: int, evaluations: int, calls: int) -> Counts:
        """Of samples that are all done."""
        return cls([DONE] * batch, [steps] * batch, [0] * batch, [evaluations] * batch, calls)


@dataclass(frozen=True)
class BatchResult:
    """The `Solution` of a batch with its counts on the host."""

    x: Tensor
    counts: Counts
    trajectory: Tensor | None = None

    @classmethod
    def of(cls, solution: Solution, calls: int) -> BatchResult:
        names = ("status", "accepted", "rejected", "evaluations")
        lists: dict[str, Any] = {name: getattr(solution, name).tolist() for name in names}
        return cls(solution.x, Counts(calls=calls, **lists), solution.trajectory)


def combine(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """sum_i weights_i k_i, without the terms whose weight is 0."""
    terms = [weight * k for weight, k in zip(weights, ks, strict=True) if weight]
    return sum(terms[1:], terms[0])


def hermite(
    theta: float | Tensor, d: float | Tensor, x: Tensor, x_new: Tensor, k: Tensor, k_new: Tensor
) -> Tensor:
    """Cubic through both ends of a step of size d with their velocities, at the share theta of it
    (Hairer I, II.6)."""
    bend = (1 - 2 * theta) * (x_new - x) + (theta - 1) * d * k + theta * d * k_new
    return (1 - theta) * x + theta * x_new + theta * (theta - 1) * bend


def column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to broadcast against x; numbers in x's dtype."""
    values = values.to(x.dtype) if values.is_floating_point() else values
    return values.reshape(-1, *[1] * (x.dim() - 1))


def finite_rows(x: Tensor) -> Tensor:
    """Whether all numbers of each sample are finite: (B,) bool."""
    return torch.isfinite(x).reshape(len(x), math.prod(x.shape[1:])).all(1)


def check_times(t0: float, t1: float, save_at: Sequence[float]) -> list[float]:
    save, sign = [float(s) for s in save_at], 1 if t1 >= t0 else -1
    path = [t0, *save, t1]
    if not all(map(math.isfinite, path)) or any(
        (b - a) * sign < 0 for a, b in itertools.pairwise(path)
    ):
        raise ValueError(
            f"times must be finite and those of save_at run from t0 = {t0} to t1 = {t1}, not {save}"
        )
    return save
