"""Live Reflow: the first rows are straightened pairs that the network being trained makes
itself."""

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
    without_dropout,
)
from odelt_fast.train.paths import FlowMatchingPath


@dataclass(frozen=True)
class LiveReflow:
    """Single-stage Reflow of shortcut-models: flow matching with step index log2 T, and Reflow rows
    with index 0.

    Reflow rows: `euler_steps` Euler steps of the live network (step index log2 T, guided) take
    noise x0 to x1; x_t lies between them, the target is x1 - x0. Guidance: None, the labels; 0, the
    null label, for the student too; w, v_null + w (v_label - v_null). Both kinds of rows use
    FlowMatchingPath(1e-5), t = floor(T u)/T.
    """

    num_classes: int
    reflow_rows: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    guidance_scale: float | None = None
    euler_steps: int = 8
    # The reference: flow rows start again at the first image, only they drop labels, and guidance 0
    # leaves the student its labels.
    compat: bool = False

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        n, batch, device = self.reflow_rows, len(images), images.device
        every, reflow, flow = slice(0, batch), slice(0, n), slice(n, batch)
        if self.compat:
            images, labels = (
                torch.cat([images[:n], images[: batch - n]]),
                torch.cat([labels[:n], labels[: batch - n]]),
            )
        y = dropped_labels(
            labels, draws, flow if self.compat else every, self.label_dropout, self.num_classes
        )
        if self.guidance_scale == 0 and not self.compat:
            y = torch.cat([torch.full_like(y[reflow], self.num_classes), y[flow]])
        t = grid_times(to_device(draws.uniform("time", every), device), 2**self.log2_steps)
        noise = to_device(draws.normal("noise", every, images.shape[1:]), device)
        index = torch.full((batch,), self.log2_steps, device=device)
        path = FlowMatchingPath(1e-5)
        velocity = path.velocity(t, noise, images, noise)
        if n:
            made = self._generate(
                networks, noise[reflow], index[reflow], y[reflow], networks.depth(reflow)
            )
            images = torch.cat([made, images[flow]])
            velocity = torch.cat([made - noise[reflow], velocity[flow]])
            index = torch.cat([torch.zeros_like(index[reflow]), index[flow]])
        return Targets(path.sample(t, noise, images, noise), t, index, y, velocity)

    def _generate(
        self, networks: Networks, x: Tensor, index: Tensor, y: Tensor, depth: list[int] | None
    ) -> Tensor:
        scale, null, steps = self.guidance_scale, self.num_classes, self.euler_steps
        with without_dropout(networks.live) as teacher:
            for i in range(steps):
                t = torch.full((len(x),), i / steps, device=x.device)
                x = (
                    x
                    + guided_velocity(teacher, x, t, index, y, depth, scale=scale, null_label=null)
                    / steps
                )
        return x
