"""Adaptive integration that never leaves the device: `integrate_adaptive` with its whole state in tensors that stay where they are, so that
one attempted step can be captured as a CUDA graph, and a while node (native.py) repeats it until every sample has ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelt_fast import native
from odelt_fast.adaptive import ERROR_NORMS, GROW, INTEGRAL_SHARE, SAFETY, SHRINK, _first_step, check_tolerances
from odelt_fast.graphs import capture
from odelt_fast.solution import (
    DONE,
    MAX_STEPS,
    NON_FINITE,
    RUNNING,
    STEP_UNDERFLOW,
    Field,
    Solution,
    check_times,
    column,
    combine,
    finite_rows,
)
from odelt_fast.tableau import Tableau

AHEAD = 4  # attempted steps between two looks at the flag where there is no while node


class DeviceAdaptive:
    """The adaptive integration of (B, ...) states from t0 to t1 in parts: `start`, then `attempt` while `flag` is not 0, then `solution`.

    start() and attempt() only launch work on the device: no value is read on the host, and every result is written in place. Arguments and
    numbers are those of `integrate_adaptive`; field(t (B,) float64, x, log2_steps) must only launch, too. Further attempts after the end
    change nothing. like: a tensor of the shape, dtype and device of the states.

    >>> solve = DeviceAdaptive(field, torch.zeros(2, 3), 7, DOPRI5)
    >>> solve.x0.copy_(x); solve.start()
    >>> while solve.flag.item(): solve.attempt()
    >>> solve.solution().x

    x0 (B, ...): the state at t0, which the caller fills. flag (1,) int32: whether a sample is still running.
    attempts (1,) int64: attempted steps so far. The field has been evaluated 2 + attempts*`evaluations_per_attempt` times.
    """

    def __init__(
        self,
        field: Field,
        like: Tensor,
        log2_steps: int,
        tableau: Tableau,
        *,
        t0: float = 0.0,
        t1: float = 1.0,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        max_steps: int = 4096,
        error_norm: str = "per_sample",
    ) -> None:
        self.rtol, self.atol = check_tolerances(rtol, atol)
        check_times(t0, t1, ())
        if tableau.error is None or tableau.error_order is None:
            raise ValueError(
                f"solver {tableau.name} has no error estimate and cannot choose its steps: take dopri5, tsit5, bosh3 or dop853"
            )
        if error_norm not in ERROR_NORMS:
            raise ValueError(f"error_norm must be one of {', '.join(ERROR_NORMS)}, not {error_norm!r}")
        if max_steps < 1 or not like.is_floating_point() or not like.numel():
            raise ValueError(f"max_steps must be at least 1, not {max_steps!r}, and x floating point and not empty, not {like.dtype}")
        self.field, self.log2_steps, self.tableau = field, log2_steps, tableau
        self.t0, self.t1, self.max_steps, self.shared = float(t0), float(t1), max_steps, error_norm == "batch"
        self.span, self.sign, self.exponent = abs(t1 - t0), math.copysign(1.0, t1 - t0), 1 / (tableau.error_order + 1)
        self.smallest = 16 * torch.finfo(torch.float64).eps * max(abs(t0), abs(t1))
        self.evaluations_per_attempt = tableau.stages - tableau.fsal
        batch, device = len(like), like.device
        self.x0, self.x, self.k = (torch.zeros_like(like, memory_format=torch.contiguous_format) for _ in range(3))
        # Time, step size, that of the last good step, norm of the last good step, and how much a step may grow: (B,) each.
        self.t, self.h, self.h_good, self.previous, self.grow = (torch.zeros(batch, dtype=torch.float64, device=device) for _ in range(5))
        self.status, self.accepted, self.rejected, self.evaluations = (
            torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.attempts = torch.zeros(1, dtype=torch.int64, device=device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)

    def start(self) -> None:
        """Sets out from x0: the first velocity and the size of the first step (two evaluations)."""
        for counter in (self.accepted, self.rejected, self.evaluations, self.attempts):
            counter.zero_()
        x = self.x.copy_(self.x0)
        running = finite_rows(x) if self.span else torch.zeros_like(self.status, dtype=torch.bool)
        status = torch.where(finite_rows(x), torch.where(running, RUNNING, DONE), NON_FINITE)
        t = self.t.fill_(self.t0)
        k = self.k.copy_(self._velocity(t, x, running))
        status = torch.where(running & ~finite_rows(k), NON_FINITE, status)
        arguments = (self._velocity, self._mean_square, t, x, k, status == RUNNING, self.sign, self.span, self.exponent)
        self.h.copy_(_first_step(*arguments).clamp(min=min(self.smallest, self.span)))
        self.h_good.copy_(self.h)
        self.previous.fill_(1e-4)
        self.grow.fill_(GROW)
        self._set_status(status)

    def attempt(self) -> None:
        """One attempted step of every running sample: stages, error, acceptance, the next step size."""
        tableau, x, k, t, h, shared = self.tableau, self.x, self.k, self.t, self.h, self.shared
        assert tableau.error is not None
        running = self.status == RUNNING
        self.attempts.add_(running.any())
        left = (self.t1 - t).abs()
        last = 1.01 * h >= left
        step = torch.where(last, left, h) * self.sign
        t_new, d = torch.where(last, self.t1, t + step), column(step, x)
        ks, x_new = [k], x
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            x_new = x + d * combine(row, ks)
            ks.append(self._velocity(t_new if c == 1 else t + c * step, x_new, running))
        if not tableau.fsal:
            x_new = x + d * combine(tableau.b, ks)
        size, error = torch.maximum(x.abs(), x_new.abs()), d * combine(tableau.error, ks)
        finite = finite_rows(x_new) & finite_rows(error)
        norm = self._mean_square(error, size, running)
        if tableau.error3 is not None:
            other = self._mean_square(d * combine(tableau.error3, ks), size, running)
            norm = torch.where(norm == 0, 0, norm.square() / (norm + 0.01 * other))
        norm = norm.sqrt()
        passed = norm <= 1
        taken = passed & running
        next_state = torch.where(column(taken, x), x_new, x)
        k_new = ks[-1] if tableau.fsal else self._velocity(torch.where(passed, t_new, t), next_state, taken & ~last)
        k_next = torch.where(column(taken, x), k_new, k)

        beta = INTEGRAL_SHARE * self.exponent
        power = norm.nan_to_num(math.inf, math.inf).clamp(min=1e-10) ** -(self.exponent - 0.75 * beta)
        factor = SAFETY * power * torch.where(passed, self.previous**beta, 1)
        factor = torch.where(passed, torch.minimum(factor, self.grow), factor.clamp(max=1)).clamp(min=SHRINK)
        moving = running | shared
        h_next = torch.where(moving, step.abs() * factor, h)
        h_good = torch.where(passed & moving, h_next, self.h_good)
        tiny = running & ~passed & (h_next < self.smallest)
        broken = running & ((tiny & ~finite) | (taken & ~last & ~finite_rows(k_next)))
        if shared:
            retry = broken.any()
            h_next, tiny = torch.where(retry & ~passed, h_good, h_next), tiny & (broken | ~retry)
        status = torch.where(taken & last, DONE, self.status)
        status = torch.where(running & ~(taken & last) & (self.attempts >= self.max_steps), MAX_STEPS, status)
        status = torch.where(tiny & finite, STEP_UNDERFLOW, torch.where(broken, NON_FINITE, status))

        self.accepted.add_(taken)
        self.rejected.add_(running & ~passed)
        t.copy_(torch.where(passed & moving, t_new, t))
        self.previous.copy_(torch.where(passed & moving, norm.clamp(min=1e-4), self.previous))
        self.grow.copy_(torch.where(passed, GROW, torch.ones_like(h)))
        self.h_good.copy_(h_good)
        h.copy_(h_next)
        k.copy_(k_next)
        x.copy_(next_state)
        self._set_status(status)

    def solution(self) -> Solution:
        """The result, as new tensors."""
        return Solution(*(part.clone() for part in (self.x, self.status, self.accepted, self.rejected, self.evaluations)))

    def _set_status(self, status: Tensor) -> None:
        self.status.copy_(status)
        self.flag.copy_((status == RUNNING).any())

    def _velocity(self, time: Tensor, state: Tensor, needed: Tensor) -> Tensor:
        self.evaluations.add_(needed)
        k: Tensor = self.field(time.clamp(min(self.t0, self.t1), max(self.t0, self.t1)), state, self.log2_steps)
        if k.shape != state.shape:
            raise ValueError(f"the field gave shape {tuple(k.shape)} for a state of shape {tuple(state.shape)}")
        return k.to(state.dtype)

    def _mean_square(self, v: Tensor, size: Tensor, running: Tensor) -> Tensor:
        """Mean of (v/(atol + rtol size))^2 over each sample, or over all running ones: (B,) float64."""
        ratio = torch.where(v == 0, 0, v / (self.atol + self.rtol * size)).double()
        mean = ratio.square().flatten(1).mean(1)
        return (torch.where(running, mean, 0).sum() / running.sum()).expand_as(mean) if self.shared else mean


class AdaptiveGraph:
    """`DeviceAdaptive` on a GPU as CUDA graphs: `graph(x)` is one launch, and the host reads nothing before the solution's values.

    Where while nodes cannot be had, `fallback` says why, and the captured step is replayed, with the flag read late and rarely; the numbers
    are the same. pool: memory pool of graphs that never run at the same time. Raises graphs.CaptureError for what cannot be captured.
    """

    def __init__(self, solve: DeviceAdaptive, pool: Any = None) -> None:
        self.solve, device = solve, solve.x.device
        self.fallback = native.while_graph_reason()
        with torch.no_grad():
            self.first, _ = capture(solve.start, device, pool)
            self.step, _ = capture(solve.attempt, device, pool)
        self.loop: native.WhileGraph | None = None
        if self.fallback is None:
            try:
                self.loop = native.WhileGraph(self.step, solve.flag, first=self.first)
            except RuntimeError as error:
                self.fallback = " ".join(str(error).split())[:200]

    def __call__(self, x: Tensor) -> Solution:
        """The solution from x (B, ...), on any device, at t0."""
        self.solve.x0.copy_(x, non_blocking=True)
        if self.loop is not None:
            self.loop.launch()
        else:
            self.first.replay()
            repeat(self.step.replay, self.solve.flag)
        return self.solve.solution()


def repeat(attempt: Callable[[], None], flag: Tensor, every: int = AHEAD) -> None:
    """Calls attempt() until flag (1,) is 0. The flag is looked at every `every` calls, and only when the next ones are on their way, so
    that the device never waits for the host; up to 2*every calls too many are made."""
    seen = torch.ones_like(flag, device="cpu", pin_memory=flag.is_cuda)
    copied = torch.cuda.Event() if flag.is_cuda else None
    while True:
        for _ in range(every):
            attempt()
        if copied is not None:
            copied.synchronize()  # returns at once before the first record
        if not seen.item():
            return
        seen.copy_(flag, non_blocking=True)
        if copied is not None:
            copied.record()
