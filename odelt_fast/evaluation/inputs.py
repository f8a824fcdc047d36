"""What an evaluation compares, and with what, loaded and checked before anything is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import check_size
from odelt_fast.config import DiTConfig, TrainedOn, are_numbers, plain
from odelt_fast.images import ImageSource
from odelt_fast.sampling.labels import labels_of_classes
from odelt_fast.sampling.noise import drawn_labels, stack_noise

from .machine import model_hash
from .real import Real
from .settings import Evaluation

# What may differ between the runs that fill one folder.
_EXTENDABLE = (
    *("depths", "depth_schedules", "steps", "solvers", "tolerances", "seeds", "first_seed"),
    *("inception_weights", "trust_features", "any_decoder"),
)


@dataclass(frozen=True)
class Inputs:
    """What an evaluation by `settings` reads (`of`).

    config: of the model, whose files have the hash model_sha256. decoder: latents -> images (None:
    the model makes images). data_labels: of the real images, as the model counts its classes, if
    they are to be drawn. remark: a line for the user.
    """

    settings: Evaluation
    device: torch.device
    config: DiTConfig
    model_sha256: str
    decoder: Callable[[Tensor], Tensor] | None
    real: Real
    data_labels: np.ndarray | None = None
    remark: str | None = None

    @classmethod
    def of(
        cls,
        settings: Evaluation,
        config: DiTConfig,
        device: torch.device,
        trained_on: TrainedOn = TrainedOn(),  # noqa: B008 (frozen)
    ) -> Inputs:
        """Opens everything that the model with this configuration, trained on that, is compared by,
        on `device`.

        Raises:
            ValueError: for data, statistics or networks that do not fit, and for too few images.
        """
        decoder = _decoder(settings, config, device)
        shape: Sequence[int] = config.image_shape
        if decoder is not None:
            decoder.check_latents(trained_on.latents)
            # asked with one latent of zeros
            shape = decoder(torch.zeros(1, *shape, device=device)).shape[1:]
        size = check_size("image_size", shape[1:], 2**16)
        real = Real.of(settings, shape[0], size, settings.num_images, device)
        labels = remark = None
        if real.source is not None:
            labels, remark = _labels(settings, config, trained_on, real.source)
        sha256 = model_hash(settings.model)
        return cls(settings, device, config, sha256, decoder, real, labels, remark)

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
        assert self.data_labels is not None
        return self.data_labels[indices % len(self.data_labels)]

    def noise(self, seed: int, images: range) -> Tensor:
        """Noise (n, C, H, W) float32 of the images with these indices."""
        return stack_noise(seed, images, self.config.image_shape)


def _labels(
    settings: Evaluation, config: DiTConfig, trained_on: TrainedOn, source: ImageSource
) -> tuple[np.ndarray | None, str | None]:
    """Labels (N,) of the images if they are to be drawn, and what is to be said of their classes.

    ValueError for classes that the model does not have; images without any may be compared with.
    """
    names, classes = source.class_names, config.num_classes
    drawn, several = settings.labels != "data", len(names) > 1
    if classes == 1 or (drawn and not (several and trained_on.class_names)):
        return source.labels, None
    if are_numbers(trained_on.class_names) and drawn:
        return source.labels, None
    if not several and not trained_on.find(names[0]):
        raise ValueError(f"--labels data: {settings.data} is one folder of images, without labels")
    try:
        labels = np.array(labels_of_classes(trained_on, names, classes), np.int64)
    except ValueError as error:
        raise ValueError(f"{settings.data} has other classes than the model: {error}") from None
    if drawn and len(names) < classes:
        return None, (
            f"{settings.data} has {len(names)} of the model's {classes} classes, and --labels"
            f" {settings.labels} draws them all: --labels data draws those of the data"
        )
    moved = [(name, label) for i, (name, label) in enumerate(zip(names, labels)) if i != label]
    told = ", ".join(f"{plain(name)} is {label}" for name, label in moved[:10])
    return labels[source.labels], f"classes by name: {told}" if moved else None


def _decoder(settings: Evaluation, config: DiTConfig, device: torch.device) -> Any:
    if settings.decoder is not None:
        from odelt_fast.sampling.decoder import load_decoder

        return load_decoder(settings.decoder, device, any_latents=settings.any_decoder)
    if config.channels not in (1, 3):
        raise ValueError(
            f"the model makes latents of {config.channels} channels: give --decoder, such as"
            " stabilityai/sd-vae-ft-mse"
        )
    return None
