"""Live Reflow: the first rows are straight lines between pairs that the live network makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .targets import (
    SHORTCUT_MODELS_PATH,
    Method,
    Networks,
    StepBatch,
    Targets,
    euler,
    grid_times,
    without_dropout,
)


@dataclass(frozen=True, kw_only=True)
class LiveReflow(Method):
    """Single-stage Reflow of shortcut-models: flow matching with step index log2 T, and Reflow rows
    with index 0.

    Reflow rows: `euler_steps` Euler steps of the live network (step index log2 T, guided) take
    noise x0 to x1; x_t lies between them, the target is x1 - x0. Guidance: None, the labels; 0, the
    null label, for the student too; w, v_null + w (v_label - v_null). Both kinds of rows use
    FlowMatchingPath(1e-5), t = floor(T u)/T.

    compat: flow rows start again at the first image, only they drop labels, and guidance 0 leaves
    the student its labels.
    """

    reflow_rows: int
    euler_steps: int = 8

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        n, reflow = self.reflow_rows, slice(0, self.reflow_rows)
        if self.compat:
            batch = batch.starting_again(n)
        y = self.dropped(batch, n)
        if self.guidance_scale == 0 and not self.compat:
            y[reflow] = self.num_classes
        t, noise = grid_times(batch.uniform(), 2**self.log2_steps), batch.noise()
        index, images = batch.full(self.log2_steps), batch.images
        made = noise[reflow]
        if n:
            depth = networks.depth(reflow)
            with without_dropout(networks.live) as live:
                teacher = self.guided(live)
                made = euler(teacher, made, index[:n].clone(), y[:n], depth, self.euler_steps)
            images = torch.cat([made, images[n:]])
        velocity = SHORTCUT_MODELS_PATH.velocity(t, noise, images)
        index[reflow], velocity[reflow] = 0, made - noise[reflow]
        return Targets(SHORTCUT_MODELS_PATH.sample(t, noise, images), t, index, y, velocity)
