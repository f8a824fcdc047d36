"""Methods that regress on a path: flow matching, the diffusion baseline, Reflow on given pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from odelt_fast.train.paths import Path, Rectified, VariancePreserving, as_rows

from .targets import Method, Networks, StepBatch, Targets, grid_times


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Method):
    """Equation 5 of the paper: x_t ~ p_t(.|z), target u_t(x_t|z), step index log2 T (the network
    does not look at it).

    times: "discrete", t = floor(T u)/T (ODE_T), or "continuous", t = u (ODE_t); both end at the
    path's last time. The reference's methods are fm: FlowMatchingPath(0.01), icfm:
    IndependentCFM(0.01), rfm: Rectified(), naive: FlowMatchingPath(1e-5).

    compat: t is rounded, so that t = 1 occurs, and the noise around the mean is that of x0 again.
    """

    path: Path
    times: str = "discrete"

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        path, y = self.path, self.dropped(batch)
        t, x0 = self.drawn_times(batch).clamp(max=path.last_time), batch.noise()
        extra = batch.noise("noise2") if path.extra_noise and not self.compat else x0
        x_t = path.sample(t, x0, batch.images, extra)
        target = self.target(t, x0, batch.images, extra)
        return Targets(x_t, t, batch.full(self.log2_steps), y, target)

    def target(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor) -> Tensor:
        """What the network learns at `path.sample(t, x0, x1, noise)`."""
        return self.path.velocity(t, x0, x1, noise)

    def drawn_times(self, batch: StepBatch) -> Tensor:
        """Times (B,) in [0, 1]."""
        uniform, sections = batch.uniform(), 2**self.log2_steps
        if self.times != "discrete":
            return uniform
        if self.compat:
            return torch.round(uniform * sections) / sections
        return grid_times(uniform, sections)


@dataclass(frozen=True, kw_only=True)
class Diffusion(FlowMatching):
    """Noise prediction (Ho et al. 2020): x_t = alpha x1 + sigma eps, t = 0 noise, t = 1 data; the
    network predicts eps, not a velocity, as in DiT.

    The loss is the plain mean squared error of eps.
    `odelt_fast.solvers.probability_flow.probability_flow_velocity` turns the output into the
    velocity of the ODE that samples it.
    """

    path: Path = field(default_factory=VariancePreserving)

    def target(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor) -> Tensor:
        return x0


@dataclass(frozen=True, kw_only=True)
class Reflow(FlowMatching):
    """Second stage of Reflow (Liu et al. 2023): images (B, 2C, H, W) hold noise x0 and the data x1
    that a teacher made of it (`PairSource`).

    x_t = (1-t) x0 + t x1, target x1 - x0. Labels are those that the pair was made with, the null
    label where that was it: none are dropped.
    """

    path: Path = field(default_factory=Rectified)

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        x0, x1 = batch.images.chunk(2, dim=1)
        t = self.drawn_times(batch)
        x_t = torch.lerp(x0, x1, as_rows(t, x0))
        return Targets(x_t, t, batch.full(self.log2_steps), batch.labels, x1 - x0)
