"""Small classifiers whose features compare small images: their definition and their files.

benchmarks/reproduce/train_features.py trains them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from odelt_fast.checkpoints.errors import refusals
from odelt_fast.checks import text, whole

_KEY = "odelt_fast_features"  # of the safetensors header


@dataclass(frozen=True)
class SmallConfig:
    """A small classifier: 3x3 residual stages of `widths` channels, halved between.

    The features are the means of the last stage; the first convolution has the stride `stride`.
    """

    name: str
    image_size: int
    channels: int
    widths: tuple[int, ...]
    num_classes: int
    stride: int = 1

    def __post_init__(self) -> None:
        sizes = (self.image_size, self.channels, *self.widths, self.num_classes, self.stride)
        for size in sizes:
            whole("a size of a feature network", size, 1, 4096)
        name = text("the name of a feature network", self.name, 64)
        if not name.endswith("-features") or not 1 <= len(self.widths) <= 8:
            raise ValueError(
                "a feature network has a name that ends in -features and 1 to 8 widths, not"
                f" {name} and {len(self.widths)}"
            )


class SmallNetwork(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> features (B, widths[-1]) and logits (B, num_classes)."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _convolution(config.channels, config.widths[0], config.stride)
        widths = config.widths
        self.stages = nn.ModuleList(map(_Stage, (widths[0], *widths[:-1]), widths))
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
        features = x.mean((2, 3))
        return features, self.head(features)


class _Stage(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(channels, width), _convolution(width, width)
        same = channels == width
        self.skip = nn.Identity() if same else nn.Conv2d(channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


def _convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def save_features(network: SmallNetwork, path: Path, notes: Mapping[str, str]) -> None:
    """Writes a small network as .safetensors in float16.

    Its configuration and `notes` (strings) stand in the header.
    """
    kept = {name: tensor.half().contiguous() for name, tensor in weights_of(network).items()}
    save_file(kept, path, {**notes, _KEY: json.dumps(asdict(network.config))})
    path.chmod(0o644)  # the writer of safetensors leaves files that only their owner can read


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that files have of a feature network: counts of batches are left out."""
    state = network.state_dict().items()
    return {name: tensor for name, tensor in state if not name.endswith("num_batches_tracked")}


def is_small(path: Path) -> bool:
    """Whether a .safetensors file is that of a small network."""
    with refusals(path), safe_open(path, "pt") as file:
        return _KEY in (file.metadata() or {})


def read_configuration(path: Path) -> SmallConfig:
    """The configuration in a small network's file. ValueError for other files."""
    with refusals(path):
        with safe_open(path, "pt") as file:
            values: Any = json.loads((file.metadata() or {}).get(_KEY, "null"))
        if not isinstance(values, dict) or not isinstance(values.get("widths"), list):
            raise ValueError("is not a feature network: its header has no configuration")
        return SmallConfig(**{**values, "widths": tuple(values["widths"])})
