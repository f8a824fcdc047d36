"""What the metrics say of real images: the numbers that a perfect model would come near."""

from __future__ import annotations

import numpy as np
import torch

from odelt_fast.evaluation.settings import Evaluation

_BATCH = 256


def measure_real(settings: Evaluation, seed: int = 0) -> dict[str, float]:
    """Of the real images of an evaluation, under its metrics' names.

    The distance of a random half to the other half, and the share that the feature network takes
    for their class; "images": how many there are. A half has fewer images than the evaluation
    compares, which makes the distance larger than that of two sets of its size.
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
    features, right = [], 0
    for first in range(0, len(source), _BATCH):
        pixels, labels = source.read_many(range(first, min(first + _BATCH, len(source))))
        found, logits = network(torch.from_numpy(pixels), settings.protocol)
        assert logits is not None
        features.append(found.numpy())
        right += int((logits.argmax(1).numpy() == labels).sum())
    rows = np.concatenate(features)[np.random.default_rng(seed).permutation(len(source))]
    first_half, second_half = (
        moments_of([half], network.dimensions).statistics() for half in np.array_split(rows, 2)
    )
    return {
        network.distance: frechet_distance(first_half, second_half),
        "recognised": right / len(source),
        "images": len(source),
    }
