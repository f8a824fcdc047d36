"""Calls of one shape: what a sampler has to look at once for a number and size of images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import check_seed, shown, whole
from odelt_fast.config import DiTConfig
from odelt_fast.engine.fused import Asked, Fused

from .batches import statistics
from .noise import check_labels, drawn_labels, stack_noise

if TYPE_CHECKING:
    from .sampler import Sampler

Labels = int | Sequence[int] | np.ndarray | Tensor | None
Progress = Callable[[int], None] | None

logger = logging.getLogger(__name__)


class Shape:
    """Replays for images (N, C, H, W) that the fused backend takes at once, where it `replays`.

    It remembers what the labels of the last call came to, and does not hold the sampler.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self._last: tuple[tuple[Any, ...], Asked] | None = None

    def replay(
        self,
        sampler: Sampler,
        noise: Tensor | None,
        labels: Labels,
        seed: int,
        first_image: int,
        progress: Progress,
    ) -> Tensor | None:
        """What `Sampler.draw` gives, by a copy in, a replay, and a copy out. None: that has to be
        asked, because there is no graph (any more), or something is wrong."""
        fused, begin = sampler.fused, time.perf_counter()
        if fused is None or sampler.decoder is not None:
            return None
        owned = range(first_image, first_image + self.shape[0])
        asked = self.asked(sampler, fused, labels, seed, owned)
        if noise is None and not fused.has_graph(asked.key):
            return None
        x = stack_noise(seed, owned, self.shape[1:]) if noise is None else noise
        if x.dtype is not torch.float32 or x.requires_grad:
            x = x.detach().float()
        try:
            images = fused.replay(asked, x)
        except RuntimeError:
            logger.info("a replay failed", exc_info=True)
            return None
        if images is None or asked.counts is None:
            return None
        seconds = time.perf_counter() - begin
        sampler.ended(self.shape, partial(statistics, sampler.operation, [asked.counts], seconds))
        if progress:
            for _ in range(asked.counts.accepted[0]):
                progress(self.shape[0])
        return images

    def asked(
        self, sampler: Sampler, fused: Fused, labels: Labels, seed: int, owned: range
    ) -> Asked:
        """What the labels ask for; ValueError as of `check_labels`."""
        if isinstance(labels, Tensor):
            labels = labels.detach().cpu().numpy()
        given = None if labels is None else np.asarray(labels)
        told: tuple[Any, ...] = ("", seed, owned)
        if given is not None:
            told = given.dtype.str, given.shape, given.tobytes()
        last = self._last
        if last is not None and last[0] == told and last[1].trajectory is fused.trajectory:
            return last[1]
        classes = sampler.model.config.num_classes
        checked = check_labels(given, len(owned), classes)
        if checked is None:
            checked = drawn_labels(seed, owned, classes)
        asked = fused.asked(tuple(self.shape), checked)
        self._last = told, asked
        return asked

    def expect(self, fused: Fused | None) -> None:
        """Has the next call with the last labels capture its graph."""
        if fused and fused.graphs and self._last:
            fused.graphs.expect(self._last[1].key)


def check_sizes(config: DiTConfig, num_images: int, size: Any) -> torch.Size:
    """(N, C, H, W) of so many images of a height and a width, None: the model's own; ValueError for
    what cannot be."""
    count, patch = whole("num_images", num_images), config.patch_size
    if size is None:
        return torch.Size((count, *config.image_shape))
    sides = size if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or any(whole("each of size", side) % patch for side in sides):
        raise ValueError(
            f"size must be a height and a width, multiples of {patch}, not {shown(size)}"
        )
    return torch.Size((count, config.channels, *sides))


class Prepared:
    """A sampler's call for a number and a size of images, as `Sampler.prepare` makes it.

    Where the fused backend runs equal steps on all of them at once, the first call captures the
    graph; those that follow copy noise and labels in, replay it and copy the images out, if the
    weights are still the same. Everywhere else it is the sampler's own call.
    """

    def __init__(self, sampler: Sampler, shape: Sequence[int], at_once: Shape | None) -> None:
        self.sampler, self.shape, self._at_once = sampler, torch.Size(shape), at_once

    def __call__(
        self,
        noise: Tensor | None = None,
        labels: Labels = None,
        seed: int = 0,
        *,
        first_image: int = 0,
        progress: Progress = None,
    ) -> Tensor:
        """The samples (N, C, H, W) of the sampler's own call, to the last bit, in a new tensor.

        Args:
            noise: of just the prepared shape; None: the seed's.
            labels, seed, first_image, progress: as of `Sampler`.

        Raises:
            ValueError: as `Sampler`, and for noise of another shape.
        """
        sampler, shape, at_once = self.sampler, self.shape, self._at_once
        if noise is not None and (not isinstance(noise, Tensor) or noise.shape != shape):
            given = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(f"the call was prepared for noise {tuple(shape)}, not {given}")
        seed, first_image = check_seed(seed), whole("first_image", first_image, 0)
        if at_once:
            images = at_once.replay(sampler, noise, labels, seed, first_image, progress)
            if images is not None:
                return images
            at_once.expect(sampler.fused)
        return sampler.draw(shape, noise, labels, seed, first_image, progress)
