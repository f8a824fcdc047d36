"""The InceptionV3 of FID: TensorFlow's network of 2015-12-05, as pytorch-fid and torch-fidelity
carry its weights.

torchvision's names and shapes, with three differences of the graph that FID was defined with:
average pools leave the padding out of the mean, the last block pools by maximum, and the head has
1008 classes. Input (B, 3, 299, 299) in [-1, 1], output the 2048 means of the last block and the
logits without bias, from which the inception score is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMENSIONS, CLASSES = 2048, 1008
Size = int | tuple[int, int]
Convolutions = Sequence[Any]  # each (channels, size, further arguments of _Convolution)
_ROW, _COLUMN = (1, 7), (7, 1)
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


class _Convolution(nn.Module):
    """Convolution without bias, batch norm (eps 0.001), ReLU; padded to keep the size where
    `same`."""

    def __init__(
        self, inputs: int, outputs: int, size: Size = 1, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        kernel = (size, size) if isinstance(size, int) else size
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean_of_neighbours(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _Block(nn.Module):
    """Chains of convolutions side by side, and a pooled branch: (B, inputs, H, W) -> (B, C, H', W')
    of what they all give.

    branches: name -> its chain, whose modules are called NAME if it is one, else NAME_1, NAME_2 ...
    A last entry of two convolutions in brackets is a fork into NAME_ia and NAME_ib. pooled:
    channels of a convolution after the pool (0: none, and the pool halves the size). by_maximum:
    how it pools.
    """

    def __init__(
        self,
        inputs: int,
        branches: dict[str, Convolutions],
        pooled: int = 0,
        by_maximum: bool = False,
    ) -> None:
        super().__init__()
        self.by_maximum, self.halves = by_maximum, not pooled
        self.chains: list[list[list[str]]] = []
        for name, chain in branches.items():
            width, steps = inputs, []
            for place, each in enumerate(chain, 1):
                fork = each if isinstance(each, list) else [each]
                names = [f"{name}_{place}{side}" for side in ("ab" if len(fork) > 1 else [""])]
                names = [name] if len(chain) == 1 else names
                for key, arguments in zip(names, fork):
                    self.add_module(key, _Convolution(width, *arguments))
                steps.append(names)
                width = fork[0][0]
            self.chains.append(steps)
        if pooled:
            self.branch_pool = _Convolution(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for steps in self.chains:
            each = x
            for names in steps:
                outs = [getattr(self, name)(each) for name in names]
                each = outs[0]
            parts += outs
        if self.halves:
            parts.append(F.max_pool2d(x, 3, 2))
        else:
            near = F.max_pool2d(x, 3, 1, 1) if self.by_maximum else _mean_of_neighbours(x)
            parts.append(self.branch_pool(near))
        return torch.cat(parts, 1)


def _a(inputs: int, pooled: int) -> _Block:
    double = [(64,), (96, 3), (96, 3)]
    five = [(48,), (64, 5)]
    return _Block(inputs, {"branch1x1": [(64,)], "branch5x5": five, "branch3x3dbl": double}, pooled)


def _b(inputs: int) -> _Block:
    double = [(64,), (96, 3), (96, 3, 2, False)]
    return _Block(inputs, {"branch3x3": [(384, 3, 2, False)], "branch3x3dbl": double})


def _c(inputs: int, width: int) -> _Block:
    single = [(width,), (width, _ROW), (192, _COLUMN)]
    double = [(width,), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)]
    branches: dict[str, Convolutions] = {
        "branch1x1": [(192,)],
        "branch7x7": single,
        "branch7x7dbl": double,
    }
    return _Block(inputs, branches, 192)


def _d(inputs: int) -> _Block:
    seven = [(192,), (192, _ROW), (192, _COLUMN), (192, 3, 2, False)]
    return _Block(inputs, {"branch3x3": [(192,), (320, 3, 2, False)], "branch7x7x3": seven})


def _e(inputs: int, by_maximum: bool) -> _Block:
    fork = [(384, (1, 3)), (384, (3, 1))]
    branches: dict[str, Convolutions] = {
        "branch1x1": [(320,)],
        "branch3x3": [(384,), fork],
        "branch3x3dbl": [(448,), (384, 3), fork],
    }
    return _Block(inputs, branches, 192, by_maximum)


class InceptionV3(nn.Module):
    """x (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), logits without bias (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, same=False)
        blocks = [
            *(_a(192, 32), _a(256, 64), _a(288, 64), _b(288)),
            *(_c(768, width) for width in (128, 160, 160, 192)),
            *(_d(768), _e(1280, False), _e(2048, True)),
        ]
        for name, block in zip(_MIXED, blocks, strict=True):
            self.add_module(f"Mixed_{name}", block)
        self.fc = nn.Linear(DIMENSIONS, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in _MIXED:
            x = getattr(self, f"Mixed_{name}")(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
