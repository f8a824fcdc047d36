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
    Noises,
    check_indices,
    first_readable,
)

SCALE = SD_SCALE
Moments = tuple[np.ndarray, np.ndarray | None]


class LatentSource(ImageSource):
    """Latents (C, S, S) by index: scale * (mean + std * noise - shift), by `latents`.

    Without noise, or where a layout has no std: scale * (mean - shift).
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

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noises = None) -> Batch:
        indices = check_indices(indices, len(self))
        mirrored = np.zeros(len(indices), bool) if flips is None else np.asarray(flips, bool)
        if mirrored.any() and not self.flippable:
            raise ValueError(f"{self.name} has no latents of mirrored images: flip none")
        if len(mirrored) != len(indices) or (noise is not None and len(noise) != len(indices)):
            raise ValueError(f"{len(indices)} indices need as many flips and generators of noise")
        shape = (len(indices), *self.image_shape)
        latents, labels = np.empty(shape, np.float32), np.empty(len(indices), np.int64)
        for row, index in enumerate(indices):

            def finite_moments(index: int, flip: bool = bool(mirrored[row])) -> Moments:
                moments = self.moments(index, flip)
                if not all(np.isfinite(part).all() for part in moments if part is not None):
                    raise ValueError("values that are not finite")
                return moments

            (mean, std), used = first_readable(self, int(index), finite_moments, self.sample_name)
            if std is not None and noise is not None:
                mean = mean + std * noise[row].standard_normal(mean.shape, np.float32)
            latents[row], labels[row] = mean, self.labels[used]
        if not self.scaled:
            if self.latents.shift:
                latents -= np.float32(self.latents.shift)
            latents *= np.float32(self.latents.scale)
        return latents, labels
