"""Shortcuts as shortcut-models trains them: guided at the finest step size only, and clipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import to_device

from .targets import (
    SHORTCUT_MODELS_PATH,
    Method,
    Networks,
    StepBatch,
    Targets,
    grid_times,
    two_half_steps,
)


@dataclass(frozen=True, kw_only=True)
class ShortcutModels(Method):
    """Shortcut models (Frans et al. 2025): as `Shortcut`, on the path FlowMatchingPath(1e-5), with
    two differences.

    Velocities that teach the step of two finest steps (k = log2(T)-1) are guided, so that coarser
    step sizes inherit the guidance and it is never applied twice; and the state between the two
    half steps and the target are clipped to +-clip.

    compat: k is not drawn but falls from log2(T)-1 to 0 along the rows, in equal shares with the
    rest at 0; flow rows start again at the first image; only they drop labels.
    """

    time_rows: int
    clip: float = 4.0

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        n, time = self.time_rows, slice(0, self.time_rows)
        if self.compat:
            levels, batch = self._fixed_levels(), batch.starting_again(n)
        else:
            levels = batch.draws.integers("step_index", time, self.log2_steps)
        index = batch.full(self.log2_steps)
        index[time] = to_device(levels, index.device)
        y = self.dropped(batch, n)

        t, noise = grid_times(batch.uniform(), torch.exp2(index.float())), batch.noise()
        x_t = SHORTCUT_MODELS_PATH.sample(t, noise, batch.images)
        velocity = SHORTCUT_MODELS_PATH.velocity(t, noise, batch.images)
        if n:
            teacher = self.guided(networks.ema, (levels == self.log2_steps - 1).nonzero().flatten())
            finer = (index[time] + 1, y[time], networks.depth(time))
            taught = two_half_steps(teacher, x_t[time], t[time], *finer, self.clip)
            velocity = torch.cat([taught.clamp(-self.clip, self.clip), velocity[n:]])
        return Targets(x_t, t, index, y, velocity)

    def _fixed_levels(self) -> Tensor:
        share = self.time_rows // self.log2_steps
        falling = torch.arange(self.log2_steps - 1, -1, -1).repeat_interleave(share)
        return torch.cat([falling, falling.new_zeros(self.time_rows - len(falling))])
