"""What an evaluation compares, and with what, loaded and checked before anything is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.sampling.noise import drawn_labels, stack_noise

from .machine import model_hash
from .real import Real
from .settings import Evaluation

# What may differ between the runs that fill one folder.
_EXTENDABLE = (
    *("depths", "depth_schedules", "steps", "solvers", "tolerances", "seeds", "first_seed"),
    *("inception_weights", "trust_features"),
)


@dataclass(frozen=True)
class Inputs:
    """What an evaluation by `settings` reads (`of`).

    config: of the model, whose files have the hash model_sha256. decoder: latents -> images (None:
    the model makes images).
    """

    settings: Evaluation
    device: torch.device
    config: DiTConfig
    model_sha256: str
    decoder: Callable[[Tensor], Tensor] | None
    real: Real

    @classmethod
    def of(cls, settings: Evaluation, config: DiTConfig, device: torch.device) -> Inputs:
        """Opens everything that the model with this configuration is compared by, on `device`.

        Raises:
            ValueError: for data, statistics or networks that do not fit, and for too few images.
        """
        decoder = _decoder(settings, config, device)
        channels, side = config.channels, config.image_size
        if decoder is not None:  # asked with one latent of zeros
            images = decoder(torch.zeros(1, channels, side, side, device=device))
            channels, side = images.shape[1], images.shape[-1]
        real = Real.of(settings, channels, side, settings.num_images, device)
        classes = real.source.num_classes if real.source and settings.labels == "data" else 0
        if classes > config.num_classes > 1:
            raise ValueError(
                f"--labels data: {settings.data} has {classes} classes, the model"
                f" {config.num_classes}"
            )
        return cls(settings, device, config, model_hash(settings.model), decoder, real)

    def bound(self, dtype: torch.dtype) -> dict[str, Any]:
        """What ties a folder to this evaluation: all that its cells have in common."""
        bound = asdict(self.settings) | {
            "model_sha256": self.model_sha256,
            "dtype": str(dtype),
            "device": self.device.type,
        }
        for name in _EXTENDABLE:
            del bound[name]
        return bound | self.real.bound()

    def labels(self, seed: int, images: range) -> np.ndarray:
        """Classes (n,) of the images with these indices."""
        classes, indices = self.config.num_classes, np.arange(images.start, images.stop)
        if self.settings.labels == "drawn" or classes == 1:
            return drawn_labels(seed, images, classes)
        if self.settings.labels == "balanced":
            return indices % classes
        assert self.real.source is not None
        return self.real.source.labels[indices % len(self.real.source)]

    def noise(self, seed: int, images: range) -> Tensor:
        """Noise (n, C, H, W) float32 of the images with these indices."""
        side = self.config.image_size
        return stack_noise(seed, images, (self.config.channels, side, side))


def _decoder(settings: Evaluation, config: DiTConfig, device: torch.device) -> Any:
    if settings.decoder is not None:
        from odelt_fast.sampling.decoder import load_decoder

        return load_decoder(settings.decoder, device)
    if config.channels not in (1, 3):
        raise ValueError(
            f"the model makes latents of {config.channels} channels: give --decoder, such as"
            " stabilityai/sd-vae-ft-mse"
        )
    return None
