"""Consistency training: what the network says at t leads to the same data as what its EMA says a
step later on the same line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws, to_device
from odelt_fast.train.objectives.targets import Networks, Targets, dropped_labels, grid_times
from odelt_fast.train.paths import FlowMatchingPath


@dataclass(frozen=True)
class Consistency:
    """Consistency training (Song et al. 2023) in the velocity form of shortcut-models.

    The run has log2 T equal stages; in stage k the step is d = 2^-k, t = floor(2^k u)/2^k. x_t and
    x_{t+d} share data and noise; the EMA network predicts the data x1' = x_{t+d} + (1-t-d)
    v(x_{t+d}, t+d) and the target is (x1' - x_t)/(1-t). Sampled by predicting the data and adding
    noise again.
    """

    num_classes: int
    total_steps: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    compat: bool = False  # the reference: no labels are dropped

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        batch, device = len(images), images.device
        every = slice(0, batch)
        k = min(step * self.log2_steps // self.total_steps, self.log2_steps)
        y = (
            labels
            if self.compat
            else dropped_labels(labels, draws, every, self.label_dropout, self.num_classes)
        )
        t = grid_times(to_device(draws.uniform("time", every), device), 2**k)
        later = t + 0.5**k
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        path = FlowMatchingPath(1e-5)
        x_t, x_later = (
            path.sample(t, noise, images, noise),
            path.sample(later, noise, images, noise),
        )
        index = torch.full((batch,), k, device=device)
        velocity = networks.ema(x_later, later, index, y, depth=networks.depth(every))
        data = x_later + (1 - later)[:, None, None, None] * velocity
        return Targets(x_t, t, index, y, (data - x_t) / (1 - t)[:, None, None, None])
