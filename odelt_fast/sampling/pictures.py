"""Arrays and pictures of images: 8-bit arrays, one picture of many images, the paper's grid of l
(rows) by T (columns)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_TILE = 64  # pixels: smaller images are enlarged to at least about this
_GAP = 2  # pixels of white between the images of a picture
_LARGEST_PICTURE = 2**28  # pixels


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) float, clipped to [-1, 1] -> (N, H, W, C) uint8: -1 is 0, 1 is 255,
    rounded. ValueError if not finite."""
    pixels = torch.as_tensor(images).detach().float()
    if pixels.dim() != 4 or not torch.isfinite(pixels).all():
        raise ValueError(
            f"images must be finite, of shape (N, C, H, W); these have shape {tuple(pixels.shape)}"
        )
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().contiguous().numpy()


def in_form(images: Tensor, output_type: str) -> Any:
    """Images (N, C, H, W), data in [-1, 1], in a form of diffusers: "pil", or in [0, 1] "np"
    (N, H, W, C) or "pt" (N, C, H, W)."""
    if output_type == "pil":
        from PIL import Image

        grey = images.shape[1] == 1
        return [Image.fromarray(a[:, :, 0] if grey else a) for a in to_uint8(images)]
    scaled = (images / 2 + 0.5).clamp(0, 1)
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: np.ndarray, columns: int | None = None) -> Image:
    """One picture of (N, H, W, C) uint8 images, row by row, in `columns` columns (None: about as
    many as rows), with narrow white gaps.

    C = 1 gives a grey picture, C = 3 RGB; other numbers of channels raise ValueError. Small images
    are enlarged by a whole factor.
    """
    from PIL import Image as PILImage

    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be (N, H, W, C) uint8, not {images.shape} {images.dtype}")
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(
            f"{channels} channels make no picture: write arrays with --npz, or give the --decoder"
            " of the latents"
        )
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    rows = math.ceil(count / columns)
    scale = max(1, _TILE // max(height, width))
    height, width = height * scale, width * scale
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    if size[0] * size[1] > _LARGEST_PICTURE:
        raise ValueError(
            f"{count} images make a picture of {size[0]}x{size[1]}, which is too large: write"
            " arrays with --npz"
        )
    grid = PILImage.new("L" if channels == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        tile = PILImage.fromarray(image[:, :, 0] if channels == 1 else image)
        place = i % columns * (width + _GAP), i // columns * (height + _GAP)
        grid.paste(tile.resize((width, height), PILImage.Resampling.NEAREST), place)
    return grid


def depth_steps_picture(
    cells: Sequence[Sequence[np.ndarray]],
    depths: Sequence[int],
    steps: Sequence[int],
    columns: int = 5,
) -> Image:
    """Figure 1 of the paper: `cells[row][column]`, each (N, H, W, C) uint8 images of one depth l
    (row) and number of steps T (column).

    A cell shows its images in `columns` columns. Raises ValueError for images that are neither grey
    nor RGB.
    """
    rows = [f"l = {depth}" for depth in depths]
    return labelled_grid(cells, rows, [f"T = {count}" for count in steps], columns)


def labelled_grid(
    cells: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    images_across: int = 5,
    *,
    upright: bool = False,
) -> Image:
    """One picture of `cells[row][column]`, each (N, H, W, C) uint8 images, with the names of rows
    (left) and columns (top).

    A cell shows its images `images_across` side by side. upright: names of rows are written from
    left to right, for rows that are lower than their names are long. Raises ValueError for images
    that are neither grey nor RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = [
        [image_grid(images, images_across).convert("RGB") for images in row] for row in cells
    ]
    width, height = pictures[0][0].size
    top, gap = max(48, height // 4), max(8, height // 20)
    font = ImageFont.load_default(size=top // 3)
    left = top if not upright else top // 3 + math.ceil(max(font.getlength(name) for name in rows))
    size = left + len(columns) * (width + gap), top + len(rows) * (height + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, text in enumerate(columns):
        middle = left + column * (width + gap) + width // 2
        draw.text((middle, top // 2), text, "black", font, anchor="mm")
    for row, text in enumerate(rows):
        above = top + row * (height + gap)
        if upright:
            draw.text((top // 6, above + height // 2), text, "black", font, anchor="lm")
        else:
            name = Image.new("RGB", (height, left), "white")
            ImageDraw.Draw(name).text((height // 2, left // 2), text, "black", font, anchor="mm")
            picture.paste(name.rotate(90, expand=True), (0, above))
        for column, cell in enumerate(pictures[row]):
            picture.paste(cell, (left + column * (width + gap), above))
    return picture
