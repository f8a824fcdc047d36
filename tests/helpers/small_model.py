"""The small model of random weights that several test files sample from."""

from __future__ import annotations

import torch

from odelt_fast import DiT, DiTConfig

SMALL = {
    "image_size": 8,
    "channels": 1,
    "hidden_size": 32,
    "depth": 4,
    "depth_min": 2,
    "depth_group": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def random_model(std: float = 0.1, **changes: object) -> DiT:
    """A model in which every weight matters: none is zero."""
    model = DiT(DiTConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()
