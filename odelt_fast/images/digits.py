"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from odelt_fast.checks import Size

from .pixels import cropped
from .sources import (
    Batch,
    Flips,
    ImageSource,
    Indices,
    Noise,
    check_indices,
    fitting,
    flip_rows,
)


class DigitsSource(ImageSource):
    """scikit-learn's 1797 handwritten digits, 8x8, grey 0..16 mapped to [-1, 1]; held in memory.

    Other sizes are made with a bicubic filter, more channels by repetition. A mirrored digit is no
    digit.
    """

    name, flippable = "digits", False
    class_names = tuple("0123456789")

    def __init__(self, image_size: Size = 8, channels: int = 1) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError(
                "the digits come with scikit-learn: pip install 'odelt-fast[eval]'"
            ) from None
        self.image_size, self.channels = image_size, channels
        self.remark = fitting(self.name, "8x8", image_size, channels, grey=True)
        digits = load_digits()
        self.labels = digits.target.astype(np.int64)
        images = (digits.images / 8 - 1).astype(np.float32)
        if image_size != 8:
            from PIL import Image

            images = np.stack(
                [np.asarray(cropped(Image.fromarray(image), image_size)) for image in images]
            ).clip(-1, 1)
        self._images = np.repeat(images[:, None], channels, axis=1)

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        indices = check_indices(indices, len(self))
        return flip_rows(self._images[indices], flips), self.labels[indices]
