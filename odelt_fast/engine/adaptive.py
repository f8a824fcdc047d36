"""A whole adaptive solve on the engine: launches alone, or CUDA graphs of one attempted step,
repeated by the GPU until all have ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelt_fast.operation import Operation
from odelt_fast.solvers.guidance import mix
from odelt_fast.solvers.probability_flow import probability_flow_velocity

from .device_adaptive import AdaptiveGraph, DeviceAdaptive, repeat
from .engine import Engine
from .graphs import Captured, Pool


class AdaptiveTrajectory:
    """x at t = 1 from x at t = 0, by steps that the samples choose: `trajectory(x, labels)` ->
    (x (B, C, H, W), counters (4, B)).

    x (B, C, H, W) float32; labels as for `Trajectory`. counters int64: status, accepted, rejected,
    evaluations (`Solution`). Calling it launches the steps one by one; `CapturedSolve` is its form
    as CUDA graphs. operation: with an adaptive solver and one depth.
    """

    def __init__(self, engine: Engine, operation: Operation) -> None:
        self.engine, self.operation, self.guidance = engine, operation, operation.mixing_scale
        self.tableau, self.limits = operation.tableau, operation.limits
        self.log2_steps = operation.step_index(engine.config.sampling)
        self.depth = engine.max_depth if operation.depth is None else operation.depth
        self.scales: Tensor | None = None  # (1,), of a network that is told the guidance scale
        with torch.inference_mode(False), torch.no_grad():
            self.null = torch.tensor([engine.config.num_classes], device=engine.device)
            if operation.told:
                scale = operation.guidance_scale if operation.is_guided else None
                self.scales = torch.full((1,), scale or 1.0, device=engine.device)

    @property
    def key(self) -> tuple[object, ...]:
        """What two trajectories share that make the same launches for the same shapes and
        guidance."""
        interval = self.operation.guidance_interval
        return (self.tableau.name, self.limits, self.log2_steps, self.depth, interval)

    def __call__(
        self, x: Tensor, labels: Tensor | None = None, scales: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        solve = self.prepare(x, labels, scales)
        solve.start()
        repeat(solve.attempt, solve.flag)
        return solve.x, solve.counters

    def prepare(
        self, x: Tensor, labels: Tensor | None = None, scales: Tensor | None = None
    ) -> DeviceAdaptive:
        """The solve from x, which is not copied: filled anew it can be solved again. labels and
        scales are read at every evaluation, too."""
        engine, depth = self.engine, self.depth
        guidance = self.guidance if labels is not None else None
        chosen = self.null if labels is None else labels
        predicts_noise = engine.config.sampling == "diffusion"
        interval, channels = self.operation.guidance_interval, engine.config.guided_channels
        shared = self.limits.error_norm == "batch"

        def field(t: Tensor, state: Tensor, log2_steps: float) -> Tensor:
            condition = engine.condition(t[:1].float() if shared else t.float(), log2_steps)
            if guidance is not None and len(condition) > 1:
                condition = torch.cat([condition, condition])
            told = scales
            if told is not None and interval is not None:
                told = torch.where((t >= interval[0]) & (t <= interval[1]), told, 1.0)
                told = told[:1] if shared else told
            final = condition + engine.labels(chosen, told)
            tables = engine.modulations(final + engine.length_rows(depth), final, depth)
            if guidance is None or interval is None:
                output = engine.velocity(state, tables, depth, guidance)
            else:  # samples have times of their own: by rows, and not in the last kernel
                both = engine.velocity(torch.cat([state, state]), tables, depth)
                output = mix(both, guidance, channels, interval, t)
            return probability_flow_velocity(output, state, t) if predicts_noise else output

        return DeviceAdaptive(field, x, self.log2_steps, self.tableau, self.limits, ops=engine.ops)

    def evaluations(self, attempts: int) -> int:
        """Of the velocity, in a solve of that many attempted steps."""
        return 2 + attempts * (self.tableau.stages - self.tableau.fsal)


class CapturedSolve(Captured):
    """An `AdaptiveTrajectory` as graphs: one launch for a whole solve where CUDA has while nodes
    (`loop.fallback` None)."""

    def _capture(
        self, device: torch.device, pool: Pool, capture: Callable[..., Any]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        assert isinstance(self.function, AdaptiveTrajectory)
        with torch.inference_mode(False), torch.no_grad():
            self.solve = self.function.prepare(*self.inputs)  # type: ignore[arg-type]
            self.loop = AdaptiveGraph(self.solve, pool, capture)
        return self.loop.step, (self.solve.x, self.solve.counters)

    def launch(self) -> None:
        self.loop.replay()
