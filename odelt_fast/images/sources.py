"""What a source of labelled images or latents is, and what the readers share."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from odelt_fast.checks import Size, show_size, sides
from odelt_fast.config import Latents

from .listing import listed
from .pixels import Unreachable, decode_failure

T = TypeVar("T")
Indices = Sequence[int] | np.ndarray
Flips = Sequence[bool] | np.ndarray | None
Noise = np.ndarray | None
Batch = tuple[np.ndarray, np.ndarray]


class ImageSource(ABC):
    """Labelled images (or latents) of one size, by index.

    Reading is a pure function of its arguments; instances can be pickled.

    Attributes:
        name: for messages.
        channels, image_size: C, and the side of squares, or height and width.
        class_names: `num_classes` strings.
        labels: (N,) int64.
        flippable: whether a mirrored image is still an image of its class.
        skipped: names of images that were left out as unreadable.
        unseen: whether others may be, which nobody has looked at.
        remark: what brings the images to the size and channels that were asked for, if they had
            others.
        latents: what the numbers are, if they are no pixels.
        posterior: whether reading samples a posterior, with the noise that it is given.
    """

    name: str
    channels: int
    image_size: Size
    class_names: tuple[str, ...]
    labels: np.ndarray
    flippable: bool = True
    skipped: Sequence[str] = ()
    unseen: bool = False
    remark: str | None = None
    latents: Latents | None = None
    posterior: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, *sides(self.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        """Images and labels by index.

        Args:
            indices: (B,) from 0 to len - 1.
            flips: (B,) which rows to mirror left to right (None: none).
            noise: (B, C, H, W) float32, standard normal numbers with which a source of latents
                samples its posterior (None: its mean); others ignore it.

        Returns:
            (B, C, H, W) float32, in [-1, 1] if they are pixels, and labels (B,) int64.

        Raises:
            IndexError: an index outside.
        """

    def read(
        self, index: int, *, flip: bool = False, noise: Noise = None
    ) -> tuple[np.ndarray, int]:
        """One image (C, H, W) float32 and its label; arguments as in `read_many`."""
        images, labels = self.read_many([index], [flip], None if noise is None else noise[None])
        return images[0], int(labels[0])


def first_readable(
    source: ImageSource, index: int, read: Callable[[int], T], name: Callable[[int], str]
) -> tuple[T, int]:
    """What `read` makes of `index`, or of the next index at which it does not raise; that index.

    For what has become unreadable since it was checked (a lost disk block), or never was checked:
    it is named in `source.skipped` and in a warning.

    Raises:
        ValueError: 8 neighbours are unreadable, or the place where they lie cannot be reached: then
            the data are gone.
    """
    what = "cannot be read" if source.unseen else "has become unreadable"
    for offset in range(8):
        used = (index + offset) % len(source)
        try:
            return read(used), used
        except Unreachable:  # no image is to blame: another in its place would change the run
            raise
        except Exception as error:  # readers of images raise most kinds
            reason, lost = decode_failure(error), name(used)
        if lost not in source.skipped:
            source.skipped = [*source.skipped, lost]
            warnings.warn(
                f"{lost} {what} ({reason}): the next one is used instead",
                stacklevel=2,
            )
    raise ValueError(
        f"{source.name}: 8 neighbours {'are' if source.unseen else 'have become'} unreadable, the"
        f" last one {lost} ({reason})"
    )


def warn_left_out(kind: str, reasons: Mapping[str, str], count: int, beside: Counter[str]) -> None:
    """One warning, of the first process alone, of what is left out.

    Args:
        kind: images or latents.
        reasons: name -> reason of each among `count` that is unreadable; the first are named.
        beside: what lies beside them and is none, by kind.
    """
    parts = []
    if reasons:
        first = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:5])
        more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        parts.append(f"{len(reasons)} of {count} {kind} left out: {first}{more}")
    if number := beside.total():
        parts.append(f"{number} others left out beside the {kind}: {listed(beside)}")
    if parts and os.environ.get("RANK", "0") == "0":
        warnings.warn("; ".join(parts), stacklevel=3)


def fitting(name: str, sizes: str, size: Size, channels: int, grey: bool) -> str | None:
    """The remark of a source whose images are of `sizes` (8x8, or several), all of them `grey` or
    not."""
    made = []
    if sizes != show_size(size):
        part = "square" if isinstance(size, int) else "part of that shape"
        made.append(f"of {sizes}, brought to {show_size(size)} (the centred {part}, resized)")
    if grey != (channels == 1):
        made.append("grey, repeated in 3 channels" if grey else "made grey")
    return f"the images of {name} are {'; '.join(made)}" if made else None


def check_indices(indices: Indices, length: int) -> np.ndarray:
    """Indices as an int64 array; IndexError naming the first that is not within 0..length-1."""
    array = np.asarray(indices, np.int64).reshape(-1)
    wrong = array[(array < 0) | (array >= length)]
    if len(wrong):
        raise IndexError(f"index {wrong[0]} is not within 0 to {length - 1}")
    return array


def flip_rows(images: np.ndarray, flips: Flips) -> np.ndarray:
    """Mirrors, in place, the rows of images (B, C, H, W) that `flips` (B,) names; the images."""
    if flips is not None:
        rows = np.flatnonzero(flips)
        images[rows] = images[rows, :, :, ::-1]
    return images
