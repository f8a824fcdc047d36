"""A whole trajectory of fixed steps as launches alone, which one CUDA graph can hold.

Nothing in it waits for the host: times, steps and lengths of all evaluations are known beforehand,
so their embeddings are. The modulation of all blocks at many steps is one matrix product, which
reads the modulation weights once (DiT-B/2, 12 blocks: 85 MB in bfloat16) and not once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from odelt_fast.operation import Operation
from odelt_fast.solvers.fixed import integrate_fixed, predict_and_renoise
from odelt_fast.solvers.probability_flow import probability_flow_velocity
from odelt_fast.solvers.tableau import Tableau

from .engine import Engine, Tables
from .graphs import Key

TABLE_BYTES = 2**26  # of the modulations that are made at once


def evaluation_times(tableau: Tableau | None, times: Sequence[float]) -> list[float]:
    """The times at which fixed steps ask for the velocity, in order; tableau None: the sampling
    rule of consistency models."""
    if tableau is None:
        return list(times[:-1])
    asked: list[float] = []

    def field(t: float, x: Tensor, log2_steps: float) -> Tensor:
        asked.append(t)
        return x

    integrate_fixed(field, torch.zeros(1), times, 0, tableau)
    return asked


class Trajectory:
    """x at t = 1 from x at t = 0 by an operation with equal steps: `trajectory(x, labels)` -> (x
    (B, C, H, W) float32, whether each is finite (B,)).

    x (B, C, H, W) float32; labels (B,) integer, (1,) for one label on all samples, or None for the
    null label alone, whose modulations are made once and kept. With guidance labels are (2B,):
    first the samples', then as many null labels, which evaluations outside the guidance interval
    leave out. A network that is told the guidance scale wants `scales` (evaluations,): an input, so
    that one graph serves all. Consistency models follow a rule of their own in
    place of a tableau, which wants their fresh noise (T - 1, B, C, H, W).
    """

    def __init__(self, engine: Engine, operation: Operation) -> None:
        sampling, length = engine.config.sampling, operation.length
        self.engine, self.operation, self.guidance = engine, operation, operation.mixing_scale
        self.tableau = None if sampling == "consistency" else operation.tableau
        self.times, self.log2_steps = tuple(operation.times), operation.step_index(sampling)
        times = evaluation_times(self.tableau, self.times)
        longest = length or engine.max_depth
        self.depths = tuple(longest(t) if callable(longest) else longest for t in times)
        everywhere = operation.guidance_interval is None or self.guidance is None
        self.guided = tuple(everywhere or operation.guides(t) for t in times)
        self.evaluation_times = torch.tensor(times, dtype=torch.float32, device=engine.device)
        with torch.inference_mode(False), torch.no_grad():
            final = engine.condition(self.evaluation_times, self.log2_steps)
            # (2, evaluations, D): of the blocks, and of the final layer.
            self.conditions = torch.stack([final + engine.length_rows(self.depths), final])
            self.null = torch.tensor([engine.config.num_classes], device=engine.device)
            self.scales = None
            if operation.told:
                told = [operation.told_scale(t) for t in times]
                self.scales = torch.tensor(told, dtype=torch.float32, device=engine.device)
            fits = self._steps_at_once(1) >= len(times)
            self.null_table = list(self._modulations(self.null)) if fits else None

    @property
    def evaluations(self) -> int:
        return len(self.depths)

    @property
    def renoises(self) -> bool:
        """Whether it takes fresh noise."""
        return self.tableau is None and len(self.times) > 2

    @cached_property
    def key(self) -> Key:
        """What two trajectories share that make the same launches for the same shapes and
        guidance."""
        rule = self.tableau.name if self.tableau else "consistency"
        return Key((rule, self.times, self.log2_steps, self.depths, self.guided))

    def __call__(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        fresh: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        engine, predicts_noise = self.engine, self.engine.config.sampling == "diffusion"
        guidance = self.guidance if labels is not None else None
        modulations = iter(self._modulations(self.null if labels is None else labels, scales))
        if labels is None and self.null_table is not None:
            modulations = iter(self.null_table)
        if guidance is not None:  # of the samples alone where there is none
            modulations = (
                tables if guided else (tables[0][: len(x)], tables[1][: len(x)])
                for tables, guided in zip(modulations, self.guided, strict=True)
            )
        mixed = [guidance if guided else None for guided in self.guided]
        evaluations = enumerate(zip(modulations, self.depths, mixed, strict=True))

        def field(t: float, state: Tensor, log2_steps: float) -> Tensor:
            i, (tables, depth, scale) = next(evaluations)
            output = engine.velocity(state, tables, depth, scale)
            if not predicts_noise:
                return output
            return probability_flow_velocity(output, state, self.evaluation_times[i : i + 1])

        def noise(i: int) -> Tensor:
            assert fresh is not None
            return fresh[i]

        if self.tableau is None:
            x = predict_and_renoise(field, x, len(self.times) - 1, self.log2_steps, noise)
        elif self.tableau.stages > 1 or predicts_noise:
            x = integrate_fixed(field, x, self.times, self.log2_steps, self.tableau).x
        else:
            for i, (tables, depth, scale) in evaluations:
                step = self.times[i + 1] - self.times[i]
                x = engine.euler_step(x, tables, depth, step, scale)
        return x, torch.isfinite(x).flatten(1).all(1)

    def _steps_at_once(self, rows: int) -> int:
        blocks = max(1, self.engine.config.live_blocks(max(self.depths)))
        columns = 6 * self.engine.config.hidden_size * blocks
        return max(1, TABLE_BYTES // (rows * columns * self.engine.dtype.itemsize))

    def _modulations(self, labels: Tensor, scales: Tensor | None = None) -> Iterator[Tables]:
        """Modulation of the blocks (R, live*6*D) and of the final layer (R, 2*D) at each
        evaluation, for labels (R,), with the guidance scales that a network is told."""
        rows, count, depth = len(labels), self._steps_at_once(len(labels)), max(self.depths)
        embedded = self.engine.labels(labels)
        for start in range(0, self.evaluations, count):
            if scales is not None:
                embedded = self.engine.labels(labels, scales[start : start + count, None])
            conditions = self.conditions[:, start : start + count, None] + embedded
            both = conditions.flatten(1, 2)  # (2, steps*R, D)
            blocks, final = self.engine.modulations(both[0], both[1], depth)
            yield from zip(blocks.split(rows), final.split(rows), strict=True)
