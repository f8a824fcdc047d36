"""The flow of a model between any two times: states on the way, data to noise and back, images
between two noises.

Everything here takes a `Sampler` for its settings: model, depth, guidance, solver, tolerances,
batch size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from odelt_fast.sampling.sampler import Sampler, check_labels, drawn_labels, image_noise
from odelt_fast.sampling.velocity import VelocityField, step_index
from odelt_fast.solvers.fixed import DONE, STATUSES, Field, Solution, solve

Labels = int | Sequence[int] | np.ndarray | Tensor | None
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Inversion:
    """Images that were carried to noise and back. noise, images (N, C, H, W) float32; error (N,):
    root mean square of images - originals; evaluations (N,): of the network, there and back."""

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
    progress: Progress | None = None,
) -> Solution:
    """What `sampler(num_images, labels, seed)` draws, as its `x`, with its states at `times`
    (rising, in [0, 1]) as its `trajectory`.

    trajectory (S, N, C, H, W). Between the steps states are interpolated, by the cubic of both
    ends' velocities (torchdiffeq's solvers by torchdiffeq); the images stay those of the sampler.
    Raises ValueError for times out of order, and as the sampler does.
    """
    check_seed(seed)
    config = sampler.model.config
    shape = (config.channels, config.image_size, config.image_size)
    if noise is None:
        noise = torch.from_numpy(
            np.stack([image_noise(seed, index, shape) for index in range(num_images)])
        )
    chosen = check_labels(labels, len(noise), config.num_classes)
    chosen = drawn_labels(seed, range(len(noise)), config.num_classes) if chosen is None else chosen
    return flow(
        sampler, noise, chosen, save_at=times, log2_steps=sampler.step_index, progress=progress
    )


def invert(
    sampler: Sampler, images: Tensor, labels: Labels = None, *, progress: Progress | None = None
) -> Inversion:
    """Carries images (N, C, H, W) in [-1, 1] (or latents) from t = 1 to the noise at t = 0 and back
    again.

    The network is told the step index 7, the instantaneous velocity, in both directions. labels as
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
    progress: Progress | None = None,
) -> Tensor:
    """Images (frames, C, H, W) of noise on the great circle from image 0 of seed_a to image 0 of
    seed_b, all with one label.

    label None: the one that image 0 of seed_a draws. ValueError for less than 2 frames and for what
    the sampler refuses.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, the two seeds' own images, not {frames}")
    check_seed(seed_a)
    check_seed(seed_b)
    config = sampler.model.config
    shape = (config.channels, config.image_size, config.image_size)
    a, b = (torch.from_numpy(image_noise(seed, 0, shape)) for seed in (seed_a, seed_b))
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
    log2_steps: int | None = None,
    progress: Progress | None = None,
) -> Solution:
    """States at t1 of x (N, C, H, W) at t0, forward or backward, by the sampler's solver; float32,
    on the model's device.

    labels: one, or one each; None: the null label. log2_steps: step index for the network; None:
    that of the instantaneous velocity. save_at: times from t0 to t1 in order, whose states come
    back as `trajectory`. progress(n): n images made a step. Raises ValueError for a consistency
    model, which has no velocity, for states that do not fit, and naming the images that the solver
    could not finish.
    """
    model = sampler.model
    chosen = labels_of_data(sampler, labels, len(x))
    states = x.detach().to(model.device, torch.float32)
    if sampler.fused:  # the weights may have changed since
        sampler.fused.refresh()
    network = sampler.fused.network if sampler.fused else sampler.network
    index = step_index(model.config.sampling, None) if log2_steps is None else log2_steps

    def integrate(rows: slice) -> Solution:
        depth = sampler.depth_schedule or sampler.depth
        field = VelocityField(
            model, depth, chosen[rows].to(model.device), sampler.guidance_scale, network
        )
        return solve_with(sampler, field, states[rows], index, t0, t1, save_at, progress)

    start = time.perf_counter()
    with torch.no_grad():
        solution = in_batches(sampler, states, integrate)
    record(sampler, time.perf_counter() - start, solution)
    return solution


def solve_with(
    sampler: Sampler,
    field: Field,
    x: Tensor,
    log2_steps: int,
    t0: float,
    t1: float,
    save_at: Sequence[float] = (),
    progress: Progress | None = None,
) -> Solution:
    """`solvers.solve` of one batch with the sampler's settings."""
    return solve(
        field,
        x,
        log2_steps,
        sampler.solver,
        t0=t0,
        t1=t1,
        steps=sampler.steps,
        shift=sampler.shift,
        rtol=sampler.rtol,
        atol=sampler.atol,
        max_steps=sampler.max_steps,
        error_norm=sampler.error_norm,
        on_step=(lambda _: progress(len(x))) if progress else None,
        save_at=save_at,
    )


def in_batches(
    sampler: Sampler,
    x: Tensor,
    integrate: Callable[[slice], Solution],
    batch_size: int | None = None,
) -> Solution:
    """The solutions of `integrate(rows)` for batches of the rows of x, as one, with the model in
    eval mode.

    batch_size None: the sampler's own. ValueError naming the rows whose status is not done, and
    what can be done.
    """
    batch = batch_size or sampler.batch_size or sampler.default_batch(x.shape[1:])
    training, parts = sampler.model.training, []
    sampler.model.eval()
    try:
        parts = [integrate(slice(first, first + batch)) for first in range(0, len(x), batch)]
    finally:
        sampler.model.train(training)
    whole = parts[0]
    if len(parts) > 1:
        names = ("x", "status", "accepted", "rejected", "evaluations")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        states = [part.trajectory for part in parts if part.trajectory is not None]
        whole = replace(whole, **joined, trajectory=torch.cat(states, 1) if states else None)
    worst = int(whole.status.max())
    if worst != DONE:
        bad = (whole.status == worst).nonzero().flatten().tolist()
        images = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"{sampler.solver} did not get through ({STATUSES[worst]}: images {images} of"
            f" {len(x)}): raise rtol and atol or max_steps, and check that the images are finite"
        )
    return whole


def record(sampler: Sampler, seconds: float, *solutions: Solution) -> None:
    """Fills `sampler.stats` with the sums over the solutions, each of the same images; evaluations
    are those that the images needed."""
    rows = 1 if sampler.guidance_scale in (None, 0, 1) else 2
    needed = [
        rows * sum(each)
        for each in zip(*(solution.evaluations.tolist() for solution in solutions), strict=True)
    ]
    sampler.stats = {
        "images": len(needed),
        "evaluations": sum(needed),
        "evaluations_per_image": sum(needed) / len(needed),
        "seconds": seconds,
        "accepted": [
            sum(each)
            for each in zip(*(solution.accepted.tolist() for solution in solutions), strict=True)
        ],
        "rejected": [
            sum(each)
            for each in zip(*(solution.rejected.tolist() for solution in solutions), strict=True)
        ],
        "evaluations_needed": needed,
        "status": [STATUSES[status] for status in solutions[-1].status.tolist()],
    }


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is a whole number in [0, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, not {seed!r}")


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
