"""Time-wise shortcuts as shortcut-models trains them: guided at the finest step size only, with
clipped targets."""

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
class ShortcutModels:
    """Shortcut models (Frans et al. 2025): as `Shortcut`, on the path FlowMatchingPath(1e-5), with
    two differences.

    Velocities that teach the step of two finest steps (k = log2(T)-1) are guided, so that coarser
    step sizes inherit the guidance and it is never applied twice; and the state between the two
    half steps and the target are clipped to +-clip.
    """

    num_classes: int
    time_rows: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    guidance_scale: float | None = None
    clip: float = 4.0
    # shortcut-models: k is not drawn but falls from log2(T)-1 to 0 along the rows, in equal shares
    # with the rest at 0; flow rows start again at the first image; only they drop labels.
    compat: bool = False

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        n, batch, device = self.time_rows, len(images), images.device
        every, time, flow = slice(0, batch), slice(0, n), slice(n, batch)
        if self.compat:
            levels = self._fixed_levels()
            images, labels = (
                torch.cat([images[:n], images[: batch - n]]),
                torch.cat([labels[:n], labels[: batch - n]]),
            )
        else:
            levels = draws.integers("step_index", time, self.log2_steps)
        guided = (levels == self.log2_steps - 1).nonzero().flatten()
        index = torch.full((batch,), self.log2_steps, device=device)
        index[time] = to_device(levels, device)
        y = dropped_labels(
            labels, draws, flow if self.compat else every, self.label_dropout, self.num_classes
        )

        sections = torch.exp2(index.float())
        t = grid_times(to_device(draws.uniform("time", every), device), sections)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        path = FlowMatchingPath(1e-5)
        x_t, velocity = path.sample(t, noise, images, noise), path.velocity(t, noise, images, noise)
        if n:
            d = 0.5 / sections[time]
            finer = (index[time] + 1, y[time], networks.depth(time))
            scale, null = self.guidance_scale, self.num_classes
            first = guided_velocity(
                networks.ema, x_t[time], t[time], *finer, scale=scale, null_label=null, rows=guided
            )
            middle = (x_t[time] + d[:, None, None, None] * first).clamp(-self.clip, self.clip)
            second = guided_velocity(
                networks.ema, middle, t[time] + d, *finer, scale=scale, null_label=null, rows=guided
            )
            velocity = torch.cat(
                [((first + second) / 2).clamp(-self.clip, self.clip), velocity[flow]]
            )
        return Targets(x_t, t, index, y, velocity)

    def _fixed_levels(self) -> Tensor:
        share = self.time_rows // self.log2_steps
        falling = torch.arange(self.log2_steps - 1, -1, -1).repeat_interleave(share)
        return torch.cat([falling, falling.new_zeros(self.time_rows - len(falling))])
