"""Flow matching on any probability path: regress on the velocity of equation 4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws, to_device
from odelt_fast.train.objectives.targets import Networks, Targets, dropped_labels, grid_times
from odelt_fast.train.paths import Path


@dataclass(frozen=True)
class FlowMatching:
    """Equation 5 of the paper: x_t ~ p_t(.|z), target u_t(x_t|z), step index log2 T (the network
    does not look at it).

    times: "discrete", t = floor(T u)/T (ODE_T), or "continuous", t = u (ODE_t); both end at the
    path's last time. The reference's methods are fm: FlowMatchingPath(0.01), icfm:
    IndependentCFM(0.01), rfm: Rectified(), naive: FlowMatchingPath(1e-5).
    """

    path: Path
    num_classes: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    times: str = "discrete"
    # the reference: t is rounded, so that t = 1 occurs, and the noise around the mean is that of x0
    # again
    compat: bool = False

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        batch, device, sections = len(images), images.device, 2**self.log2_steps
        every = slice(0, batch)
        y = dropped_labels(labels, draws, every, self.label_dropout, self.num_classes)
        t = to_device(draws.uniform("time", every), device)
        if self.times == "discrete":
            t = torch.round(t * sections) / sections if self.compat else grid_times(t, sections)
        t = t.clamp(max=self.path.last_time)
        x0 = to_device(draws.normal("noise", every, images.shape[1:]), device)
        noise = x0
        if self.path.extra_noise and not self.compat:
            noise = to_device(draws.normal("noise2", every, images.shape[1:]), device)
        x_t = self.path.sample(t, x0, images, noise)
        index = torch.full((batch,), self.log2_steps, device=device)
        return Targets(x_t, t, index, y, self.path.velocity(t, x0, images, noise))
