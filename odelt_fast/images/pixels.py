"""From encoded images to pixels, and the check that finds what cannot be decoded beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from odelt_fast.checks import Size, sides
from odelt_fast.files import (
    cache_folder,
    locked,
    one_line,
    problem_of,
    read_bytes,
    write_atomically,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow's readers hand to other programs (EPS), or recognise without decoding it.
_NOT_DECODED = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
# Told by how they begin. Not TIFF, whose mark cameras' raw files have too: of these Pillow decodes
# the thumbnail.
_MARKED = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
_PNG_MARK = b"\x89PNG\r\n\x1a\n"
_MAX_PNG = 1 << 30  # bytes of a file
# Beginnings of the texts in a PNG that may say how it is to be turned, and the most bytes of one.
_TURNING = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")
_MAX_TURNING = 1 << 20
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_EXIF_ORIENTATION = 0x0112
# A check of more photographs would take an hour of a core: of those a sample is looked at.
_MOST_CHECKED, _SAMPLE = 500_000, 50_000
_REMEMBERED_FROM = 2000  # images: below, a check takes a second or two and is not worth a file
_CHECK_VERSION = 2


class Unreachable(ValueError):
    """The place where images lie cannot be reached: no image is to blame."""


class Store(Protocol):
    """Where encoded images lie.

    `encoded`: the bytes or the path of one; it may raise. `fingerprint`: changes when the data do.
    `left_out`: what lies there and is no image, by kind.
    """

    left_out: Counter[str]

    def __len__(self) -> int: ...
    def name(self, row: int) -> str: ...
    def encoded(self, row: int) -> bytes | str: ...
    def fingerprint(self) -> str: ...


HowMany = int | Literal["all", "auto"]  # images that are decoded beforehand; auto: a sample of many
Opened = tuple[Store, np.ndarray, tuple[str, ...]]  # images, labels (N,) int64, class names


@dataclass(frozen=True)
class Check:
    """What a decode of a store, or of some of it, found.

    Attributes:
        skipped: row -> reason.
        size: (width, height) of the first good image.
        other: the first pair of rows of different sizes: row, row, width, height of the second.
        grey: all images are.
    """

    count: int
    skipped: dict[int, str]
    size: tuple[int, int]
    other: tuple[int, ...] | None
    grey: bool


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself, without other programs."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


@cache
def image_endings() -> frozenset[str]:
    """Endings of the names of files in these formats, in lower case, with their dots."""
    from PIL import Image

    formats = {*image_formats(), "MPO"}  # a JPEG with further pictures
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, name in endings if name in formats)


def is_image_file(path: str) -> bool:
    """Whether a file's name ends as an image's does; one without ending is looked into."""
    from PIL import Image

    ending = os.path.splitext(path)[1].lower()
    if ending:
        return ending in image_endings()
    try:
        with Image.open(path, formats=_MARKED):
            return True
    except Exception:  # readers of images raise most kinds
        return False


def decode_image(encoded: bytes | str, image_size: Size | None, channels: int) -> np.ndarray:
    """The centred part of an encoded image that has the shape of image_size.

    The EXIF orientation is applied; transparent parts are laid over white; 16 bits keep their upper
    8; of an animation or several pages, the first. Any exception means that the image cannot be
    decoded: Pillow's readers raise most kinds of them.

    Args:
        encoded: bytes, or a path.
        image_size: to which it is resized (None: the centred square, as it is).

    Returns:
        (channels, H, W) uint8.
    """
    with _open_image(_without_texts(encoded)) as image:
        image.load()  # some readers turn it then
        orientation = _orientation(image)
        pixels = _convert(image, "L" if channels == 1 else "RGB")
    part = np.asarray(cropped(_turn(pixels, orientation), image_size))
    return part[None] if channels == 1 else np.ascontiguousarray(part.transpose(2, 0, 1))


def cropped(image: Image, image_size: Size | None) -> Image:
    """The largest centred part of an image with the shape of image_size, at that size; None: the
    centred square, as large as it is.

    Box-halved while twice too large, then bicubic (as ADM does).
    """
    from PIL.Image import Resampling

    height, width = sides(image_size or min(image.size))
    share = min(image.width / width, image.height / height)
    part = min(image.width, round(width * share)), min(image.height, round(height * share))
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    if image.size != part:
        image = image.crop((left, top, left + part[0], top + part[1]))
    if image.size == (width, height):
        return image
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    return image.resize((width, height), Resampling.BICUBIC)


def _without_texts(encoded: bytes | str) -> bytes | str:
    """What Pillow is to open: a PNG without its texts and its colour profile, of which Pillow
    unpacks no more than 1 MB, and which change nothing here; all else as it is."""
    if isinstance(encoded, str):
        with open(encoded, "rb") as file:
            if file.read(len(_PNG_MARK)) != _PNG_MARK:
                return encoded
        encoded = read_bytes(Path(encoded), _MAX_PNG)
    elif not encoded.startswith(_PNG_MARK):
        return encoded
    kept, start = [_PNG_MARK], len(_PNG_MARK)
    while start < len(encoded):
        length, kind = int.from_bytes(encoded[start : start + 4]), encoded[start + 4 : start + 8]
        end = start + length + 12  # with its length, kind and checksum
        turning = length <= _MAX_TURNING and encoded.startswith(_TURNING, start + 8)
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") or turning:
            kept.append(encoded[start:end])
        if kind == b"IEND":
            break
        start = end
    return b"".join(kept)


def _open_image(encoded: bytes | str) -> Image:
    from PIL import Image

    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    image = Image.open(file, formats=image_formats())
    # Pillow itself only warns up to twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(
            f"{image.width}x{image.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS}"
        )
    return image


def _orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it is missing or damaged, as viewers do."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _turn(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
    return image if orientation == 1 else image.transpose(Transpose[turns.split()[orientation - 2]])


def _convert(image: Image, mode: str) -> Image:
    from PIL import Image as pillow

    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("32-bit values, whose black and white are not known: make them 8 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return pillow.fromarray((wide >> 8).astype(np.uint8)).convert(mode)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert(mode)


def inspect_image(encoded: bytes | str) -> tuple[int, int, bool]:
    """Width and height after orientation, and whether it is grey, of an image that decodes.

    Any exception means that it does not, completely.
    """
    encoded = _without_texts(encoded)
    with _open_image(encoded) as image:
        if image.format == "PNG":
            with _open_image(encoded) as other:
                other.verify()  # the checksums, which decoding ignores
        image.load()
        turned = _orientation(image) >= 5
        if image.mode not in ("L", "RGB"):
            _convert(image, "RGB")  # not every mode can be
        width, height = (image.height, image.width) if turned else image.size
        return width, height, image.mode in _GREY_MODES


def rows_to_check(count: int, wanted: HowMany) -> Sequence[int]:
    """The rows that are looked at before the others are used: all, or as many, evenly spread."""
    if wanted == "auto":
        wanted = _SAMPLE if count > _MOST_CHECKED else "all"
    if wanted == "all" or wanted >= count:
        return range(count)
    return [row * count // wanted for row in range(wanted)]


def check_images(store: Store, rows: Sequence[int], *, one_size: bool) -> Check:
    """Decodes these images of a store once, on all cores, and reports which cannot be.

    What was found is remembered in the cache folder while the data stay as they are. Of several
    processes one checks and the others wait.

    Raises:
        ValueError: `one_size` and two sizes are found; no image is left.
    """
    if len(rows) < _REMEMBERED_FROM:
        check = _check_all(store, rows, one_size)
    else:
        import PIL

        facts = f"{_CHECK_VERSION} {PIL.__version__} {store.fingerprint()}"
        if len(rows) < len(store):
            facts += f" {len(rows)}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        path = cache_folder() / f"check-{key}.json"
        with locked(path.with_suffix(".lock")):
            remembered = _read_check(path, len(store))
            check = remembered or _check_all(store, rows, one_size)
            if remembered is None:
                found = json.dumps(asdict(check)).encode()
                with contextlib.suppress(OSError):
                    write_atomically(path, lambda file: file.write(found))
    if len(check.skipped) == len(rows):
        row, reason = next(iter(check.skipped.items()))
        raise ValueError(
            f"none of the {len(rows)} images can be decoded; {store.name(row)}: {reason}"
        )
    if one_size and check.other is not None:
        raise ValueError(_mixed_sizes(store, check.size, check.other))
    return check


def _mixed_sizes(store: Store, size: tuple[int, int], other: tuple[int, ...]) -> str:
    first, second, width, height = other
    return (
        f"the images have different sizes: {store.name(first)} is {size[0]}x{size[1]},"
        f" {store.name(second)} is {width}x{height}; give an image size to bring them to,"
        " or images of one size"
    )


def _check_all(store: Store, rows: Sequence[int], one_size: bool) -> Check:
    from tqdm import tqdm

    skipped: dict[int, str] = {}
    first, size, grey = -1, (0, 0), True
    other: tuple[int, ...] | None = None
    chunks = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    progress = tqdm(
        total=len(rows), desc="checking images", unit="image", delay=2, disable=None, leave=False
    )
    with ThreadPoolExecutor(num_threads()) as pool, progress:
        inspected = pool.map(partial(_inspect_all, store), chunks)
        for chunk, results in zip(chunks, inspected):
            for row, result in zip(chunk, results):
                if isinstance(result, str):
                    skipped[row] = result
                    continue
                grey = grey and result[2]
                if first < 0:
                    first, size = row, result[:2]
                elif other is None and result[:2] != size:
                    other = (first, row, *result[:2])
                    if one_size:
                        pool.shutdown(cancel_futures=True)
                        raise ValueError(_mixed_sizes(store, size, other))
            progress.update(len(chunk))
    return Check(len(store), skipped, size, other, grey)


def reading(store: Store, rows: Sequence[int] | np.ndarray) -> Callable[[int], bytes | str]:
    """`store.encoded`, for which a store that can (`together`) has fetched these rows at once."""
    together = getattr(store, "together", None)
    read: Callable[[int], bytes | str] = together(rows) if together else store.encoded
    return read


def _inspect_all(store: Store, rows: Sequence[int]) -> list[tuple[int, int, bool] | str]:
    read = reading(store, rows)
    return [_inspect(read, row) for row in rows]


def _inspect(read: Callable[[int], bytes | str], row: int) -> tuple[int, int, bool] | str:
    encoded: bytes | str = b""
    try:
        encoded = read(row)
        return inspect_image(encoded)
    except Unreachable:
        raise
    except Exception as error:
        failure = decode_failure(error)
        return problem_of(Path(encoded), failure) if isinstance(encoded, str) else failure


def decode_failure(error: Exception) -> str:
    """Why an image cannot be decoded, in one line without Pillow's memory addresses."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image that Pillow decodes"
    return one_line(error)


def _read_check(path: Path, count: int) -> Check | None:
    """A remembered check; None if there is none or it is damaged."""
    try:
        values = json.loads(path.read_text())
        width, height = map(int, values["size"])
        other = None if values["other"] is None else tuple(map(int, values["other"]))
        skipped = {int(row): str(reason) for row, reason in values["skipped"].items()}
        check = Check(values["count"], skipped, (width, height), other, bool(values["grey"]))
        return check if check.count == count and skipped.keys() <= set(range(count)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def num_threads() -> int:
    """Cores that this process may use, at most 16."""
    own = hasattr(os, "sched_getaffinity")
    return min(len(os.sched_getaffinity(0)) if own else os.cpu_count() or 1, 16)
