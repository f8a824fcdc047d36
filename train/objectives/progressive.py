"""Progressive distillation: the student learns two steps of its teacher in one; at the end of each
stage it becomes the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .targets import (
    SHORTCUT_MODELS_PATH,
    Method,
    Networks,
    StepBatch,
    Targets,
    grid_times,
    two_half_steps,
)


def stage(step: int, total_steps: int, log2_steps: int) -> int:
    """Number of the stage, 0 .. log2 T - 1, in which optimizer step `step` of `total_steps` is:
    stages are equally long."""
    return min(step * log2_steps // total_steps, log2_steps - 1)


@dataclass(frozen=True, kw_only=True)
class Progressive(Method):
    """Progressive distillation (Salimans and Ho 2022) of a flow, as shortcut-models does it.

    In stage s the student makes 2^k steps, k = log2(T) - 1 - s, and the frozen teacher twice as
    many: t = floor(2^k u)/2^k, target = mean of the teacher's velocities (step index k+1) at t and,
    after an Euler step, at t + 2^-(k+1), where the state is clipped to +-clip. Guidance belongs to
    the first stage: later teachers have it already.

    compat: no labels are dropped.
    """

    total_steps: int
    clip: float = 4.0

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        assert networks.teacher is not None
        finest = self.log2_steps - 1
        k = finest - stage(batch.step, self.total_steps, self.log2_steps)
        teacher = self.guided(networks.teacher) if k == finest else networks.teacher
        y = self.dropped(batch, len(batch))
        t = grid_times(batch.uniform(), 2**k)
        x_t = SHORTCUT_MODELS_PATH.sample(t, batch.noise(), batch.images)
        depth = networks.depth(batch.rows)
        velocity = two_half_steps(teacher, x_t, t, batch.full(k + 1), y, depth, self.clip)
        return Targets(x_t, t, batch.full(k), y, velocity)
