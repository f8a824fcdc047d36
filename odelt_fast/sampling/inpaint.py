"""Images of which a part is known: it is put back on its path at each time, and the rest is drawn
to fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import check_seed, whole
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.solution import BatchResult, Hook

from .batches import Batches, evaluating, statistics
from .host import on_each_step
from .noise import check_labels, drawn_labels, stack_noise
from .sampler import Sampler
from .velocity import VelocityField


def inpaint(
    sampler: Sampler,
    image: Tensor,
    mask: Tensor,
    num_images: int = 16,
    labels: int | Sequence[int] | np.ndarray | Tensor | None = None,
    seed: int = 0,
    *,
    progress: Hook | None = None,
) -> Tensor:
    """Samples (N, C, H, W) float32 that are `image` where `mask` is False, and drawn elsewhere.

    Wherever the network is asked, the known part of the state is (1 - t) noise + t image, on the
    path of a flow, and moves with its velocity, image - noise; so a solver of any order keeps it.
    At t = 1 it is the image's, exactly.

    Args:
        sampler: of a flow, with a solver of equal steps; its decoder, if any, has the result.
        image: (C, H, W) in [-1, 1], or latents of a model of latents; H and W are multiples of the
            patch size.
        mask: (H, W), True (not 0) where it is to be drawn.
        num_images, labels, seed, progress: as of `Sampler`; so is the noise of image i.

    Raises:
        ValueError: for a model that is no flow, a solver that chooses its own steps, an image or a
            mask that does not fit, and as the sampler does.
    """
    model, operation = sampler.model, sampler.operation
    seed, count = check_seed(seed), whole("num_images", num_images)
    image, mask = check_known(sampler, image, mask)
    shape, classes = tuple(image.shape), model.config.num_classes
    given = check_labels(labels, count, classes)
    index = operation.step_index(model.config.sampling)
    start = time.perf_counter()
    batches = Batches(sampler, count, shape, allocate=sampler.decoder is None)
    with evaluating(model), torch.no_grad():
        for rows in batches:
            owned = range(rows.start, rows.stop)
            chosen = drawn_labels(seed, owned, classes) if given is None else given[rows]
            on_step = on_each_step(progress, len(owned))
            with batches:
                noise = stack_noise(seed, owned, shape).to(model.device)
                on_device = torch.from_numpy(chosen).to(model.device)
                drawn = VelocityField(model, operation, on_device, sampler.evaluate)
                field = PartlyKnown(drawn, noise, image, mask)
                solution = solve(field, noise, index, operation, on_step=on_step)
                images = torch.where(mask, solution.x, image)
                decoded = sampler.decoder(images) if sampler.decoder else images
                batches.add(BatchResult.of(solution, drawn.evaluations), decoded)
    sampler.stats = statistics(operation, batches.counts, time.perf_counter() - start)
    return batches.x


@dataclass(frozen=True)
class PartlyKnown:
    """The velocity field `drawn` where mask (H, W) is True; elsewhere the states (B, C, H, W) are
    on the path from noise to image, and so is what `drawn` sees of them."""

    drawn: VelocityField
    noise: Tensor
    image: Tensor
    mask: Tensor

    def __call__(self, t: float | Tensor, x: Tensor, log2_steps: float) -> Tensor:
        known = (1 - t) * self.noise + t * self.image
        velocity = self.drawn(t, torch.where(self.mask, x, known), log2_steps)
        return torch.where(self.mask, velocity, self.image - self.noise)


def check_known(sampler: Sampler, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Image and mask of `inpaint`, float32 and bool on the model's device; it raises as that
    does."""
    config, how = sampler.model.config, sampler.operation
    if config.sampling in ("consistency", "diffusion"):
        raise ValueError(
            f"a {config.sampling} model has no straight path from noise to data on which a known"
            " part could be put back: take a flow or shortcut model"
        )
    if how.adaptive:
        raise ValueError(
            f"{how.solver} chooses its own steps: the known part is put back by solvers with equal"
            " steps, such as euler, heun2 or rk4"
        )
    image, mask = torch.as_tensor(image), torch.as_tensor(mask)
    patch, sizes = config.patch_size, tuple(image.shape[1:])
    if image.dim() != 3 or len(image) != config.channels or any(side % patch for side in sizes):
        raise ValueError(
            f"image must have shape ({config.channels}, H, W), H and W multiples of {patch}, not"
            f" {tuple(image.shape)}"
        )
    if tuple(mask.shape) != sizes:
        raise ValueError(f"mask must have the image's size {sizes}, not {tuple(mask.shape)}")
    image = image.detach().to(sampler.model.device, torch.float32)
    if not torch.isfinite(image).all():
        raise ValueError("image holds values that are not finite")
    mask = mask.to(image.device) != 0
    if mask.all() or not mask.any():
        part = "all of the image is to be drawn" if mask.any() else "nothing is to be drawn"
        raise ValueError(f"mask must be True at some places and False at others: {part}")
    return image, mask
