"""Shortcut models: flow matching whose first rows learn two half steps in one (time
consistency)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws, to_device
from odelt_fast.train.objectives.targets import (
    Model,
    Networks,
    Targets,
    dropped_labels,
    grid_times,
    guided_velocity,
)


@dataclass(frozen=True)
class Shortcut:
    """Time-wise shortcuts (Frans et al. 2025) as the ODE_t(ODE_l) reference trains them (its
    targets_shortcut.py).

    Flow rows: t = floor(T u)/T, x_t = (1-t) x0 + t x1, target x1 - x0, step index log2 T.
    Time-consistency rows: k uniform in 0..log2(T)-1, d = 2^-(k+1), t = floor(2^k u)/2^k, target =
    mean of the EMA network's velocities (step index k+1) at t and, after an Euler step d, at t + d;
    the student's step index is k. With a guidance scale, the second half of the time-consistency
    rows learns guided velocities at every k, the first half those of the labels.
    """

    num_classes: int
    time_rows: int
    log2_steps: int = 7  # log2 T of the finest step size
    label_dropout: float = 0.1
    guidance_scale: float | None = None
    # The reference: flow rows start again at the first image, time-consistency rows keep their
    # labels; guided rows repeat the unguided ones' images, times and noise, and their second step
    # mixes the label's velocity on the unguided line with the null one on their own.
    compat: bool = False

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and self.time_rows % 2:
            raise ValueError(
                f"half of the time-consistency rows are guided: {self.time_rows} is not even"
            )

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        n, batch, device = self.time_rows, len(images), images.device
        every, time, flow = slice(0, batch), slice(0, n), slice(n, batch)
        index = torch.full((batch,), self.log2_steps, device=device)
        index[time] = to_device(draws.integers("step_index", time, self.log2_steps), device)
        uniform = to_device(draws.uniform("time", every), device)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        if self.compat:
            rows = torch.arange(batch, device=device)
            if self.guidance_scale is not None:
                rows[n // 2 : n] = rows[: n // 2]
            index, uniform, noise = index[rows], uniform[rows], noise[rows]
            rows[flow] = torch.arange(batch - n, device=device)
            images, labels = images[rows], labels[rows]
        y = dropped_labels(
            labels, draws, flow if self.compat else every, self.label_dropout, self.num_classes
        )

        sections = torch.exp2(index.float())  # T in flow rows, 2^k in time rows
        t = grid_times(uniform, sections)
        velocity = images - noise
        x_t = torch.lerp(noise, images, t[:, None, None, None])
        if n:
            d = 0.5 / sections[time]
            finer = (index[time] + 1, y[time], networks.depth(time))
            first = self._teach(networks.ema, x_t[time], t[time], *finer)
            second = self._teach(
                networks.ema, x_t[time] + d[:, None, None, None] * first, t[time] + d, *finer
            )
            velocity = torch.cat([(first + second) / 2, velocity[flow]])
        return Targets(x_t, t, index, y, velocity)

    def _teach(
        self,
        teacher: Model,
        x: Tensor,
        t: Tensor,
        index: Tensor,
        y: Tensor,
        depth: list[int] | None,
    ) -> Tensor:
        """The teacher's velocities, guided in the second half of the rows."""
        scale, half = self.guidance_scale, len(x) // 2
        if not self.compat or scale is None:
            guided = torch.arange(half, len(x))
            return guided_velocity(
                teacher,
                x,
                t,
                index,
                y,
                depth,
                scale=scale,
                null_label=self.num_classes,
                rows=guided,
            )
        v = teacher(
            x,
            t,
            index,
            torch.cat([y[:half], torch.full_like(y[half:], self.num_classes)]),
            depth=depth,
        )
        return torch.cat([v[:half], v[half:] + scale * (v[:half] - v[half:])])
