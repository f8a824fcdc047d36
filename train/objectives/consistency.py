"""Consistency training and distillation: what the network says at t leads to the same data as what
its EMA says a step later on the same line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odelt_fast.train.paths import as_rows

from .targets import (
    SHORTCUT_MODELS_PATH,
    Method,
    Networks,
    StepBatch,
    Targets,
    grid_times,
)


@dataclass(frozen=True, kw_only=True)
class Consistency(Method):
    """Consistency training (Song et al. 2023) in the velocity form of shortcut-models.

    The run has log2 T equal stages; in stage k the step is d = 2^-k, t = floor(2^k u)/2^k. x_t and
    x_{t+d} share data and noise; the EMA network predicts the data x1' = x_{t+d} + (1-t-d)
    v(x_{t+d}, t+d) and the target is (x1' - x_t)/(1-t). Sampled by predicting the data and adding
    noise again.

    compat: no labels are dropped.
    """

    total_steps: int

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        k = min(batch.step * self.log2_steps // self.total_steps, self.log2_steps)
        y = self.dropped(batch, len(batch))
        t, noise = grid_times(batch.uniform(), 2**k), batch.noise()
        later = t + 0.5**k
        x_t = SHORTCUT_MODELS_PATH.sample(t, noise, batch.images)
        x_later = SHORTCUT_MODELS_PATH.sample(later, noise, batch.images)
        return _targets(networks, x_t, t, x_later, later, batch.full(k), y)


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(Method):
    """Consistency distillation (Song et al. 2023) in the velocity form of shortcut-models.

    t = floor(T u)/T, d = 1/T. The teacher, guided if asked for, takes x_t to x_{t+d} by an Euler
    step, clipped to +-clip; the rest is as in consistency training. Step index log2 T everywhere.

    compat: no labels are dropped.
    """

    clip: float = 4.0

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        assert networks.teacher is not None
        d = 0.5**self.log2_steps
        y = self.dropped(batch, len(batch))
        t, noise = grid_times(batch.uniform(), 2**self.log2_steps), batch.noise()
        x_t, index = (
            SHORTCUT_MODELS_PATH.sample(t, noise, batch.images),
            batch.full(self.log2_steps),
        )
        teacher = self.guided(networks.teacher)
        x_later = x_t + d * teacher(x_t, t, index, y, depth=networks.depth(batch.rows))
        x_later = x_later.clamp(-self.clip, self.clip)
        return _targets(networks, x_t, t, x_later, t + d, index, y)


def _targets(
    networks: Networks,
    x_t: Tensor,
    t: Tensor,
    x_later: Tensor,
    later: Tensor,
    index: Tensor,
    y: Tensor,
) -> Targets:
    """The velocity from x_t to the data that the EMA network predicts at x_later."""
    velocity = networks.ema(x_later, later, index, y, depth=networks.depth(slice(len(t))))
    data = x_later + as_rows(1 - later, x_t) * velocity
    return Targets(x_t, t, index, y, (data - x_t) / as_rows(1 - t, x_t))
