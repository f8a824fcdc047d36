"""Noise and labels from seeds.

Image i depends on (seed, i) alone: `philox(seed, stream, image index, step index)` draws it. No two
of these share a number, and the same pictures come out on every device, in any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Training's streams are numbered from 0 (train/draws.py): these start far above, so that a model
# never meets its training noise.
STREAMS = {
    "noise": 2**32,
    "label": 2**32 + 1,
    "renoise": 2**32 + 2,
    "probe": 2**32 + 3,
    "dequantise": 2**32 + 4,
}


def philox(seed: int, stream: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """Numpy's counter-based generator, all numbers in [0, 2^64).

    Args:
        seed, stream: the key.
        first, second: independent sequences of the key. They are the upper two of the counter's
            four words; the lower two count the numbers drawn.
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, first, second], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def image_noise(
    seed: int, index: int, shape: Sequence[int], stream: str = "noise", step: int = 0
) -> np.ndarray:
    """Standard normal float32 of `shape` that belongs to image `index` of `seed` (both in [0,
    2^64))."""
    return philox(seed, STREAMS[stream], index, step).standard_normal(shape, dtype=np.float32)


def drawn_labels(seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Label of each image that was given none, int64: uniform over the classes; for one-class
    models the null label (num_classes)."""
    if num_classes == 1:
        return np.full(len(indices), num_classes, np.int64)
    generators = (philox(seed, STREAMS["label"], index) for index in indices)
    return np.array([generator.integers(num_classes) for generator in generators], np.int64)


def stack_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "noise", step: int = 0
) -> Tensor:
    """The noise of several images, (len(indices), *shape) float32."""
    return torch.from_numpy(
        np.stack([image_noise(seed, index, shape, stream, step) for index in indices])
    )


def check_labels(
    labels: int | Sequence[int] | np.ndarray | Tensor | None, count: int, num_classes: int
) -> np.ndarray | None:
    """Labels as (count,) int64, one label repeated for all; None stays None. ValueError unless all
    are in [0, num_classes]."""
    if labels is None:
        return None
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"labels must be whole numbers from 0 to {num_classes}, where {num_classes} is the null"
            " label"
        )
    if array.shape not in ((), (count,)):
        raise ValueError(
            f"{array.shape if array.ndim > 1 else len(array)} labels for {count} images: give one,"
            " or one for each image"
        )
    wrong = array[(array < 0) | (array > num_classes)]
    if wrong.size:
        raise ValueError(
            f"label {wrong.flat[0]} is not allowed: labels go from 0 to {num_classes - 1},"
            f" {num_classes} is the null label"
        )
    return array.astype(np.int64) if array.ndim else np.full(count, array, np.int64)
