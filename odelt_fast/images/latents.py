"""What a source of VAE latents is: posterior moments by index, sampled when they are read."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from odelt_fast.config import SD_SCALE, Latents

from .sources import (
    Batch,
    Flips,
    ImageSource,
    Indices,
    Noise,
    check_indices,
    first_readable,
)

SCALE = SD_SCALE
Moments = tuple[np.ndarray, np.ndarray | None]


class LatentSource(ImageSource):
    """Latents (C, S, S) by index: scale * (mean + std * noise - shift), by `latents`.

    Without noise, or where a layout has no std (no `posterior`): scale * (mean - shift).
    """

    latents: Latents
    scaled = False  # whether `moments` are scaled and shifted already

    @abstractmethod
    def moments(self, index: int, flip: bool) -> Moments:
        """Mean and standard deviation (C, S, S) float32 of the posterior, the latter None if
        unknown; any exception: unreadable."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """For messages."""

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        indices = check_indices(indices, len(self))
        mirrored = np.zeros(len(indices), bool) if flips is None else np.asarray(flips, bool)
        if mirrored.any() and not self.flippable:
            raise ValueError(f"{self.name} has no latents of mirrored images: flip none")
        shape = (len(indices), *self.image_shape)
        if len(mirrored) != len(indices) or (noise is not None and noise.shape != shape):
            raise ValueError(f"{len(indices)} indices need as many flips and noise of {shape}")
        moments, used = self.stacked(indices, mirrored)
        if noise is None or moments.shape[1] == 1:
            latents = np.ascontiguousarray(moments[:, 0])
        else:
            latents = moments[:, 0] + moments[:, 1] * noise
        if not self.scaled:
            if self.latents.shift:
                latents -= np.float32(self.latents.shift)
            latents *= np.float32(self.latents.scale)
        return latents, self.labels[used]

    def stacked(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and, if known, standard deviation of all rows, finite, (B, 1 or 2, C, S, S) float32;
        whose they are: of the next ones where some have become unreadable."""
        shape = (len(indices), 1 + self.posterior, *self.image_shape)
        moments, used = np.empty(shape, np.float32), np.empty(len(indices), np.int64)
        for row in range(len(indices)):
            moments[row], used[row] = self.readable(int(indices[row]), bool(mirrored[row]))
        return moments, used

    def readable(self, index: int, flip: bool) -> tuple[np.ndarray, int]:
        """One row of `stacked`."""

        def finite(index: int) -> np.ndarray:
            moments = np.stack([part for part in self.moments(index, flip) if part is not None])
            if not np.isfinite(moments).all():
                raise ValueError("values that are not finite")
            return moments

        return first_readable(self, index, finite, self.sample_name)
