"""Shortcut models: flow matching whose first rows learn two half steps in one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odelt_fast.train.draws import to_device
from odelt_fast.train.paths import as_rows

from .targets import (
    Depths,
    Method,
    Model,
    Networks,
    StepBatch,
    Targets,
    grid_times,
    two_half_steps,
)


@dataclass(frozen=True, kw_only=True)
class Shortcut(Method):
    """Time-wise shortcuts (Frans et al. 2025) as the ODE_t(ODE_l) reference trains them (its
    targets_shortcut.py).

    Flow rows: t = floor(T u)/T, x_t = (1-t) x0 + t x1, target x1 - x0, step index log2 T.
    Time-consistency rows: k uniform in 0..log2(T)-1, d = 2^-(k+1), t = floor(2^k u)/2^k, target =
    mean of the EMA network's velocities (step index k+1) at t and, after an Euler step d, at t + d;
    the student's step index is k. With a guidance scale, the second half of the time-consistency
    rows learns guided velocities at every k, the first half those of the labels.

    compat: flow rows start again at the first image, time-consistency rows keep their labels;
    guided rows repeat the unguided ones' images, times and noise, and their second step mixes the
    label's velocity on the unguided line with the null one on their own.
    """

    time_rows: int  # even where they are guided

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        n, device = self.time_rows, batch.images.device
        time = slice(0, n)
        index, uniform = batch.full(self.log2_steps), batch.uniform()
        noise = batch.noise().to(batch.images.dtype)
        index[time] = to_device(batch.draws.integers("step_index", time, self.log2_steps), device)
        images, labels = batch.images, batch.labels
        if self.compat:
            rows = torch.arange(len(batch), device=device)
            if self.guidance_scale is not None:
                rows[n // 2 : n] = rows[: n // 2]
            index, uniform, noise = index[rows], uniform[rows], noise[rows]
            rows[n:] = torch.arange(len(batch) - n, device=device)
            batch = replace(batch, images=images[rows], labels=labels[rows])
        y = self.dropped(batch, n)

        t = grid_times(uniform, torch.exp2(index.float()))  # of T in flow rows, 2^k in time rows
        velocity = batch.images - noise
        x_t = torch.lerp(noise, batch.images, as_rows(t, noise).to(noise.dtype))
        if n:
            finer = (index[time] + 1, y[time], networks.depth(time))
            teacher = self._teacher(networks.target)
            taught = two_half_steps(teacher, x_t[time], t[time], *finer)
            velocity = torch.cat([taught, velocity[n:]])
        return Targets(x_t, t, index, y, velocity)

    def _teacher(self, ema: Model) -> Model:
        """The EMA network, guided in the second half of the rows."""
        scale, half = self.guidance_scale, self.time_rows // 2
        if scale is None or not self.compat:
            return self.guided(ema, torch.arange(half, self.time_rows))

        def mixed(x: Tensor, t: Tensor, index: Tensor, y: Tensor, depth: Depths) -> Tensor:
            y = torch.cat([y[:half], torch.full_like(y[half:], self.num_classes)])
            v = ema(x, t, index, y, depth=depth)
            return torch.cat([v[:half], v[half:] + scale * (v[:half] - v[half:])])

        return mixed
