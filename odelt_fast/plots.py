"""Pictures of a model over its two dials: the paper's grid of l (rows) by T (columns)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from odelt_fast.model import DiT


def depth_steps_grid(
    model: DiT,
    depths: Sequence[int] | None = None,
    steps: Sequence[int] = (128, 4, 1),
    *,
    labels: int | Sequence[int] | None = None,
    num_images: int = 10,
    columns: int = 5,
    seed: int = 0,
    guidance_scale: float | None = None,
) -> Image:
    """Figure 1 of the paper: one cell per depth l (rows, longest first) and number of steps T (columns), same noise and labels in all.

    A cell shows `num_images` images in `columns` columns; labels None counts through the classes. Raises ValueError for a depth that the
    model does not have, and for images that are neither grey nor RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    from odelt_fast.sampler import Sampler, image_grid, to_uint8

    if labels is None and model.config.num_classes > 1:
        labels = [index % model.config.num_classes for index in range(num_images)]
    rows = sorted(depths or model.config.depths, reverse=True)
    cells = []
    for depth in rows:
        for count in steps:
            sampler = Sampler(model, depth=depth, steps=count, guidance_scale=guidance_scale)
            cells.append(image_grid(to_uint8(sampler(num_images=num_images, labels=labels, seed=seed)), columns=columns).convert("RGB"))
    width, height = cells[0].size
    margin, gap = max(48, height // 4), max(8, height // 20)
    font = ImageFont.load_default(size=margin // 3)
    picture = Image.new("RGB", (margin + len(steps) * (width + gap), margin + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for column, count in enumerate(steps):
        draw.text((margin + column * (width + gap) + width // 2, margin // 2), f"T = {count}", "black", font, anchor="mm")
    for row, depth in enumerate(rows):
        text = Image.new("RGB", (height, margin), "white")
        ImageDraw.Draw(text).text((height // 2, margin // 2), f"l = {depth}", "black", font, anchor="mm")
        picture.paste(text.rotate(90, expand=True), (0, margin + row * (height + gap)))
        for column in range(len(steps)):
            picture.paste(cells[row * len(steps) + column], (margin + column * (width + gap), margin + row * (height + gap)))
    return picture
