"""Readers of image and latent sources: one interface, `open_source`, for training and for
evaluation."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from odelt_fast.files import one_line
from odelt_fast.images.folders import open_folder
from odelt_fast.images.latents import open_latents
from odelt_fast.images.parquet import open_parquet, parquet_files
from odelt_fast.images.pixels import (
    SUFFIXES,
    Store,
    check_images,
    decode_image,
    num_threads,
    resize_square,
)
from odelt_fast.images.sources import ImageSource, Noise, check_indices, first_readable, flip_rows
from odelt_fast.images.tables import SAVED_MARKS, open_dataset

__all__ = ["DigitsSource", "EncodedImages", "ImageSource", "open_source"]


class DigitsSource(ImageSource):
    """scikit-learn's 1797 real 8x8 handwritten digits, grey 0..16 mapped to [-1, 1]; held in
    memory. A mirrored digit is no digit.

    Other sizes are made with a bicubic filter, more channels by repetition.
    """

    name, flippable = "digits", False
    class_names = tuple("0123456789")

    def __init__(self, image_size: int = 8, channels: int = 1) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError(
                "the digits come with scikit-learn: pip install 'odelt-fast[eval]'"
            ) from None
        self.image_size, self.channels = image_size, channels
        digits = load_digits()
        self.labels = digits.target.astype(np.int64)
        images = (digits.images / 8 - 1).astype(np.float32)
        if image_size != 8:
            from PIL import Image

            images = np.stack(
                [np.asarray(resize_square(Image.fromarray(image), image_size)) for image in images]
            ).clip(-1, 1)
        self._images = np.repeat(images[:, None], channels, axis=1)

    def read_many(
        self,
        indices: Sequence[int] | np.ndarray,
        flips: Sequence[bool] | np.ndarray | None = None,
        noise: Sequence[Noise] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = check_indices(indices, len(self))
        return flip_rows(self._images[indices], flips), self.labels[indices]


class EncodedImages(ImageSource):
    """Encoded images of a `Store`, decoded on reading. Small sets are kept decoded as they are
    read.

    Construction decodes everything once (`check_images`): images that cannot be decoded are left
    out and named in `skipped` and in one warning. An image that becomes unreadable later (a lost
    disk block) is replaced by the next readable one, with a warning.
    """

    _KEPT = 512 << 20  # bytes of decoded pixels

    def __init__(
        self,
        name: str,
        store: Store,
        labels: np.ndarray,
        class_names: Sequence[str],
        image_size: int | None,
        channels: int | None,
    ) -> None:
        check = check_images(store, one_size=image_size is None)
        good = np.setdiff1d(np.arange(len(store)), list(check.skipped))
        self.name, self.class_names = name, tuple(class_names)
        self.labels = labels[good]
        self.image_size = image_size or min(check.size)
        self.channels = channels or (1 if check.grey else 3)
        self.skipped = [store.name(row) for row in check.skipped]
        self._store, self._rows, self._resize = store, good, image_size
        self._small = (
            math.prod(check.size) < 1 << 14
        )  # decoded sooner than handed to another thread
        self._kept: np.ndarray | None = None
        self._used: np.ndarray | None = None
        if check.skipped:
            shown = [
                f"{name} ({reason})" for name, reason in zip(self.skipped, check.skipped.values())
            ][:5]
            more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            warnings.warn(
                f"{len(self.skipped)} of {len(store)} images left out: {', '.join(shown)}{more}",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_used": None}

    def _make_room(self) -> None:
        shape = (len(self), self.channels, self.image_size, self.image_size)
        if self._kept is None and math.prod(shape) <= self._KEPT:
            self._kept = np.empty(shape, np.uint8)  # memory is taken as images come
            self._used = np.full(
                len(self), -1
            )  # the image whose pixels stand at an index; -1: none yet

    def read_many(
        self,
        indices: Sequence[int] | np.ndarray,
        flips: Sequence[bool] | np.ndarray | None = None,
        noise: Sequence[Noise] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = check_indices(indices, len(self))
        self._make_room()
        if self._kept is None or self._used is None:
            decoded = self._decode_all(indices)
            pixels = (
                np.stack([image for image, _ in decoded])
                if decoded
                else np.empty((0, self.channels, *[self.image_size] * 2), np.uint8)
            )
            labels = self.labels[[used for _, used in decoded]]
        else:
            missing = np.unique(indices[self._used[indices] < 0])
            for index, (image, used) in zip(missing, self._decode_all(missing)):
                self._kept[index], self._used[index] = image, used
            pixels, labels = self._kept[indices], self.labels[self._used[indices]]
        images = pixels.astype(np.float32)
        images /= 127.5
        images -= 1
        return flip_rows(images, flips), labels

    def _decode_all(self, indices: np.ndarray) -> list[tuple[np.ndarray, int]]:
        if self._small or len(indices) < 2 or num_threads() == 1:
            return [self._decode(int(index)) for index in indices]
        # Made for each batch: a pool kept over a fork would wait for ever.
        with ThreadPoolExecutor(num_threads()) as pool:
            return list(pool.map(lambda index: self._decode(int(index)), indices))

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        def decode(index: int) -> np.ndarray:
            pixels = decode_image(
                self._store.encoded(int(self._rows[index])), self._resize, self.channels
            )
            if pixels.shape[1:] != (self.image_size, self.image_size):
                raise ValueError("its size has changed")
            return pixels

        return first_readable(
            self, index, decode, lambda index: self._store.name(int(self._rows[index]))
        )


def open_source(
    data: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    split: str = "train",
) -> ImageSource:
    """Opens labelled images or latents. `data` is one of

    - digits: the digits of scikit-learn - a folder of class folders (sorted names are the labels),
    of train/ and test/ with class folders, or of images (one class) - a Parquet file, or a folder
    of them, with columns of images and labels as Hugging Face `datasets` writes them - the id of a
    data set on the Hugging Face Hub (user/name, user/name:config), or a folder made by its
    `save_to_disk` - a folder of latents: written by `odelt-fast encode`, by fast-DiT (*_features,
    *_labels), or for REPA (img-mean-std-*.npy)

    image_size: images become the centred square, resized to it; None: all have one size, whose
    centred square is taken. channels: 1 (grey) or 3; None: 1 if every image is grey. Neither
    changes latents. split: which part, where the data have parts.

    Raises ValueError, in one line, before anything is read for training: no data, none of these
    kinds, wrong labels, mixed sizes. Images that cannot be decoded are left out (`skipped`).
    """
    _check_choice("image_size", image_size, range(1, 4097), "1 to 4096")
    _check_choice("channels", channels, range(1, 4097), "a whole number of at least 1")
    if str(data) == "digits":
        _check_choice("channels", channels, (1, 3), "1 or 3")
        _only_train("digits", split)
        return DigitsSource(image_size or 8, channels or 1)
    path = Path(data).expanduser()
    try:
        kind = _kind(path, str(data))
        if kind == "latents":
            _only_train(str(data), split)
            source = open_latents(path)
            for name, wanted in (("image_size", image_size), ("channels", channels)):
                if wanted is not None and wanted != getattr(source, name):
                    raise ValueError(
                        f"the latents in {data} have {name} {getattr(source, name)}, which cannot"
                        f" be changed to {wanted}"
                    )
            return source
        _check_choice("channels", channels, (1, 3), "1 or 3")
        store, labels, names = _open_store(str(data), path, kind, split)
        return EncodedImages(str(data), store, labels, names, image_size, channels)
    except OSError as error:
        raise ValueError(f"{data} cannot be read: {one_line(error)}") from None


def _open_store(
    data: str, path: Path, kind: str, split: str
) -> tuple[Store, np.ndarray, tuple[str, ...]]:
    if kind == "dataset":
        return open_dataset(str(path) if path.exists() else data, split)
    if kind == "parquet":
        return open_parquet([path] if path.is_file() else parquet_files(path, split))
    return open_folder(path, split)


def _kind(path: Path, data: str) -> str:
    """latents, dataset, parquet or folder; ValueError for what is none of them. `data`: as the user
    wrote it (./a/b is never an id)."""
    if path.is_file():
        if path.suffix == ".parquet":
            return "parquet"
        raise ValueError(f"{path} is a file of no known kind: give a .parquet file or a folder")
    if not path.is_dir() or not data:
        if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", data) and path.suffix not in (
            ".parquet",
            ".npy",
            ".json",
            *SUFFIXES,
        ):
            return "dataset"
        raise ValueError(
            f"{data!r} does not exist: give digits, a folder, a .parquet file or the id of a"
            " Hugging Face data set"
        )
    entries = list(os.scandir(path))
    names, folders = (
        {entry.name for entry in entries},
        {entry.name for entry in entries if entry.is_dir()},
    )
    if (
        ({"manifest.json", "encoding.json"} & names and not folders)
        or "vae-sd" in folders
        or any(n.endswith("_features") for n in folders)
    ):
        return "latents"
    if names & set(SAVED_MARKS):
        return "dataset"
    if "dataset.json" in names and any(path.rglob("img-mean-std-*.npy")):
        return "latents"
    return (
        "parquet"
        if any(any(path.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
        else "folder"
    )


def _check_choice(name: str, value: object, allowed: Sequence[int], text: str) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or value not in allowed
    ):
        raise ValueError(f"{name} must be {text}, or None, not {value!r}")


def _only_train(data: str, split: str) -> None:
    if split != "train":
        raise ValueError(f"{data} has no split {split!r}: it is all of the split 'train'")
