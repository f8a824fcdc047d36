"""Length consistency: rows learn the EMA network's velocity at another number of blocks (equation 8
of the paper)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .targets import Networks, Objective, StepBatch, Targets


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
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        depth, first = self._drawn_depths(batch, "depth", 0), len(batch) - self.rows
        student = replace(networks, depths=depth) if self.teacher_depth == "student" else networks
        targets = self.objective(student, batch)
        velocity = targets.velocity
        if self.rows:
            inputs = (targets.x_t, targets.t, targets.log2_steps, targets.y)
            other = self._drawn_depths(batch, "teacher_depth", first)
            taught = networks.target(*(values[first:] for values in inputs), depth=other)
            velocity = torch.cat([velocity[:first], taught.to(velocity.dtype)])
        return replace(targets, depth=depth, velocity=velocity)

    def _drawn_depths(self, batch: StepBatch, name: str, first: int) -> list[int]:
        drawn = batch.draws.integers(name, slice(first, len(batch)), len(self.depths))
        return [self.depths[i] for i in drawn.tolist()]
