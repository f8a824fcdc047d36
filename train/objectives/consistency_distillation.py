"""Consistency distillation: as consistency training, but a frozen teacher makes the step."""

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


@dataclass(frozen=True)
class ConsistencyDistillation:
    """Consistency distillation (Song et al. 2023) in the velocity form of shortcut-models.

    t = floor(T u)/T, d = 1/T. The teacher, guided if asked for, takes x_t to x_{t+d} by an Euler
    step, clipped to +-clip; the student's EMA predicts the data x1' = x_{t+d} + (1-t-d) v(x_{t+d},
    t+d); the target is (x1' - x_t)/(1-t). Step index log2 T everywhere.
    """

    num_classes: int
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
        every, d = slice(0, batch), 0.5**self.log2_steps
        y = (
            labels
            if self.compat
            else dropped_labels(labels, draws, every, self.label_dropout, self.num_classes)
        )
        t = grid_times(to_device(draws.uniform("time", every), device), 2**self.log2_steps)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        x_t = FlowMatchingPath(1e-5).sample(t, noise, images, noise)
        index = torch.full((batch,), self.log2_steps, device=device)
        depth = networks.depth(every)
        step_velocity = guided_velocity(
            networks.teacher,
            x_t,
            t,
            index,
            y,
            depth,
            scale=self.guidance_scale,
            null_label=self.num_classes,
        )
        x_later = (x_t + d * step_velocity).clamp(-self.clip, self.clip)
        velocity = networks.ema(x_later, t + d, index, y, depth=depth)
        data = x_later + (1 - t - d)[:, None, None, None] * velocity
        return Targets(x_t, t, index, y, (data - x_t) / (1 - t)[:, None, None, None])
