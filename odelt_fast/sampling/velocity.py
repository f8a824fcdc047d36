"""The velocity field that a solver integrates: a network with its depth, labels and guidance bound,
and its evaluations counted."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.config import NUM_STEP_INDICES
from odelt_fast.model import DiT
from odelt_fast.solvers.probability_flow import probability_flow_velocity

DepthSchedule = Sequence[tuple[float, int]] | Callable[[float], int]


def step_index(sampling: str, steps: int | None, jumps: bool = True) -> int:
    """Step index that the network is fed when `steps` time steps are taken: 0 (one step) to 7 (128
    steps).

    `sampling` is `DiTConfig.sampling`. shortcut, consistency: floor(log2 steps), at most 7. flow: 7
    at any number of steps. live_reflow: 0 below 128 steps, else 7. diffusion: 7, of no effect. (A
    network that is not step-conditioned replaces it by 0 itself.) steps None (an adaptive solver):
    7, the instantaneous velocity. jumps False (a solver other than Euler's, or steps of unequal
    length): 7 for shortcut too, because what it learnt below 7 is the mean velocity over one Euler
    step of length 1/steps, not the velocity.
    """
    finest = NUM_STEP_INDICES - 1
    if steps is None or (sampling == "shortcut" and not jumps):
        return finest
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


def check_depth_schedule(model: DiT, schedule: DepthSchedule) -> Callable[[float], int]:
    """The depth l at each time t that a schedule asks for: pairs (t, l) with rising t from 0, each
    holding until the next; or a function.

    Raises ValueError for pairs that are none or out of order, and for a depth that the model does
    not have (a function's when it is met).
    """
    if callable(schedule):
        given = schedule
        return lambda t: model.check_depth(given(t))
    wanted = (
        "depth_schedule must be a function t -> depth, or pairs (t, depth) with t rising from 0,"
        " such as [(0, 4), (0.5, 12)]"
    )
    try:
        pairs = [(float(t), depth) for t, depth in schedule]
    except (TypeError, ValueError):
        raise ValueError(f"{wanted}, not {schedule!r}") from None
    times = [t for t, _ in pairs]
    if not times or times[0] != 0 or not all(a < b <= 1 for a, b in itertools.pairwise(times)):
        raise ValueError(f"{wanted}, not {schedule!r}")
    depths = [model.check_depth(depth) for _, depth in pairs]
    return lambda t: depths[max(bisect.bisect_right(times, t) - 1, 0)]


class VelocityField:
    """f(t, x, log2_steps): velocity of `model` at a fixed depth, for one batch of labels, with
    classifier-free guidance.

    depth: a depth l, None (all that are loaded), or a function t -> l (`check_depth_schedule`), for
    solvers that give all samples one time.

    Guidance scale w: None or 1 uses the labels only, 0 the null label only; otherwise v_null + w
    (v_label - v_null), both from one doubled batch. labels (B,) integer, on the model's device;
    num_classes is the null label. network: what is called in place of the model, with its signature
    (its compiled form). What a diffusion model says is noise: its velocity is that of the
    probability-flow ODE. Raises ValueError for a depth that the model does not have and a scale
    that is not finite.

    `evaluations` counts the network evaluations of every image so far: a call adds 1, a guided call
    2.
    """

    def __init__(
        self,
        model: DiT,
        depth: int | Callable[[float], int] | None,
        labels: Tensor,
        guidance_scale: float | None = None,
        network: Callable[..., Tensor] | None = None,
    ) -> None:
        self.depth = depth if callable(depth) else model.check_depth(depth)
        self.says_noise = model.config.sampling == "diffusion"
        self.network = network or model
        scale = check_guidance(guidance_scale)
        null = torch.full_like(labels, model.config.num_classes)
        self.guidance_scale = None if scale in (0, 1) else scale
        self.labels = null if scale == 0 else labels
        if self.guidance_scale is not None:
            self.labels = torch.cat([labels, null])
        self.evaluations = 0

    def __call__(self, t: float | Tensor, x: Tensor, log2_steps: int) -> Tensor:
        """x (B, C, H, W) at time t, a number or (B,) -> its velocity, in the shape and dtype of x;
        the network runs in its own dtype."""
        # Time and step index are tensors so that a compiled network is not compiled anew for each
        # of their values.
        step = torch.full((1,), log2_steps, dtype=torch.float32, device=x.device)
        if isinstance(t, Tensor):
            time = t.reshape(-1).to(x.device, torch.float32)
        else:
            time = torch.full((1,), t, dtype=torch.float32, device=x.device)
        depth = (
            self.depth(float(t.reshape(-1)[0] if isinstance(t, Tensor) else t))
            if callable(self.depth)
            else self.depth
        )
        state = x
        if self.guidance_scale is not None:
            state, time = torch.cat([x, x]), time if len(time) == 1 else torch.cat([time, time])
        said = self.network(state, time, step, self.labels, depth=depth).to(x.dtype)
        self.evaluations += 1
        if self.guidance_scale is not None:
            self.evaluations += 1
            label, null = said.chunk(2)
            said = null + self.guidance_scale * (label - null)
        return probability_flow_velocity(said, x, t) if self.says_noise else said


def compiled(model: DiT, compiler: str = "inductor") -> Callable[..., Tensor]:
    """torch.compile form of the model: takes what the model takes; raises ValueError where it
    cannot run, never falls back to the model."""
    fast: Callable[..., Tensor] = torch.compile(model, fullgraph=True, backend=compiler)

    def network(*args: Any, **kwargs: Any) -> Tensor:
        import torch._dynamo.exc

        try:
            # Samplers of several depths and batch sizes share one cache, whose default limit of 8
            # entries would be an error here.
            with torch._dynamo.config.patch(recompile_limit=256):
                return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"backend 'compile' cannot run here: {reason}") from error

    return network
