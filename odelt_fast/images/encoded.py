"""Image files and tables of images as a source: checked once, decoded on reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from odelt_fast.checks import Size

from .pixels import (
    HowMany,
    Store,
    check_images,
    decode_image,
    num_threads,
    reading,
    rows_to_check,
)
from .sources import (
    Batch,
    Flips,
    ImageSource,
    Indices,
    Noise,
    check_indices,
    first_readable,
    fitting,
    flip_rows,
    warn_left_out,
)


class EncodedImages(ImageSource):
    """Encoded images of a `Store`, decoded on reading; small sets are kept decoded once read.

    Construction decodes everything once (`check_images`), or some: images that cannot be decoded
    are left out and named in `skipped` and in one warning. An image that is found unreadable later
    (a lost disk block) is replaced by the next readable one, with a warning.
    """

    _KEPT, _KEPT_BY_COPIES = 512 << 20, 128 << 20  # bytes of decoded pixels; in each worker

    def __init__(
        self,
        name: str,
        store: Store,
        labels: np.ndarray,
        class_names: Sequence[str],
        image_size: Size | None,
        channels: int | None,
        checked: HowMany = "all",
    ) -> None:
        rows = rows_to_check(len(store), checked)
        check = check_images(store, rows, one_size=image_size is None)
        good = np.setdiff1d(np.arange(len(store)), list(check.skipped))
        self.name, self.class_names = name, tuple(class_names)
        self.labels = labels[good]
        self.image_size = image_size or min(check.size)
        self.channels = channels or (1 if check.grey else 3)
        sizes = f"{check.size[0]}x{check.size[1]}" + (" and other sizes" if check.other else "")
        remarks = [fitting(name, sizes, self.image_size, self.channels, check.grey)]
        self.unseen = len(rows) < len(store)
        if self.unseen:
            remarks.append(
                f"{len(rows)} of the {len(store)} images of {name} were decoded beforehand,"
                f" {len(check.skipped)} cannot be: the others are found out as they are used"
            )
        self.remark = "; ".join(filter(None, remarks)) or None
        self.skipped = [store.name(row) for row in check.skipped]
        self._store, self._rows, self._resize = store, good, image_size
        # Decoded sooner than handed to another thread.
        self._small = math.prod(check.size) < 1 << 14
        reasons = dict(zip(self.skipped, check.skipped.values()))
        warn_left_out("images", reasons, len(rows), store.left_out)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_kept"}
        return state | {"_KEPT": min(self._KEPT, self._KEPT_BY_COPIES)}

    @cached_property
    def _kept(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels of small sets by index, and the image whose pixels stand there; -1: none yet."""
        shape = (len(self), *self.image_shape)
        if math.prod(shape) > self._KEPT:
            return None
        return np.empty(shape, np.uint8), np.full(len(self), -1)  # memory is taken as images come

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        indices = check_indices(indices, len(self))
        if self._kept is None:
            decoded = self._decode_all(indices)
            shape = (-1, *self.image_shape)
            pixels = np.array([image for image, _ in decoded], np.uint8).reshape(shape)
            labels = self.labels[np.array([used for _, used in decoded], np.int64)]
        else:
            kept, shown = self._kept
            missing = np.unique(indices[shown[indices] < 0])
            for index, (image, used) in zip(missing, self._decode_all(missing)):
                kept[index], shown[index] = image, used
            pixels, labels = kept[indices], self.labels[shown[indices]]
        images = pixels.astype(np.float32)
        images /= 127.5
        images -= 1
        return flip_rows(images, flips), labels

    def _decode_all(self, indices: np.ndarray) -> list[tuple[np.ndarray, int]]:
        if not len(indices):
            return []
        read = reading(self._store, self._rows[indices])
        if self._small or len(indices) < 2 or num_threads() == 1:
            return [self._decode(int(index), read) for index in indices]
        # Made for each batch: a pool kept over a fork would wait for ever.
        with ThreadPoolExecutor(num_threads()) as pool:
            return list(pool.map(lambda index: self._decode(int(index), read), indices))

    def _decode(self, index: int, read: Callable[[int], bytes | str]) -> tuple[np.ndarray, int]:
        def decode(index: int) -> np.ndarray:
            encoded = read(int(self._rows[index]))
            pixels = decode_image(encoded, self._resize, self.channels)
            if pixels.shape[1:] != self.image_shape[1:]:
                raise ValueError("its size has changed")
            return pixels

        return first_readable(self, index, decode, lambda i: self._store.name(int(self._rows[i])))
