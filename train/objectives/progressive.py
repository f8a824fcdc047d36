"""Progressive distillation: the student learns two steps of its teacher in one; at the end of each
stage it becomes the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws, to_device
from odelt_fast.train.objectives.targets import (
    Networks,
    Targets,
    dropped_labels,
    grid_times,
    guided_velocity,
)
from odelt_fast.train.paths import FlowMatchingPath


def stage(step: int, total_steps: int, log2_steps: int) -> int:
    """Number of the stage, 0 .. log2 T - 1, in which optimizer step `step` of `total_steps` is:
    stages are equally long."""
    return min(step * log2_steps // total_steps, log2_steps - 1)


@dataclass(frozen=True)
class Progressive:
    """Progressive distillation (Salimans and Ho 2022) of a flow, as shortcut-models does it.

    In stage s the student makes 2^k steps, k = log2(T) - 1 - s, and the frozen teacher twice as
    many: t = floor(2^k u)/2^k, target = mean of the teacher's velocities (step index k+1) at t and,
    after an Euler step, at t + 2^-(k+1), where the state is clipped to +-clip. Guidance belongs to
    the first stage: later teachers have it already.
    """

    num_classes: int
    total_steps: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    guidance_scale: float | None = None
    clip: float = 4.0
    compat: bool = False  # the reference: no labels are dropped

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        assert networks.teacher is not None
        batch, device = len(images), images.device
        every = slice(0, batch)
        k = self.log2_steps - 1 - stage(step, self.total_steps, self.log2_steps)
        scale = self.guidance_scale if k == self.log2_steps - 1 else None
        y = (
            labels
            if self.compat
            else dropped_labels(labels, draws, every, self.label_dropout, self.num_classes)
        )
        t = grid_times(to_device(draws.uniform("time", every), device), 2**k)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        x_t = FlowMatchingPath(1e-5).sample(t, noise, images, noise)
        d = 0.5**k / 2
        finer = (torch.full((batch,), k + 1, device=device), y, networks.depth(every))
        first = guided_velocity(
            networks.teacher, x_t, t, *finer, scale=scale, null_label=self.num_classes
        )
        middle = (x_t + d * first).clamp(-self.clip, self.clip)
        second = guided_velocity(
            networks.teacher, middle, t + d, *finer, scale=scale, null_label=self.num_classes
        )
        return Targets(x_t, t, finer[0] - 1, y, (first + second) / 2)
