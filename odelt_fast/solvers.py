"""Integration of a velocity field from noise (t = 0) to data (t = 1), or between any two times: given steps, or steps chosen by the error.

A field is a function (t, x, step index) -> dx/dt of x's shape and dtype, x (B, ...). Fixed steps pass t as a number; adaptive ones as a
(B,) float64 tensor, since every sample has its own time.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from odelt_fast.tableau import Tableau, find_tableau

Field = Callable[[Any, Tensor, int], Tensor]
Hook = Callable[[int], None]

STATUSES = ("done", "max_steps", "step_underflow", "non_finite")
DONE, MAX_STEPS, STEP_UNDERFLOW, NON_FINITE = range(4)
RUNNING = -1
ERROR_NORMS = ("per_sample", "batch")
TORCHDIFFEQ_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
TORCHDIFFEQ_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
# Safety, smallest and largest change of the step size, and the share of the integral part: those of Hairer's DOPRI5.
SAFETY, SHRINK, GROW, INTEGRAL_SHARE = 0.9, 0.2, 10.0, 0.2


@dataclass(frozen=True)
class Solution:
    """Result of an integration. x (B, ...): the last state that was accepted. status (B,) int64: index into STATUSES. accepted, rejected,
    evaluations (B,) int64: steps of each sample, and evaluations that it needed (a batch is evaluated as long as one of it needs more).
    trajectory (S, B, ...): states at the S times of save_at, NaN where a sample did not get there; None if none were asked for.
    """

    x: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    trajectory: Tensor | None = None

    @classmethod
    def of_fixed_steps(cls, x: Tensor, steps: int, evaluations: int, trajectory: Tensor | None = None) -> Solution:
        """What `steps` steps that none could refuse led to: done where x is finite."""
        accepted, rejected, needed = (torch.full((len(x),), value, device=x.device) for value in (steps, 0, evaluations))
        return cls(x, torch.where(_finite(x), DONE, NON_FINITE), accepted, rejected, needed, trajectory)


def check_solver(name: str) -> str:
    """`name` if it is a solver; otherwise ValueError that names those there are."""
    if isinstance(name, str) and name.startswith("torchdiffeq:"):
        allowed = (*TORCHDIFFEQ_ADAPTIVE, *TORCHDIFFEQ_FIXED)
        if name.removeprefix("torchdiffeq:") not in allowed:
            raise ValueError(f"solver torchdiffeq: must be followed by one of {', '.join(allowed)}, not {name!r}")
    else:
        find_tableau(name)
    return name


def is_adaptive(solver: str) -> bool:
    """Whether a solver chooses its own steps."""
    if solver.startswith("torchdiffeq:"):
        return solver.removeprefix("torchdiffeq:") in TORCHDIFFEQ_ADAPTIVE
    return find_tableau(solver)[1]


def check_tolerances(rtol: float, atol: float) -> tuple[float, float]:
    """Both as floats; ValueError unless they are finite, neither is negative and one is above 0."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
    if rtol == atol == 0:
        raise ValueError("rtol and atol must not both be 0: no step would be accurate enough")
    return float(rtol), float(atol)


def check_time_grid(grid: str | tuple[str, float]) -> float:
    """The shift s that a time grid asks for: 1 for "uniform"; "shift:3.0" or ("shift", 3.0) give 3. ValueError for anything else."""
    if isinstance(grid, str) and grid == "uniform":
        return 1.0
    try:
        name, value = grid.split(":", 1) if isinstance(grid, str) else grid
        shift = float(value) if name == "shift" and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        shift = math.nan
    if not 0 < shift < math.inf:
        raise ValueError(f"time_grid must be uniform, or shift:S with a finite S above 0 (shift:3.0), not {grid!r}")
    return shift


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 0 to 1: t = u/(s - (s - 1) u) for u = i/steps.

    A shift s > 1 spends more steps near the noise, where images of high resolution need them. It is tau' = s tau/(1 + (s - 1) tau) of Esser
    et al. 2024 (equation 23, s = sqrt(m/n)) for their noise level tau = 1 - t.
    """
    return [u / (shift - (shift - 1) * u) for u in (i / steps for i in range(steps))] + [1.0]


def integrate(
    field: Field, x: Tensor, steps: int, log2_steps: int, solver: str = "euler", on_step: Hook | None = None, shift: float = 1.0
) -> Tensor:
    """State at t = 1 after `steps` fixed steps of a tableau from t = 0; x (B, ...) is left as it is.

    log2_steps: the step index that the field is fed. on_step(i) is called after step i. shift: see `time_grid`. Raises ValueError for an
    unknown solver.
    """
    return integrate_fixed(field, x, time_grid(steps, shift), log2_steps, find_tableau(solver)[0], on_step).x


def integrate_fixed(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    log2_steps: int,
    tableau: Tableau,
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """Steps of `tableau` between neighbouring `times`, rising or falling. save_at as in `integrate_adaptive`."""
    save = _check_times(times[0], times[-1], save_at)
    saved = [x] * sum(s == times[0] for s in save)
    stages = tableau.stages - tableau.fsal  # the last stage of a FSAL method is the first of the next step
    weights = tableau.a[-1] if tableau.fsal else tableau.b
    evaluations, k_new = 0, None
    for i in range(len(times) - 1):
        t, t_new = times[i], times[i + 1]
        d, ks = t_new - t, [field(t, x, log2_steps) if k_new is None else k_new]
        evaluations += k_new is None
        for c, row in zip(tableau.c[1:stages], tableau.a[1:stages], strict=True):
            ks.append(field(t_new if c == 1 else t + c * d, x + d * _combine(row, ks), log2_steps))
        evaluations += stages - 1
        x_new, k_new = x + d * _combine(weights, ks), None
        inside = [s for s in save[len(saved) :] if (t < s <= t_new) or (t > s >= t_new)]
        if inside:
            k_new = field(t_new, x_new, log2_steps)
            evaluations += 1
            saved += [_hermite((s - t) / d, d, x, x_new, ks[0], k_new) for s in inside]
        x = x_new
        if on_step:
            on_step(i)
    return Solution.of_fixed_steps(x, len(times) - 1, evaluations, torch.stack(saved) if save else None)


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
    save = _check_times(t0, t1, save_at)
    if tableau.error is None or tableau.error_order is None:
        raise ValueError(f"solver {tableau.name} has no error estimate and cannot choose its steps: take dopri5, tsit5, bosh3 or dop853")
    if error_norm not in ERROR_NORMS:
        raise ValueError(f"error_norm must be one of {', '.join(ERROR_NORMS)}, not {error_norm!r}")
    if max_steps < 1 or not x.is_floating_point():
        raise ValueError(f"max_steps must be at least 1, not {max_steps!r}, and x floating point, not {x.dtype}")
    shared, span, sign, exponent = error_norm == "batch", abs(t1 - t0), math.copysign(1.0, t1 - t0), 1 / (tableau.error_order + 1)
    smallest = 16 * torch.finfo(torch.float64).eps * max(abs(t0), abs(t1))
    status = torch.where(_finite(x), RUNNING if span and x.numel() else DONE, NON_FINITE)
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
    status = torch.where((status == RUNNING) & ~_finite(k), NON_FINITE, status)
    h = _first_step(velocity, mean_square, t, x, k, status == RUNNING, sign, span, exponent).clamp(min=min(smallest, span))
    h_good, previous, grow = h, torch.full_like(h, 1e-4), torch.full_like(h, GROW)
    attempts = 0
    while (running := status == RUNNING).any():
        last = 1.01 * h >= (t1 - t).abs()
        step = torch.where(last, (t1 - t).abs(), h) * sign
        t_new, d = torch.where(last, t1, t + step), _column(step, x)
        ks, x_new = [k], x
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            x_new = x + d * _combine(row, ks)
            ks.append(velocity(t_new if c == 1 else t + c * step, x_new, running))
        if not tableau.fsal:
            x_new = x + d * _combine(tableau.b, ks)
        size, error = torch.maximum(x.abs(), x_new.abs()), d * _combine(tableau.error, ks)
        finite = _finite(x_new) & _finite(error)
        norm = mean_square(error, size, running)
        if tableau.error3 is not None:
            other = mean_square(d * _combine(tableau.error3, ks), size, running)
            norm = torch.where(norm == 0, 0, norm.square() / (norm + 0.01 * other))  # |e5|^2/sqrt(|e5|^2 + |e3|^2/100), squared
        norm = norm.sqrt()
        passed = norm <= 1
        taken = passed & running
        next_state = torch.where(_column(taken, x), x_new, x)
        needed = taken & ~last if not save else taken
        if tableau.fsal:
            k_new = ks[-1]
        else:
            k_new = velocity(torch.where(passed, t_new, t), next_state, needed) if needed.any() else k
        for i, s in enumerate(save):
            inside = taken & ((s - t) * sign > 0) & ((s - t_new) * sign <= 0)
            state = _hermite(_column((s - t) / step, x), d, x, x_new, k, k_new)
            trajectory[i] = torch.where(_column(inside, x), state, trajectory[i])
        k = torch.where(_column(taken, x), k_new, k)
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
        broken = running & ((tiny & ~finite) | (taken & ~last & ~_finite(k)))
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
    probe = velocity(t + sign * h0, x + _column(sign * h0, x) * k, running)
    d2 = mean_square(probe - k, size, running).sqrt() / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** exponent)
    return torch.where(h1.isfinite() & (h1 > 0), torch.minimum(100 * h0, h1), h0).clamp(max=span)


def integrate_torchdiffeq(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    log2_steps: int,
    method: str,
    *,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_steps: int = 4096,
    on_step: Hook | None = None,
) -> Solution:
    """torchdiffeq's `method` from times[0] to times[-1]: fixed-step methods step along `times`, adaptive ones (one error over the batch)
    choose theirs. Raises ValueError where torchdiffeq gives up."""
    from torchdiffeq import odeint

    counts = {"evaluations": 0, "accepted": 0, "rejected": 0}

    def function(t: Tensor, state: Tensor) -> Tensor:
        counts["evaluations"] += 1
        return field(t, state, log2_steps)

    def count(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            counts[name] += 1
            if on_step:
                on_step(counts["accepted"] + counts["rejected"] - 1)

        return called

    grid = torch.tensor(times, dtype=torch.float64, device=x.device)
    options: dict[str, Any]
    if method in TORCHDIFFEQ_ADAPTIVE:
        options = {"max_num_steps": max_steps}
        hooks = {"callback_accept_step": "accepted", "callback_reject_step": "rejected"}
    else:
        options = {"grid_constructor": lambda function, state, t: grid}
        if method.endswith("_adams"):
            options["max_order"] = 4  # torchdiffeq's default of 12 is unstable at the step sizes of sampling
        hooks = {"callback_step": "accepted"}
    for hook, name in hooks.items():
        setattr(function, hook, count(name))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Functional iteration did not converge")
            x = odeint(function, x, grid[[0, -1]], rtol=rtol, atol=atol, method=method, options=options)[-1]
    except AssertionError as error:
        reason = str(error).split(":")[0]
        advice = "raise rtol and atol or max_steps, or take dopri5 or tsit5, which say which image failed"
        raise ValueError(f"torchdiffeq:{method} gave up at rtol {rtol:g}, atol {atol:g} ({reason}): {advice}") from error
    solution = Solution.of_fixed_steps(x, counts["accepted"], counts["evaluations"])
    return replace(solution, rejected=torch.full_like(solution.rejected, counts["rejected"]))


def predict_and_renoise(
    field: Field, x: Tensor, steps: int, log2_steps: int, noise: Callable[[int], Tensor], on_step: Hook | None = None
) -> Tensor:
    """Sampling of consistency models: x1 = x + v (1-t), then x <- x1 (t+d) + eps (1-t-d), for t = i/T, d = 1/T.

    noise(i) gives eps (B, C, H, W) of step i; it is not asked for after the last step, where its weight is 0. on_step as in `integrate`.
    """
    for i in range(steps):
        data = x + field(i / steps, x, log2_steps) * ((steps - i) / steps)
        left = (steps - i - 1) / steps
        x = data * ((i + 1) / steps) + noise(i) * left if left else data
        if on_step:
            on_step(i)
    return x


def _combine(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """sum_i weights_i k_i, without the terms whose weight is 0."""
    terms = [weight * k for weight, k in zip(weights, ks, strict=True) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _hermite(theta: float | Tensor, d: float | Tensor, x: Tensor, x_new: Tensor, k: Tensor, k_new: Tensor) -> Tensor:
    """Cubic through both ends of a step of size d with their velocities, at the share theta of it (Hairer I, II.6)."""
    bend = (1 - 2 * theta) * (x_new - x) + (theta - 1) * d * k + theta * d * k_new
    return (1 - theta) * x + theta * x_new + theta * (theta - 1) * bend


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to broadcast against x; numbers in x's dtype."""
    values = values.to(x.dtype) if values.is_floating_point() else values
    return values.reshape(-1, *[1] * (x.dim() - 1))


def _finite(x: Tensor) -> Tensor:
    """Whether all numbers of each sample are finite: (B,) bool."""
    return torch.isfinite(x).reshape(len(x), -1).all(1) if x.numel() else torch.ones(len(x), dtype=torch.bool, device=x.device)


def _check_times(t0: float, t1: float, save_at: Sequence[float]) -> list[float]:
    save, sign = [float(s) for s in save_at], 1 if t1 >= t0 else -1
    path = [t0, *save, t1]
    if not all(map(math.isfinite, path)) or any((b - a) * sign < 0 for a, b in itertools.pairwise(path)):
        raise ValueError(f"times must be finite and those of save_at run from t0 = {t0} to t1 = {t1}, not {save}")
    return save
