"""Images in a .npz file, as `odelt-fast sample --npz` and evaluators of generated images have
them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from odelt_fast.checks import Size, check_size, show_size
from odelt_fast.files import one_line

from .pixels import cropped
from .sources import Batch, Flips, ImageSource, Indices, Noise, check_indices, fitting, flip_rows

_MOST_CLASSES = 10_000_000
_MOST_PIXELS = 2**16  # of a side


class ArrayImages(ImageSource):
    """arr_0 (N, H, W, C) uint8 with C 1 or 3, and, where it is there, arr_1 (N,) of labels.

    arr_0 is mapped, not held in memory; one that is compressed is unpacked to a temporary file
    first. Both are read through once, so that damage is found.

    Args:
        image_size, channels: what images are brought to (None: as they are).

    Raises:
        ValueError: in one line, for anything else and for damaged files.
    """

    def __init__(self, path: Path, image_size: Size | None, channels: int | None) -> None:
        self._arguments = path, image_size, channels
        try:
            with ZipFile(path) as archive:
                self._images = _mapped(path, archive, "arr_0")
                named = "arr_1.npy" in archive.namelist()
                labels = np.array(_mapped(path, archive, "arr_1")) if named else None
            shape, dtype = self._images.shape, self._images.dtype
            if dtype != np.uint8 or len(shape) != 4 or not shape[0] or shape[3] not in (1, 3):
                raise ValueError(
                    f"arr_0 must be (N, H, W, C) uint8 of 1 or 3 channels, not {shape} {dtype}"
                )
            own = check_size("the sides of arr_0", shape[1:3], _MOST_PIXELS)
            self.labels, self.class_names = _classes(labels, shape[0])
        # zipfile and numpy raise all of these for files of anybody's making
        except (
            OSError,
            ValueError,
            LookupError,
            EOFError,
            RuntimeError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise ValueError(
                f"{path} holds no images that can be read: {one_line(error, 200)}"
            ) from None
        self.name = str(path)
        self.image_size, self.channels = size, depth = image_size or own, channels or shape[3]
        self.remark = fitting(self.name, show_size(own), size, depth, shape[3] == 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayImages, self._arguments  # not what the arrays hold

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        indices = check_indices(indices, len(self))
        pixels = self._images[indices]
        if pixels.shape[1:] != (*self.image_shape[1:], self.channels):
            pixels = np.stack([self._brought(image) for image in pixels])
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
        images /= 127.5
        images -= 1
        return flip_rows(images, flips), self.labels[indices]

    def _brought(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 to the size and the channels that are wanted."""
        from PIL import Image

        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        brought = np.asarray(cropped(picture, self.image_size))
        return brought.reshape(*self.image_shape[1:], self.channels)


def _classes(labels: np.ndarray | None, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if labels is None:
        return np.zeros(count, np.int64), ("all",)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"arr_1 must be {count} whole numbers, not {labels.shape} {labels.dtype}")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= _MOST_CLASSES:
        raise ValueError(f"arr_1 must hold labels from 0, not {least} to {most}")
    return labels.astype(np.int64), tuple(map(str, range(most + 1)))


def _mapped(path: Path, archive: ZipFile, name: str) -> np.ndarray:
    """An array of the archive, read-only, in pages of its file or of a temporary one."""
    info, formats = archive.getinfo(f"{name}.npy"), np.lib.format
    stored = info.compress_type == ZIP_STORED
    with archive.open(info) as member:
        read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        version = formats.read_magic(member)
        if version not in read:
            raise ValueError(f"version {version} of the npy format")
        shape, fortran, dtype = read[version](member)
        offset = member.tell()
        needed = offset + math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or needed != info.file_size:
            raise ValueError(
                f"{name} is damaged or pickled: {dtype} {shape} in {info.file_size} bytes"
            )
        if not stored and info.file_size > shutil.disk_usage(tempfile.gettempdir()).free:
            raise ValueError(f"no room to unpack the {info.file_size} bytes of {name}")
        order: Literal["F", "C"] = "F" if fortran else "C"
        if not stored:
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(member, unpacked, 1 << 20)
                unpacked.flush()
                return np.memmap(unpacked, dtype, "r", 0, shape, order)
        with open(os.devnull, "wb") as nowhere:  # reading to the end compares the checksum
            shutil.copyfileobj(member, nowhere, 1 << 20)
    with path.open("rb") as file:
        # Behind the local header, whose name and extra field have the lengths that it says.
        file.seek(info.header_offset + 26)
        head = file.read(4)
    begin = info.header_offset + 30 + sum(np.frombuffer(head, "<u2").tolist())
    return np.memmap(path, dtype, "r", begin + offset, shape, order)
