"""What an adaptive solver decides about an attempted step: its error over the tolerance,
acceptance, the next step size, who has ended.

The only definition of this arithmetic in PyTorch: the host's loop, the loop on the device and the
kernels' plain form all call it. The step sizes are chosen by the PI controller of Hairer and
Wanner's DOPRI5 (Solving ODEs II, IV.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Limits

STATUSES = ("done", "max_steps", "step_underflow", "non_finite")
DONE, MAX_STEPS, STEP_UNDERFLOW, NON_FINITE = range(4)
RUNNING = -1
# Safety, smallest and largest change of the step size, and the share of the integral part: those of
# Hairer's DOPRI5.
SAFETY, SHRINK, GROW, INTEGRAL_SHARE = 0.9, 0.2, 10.0, 0.2


class StepRules(NamedTuple):
    """What a solve does not change. smallest: the step size below which a refused step is given up;
    exponent, beta: of the controller."""

    t0: float
    t1: float
    rtol: float
    atol: float
    smallest: float
    max_steps: float
    exponent: float
    beta: float
    safety: float = SAFETY
    shrink: float = SHRINK
    grow: float = GROW

    @classmethod
    def of(cls, error_order: int, t0: float, t1: float, limits: Limits) -> StepRules:
        """For an error estimate of that order, between t0 and t1."""
        order = 1 / (error_order + 1)
        beta = INTEGRAL_SHARE * order
        smallest = 16 * torch.finfo(torch.float64).eps * max(abs(t0), abs(t1))
        bounds = limits.rtol, limits.atol, smallest, limits.max_steps
        return cls(float(t0), float(t1), *bounds, order - 0.75 * beta, beta)

    @property
    def sign(self) -> float:
        return math.copysign(1.0, self.t1 - self.t0)


class Control(NamedTuple):
    """Of each sample, (B,) float64: time, size of the next step and of the last good one, norm of
    the last accepted error, and how much the next step may grow."""

    t: Tensor
    h: Tensor
    h_good: Tensor
    previous: Tensor
    grow: Tensor


class Counts(NamedTuple):
    """Of each sample, (B,) int64: status (RUNNING or an index into STATUSES), accepted and rejected
    steps, evaluations."""

    status: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor


def proposed(
    t: Tensor, h: Tensor, t1: float | Tensor, sign: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(signed step, time at its end, whether it is the last) of the next attempt, each (B,). The
    last one takes up to 1% more."""
    left = (t1 - t).abs()
    last = 1.01 * h >= left
    step = torch.where(last, left, h) * sign
    return step, torch.where(last, t1, t + step), last


def mean_square(v: Tensor, size: Tensor, running: Tensor, rules: StepRules, shared: bool) -> Tensor:
    """Mean of (v/(atol + rtol size))^2 over each sample, or over all running ones: (B,) float64."""
    ratio = torch.where(v == 0, 0, v / (rules.atol + rules.rtol * size)).double()
    mean = ratio.square().flatten(1).mean(1)
    return (torch.where(running, mean, 0).sum() / running.sum()).expand_as(mean) if shared else mean


def error_norm(
    error: Tensor,
    error3: Tensor | None,
    size: Tensor,
    running: Tensor,
    rules: StepRules,
    shared: bool,
) -> Tensor:
    """Norm of an estimated error (B, ...) over the tolerance at states of `size`, (B,) float64;
    DOP853 has two estimates."""
    norm = mean_square(error, size, running, rules, shared)
    if error3 is not None:
        other = mean_square(error3, size, running, rules, shared)
        # |e5|^2/sqrt(|e5|^2 + |e3|^2/100), squared.
        norm = torch.where(norm == 0, 0, norm.square() / (norm + 0.01 * other))
    return norm.sqrt()


def decide(
    control: Control,
    counts: Counts,
    norm: Tensor,
    finite: Tensor,
    k_finite: Tensor,
    rules: StepRules,
    shared: bool,
) -> tuple[Control, Counts]:
    """What an attempt of `proposed(control)` leads to.

    Args:
        norm: (B,) that of its error; NaN: refused.
        finite: (B,) whether the new state and the error are.
        k_finite: (B,) whether the velocity at the state that holds now is.
        shared: whether all samples have one time, step and norm.
    """
    t, h, h_good, previous, grow = control
    status, accepted, rejected, evaluations = counts
    step, t_new, last = proposed(t, h, rules.t1, rules.sign)
    running = status == RUNNING
    passed = norm <= 1
    taken = passed & running
    accepted, rejected = accepted + taken, rejected + (running & ~passed)

    power = norm.nan_to_num(math.inf, math.inf).clamp(min=1e-10) ** -rules.exponent
    factor = rules.safety * power * torch.where(passed, previous**rules.beta, 1)
    factor = torch.where(passed, torch.minimum(factor, grow), factor.clamp(max=1))
    factor = factor.clamp(min=rules.shrink)
    moving = running | shared
    t = torch.where(passed & moving, t_new, t)
    h = torch.where(moving, step.abs() * factor, h)
    h_good = torch.where(passed & moving, h, h_good)
    previous = torch.where(passed & moving, norm.clamp(min=1e-4), previous)
    # A step after a rejected one does not grow.
    grow = torch.where(passed, rules.grow, torch.ones_like(h))

    tiny = running & ~passed & (h < rules.smallest)
    broken = running & ((tiny & ~finite) | (taken & ~last & ~k_finite))
    if shared:  # one that cannot go on ends alone, and the others retry with their last good size
        retry = broken.any()
        h, tiny = torch.where(retry & ~passed, h_good, h), tiny & (broken | ~retry)
    status = torch.where(taken & last, DONE, status)
    spent = accepted + rejected >= rules.max_steps
    status = torch.where(running & ~(taken & last) & spent, MAX_STEPS, status)
    status = torch.where(tiny & finite, STEP_UNDERFLOW, torch.where(broken, NON_FINITE, status))
    counts = Counts(status, accepted, rejected, evaluations)
    return Control(t, h, h_good, previous, grow), counts
