"""A model over its two dials, the number of active blocks l and of time steps T."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from odelt_fast.model import DiT
from odelt_fast.plots import to_uint8
from odelt_fast.sampler import Sampler


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
    """Images (N, H, W, C) uint8 for every depth l (rows) and number of steps T (columns), from the same noise and labels.

    labels None counts through the classes. Raises ValueError for what `Sampler` refuses.
    """
    if labels is None and model.config.num_classes > 1:
        labels = [index % model.config.num_classes for index in range(num_images)]
    samplers = [[Sampler(model, depth, count, guidance_scale=guidance_scale) for count in steps] for depth in depths]  # refuses first
    return [[to_uint8(sampler(num_images, labels, seed)) for sampler in row] for row in samplers]
