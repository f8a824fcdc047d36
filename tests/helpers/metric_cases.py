"""Features, logits, images and weights that the recordings of other libraries were made from
(record_metrics.py)."""

from __future__ import annotations

import numpy as np

from odelt_fast.evaluation.inception import InceptionV3


def features(name: str) -> np.ndarray:
    """(300, 12) float64: two overlapping distributions with some structure."""
    draw = np.random.default_rng({"real": 1, "generated": 2}[name])
    mixing = np.random.default_rng(3).normal(size=(12, 12)) / 3
    return draw.normal(size=(300, 12)) @ mixing + (0.3 if name == "generated" else 0)


def logits() -> np.ndarray:
    """(203, 7) float64: not a multiple of the number of splits."""
    return 3 * np.random.default_rng(4).normal(size=(203, 7))


def inception_input() -> np.ndarray:
    """(1, 3, 299, 299) uint8."""
    return np.random.default_rng(6).integers(0, 256, (1, 3, 299, 299), dtype=np.uint8)


def inception_weights() -> dict[str, np.ndarray]:
    """Random weights under the names of the FID network; variances are above 0, and activations
    neither vanish nor explode."""
    import torch

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    draw, weights = np.random.default_rng(7), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(("running_var", "bn.weight")):
            array = draw.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            array = draw.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            array = 0.1 * draw.normal(size=shape)
        weights[name] = array.astype(np.float32)
    return weights
