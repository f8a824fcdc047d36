"""What a run trains on: its data, at the size of its model, and the loader, which images a step
sees: a pure function of (seed, step, row), so a resumed run needs no loader state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from odelt_fast.images import ImageSource, is_latents, open_source

from .config import TrainConfig
from .draws import generator


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
    )


class Loader:
    """Batches from an image source. An epoch is a permutation drawn from (seed, epoch); flips come
    from (seed, step, row)."""

    def __init__(
        self, source: ImageSource, seed: int, global_batch: int, random_flip: bool = True
    ) -> None:
        self.source, self.seed, self.global_batch = source, seed, global_batch
        self.random_flip = random_flip and source.flippable
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: generator(seed, "order", epoch).permutation(len(source))
        )

    def batch(self, step: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows `rows` of the global batch of step `step`: images (B, C, H, W) float32 in [-1, 1]
        and labels (B,) int64, on the CPU."""
        epochs, places = np.divmod(step * self.global_batch + rows, len(self.source))
        indices = np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places)])
        flips = np.zeros(len(rows), bool)
        if self.random_flip:
            flips = (generator(self.seed, "flip", step).random(int(rows.max()) + 1) < 0.5)[rows]
        # For sources of VAE posteriors.
        noise = [generator(self.seed, "posterior", step, int(row)) for row in rows]
        images, labels = self.source.read_many(indices, flips, noise)
        return torch.from_numpy(images), torch.from_numpy(labels)
