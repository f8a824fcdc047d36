"""What the metrics say of real images: the numbers that a perfect model would come near.

python -m benchmarks.study.real --model mnist --data mnist-10k.parquet --num-images 1797
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from odelt_fast.evaluation.settings import Evaluation

_BATCH = 256


@dataclass(frozen=True)
class Options:
    model: str
    """Folder, bundled name or Hub id: gives the size of images."""
    data: str
    """Real images, as of odelt-fast evaluate."""
    num_images: int | None = None
    """How many are compared with the others; half of them by default."""
    seed: int = 0
    """Of the choice."""


def measure_real(
    settings: Evaluation, seed: int = 0, num_images: int | None = None
) -> dict[str, float]:
    """Of the real images of an evaluation, under its metrics' names.

    The distance of a random `num_images` of them (None: half) to the others, and the share that the
    feature network takes for their class; "images": how many there are. A half of a small set has
    fewer images than the evaluation compares, which makes the distance larger than that of two sets
    of its size.

    Raises:
        ValueError: if fewer than two images are compared, or are left.
    """
    from odelt_fast.checkpoints.folder import load_model
    from odelt_fast.evaluation.features import bundled_for, load_features
    from odelt_fast.evaluation.metrics import frechet_distance, moments_of
    from odelt_fast.images import open_source

    config = load_model(settings.model, "cpu", depth=min(settings.depths, default=None)).config
    network = load_features(
        bundled_for(config.channels, config.image_size) or "inception", torch.device("cpu")
    )
    assert settings.data is not None
    source = open_source(
        settings.data, image_size=config.image_size, channels=config.channels, split=settings.split
    )
    chosen = (len(source) + 1) // 2 if num_images is None else num_images
    if not 2 <= chosen <= len(source) - 2:
        raise ValueError(f"num_images must be from 2 to {len(source) - 2}, not {chosen}")
    features, right = [], 0
    for first in range(0, len(source), _BATCH):
        pixels, labels = source.read_many(range(first, min(first + _BATCH, len(source))))
        found, logits = network(torch.from_numpy(pixels), settings.protocol)
        assert logits is not None
        features.append(found.numpy())
        right += int((logits.argmax(1).numpy() == labels).sum())
    rows = np.concatenate(features)[np.random.default_rng(seed).permutation(len(source))]
    some, others = (
        moments_of([part], network.dimensions).statistics()
        for part in (rows[:chosen], rows[chosen:])
    )
    return {
        network.distance: frechet_distance(some, others),
        "recognised": right / len(source),
        "images": len(source),
    }


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    try:
        settings = Evaluation(options.model, options.data)
        print(json.dumps(measure_real(settings, options.seed, options.num_images), indent=1))
    except ValueError as mistake:
        raise SystemExit(f"error: {mistake}") from None
