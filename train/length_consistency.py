"""Length consistency: rows learn what the EMA network says at another number of blocks (equation 8
of the paper)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odelt_fast.train.draws import Draws
from odelt_fast.train.objectives.targets import Networks, Objective, Targets


@dataclass(frozen=True)
class LengthConsistency:
    """Wraps any objective: every row gets a random depth l; the last `rows` rows regress to the EMA
    network at an independent depth.

    As the reference does it: l and l_LC uniform in {depth_min, depth_min + G, .., depth}, the
    target replaces the wrapped objective's, at the same x_t, t, step index and label. teacher_depth
    "student": teachers of the wrapped objective run at the row's l (Algorithm 1), instead of at
    full depth ("full").
    """

    objective: Objective
    depths: tuple[int, ...]
    rows: int
    teacher_depth: str = "full"

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        batch = len(images)
        depth = [
            self.depths[i]
            for i in draws.integers("depth", slice(0, batch), len(self.depths)).tolist()
        ]
        taught = replace(networks, depths=depth) if self.teacher_depth == "student" else networks
        targets = self.objective(taught, images, labels, draws, step)
        if not self.rows:
            return replace(targets, depth=depth)
        last = slice(batch - self.rows, batch)
        told_depth = [
            self.depths[i] for i in draws.integers("teacher_depth", last, len(self.depths)).tolist()
        ]
        told = networks.ema(
            targets.x_t[last],
            targets.t[last],
            targets.log2_steps[last],
            targets.y[last],
            depth=told_depth,
        )
        return replace(
            targets,
            depth=depth,
            velocity=torch.cat(
                [targets.velocity[: batch - self.rows], told.to(targets.velocity.dtype)]
            ),
        )
