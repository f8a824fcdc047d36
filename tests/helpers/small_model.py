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


def latent_model(image_size: int = 4) -> DiT:
    """A small model of latents with four channels and three classes, freshly initialised but for
    its last projection, so that it moves what it is given."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 2, "depth_min": 1, "depth_group": 1, "num_heads": 2}
    model = DiT(DiTConfig(image_size=image_size, channels=4, num_classes=3, **sizes))
    torch.nn.init.normal_(model.final_layer.out.weight)
    return model
