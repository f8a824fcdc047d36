"""The velocity field that a solver integrates: a network with its depth, labels and guidance bound, and its evaluations counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelt_fast.model import NUM_STEP_INDICES, DiT
from odelt_fast.probability_flow import probability_flow_velocity


def step_index(sampling: str, steps: int) -> int:
    """Step index that the network is fed when `steps` time steps are taken: 0 (one step) to 7 (128 steps).

    `sampling` is `DiTConfig.sampling`. shortcut, consistency: floor(log2 steps), at most 7. flow: 7 at any number of steps. live_reflow:
    0 below 128 steps, else 7. diffusion: 7, of no effect. (A network that is not step-conditioned replaces it by 0 itself.)
    """
    finest = NUM_STEP_INDICES - 1
    if sampling in ("shortcut", "consistency"):
        return min(steps.bit_length() - 1, finest)
    if sampling == "live_reflow":
        return 0 if steps < 2**finest else finest
    return finest


def check_guidance(scale: float | None) -> float | None:
    """The guidance scale as a float; ValueError unless it is None or a finite number."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number or None, not {scale!r}")
    return float(scale)


class VelocityField:
    """f(t, x, log2_steps): velocity of `model` at a fixed depth, for one batch of labels, with classifier-free guidance.

    Guidance scale w: None or 1 uses the labels only, 0 the null label only; otherwise v_null + w (v_label - v_null), both from one doubled
    batch. labels (B,) integer, on the model's device; num_classes is the null label. network: what is called in place of the model, with
    its signature (its compiled form). What a diffusion model says is noise: its velocity is that of the probability-flow ODE.
    Raises ValueError for a depth that the model does not have and a scale that is not finite.

    `evaluations` counts the network evaluations of every image so far: a call adds 1, a guided call 2.
    """

    def __init__(
        self,
        model: DiT,
        depth: int | None,
        labels: Tensor,
        guidance_scale: float | None = None,
        network: Callable[..., Tensor] | None = None,
    ) -> None:
        self.depth = model.check_depth(depth)
        self.says_noise = model.config.sampling == "diffusion"
        self.network = network or model
        scale = check_guidance(guidance_scale)
        null = torch.full_like(labels, model.config.num_classes)
        self.guidance_scale = None if scale in (0, 1) else scale
        self.labels = null if scale == 0 else labels
        if self.guidance_scale is not None:
            self.labels = torch.cat([labels, null])
        self.evaluations = 0

    def __call__(self, t: float, x: Tensor, log2_steps: int) -> Tensor:
        """x (B, C, H, W) at time t -> its velocity, in the shape and dtype of x; the network runs in its own dtype."""
        # Time and step index are tensors so that a compiled network is not compiled anew for each of their values.
        time, step = (torch.full((1,), value, dtype=torch.float32, device=x.device) for value in (t, log2_steps))
        said = self.network(x if self.guidance_scale is None else torch.cat([x, x]), time, step, self.labels, depth=self.depth).to(x.dtype)
        self.evaluations += 1
        if self.guidance_scale is not None:
            self.evaluations += 1
            label, null = said.chunk(2)
            said = null + self.guidance_scale * (label - null)
        return probability_flow_velocity(said, x, t) if self.says_noise else said


def compiled(model: DiT, compiler: str = "inductor") -> Callable[..., Tensor]:
    """torch.compile form of the model: takes what the model takes; raises ValueError where it cannot run, never falls back to the model."""
    fast: Callable[..., Tensor] = torch.compile(model, fullgraph=True, backend=compiler)

    def network(*args: Any, **kwargs: Any) -> Tensor:
        import torch._dynamo.exc

        try:
            # Samplers of several depths and batch sizes share one cache, whose default limit of 8 entries would be an error here.
            with torch._dynamo.config.patch(recompile_limit=256):
                return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"backend 'compile' cannot run here: {reason}") from error

    return network
