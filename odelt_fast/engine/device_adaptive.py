"""Adaptive integration that never leaves the device: the steps of adaptive.py on tensors that stay
where they are, so that one attempted step can be captured as a CUDA graph, and a while node
(native/while_graph.py) repeats it until every sample has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from odelt_fast.files import one_line
from odelt_fast.solvers.adaptive import AdaptiveSteps, State
from odelt_fast.solvers.options import Limits
from odelt_fast.solvers.solution import Field, Solution, check_times
from odelt_fast.solvers.step_control import RUNNING, Control, Counts
from odelt_fast.solvers.tableau import Tableau

from .graphs import Pool, capture
from .native.while_graph import WhileGraph, while_graph_unavailable

logger = logging.getLogger(__name__)


class DeviceAdaptive:
    """The adaptive integration of (B, ...) states from t0 to t1 in parts: `start`, then `attempt`
    while `flag` is not 0, then `solution`.

    start() and attempt() only launch work on the device: no value is read on the host, and every
    result is written in place. The numbers are those of `integrate_adaptive`. Further attempts
    after the end change nothing.

    >>> solve = DeviceAdaptive(field, x, 7, TABLEAUS["dopri5"])
    >>> solve.start()
    >>> while solve.flag.item(): solve.attempt()
    >>> solve.solution().x

    Args:
        field: field(t (B,) float64, x, log2_steps), which must only launch, too.
        x0: (B, ...), the state at the begin of `span`; it is not copied, so that the caller can
            fill it anew and start again.
        ops: those of `load_operators`, which make an attempt's arithmetic 2 launches a stage and 3
            at its end, equal within rounding; None (and for batches of more than ops.MOST_SAMPLES):
            PyTorch's own operators, about 200 launches, equal to the last bit.

    Attributes:
        x, counters: the solution (B, ...), and (4, B) int64: status, accepted and rejected steps,
            evaluations.
        flag: (1,) int32, whether a sample is still running.
        evaluations_per_attempt: the field has been evaluated 2 + attempts * this times.
    """

    def __init__(
        self,
        field: Field,
        x0: Tensor,
        log2_steps: float,
        tableau: Tableau,
        limits: Limits = Limits(),  # noqa: B008 (it is frozen)
        span: tuple[float, float] = (0.0, 1.0),
        ops: SimpleNamespace | None = None,
    ) -> None:
        check_times(*span, ())
        self.steps = AdaptiveSteps(field, log2_steps, tableau, *span, limits)
        if not x0.is_floating_point() or not x0.numel():
            raise ValueError(
                f"x must be floating point and not empty, not {tuple(x0.shape)} in {x0.dtype}"
            )
        self.x0, self.tableau, batch, device = x0, tableau, len(x0), x0.device
        self.evaluations_per_attempt = tableau.stages - tableau.fsal
        self.ops = ops if ops and batch <= ops.MOST_SAMPLES else None
        self.x = torch.zeros_like(x0, memory_format=torch.contiguous_format)
        # The velocities of an attempt, the last of them at its end; without ops only the first is
        # kept from one attempt to the next.
        self.stages = x0.new_zeros((self.evaluations_per_attempt + 1 if self.ops else 1, *x0.shape))
        self.control = torch.zeros(5, batch, dtype=torch.float64, device=device)
        self.counters = torch.zeros(4, batch, dtype=torch.int64, device=device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        counts = Counts(*self.counters)
        self.state = State(self.x, self.stages[0], Control(*self.control), counts)
        if self.ops:
            self._prepare_fused()

    def start(self) -> None:
        """Sets out from x0: the first velocity and the size of the first step (two evaluations)."""
        self._write(self.steps.first(self.x0))
        if self.ops:
            step, times, _ = self.ops.first_attempt(self.control, self.nodes, self.rules)
            self.step.copy_(step)
            self.times.copy_(times)

    def attempt(self) -> None:
        """One attempted step of every running sample."""
        if self.ops:
            self._fused_attempt()
        else:
            self._write(self.steps.attempt(self.state))

    def solution(self) -> Solution:
        """The result, as new tensors."""
        return Solution(self.x.clone(), *self.counters.clone())

    @property
    def attempts(self) -> Tensor:
        """Attempted steps so far, () int64."""
        return self.counters[1:3].sum(0).max()

    def _write(self, state: State) -> None:
        held, new = ((each.x, each.k, *each.control, *each.counts) for each in (self.state, state))
        for target, value in zip(held, new, strict=True):
            target.copy_(value)
        self.flag.copy_((state.counts.status == RUNNING).any())

    def _prepare_fused(self) -> None:
        """What the kernels read beside the state: the tableau, the rules of the step sizes, and the
        step and times of the next attempt."""
        tableau, steps, batch = self.tableau, self.steps, len(self.x)

        def on_device(row: tuple[float, ...]) -> Tensor:
            return torch.tensor(row, dtype=torch.float64, device=self.x.device)

        rows, nodes = tableau.a[1:], tableau.c
        if not tableau.fsal:  # the velocity at the next state is one stage more
            rows, nodes = (*rows, tableau.b), (*nodes, 1.0)
        self.rows = [on_device(row) for row in rows]
        self.nodes, self.error = on_device(nodes), on_device(steps.error)
        self.error3 = None if tableau.error3 is None else on_device(tableau.error3)
        self.rules = on_device(tuple(steps.rules))
        self.step = self.control.new_zeros(batch)
        self.times = self.control.new_zeros((len(nodes), batch))

    def _fused_attempt(self) -> None:
        ops: Any = self.ops
        stages, x_new = self.stages, self.x
        for i, row in enumerate(self.rows, 1):
            x_new = ops.combine_stages(self.x, stages[:i], row, self.step)
            stages[i].copy_(self.steps.velocity(self.times[i], x_new))
        states = self.control, self.counters, self.step, self.times, self.flag
        constants = self.nodes, self.error, self.error3, self.rules
        choices = self.steps.shared, self.tableau.fsal
        ops.adaptive_step_update(self.x, x_new, stages, *states, *constants, *choices)


class AdaptiveGraph:
    """`DeviceAdaptive` on a GPU as CUDA graphs: `replay()` is one launch, and the host reads
    nothing before the solution's values.

    Where while nodes cannot be had, `fallback` is the reason, and the captured step is replayed,
    with the flag read late; the numbers are the same.

    Args:
        solve: what is captured.
        pool: of graphs that never run at the same time.
        capturing: `graphs.capture`, or what acts as it.

    Raises:
        graphs.CaptureError: it cannot be captured.
    """

    def __init__(
        self,
        solve: DeviceAdaptive,
        pool: Pool | None = None,
        capturing: Callable[..., tuple[Any, Any]] = capture,
    ) -> None:
        self.solve, device = solve, solve.x.device

        def captured(launch: Callable[[], None]) -> Any:
            def function() -> tuple[Tensor, ...]:
                launch()
                return ()

            return capturing(function, device, pool)[0]

        with torch.no_grad():
            self.first, self.step = captured(solve.start), captured(solve.attempt)
        self.loop: WhileGraph | None = None
        self.fallback: str | None = f"the model is on {device}"
        if device.type == "cuda":
            try:
                self.fallback = while_graph_unavailable()
                if self.fallback is None:
                    self.loop = WhileGraph(self.step, solve.flag, first=self.first)
            except RuntimeError as error:
                logger.info("a while graph cannot be made", exc_info=True)
                self.fallback = one_line(error)

    def replay(self) -> None:
        """Solves from what lies in `solve.x0`."""
        if self.loop is not None:
            self.loop.launch()
        else:
            self.first.replay()
            repeat(self.step.replay, self.solve.flag)


def repeat(attempt: Callable[[], None], flag: Tensor) -> None:
    """Calls attempt() until flag (1,) is 0.

    The flag is looked at only when the next call is on its way: that hides the time it takes to
    arrive, and the device never waits for the host. One call too many is made, or two if there was
    nothing to do; more would cost all evaluations of a step each.
    """
    seen = torch.ones_like(flag, device="cpu", pin_memory=flag.is_cuda)
    copied = torch.cuda.Event() if flag.is_cuda else None
    while True:
        attempt()
        if copied is not None:
            copied.synchronize()  # returns at once before the first record
        if not seen.item():
            return
        seen.copy_(flag, non_blocking=True)
        if copied is not None:
            copied.record()
