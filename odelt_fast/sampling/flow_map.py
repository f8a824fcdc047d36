"""The flow of a model between any two times: states on the way, data to noise and back, images
between two noises.

Everything here takes a `Sampler` for its settings: model, operation, batch size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import check_seed, whole
from odelt_fast.operation import step_index
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.solution import BatchResult, Hook, Solution
from odelt_fast.solvers.step_control import STATUSES

from .batches import Batches, evaluating
from .host import on_each_step
from .noise import check_labels, drawn_labels, stack_noise
from .sampler import Sampler
from .velocity import VelocityField

Labels = int | Sequence[int] | np.ndarray | Tensor | None


@dataclass(frozen=True)
class Inversion:
    """Images that were carried to noise and back. noise, images (N, C, H, W); error (N,): root mean
    square of images - originals; evaluations (N,): of the network, there and back."""

    noise: Tensor
    images: Tensor
    error: Tensor
    evaluations: Tensor


def trajectory(
    sampler: Sampler,
    times: Sequence[float],
    num_images: int = 16,
    labels: Labels = None,
    seed: int = 0,
    *,
    noise: Tensor | None = None,
    progress: Hook | None = None,
) -> Solution:
    """What `sampler(num_images, labels, seed)` draws, as its `x`, with its states at `times`
    (rising, in [0, 1]) as its `trajectory` (S, N, C, H, W).

    Between the steps states are interpolated, by the cubic of both ends' velocities (torchdiffeq's
    solvers by torchdiffeq); the images stay those of the sampler.

    Raises:
        ValueError: for times out of order, and as the sampler does.
    """
    check_seed(seed)
    config = sampler.model.config
    if noise is None:
        noise = stack_noise(seed, range(num_images), config.image_shape)
    if labels is None:
        labels = drawn_labels(seed, range(len(noise)), config.num_classes)
    index = sampler.operation.step_index(config.sampling)
    return flow(sampler, noise, labels, save_at=times, log2_steps=index, progress=progress)


def invert(
    sampler: Sampler, images: Tensor, labels: Labels = None, *, progress: Hook | None = None
) -> Inversion:
    """Carries images (N, C, H, W) in [-1, 1] (or latents) from t = 1 to the noise at t = 0 and back
    again.

    The network is fed the step index 7, the instantaneous velocity, in both directions. labels as
    in `flow`. The error says how far the solver's steps are from the flow: it falls with more
    steps, or with rtol and atol.
    """
    start = time.perf_counter()
    there = flow(sampler, images, labels, 1.0, 0.0, progress=progress)
    back = flow(sampler, there.x, labels, progress=progress)
    record(sampler, time.perf_counter() - start, there, back)
    error = (back.x - images.to(back.x)).flatten(1).square().mean(1).sqrt()
    return Inversion(there.x, back.x, error, there.evaluations + back.evaluations)


def interpolate(
    sampler: Sampler,
    seed_a: int,
    seed_b: int,
    frames: int = 8,
    label: int | None = None,
    *,
    progress: Hook | None = None,
) -> Tensor:
    """Images (frames, C, H, W) of noise on the great circle from image 0 of seed_a to image 0 of
    seed_b, all with one label.

    label None: the one that image 0 of seed_a draws. ValueError for less than 2 frames and for what
    the sampler refuses.
    """
    if whole("frames", frames) < 2:
        raise ValueError(f"frames must be at least 2, the two seeds' own images, not {frames}")
    config = sampler.model.config
    a, b = (stack_noise(check_seed(seed), [0], config.image_shape)[0] for seed in (seed_a, seed_b))
    chosen = int(drawn_labels(seed_a, [0], config.num_classes)[0]) if label is None else label
    noise = torch.stack([slerp(a, b, frame / (frames - 1)) for frame in range(frames)])
    return sampler(noise=noise, labels=chosen, progress=progress)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Point at `share` of the great circle from a to b (one sample each): sin((1-s) w)/sin(w) a +
    sin(s w)/sin(w) b, w their angle.

    Unlike a straight line it keeps the length that the noise of a model has. Nearly parallel a and
    b are joined by the line.
    """
    cosine = torch.dot(a.flatten().double(), b.flatten().double()) / (
        a.double().norm() * b.double().norm()
    )
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if not math.sin(angle) > 1e-6:
        return torch.lerp(a, b, share)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def flow(
    sampler: Sampler,
    x: Tensor,
    labels: Labels = None,
    t0: float = 0.0,
    t1: float = 1.0,
    *,
    save_at: Sequence[float] = (),
    log2_steps: float | None = None,
    progress: Hook | None = None,
) -> Solution:
    """States at t1 of x (N, C, H, W) at t0, forward or backward, by the sampler's solver; float32,
    on the model's device.

    Args:
        labels: one, or one each; None: the null label.
        save_at: times from t0 to t1 in order, whose states come back as `trajectory`.
        log2_steps: step index for the network; None: that of the instantaneous velocity.
        progress: called with n when n images have made a step.

    Raises:
        ValueError: for a consistency model, which has no velocity, for states that do not fit, and
            naming the images that the solver could not finish.
    """
    model, operation = sampler.model, sampler.operation
    chosen = labels_of_data(sampler, labels, len(x)).to(model.device)
    states = x.detach().to(model.device, torch.float32)
    index = step_index(model.config.sampling, None) if log2_steps is None else log2_steps
    start = time.perf_counter()
    batches = Batches(sampler, len(x), tuple(x.shape[1:]), end=t1)
    with evaluating(model), torch.no_grad():
        for rows in batches:
            on_step = on_each_step(progress, rows.stop - rows.start)
            with batches:
                field = VelocityField(model, operation, chosen[rows], sampler.evaluate)
                solution = solve(
                    field, states[rows], index, operation, t0=t0, t1=t1,
                    save_at=save_at, on_step=on_step,
                )  # fmt: skip
                batches.add(BatchResult.of(solution, field.evaluations))
    solution = batches.solution
    record(sampler, time.perf_counter() - start, solution)
    return solution


def record(sampler: Sampler, seconds: float, *solutions: Solution) -> None:
    """Fills `sampler.stats` with the sums over the solutions, each of the same images; evaluations
    are those that the images needed."""

    def summed(name: str) -> list[int]:
        lists = (getattr(solution, name).tolist() for solution in solutions)
        return [sum(each) for each in zip(*lists, strict=True)]

    needed = list(map(sampler.operation.network_evaluations, summed("evaluations")))
    sampler.stats = {
        "images": len(needed),
        "evaluations": sum(needed),
        "evaluations_per_image": sum(needed) / len(needed),
        "seconds": seconds,
        "accepted": summed("accepted"),
        "rejected": summed("rejected"),
        "evaluations_needed": needed,
        "status": [STATUSES[status] for status in solutions[-1].status.tolist()],
    }


def labels_of_data(sampler: Sampler, labels: Labels, count: int) -> Tensor:
    """(count,) int64 labels; None: the null label. ValueError for a model without a velocity, no
    images, and labels that do not fit."""
    config = sampler.model.config
    if config.sampling == "consistency":
        raise ValueError(
            "a consistency model predicts the data and has no velocity to follow: take a model of"
            " another objective"
        )
    if not count:
        raise ValueError("there must be at least one image")
    chosen = check_labels(
        config.num_classes if labels is None else labels, count, config.num_classes
    )
    return torch.from_numpy(chosen)
