"""Length consistency: rows learn the EMA network's velocity at another number of blocks (equation 8
of the paper), or that of the frozen network that the run started from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from odelt_fast.config import NUM_STEP_INDICES

from .targets import Networks, Objective, StepBatch, Targets


@dataclass(frozen=True)
class LengthConsistency:
    """Wraps any objective: every row gets a random depth l; the last `rows` rows regress to the EMA
    network at an independent depth.

    As the reference does it: l and l_LC uniform in {depth_min, depth_min + G, .., depth}, the
    target replaces the wrapped objective's, at the same x_t, t, step index and label. teacher_depth
    "student": teachers of the wrapped objective run at the row's l (Algorithm 1), instead of at
    full depth ("full").

    frozen: the last `rows` rows, which are flow rows, learn what the frozen teacher gives at its
    full depth and, where it knows step sizes, at the finest: the velocity itself.
    """

    objective: Objective
    depths: tuple[int, ...]
    rows: int
    teacher_depth: str = "full"
    frozen: bool = False

    @torch.no_grad()
    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        depth, first = self._drawn_depths(batch, "depth", 0), len(batch) - self.rows
        student = replace(networks, depths=depth) if self.teacher_depth == "student" else networks
        targets = self.objective(student, batch)
        velocity = targets.velocity
        if self.rows:
            x_t, t, index, y = (
                values[first:] for values in (targets.x_t, targets.t, targets.log2_steps, targets.y)
            )
            if self.frozen:
                assert networks.teacher is not None
                taught = networks.teacher(x_t, t, torch.full_like(index, NUM_STEP_INDICES - 1), y)
            else:
                other = self._drawn_depths(batch, "teacher_depth", first)
                told = targets.told(slice(first, None))
                taught = networks.target(x_t, t, index, y, depth=other, **told)
            velocity = torch.cat([velocity[:first], taught.to(velocity.dtype)])
        return replace(targets, depth=depth, velocity=velocity)

    def _drawn_depths(self, batch: StepBatch, name: str, first: int) -> list[int]:
        drawn = batch.draws.integers(name, slice(first, len(batch)), len(self.depths))
        return [self.depths[i] for i in drawn.tolist()]
