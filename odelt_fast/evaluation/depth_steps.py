"""Images over the two dials, as in Figure 1 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from odelt_fast.model import DiT
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler


def sample_depths_by_steps(
    model: DiT,
    depths: Sequence[int],
    steps: Sequence[int],
    num_images: int,
    *,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
) -> list[list[np.ndarray]]:
    """Images for every depth l (rows) and number of steps T (columns), of the same noise.

    Args:
        model: what is sampled, with Euler's steps.
        depths: of the rows.
        steps: of the columns.
        num_images: of each cell.
        labels: the same in each cell, in turn; None counts through the classes.
        seed: of the noise.
        guidance_scale: w, as for `Sampler`.

    Returns:
        Arrays (N, H, W, C) uint8.

    Raises:
        ValueError: for what `Sampler` refuses, before anything is drawn.
    """
    if labels is None and model.config.num_classes > 1:
        labels = [index % model.config.num_classes for index in range(num_images)]
    samplers = [
        [Sampler(model, depth, count, guidance_scale=guidance_scale) for count in steps]
        for depth in depths
    ]
    return [[to_uint8(sampler(num_images, labels, seed)) for sampler in row] for row in samplers]
