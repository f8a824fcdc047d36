"""The velocity field that a solver integrates: a network with its depth, labels and guidance bound,
and its evaluations counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odelt_fast.model import DiT, as_vector
from odelt_fast.operation import Operation
from odelt_fast.solvers.guidance import mix
from odelt_fast.solvers.probability_flow import probability_flow_velocity


class VelocityField:
    """f(t, x, log2_steps): velocity of `model` for one batch of labels, with guidance.

    Guidance scale w: None or 1 uses the labels alone, 0 the null label alone; otherwise v_null + w
    (v_label - v_null), both from one doubled batch, in the channels that the configuration has
    guided. Outside the operation's guidance interval the labels alone: of a time that is a number
    nothing else is computed. A network that is told its guidance scale gives the guided velocity
    itself, in one evaluation. A diffusion model predicts the noise: its
    velocity is that of the probability-flow ODE. `evaluations` counts the network evaluations of
    every image so far: a call adds 1, a guided call 2.

    Args:
        operation: depth (or schedule, for solvers that give all samples one time) and guidance.
        labels: (B,) integer, on the model's device; num_classes is the null label.
        network: what is called in place of the model, with its signature (its compiled form).

    Raises:
        ValueError: for a depth that the model does not have.
    """

    def __init__(
        self,
        model: DiT,
        operation: Operation,
        labels: Tensor,
        network: Callable[..., Tensor] | None = None,
    ) -> None:
        length = operation.length
        self.depth = length if callable(length) else model.check_depth(length)
        self.predicts_noise = model.config.sampling == "diffusion"
        self.network = network or model
        self.scale, self.guided_channels = operation.mixing_scale, model.config.guided_channels
        null = torch.full_like(labels, model.config.num_classes)
        self.operation = operation
        self.labels = null if operation.guidance_scale == 0 else labels
        self.both = None if self.scale is None else torch.cat([labels, null])
        self.evaluations = 0

    def __call__(self, t: float | Tensor, x: Tensor, log2_steps: float) -> Tensor:
        """Velocity of x (B, C, H, W) at time t, a number or (B,), in the shape and dtype of x; the
        network runs in its own dtype."""
        # Time and step index are tensors so that a compiled network is not compiled anew for each
        # of their values.
        time, step = (as_vector(value, x.device) for value in (t, log2_steps))
        depth = self.depth
        if callable(depth):
            depth = depth(float(t.reshape(-1)[0] if isinstance(t, Tensor) else t))
        state, labels = x, self.labels
        told = {}
        if self.operation.told:
            told["guidance"] = as_vector(self.operation.told_scale(t), x.device)
        guided = self.both is not None and (isinstance(t, Tensor) or self.operation.guides(t))
        if self.both is not None and guided:
            state, labels = torch.cat([x, x]), self.both
            time = time if len(time) == 1 else torch.cat([time, time])
        output = self.network(state, time, step, labels, depth=depth, **told).to(x.dtype)
        self.evaluations += 1
        if self.scale is not None and guided:
            self.evaluations += 1
            interval = self.operation.guidance_interval
            output = mix(output, self.scale, self.guided_channels, interval, t)
        return probability_flow_velocity(output, x, t) if self.predicts_noise else output
