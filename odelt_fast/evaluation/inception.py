"""The InceptionV3 of FID: TensorFlow's network of 2015-12-05, with torchvision's names and shapes.

pytorch-fid and torch-fidelity carry its weights. Three differences of the graph that FID was
defined with: average pools leave the padding out of the mean, the last block pools by maximum, and
the head has 1008 classes. Input (B, 3, 299, 299) in [-1, 1], output the 2048 means of the last
block and the logits without bias, from which the inception score is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMENSIONS, CLASSES = 2048, 1008
# Chains of convolutions side by side, by name. A convolution: (outputs, size, stride, padding), and
# at the end of a chain a fork into two of them, in a list.
Chains = Mapping[str, Sequence[Any]]
_ROW, _COLUMN, _HALVED = (1, 7), (7, 1), (3, 2, "valid")

_A: Chains = {
    "branch1x1": [(64,)],
    "branch5x5": [(48,), (64, 5)],
    "branch3x3dbl": [(64,), (96, 3), (96, 3)],
}
_B: Chains = {
    "branch3x3": [(384, *_HALVED)],
    "branch3x3dbl": [(64,), (96, 3), (96, *_HALVED)],
}
_D: Chains = {
    "branch3x3": [(192,), (320, *_HALVED)],
    "branch7x7x3": [(192,), (192, _ROW), (192, _COLUMN), (192, *_HALVED)],
}
_FORK = [(384, (1, 3)), (384, (3, 1))]
_E: Chains = {
    "branch1x1": [(320,)],
    "branch3x3": [(384,), _FORK],
    "branch3x3dbl": [(448,), (384, 3), _FORK],
}


def _c(width: int) -> Chains:
    double = [(width,), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)]
    single = [(width,), (width, _ROW), (192, _COLUMN)]
    return {"branch1x1": [(192,)], "branch7x7": single, "branch7x7dbl": double}


_halve = partial(F.max_pool2d, kernel_size=3, stride=2)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)

_STEM = {  # None: a pool
    "Conv2d_1a_3x3": (32, *_HALVED),
    "Conv2d_2a_3x3": (32, 3, 1, "valid"),
    "Conv2d_2b_3x3": (64, 3),
    "pool1": None,
    "Conv2d_3b_1x1": (80,),
    "Conv2d_4a_3x3": (192, 3, 1, "valid"),
    "pool2": None,
}
_BLOCKS: Mapping[str, tuple[Any, ...]] = {  # name -> chains, pool, outputs of its convolution
    "Mixed_5b": (_A, _mean, 32),
    "Mixed_5c": (_A, _mean, 64),
    "Mixed_5d": (_A, _mean, 64),
    "Mixed_6a": (_B, _halve),
    "Mixed_6b": (_c(128), _mean, 192),
    "Mixed_6c": (_c(160), _mean, 192),
    "Mixed_6d": (_c(160), _mean, 192),
    "Mixed_6e": (_c(192), _mean, 192),
    "Mixed_7a": (_D, _halve),
    "Mixed_7b": (_E, _mean, 192),
    "Mixed_7c": (_E, _maximum, 192),
}


def _convolution(
    inputs: int, outputs: int, size: Any = 1, stride: int = 1, padding: str = "same"
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    norm = nn.BatchNorm2d(outputs, eps=0.001)
    return nn.Sequential(OrderedDict(conv=convolution, bn=norm, relu=nn.ReLU()))


class _Block(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H', W'): what its chains and its pool give, side by side.

    The modules of a chain are called NAME if it is one, else NAME_1, NAME_2 ..., those of a fork
    NAME_ia and NAME_ib. pooled: outputs of a convolution after the pool (0: none).
    """

    def __init__(
        self, inputs: int, chains: Chains, pool: Callable[[Tensor], Tensor], pooled: int = 0
    ) -> None:
        super().__init__()
        self.pool, self.chains, self.outputs = pool, list[Any](), pooled or inputs
        for name, chain in chains.items():
            width, steps = inputs, []
            for place, step in enumerate(chain, 1):
                fork = step if isinstance(step, list) else [step]
                steps.append([_convolution(width, *arguments) for arguments in fork])
                for side, module in zip("ab" if len(fork) > 1 else [""], steps[-1]):
                    self.add_module(f"{name}_{place}{side}" if len(chain) > 1 else name, module)
                width = fork[0][0]
            self.chains.append(steps)
            self.outputs += width * len(fork)
        self.branch_pool = _convolution(inputs, pooled) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for chain in self.chains:
            outs = [x]
            for fork in chain:
                outs = [module(outs[0]) for module in fork]
            parts += outs
        return torch.cat([*parts, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """x (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), logits without bias (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, arguments in _STEM.items():
            if arguments:
                self.add_module(name, _convolution(channels, *arguments))
                channels = arguments[0]
            else:
                self.add_module(name, nn.MaxPool2d(3, 2))
        for name, arguments in _BLOCKS.items():
            block = _Block(channels, *arguments)
            self.add_module(name, block)
            channels = block.outputs
        self.fc = nn.Linear(DIMENSIONS, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for name in (*_STEM, *_BLOCKS):
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
