"""The diffusion baseline: predict the noise of the variance-preserving process, as DiT does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws, to_device
from odelt_fast.train.objectives.targets import Networks, Targets, dropped_labels, grid_times
from odelt_fast.train.paths import VariancePreserving


@dataclass(frozen=True)
class Diffusion:
    """Noise prediction (Ho et al. 2020): x_t = alpha x1 + sigma eps, t = 0 noise, t = 1 data; the
    network says eps, not a velocity.

    The loss is the plain mean squared error of eps.
    `odelt_fast.solvers.probability_flow.probability_flow_velocity` turns the output into the
    velocity of the ODE that samples it. times: "discrete", t = floor(T u)/T, or "continuous".
    """

    num_classes: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    times: str = "discrete"

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        batch, device = len(images), images.device
        every, path = slice(0, batch), VariancePreserving()
        y = dropped_labels(labels, draws, every, self.label_dropout, self.num_classes)
        t = to_device(draws.uniform("time", every), device)
        if self.times == "discrete":
            t = grid_times(t, 2**self.log2_steps)
        t = t.clamp(max=path.last_time)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        index = torch.full((batch,), self.log2_steps, device=device)
        return Targets(path.sample(t, noise, images, noise), t, index, y, noise)
