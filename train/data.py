"""What a run trains on: its data, at the size of its model, and the loader, which images a step
sees: a pure function of (seed, step, row), so a resumed run needs no loader state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from odelt_fast.images import ImageSource, is_latents, open_source

from .config import TrainConfig
from .draws import generator, normal


def open_images(config: TrainConfig) -> ImageSource:
    """The data of a run: images at the size and with the channels of its model, or latents as they
    are. ValueError as `open_source`."""
    model = config.model
    latents = is_latents(config.data)
    return open_source(
        config.data,
        image_size=None if latents else model.image_size,
        channels=None if latents else model.channels,
        image_column=config.image_column,
        label_column=config.label_column,
        check_images=config.check_images,
    )


class Loader:
    """Batches from an image source. An epoch is a permutation drawn from (seed, epoch); flips come
    from (seed, step, row). Workers get copies of it."""

    def __init__(
        self, source: ImageSource, seed: int, global_batch: int, random_flip: bool = True
    ) -> None:
        self.source, self.seed, self.global_batch = source, seed, global_batch
        self.random_flip = random_flip and source.flippable

    def batch(self, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows `rows` of the global batch of step `step`: images (B, C, H, W) float32 in [-1, 1]
        and labels (B,) int64, on the CPU."""
        source = self.source
        epochs, places = np.divmod(step * self.global_batch + rows, len(source))
        indices = np.empty(len(rows), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = _permutation(self.seed, int(epoch), len(source))[places[chosen]]
        flips = np.zeros(len(rows), bool)
        if self.random_flip:
            flips = (generator(self.seed, "flip", step).random(int(rows.max()) + 1) < 0.5)[rows]
        noise = None
        if source.posterior:
            noise = normal(self.seed, "posterior", step, rows, source.image_shape)
        images, labels = source.read_many(indices, flips, noise)
        return torch.from_numpy(images), torch.from_numpy(labels)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)
