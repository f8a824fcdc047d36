"""Integration of a velocity field with steps that each sample, or the batch, chooses by its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from odelt_fast.solution import (
    DONE,
    MAX_STEPS,
    NON_FINITE,
    RUNNING,
    STEP_UNDERFLOW,
    Field,
    Hook,
    Solution,
    check_times,
    column,
    combine,
    finite_rows,
    hermite,
)
from odelt_fast.tableau import Tableau

ERROR_NORMS = ("per_sample", "batch")
# Safety, smallest and largest change of the step size, and the share of the integral part: those of Hairer's DOPRI5.
SAFETY, SHRINK, GROW, INTEGRAL_SHARE = 0.9, 0.2, 10.0, 0.2


def check_tolerances(rtol: float, atol: float) -> tuple[float, float]:
    """Both as floats; ValueError unless they are finite, neither is negative and one is above 0."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
    if rtol == atol == 0:
        raise ValueError("rtol and atol must not both be 0: no step would be accurate enough")
    return float(rtol), float(atol)


def integrate_adaptive(
    field: Field,
    x: Tensor,
    log2_steps: int,
    tableau: Tableau,
    *,
    t0: float = 0.0,
    t1: float = 1.0,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_steps: int = 4096,
    error_norm: str = "per_sample",
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """State at t1 of x (B, ...) at t0 (t1 may be the earlier one), with steps whose estimated error is at most atol + rtol |x|.

    The error is a root mean square over a sample, or with error_norm="batch" over all samples, which then share time and step. A sample
    takes at most max_steps steps, accepted or not. Its steps are chosen by the PI controller of Hairer and Wanner's DOPRI5 (Solving ODEs
    II, IV.2), the first one by Hairer's rule (I, II.4). The whole batch is evaluated every time and finished samples are masked, so that
    no sample's result depends on the others' contents. A sample that becomes non-finite however small the step ends alone, with a status;
    under "batch" the others retry with their last good step size. save_at: times from t0 to t1 in that order, whose states come back
    by cubic Hermite interpolation (order 3). on_step(n) is called after attempted step n.

    Raises ValueError for tolerances, times or a tableau that cannot work, and for a field whose result does not have x's shape.
    """
    rtol, atol = check_tolerances(rtol, atol)
    save = check_times(t0, t1, save_at)
    if tableau.error is None or tableau.error_order is None:
        raise ValueError(f"solver {tableau.name} has no error estimate and cannot choose its steps: take dopri5, tsit5, bosh3 or dop853")
    if error_norm not in ERROR_NORMS:
        raise ValueError(f"error_norm must be one of {', '.join(ERROR_NORMS)}, not {error_norm!r}")
    if max_steps < 1 or not x.is_floating_point():
        raise ValueError(f"max_steps must be at least 1, not {max_steps!r}, and x floating point, not {x.dtype}")
    shared, span, sign, exponent = error_norm == "batch", abs(t1 - t0), math.copysign(1.0, t1 - t0), 1 / (tableau.error_order + 1)
    smallest = 16 * torch.finfo(torch.float64).eps * max(abs(t0), abs(t1))
    status = torch.where(finite_rows(x), RUNNING if span and x.numel() else DONE, NON_FINITE)
    t = torch.full((len(x),), t0, dtype=torch.float64, device=x.device)
    accepted, rejected, evaluations = (torch.zeros_like(status) for _ in range(3))
    trajectory = torch.full((len(save), *x.shape), math.nan, dtype=x.dtype, device=x.device)
    trajectory[[i for i, s in enumerate(save) if s == t0]] = x
    if not (status == RUNNING).any():
        return Solution(x, status, accepted, rejected, evaluations, trajectory if save else None)

    def velocity(time: Tensor, state: Tensor, needed: Tensor) -> Tensor:
        evaluations.add_(needed)
        k = field(time.clamp(min(t0, t1), max(t0, t1)), state, log2_steps)
        if k.shape != x.shape:
            raise ValueError(f"the field gave shape {tuple(k.shape)} for a state of shape {tuple(x.shape)}")
        return k.to(x.dtype)

    def mean_square(v: Tensor, size: Tensor, running: Tensor) -> Tensor:
        """Mean of (v/(atol + rtol size))^2 over each sample, or over all running ones: (B,) float64."""
        ratio = torch.where(v == 0, 0, v / (atol + rtol * size)).double()
        mean = ratio.square().flatten(1).mean(1)
        return (torch.where(running, mean, 0).sum() / running.sum()).expand_as(mean) if shared else mean

    k = velocity(t, x, status == RUNNING)
    status = torch.where((status == RUNNING) & ~finite_rows(k), NON_FINITE, status)
    h = _first_step(velocity, mean_square, t, x, k, status == RUNNING, sign, span, exponent).clamp(min=min(smallest, span))
    h_good, previous, grow = h, torch.full_like(h, 1e-4), torch.full_like(h, GROW)
    attempts = 0
    while (running := status == RUNNING).any():
        last = 1.01 * h >= (t1 - t).abs()
        step = torch.where(last, (t1 - t).abs(), h) * sign
        t_new, d = torch.where(last, t1, t + step), column(step, x)
        ks, x_new = [k], x
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            x_new = x + d * combine(row, ks)
            ks.append(velocity(t_new if c == 1 else t + c * step, x_new, running))
        if not tableau.fsal:
            x_new = x + d * combine(tableau.b, ks)
        size, error = torch.maximum(x.abs(), x_new.abs()), d * combine(tableau.error, ks)
        finite = finite_rows(x_new) & finite_rows(error)
        norm = mean_square(error, size, running)
        if tableau.error3 is not None:
            other = mean_square(d * combine(tableau.error3, ks), size, running)
            norm = torch.where(norm == 0, 0, norm.square() / (norm + 0.01 * other))  # |e5|^2/sqrt(|e5|^2 + |e3|^2/100), squared
        norm = norm.sqrt()
        passed = norm <= 1
        taken = passed & running
        next_state = torch.where(column(taken, x), x_new, x)
        needed = taken & ~last if not save else taken
        if tableau.fsal:
            k_new = ks[-1]
        else:
            k_new = velocity(torch.where(passed, t_new, t), next_state, needed) if needed.any() else k
        for i, s in enumerate(save):
            inside = taken & ((s - t) * sign > 0) & ((s - t_new) * sign <= 0)
            state = hermite(column((s - t) / step, x), d, x, x_new, k, k_new)
            trajectory[i] = torch.where(column(inside, x), state, trajectory[i])
        k = torch.where(column(taken, x), k_new, k)
        x, accepted, rejected = next_state, accepted + taken, rejected + (running & ~passed)

        beta = INTEGRAL_SHARE * exponent
        power = norm.nan_to_num(math.inf, math.inf).clamp(min=1e-10) ** -(exponent - 0.75 * beta)
        factor = SAFETY * power * torch.where(passed, previous**beta, 1)
        factor = torch.where(passed, torch.minimum(factor, grow), factor.clamp(max=1)).clamp(min=SHRINK)
        moving = running | shared
        t = torch.where(passed & moving, t_new, t)
        h = torch.where(moving, step.abs() * factor, h)
        h_good = torch.where(passed & moving, h, h_good)
        previous = torch.where(passed & moving, norm.clamp(min=1e-4), previous)
        grow = torch.where(passed, GROW, torch.ones_like(h))  # a step after a rejected one does not grow

        attempts += 1
        tiny = running & ~passed & (h < smallest)
        broken = running & ((tiny & ~finite) | (taken & ~last & ~finite_rows(k)))
        if shared and broken.any():
            h, tiny = torch.where(passed, h, h_good), tiny & broken
        stuck = tiny & finite
        status = torch.where(taken & last, DONE, status)
        status = torch.where(running & ~(taken & last) & (attempts >= max_steps), MAX_STEPS, status)
        status = torch.where(stuck, STEP_UNDERFLOW, torch.where(broken, NON_FINITE, status))
        if on_step:
            on_step(attempts)
    return Solution(x, status, accepted, rejected, evaluations, trajectory if save else None)


def _first_step(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    mean_square: Callable[[Tensor, Tensor, Tensor], Tensor],
    t: Tensor,
    x: Tensor,
    k: Tensor,
    running: Tensor,
    sign: float,
    span: float,
    exponent: float,
) -> Tensor:
    """Size of the first step, (B,): Hairer, Norsett, Wanner I, II.4. Takes one evaluation."""
    size = x.abs()
    d0, d1 = (mean_square(v, size, running).sqrt() for v in (x, k))
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).nan_to_num(1e-6, 1e-6).clamp(max=span)
    probe = velocity(t + sign * h0, x + column(sign * h0, x) * k, running)
    d2 = mean_square(probe - k, size, running).sqrt() / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** exponent)
    return torch.where(h1.isfinite() & (h1 > 0), torch.minimum(100 * h0, h1), h0).clamp(max=span)
