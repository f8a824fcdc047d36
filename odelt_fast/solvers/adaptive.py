"""Integration of a velocity field with steps that each sample, or the batch, chooses by its error.

`AdaptiveSteps` is one attempted step, from state to state, with the decisions of step_control.py;
`integrate_adaptive` repeats it on the host, and engine/native/while_graph.py on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Limits
from .solution import (
    Field,
    Hook,
    Solution,
    check_times,
    column,
    combine,
    finite_rows,
    hermite,
)
from .step_control import (
    DONE,
    GROW,
    NON_FINITE,
    RUNNING,
    Control,
    Counts,
    StepRules,
    decide,
    error_norm,
    mean_square,
    proposed,
)
from .tableau import Tableau


class State(NamedTuple):
    """A solve between two attempted steps. x, k (B, ...): state and velocity."""

    x: Tensor
    k: Tensor
    control: Control
    counts: Counts


class AdaptiveSteps:
    """`first(x)` is the state at t0, `attempt(state)` that after one attempted step of every
    running sample. Nothing is changed in place.

    on_host: the host may be asked whether any sample needs an evaluation; without it, everything is
    launched and no value is read. velocity_at_end: whether the velocity at t1 is wanted too. For
    the rest see `integrate_adaptive`.
    """

    def __init__(
        self,
        field: Field,
        log2_steps: float,
        tableau: Tableau,
        t0: float,
        t1: float,
        limits: Limits,
        on_host: bool = False,
        velocity_at_end: bool = False,
    ) -> None:
        if tableau.error is None or tableau.error_order is None:
            raise ValueError(
                f"solver {tableau.name} has no error estimate and cannot choose its steps: take"
                " dopri5, tsit5, bosh3 or dop853"
            )
        self.field, self.log2_steps = field, log2_steps
        self.tableau, self.error = tableau, tableau.error
        self.rules = StepRules.of(tableau.error_order, t0, t1, limits)
        self.span, self.order = abs(t1 - t0), tableau.error_order + 1
        self.shared = limits.error_norm == "batch"
        self.on_host, self.velocity_at_end = on_host, velocity_at_end

    def first(self, x: Tensor) -> State:
        """At t0: the first velocity and the size of the first step, one evaluation each."""
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, not {x.dtype}")
        begun = RUNNING if self.span and x.numel() else DONE
        status = torch.where(finite_rows(x), begun, NON_FINITE)
        t = torch.full((len(x),), self.rules.t0, dtype=torch.float64, device=x.device)
        none, k, h = torch.zeros_like(status), torch.zeros_like(x), torch.zeros_like(t)
        evaluations = none
        if not self.on_host or (status == RUNNING).any():
            evaluations = none + (status == RUNNING)
            k = self.velocity(t, x)
            status = torch.where((status == RUNNING) & ~finite_rows(k), NON_FINITE, status)
            evaluations = evaluations + (status == RUNNING)
            h = self._first_size(t, x, k, status == RUNNING)
            h = h.clamp(min=min(self.rules.smallest, self.span))
        control = Control(t, h, h, torch.full_like(h, 1e-4), torch.full_like(h, GROW))
        return State(x, k, control, Counts(status, none, none, evaluations))

    def attempt(self, state: State) -> State:
        """Stages, error, acceptance, the next step size, and who has ended."""
        tableau, rules, shared = self.tableau, self.rules, self.shared
        x, k, control, counts = state
        t, running = control.t, counts.status == RUNNING
        step, t_new, last = proposed(t, control.h, rules.t1, rules.sign)
        d, ks, x_new = column(step, x), [k], x
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            x_new = x + d * combine(row, ks)
            ks.append(self.velocity(t_new if c == 1 else t + c * step, x_new))
        if not tableau.fsal:
            x_new = x + d * combine(tableau.b, ks)
        error = d * combine(self.error, ks)
        error3 = None if tableau.error3 is None else d * combine(tableau.error3, ks)
        largest = torch.maximum(x.abs(), x_new.abs())
        norm = error_norm(error, error3, largest, running, rules, shared)
        finite, taken = finite_rows(x_new) & finite_rows(error), (norm <= 1) & running
        x = torch.where(column(taken, x), x_new, x)
        evaluations = counts.evaluations + running * (tableau.stages - 1)
        k_new = ks[-1]
        if not tableau.fsal:
            needed = taken if self.velocity_at_end else taken & ~last
            evaluations = evaluations + needed
            k_new = k
            if not self.on_host or needed.any():
                k_new = self.velocity(torch.where(norm <= 1, t_new, t), x)
        k = torch.where(column(taken, x), k_new, k)
        counts = counts._replace(evaluations=evaluations)
        decided = decide(control, counts, norm, finite, finite_rows(k), rules, shared)
        return State(x, k, *decided)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """The field at times t (B,), which are held between t0 and t1: rounding may take them
        out."""
        ends = sorted((self.rules.t0, self.rules.t1))
        k: Tensor = self.field(t.clamp(*ends), x, self.log2_steps)
        if k.shape != x.shape:
            raise ValueError(
                f"the field gave shape {tuple(k.shape)} for a state of shape {tuple(x.shape)}"
            )
        return k.to(x.dtype)

    def _first_size(self, t: Tensor, x: Tensor, k: Tensor, running: Tensor) -> Tensor:
        """Size of the first step, (B,): Hairer, Norsett, Wanner I, II.4. Takes one evaluation."""
        size, sign, span = x.abs(), self.rules.sign, self.span

        def norm(v: Tensor) -> Tensor:
            return mean_square(v, size, running, self.rules, self.shared).sqrt()

        d0, d1 = norm(x), norm(k)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h0 = h0.nan_to_num(1e-6, 1e-6).clamp(max=span)
        probe = self.velocity(t + sign * h0, x + column(sign * h0, x) * k)
        d2 = norm(probe - k) / h0
        steepest = torch.maximum(d1, d2)
        power = (0.01 / steepest) ** (1 / self.order)
        h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), power)
        return torch.where(h1.isfinite() & (h1 > 0), torch.minimum(100 * h0, h1), h0).clamp(
            max=span
        )


def integrate_adaptive(
    field: Field,
    x: Tensor,
    log2_steps: float,
    tableau: Tableau,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    *,
    span: tuple[float, float] = (0.0, 1.0),
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """State at the end of `span` of x (B, ...) at its begin, with steps that each sample chooses.

    Steps are chosen by the PI controller of Hairer and Wanner's DOPRI5 (Solving ODEs II, IV.2), the
    first one by Hairer's rule (I, II.4), within `limits`. The whole batch is evaluated every time
    and finished samples are masked, so that no sample's result depends on the others' contents. A
    sample that becomes non-finite however small the step ends alone, with a status; under
    error_norm "batch" the others retry with their last good step size.

    Args:
        span: (t0, t1), t1 may be the earlier one.
        on_step: called with n after attempted step n.
        save_at: times from t0 to t1 in that order, whose states come back by cubic Hermite
            interpolation (order 3).

    Raises:
        ValueError: for times or a tableau that cannot work, and for a field whose result does not
            have x's shape.
    """
    t0, t1 = span
    save = check_times(t0, t1, save_at)
    steps = AdaptiveSteps(
        field, log2_steps, tableau, t0, t1, limits, on_host=True, velocity_at_end=bool(save)
    )
    state = steps.first(x)
    trajectory = torch.full((len(save), *x.shape), math.nan, dtype=x.dtype, device=x.device)
    trajectory[[i for i, s in enumerate(save) if s == t0]] = x
    attempts = 0
    while (state.counts.status == RUNNING).any():
        before, state = state, steps.attempt(state)
        taken = state.counts.accepted > before.counts.accepted
        t, t_new, sign = before.control.t, state.control.t, steps.rules.sign
        for i, s in enumerate(save):
            inside = column(taken & ((s - t) * sign > 0) & ((s - t_new) * sign <= 0), x)
            share, d = column((s - t) / (t_new - t), x), column(t_new - t, x)
            between = hermite(share, d, before.x, state.x, before.k, state.k)
            trajectory[i] = torch.where(inside, between, trajectory[i])
        attempts += 1
        if on_step:
            on_step(attempts)
    return Solution(state.x, *state.counts, trajectory if save else None)
