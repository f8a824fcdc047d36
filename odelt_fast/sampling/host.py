"""Solves on the host: the solver's steps in Python, the model called for each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.fixed import predict_and_renoise
from odelt_fast.solvers.solution import BatchResult, Hook, Noise, Solution

from .velocity import VelocityField


def on_each_step(progress: Hook | None, count: int) -> Hook | None:
    """A solver's on_step that reports a step of the `count` images of a batch."""
    return None if progress is None else lambda _: progress(count)


@dataclass(frozen=True)
class Host:
    """`solve` as `engine.fused.Fused` has it, for every model on every device.

    Args:
        network: evaluates the model: itself, its compiled form, or an engine's `network`.
    """

    model: DiT
    operation: Operation
    network: Callable[..., Tensor]

    def solve(
        self, x: Tensor, labels: np.ndarray, fresh: Noise, progress: Hook | None
    ) -> BatchResult:
        """One batch from t = 0 to 1 as `Fused.solve`; progress is called as steps are made."""
        device, operation = self.model.device, self.operation
        x = x.to(device)
        chosen = torch.from_numpy(labels).to(device)
        field = VelocityField(self.model, operation, chosen, self.network)
        sampling = self.model.config.sampling
        index, steps = operation.step_index(sampling), operation.steps or 0
        on_step = on_each_step(progress, len(labels))
        if sampling == "consistency":
            end = predict_and_renoise(
                field, x, steps, index, lambda i: fresh(i).to(device), on_step
            )
            solution = Solution.of_fixed_steps(end, steps, steps)
        else:
            solution = solve(field, x, index, operation, on_step=on_step)
        return BatchResult.of(solution, field.evaluations)
