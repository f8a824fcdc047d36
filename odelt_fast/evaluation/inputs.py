"""What an evaluation compares, and with what, loaded and checked before anything is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.images import ImageSource, open_source
from odelt_fast.sampling.noise import drawn_labels, stack_noise

from .comparison import check_statistics
from .features import FeatureNetwork, bundled_for, load_features
from .machine import file_hash, model_hash
from .metrics import Statistics, read_statistics
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
    the model makes images). source, statistics: the real images, at the size of the generated ones,
    or what is known of them; one of the two, or none where nothing is compared.
    """

    settings: Evaluation
    device: torch.device
    config: DiTConfig
    model_sha256: str
    decoder: Callable[[Tensor], Tensor] | None
    network: FeatureNetwork
    source: ImageSource | None
    statistics: Statistics | None

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
        network = _network(settings, channels, side, device)
        network.check_images(channels, side)
        source = statistics = None
        if settings.data is not None:
            source = open_source(
                settings.data, image_size=side, channels=channels, split=settings.split
            )
            if settings.labels == "data" and source.num_classes > config.num_classes > 1:
                raise ValueError(
                    f"--labels data: {settings.data} has {source.num_classes} classes, the model"
                    f" {config.num_classes}"
                )
        if settings.stats is not None:
            statistics = read_statistics(settings.stats)
            check_statistics(statistics, settings.stats, network, settings.protocol)
        _check_counts(settings, network, source)
        model_sha256 = model_hash(settings.model)
        return cls(settings, device, config, model_sha256, decoder, network, source, statistics)

    def bound(self, dtype: torch.dtype) -> dict[str, Any]:
        """What ties a folder to this evaluation: all that its cells have in common."""
        bound = asdict(self.settings) | {
            "model_sha256": self.model_sha256,
            "features_sha256": self.network.fingerprint,
            "dtype": str(dtype),
            "features": self.network.name,
            "device": self.device.type,
        }
        for name in _EXTENDABLE:
            del bound[name]
        if self.settings.stats is not None:
            bound["stats_sha256"] = file_hash(Path(self.settings.stats))
        if self.source is not None:
            bound["data_images"] = len(self.source)
        return bound

    def labels(self, seed: int, images: range) -> np.ndarray:
        """Classes (n,) of the images with these indices."""
        classes, indices = self.config.num_classes, np.arange(images.start, images.stop)
        if self.settings.labels == "drawn" or classes == 1:
            return drawn_labels(seed, images, classes)
        if self.settings.labels == "balanced":
            return indices % classes
        assert self.source is not None
        return self.source.labels[indices % len(self.source)]

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


def _network(
    settings: Evaluation, channels: int, image_size: int, device: torch.device
) -> FeatureNetwork:
    name, weights = settings.features, settings.inception_weights
    if name == "auto":
        fitting = bundled_for(channels, image_size)
        name = fitting if fitting and not weights else "inception"
    return load_features(name, device, inception_weights=weights, trust=settings.trust_features)


def _check_counts(
    settings: Evaluation, network: FeatureNetwork, source: ImageSource | None
) -> None:
    fewest = min(settings.num_images, settings.num_images if source is None else len(source))
    too_few = "frechet" in settings.metrics and fewest <= network.dimensions
    if too_few and not settings.allow_few_samples:
        raise ValueError(
            f"{fewest} images are too few for the {network.dimensions} features of {network.name}:"
            f" take more than {network.dimensions}, or, if you know what the number then means,"
            " --allow-few-samples"
        )
    if fewest < 10 and set(settings.metrics) - {"frechet", "recognised"}:
        raise ValueError(
            f"{', '.join(settings.metrics)} of {fewest} images mean nothing: take at least 10"
        )
