"""The InceptionV3 of FID: TensorFlow's network of 2015-12-05, as pytorch-fid and torch-fidelity
carry its weights.

torchvision's names and shapes, with three differences of the graph that FID was defined with:
average pools leave the padding out of the mean, the last block pools by maximum, and the head has
1008 classes. Input (B, 3, 299, 299) in [-1, 1], output the 2048 means of the last block and the
logits without bias, from which the inception score is computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMENSIONS, CLASSES = 2048, 1008
Size = int | tuple[int, int]


class _Conv(nn.Module):
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


def _chain(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _A(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = (
            _Conv(inputs, 64),
            _Conv(64, 96, 3),
            _Conv(96, 96, 3),
        )
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        return torch.cat(
            [self.branch1x1(x), five, double, self.branch_pool(_mean_of_neighbours(x))], 1
        )


class _B(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2, same=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1, self.branch7x7_2 = _Conv(inputs, width), _Conv(width, width, row)
        self.branch7x7_3 = _Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(inputs, width), _Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = (
            _Conv(width, width, row),
            _Conv(width, width, column),
        )
        self.branch7x7dbl_5 = _Conv(width, 192, row)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _chain(x, *(getattr(self, f"branch7x7dbl_{i}") for i in range(1, 6)))
        return torch.cat(
            [self.branch1x1(x), single, double, self.branch_pool(_mean_of_neighbours(x))], 1
        )


class _D(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(inputs, 192), _Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(inputs, 192), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = (
            _Conv(192, 192, (7, 1)),
            _Conv(192, 192, 3, 2, same=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        seven = _chain(
            x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4
        )
        return torch.cat(
            [_chain(x, self.branch3x3_1, self.branch3x3_2), seven, F.max_pool2d(x, 3, 2)], 1
        )


class _E(nn.Module):
    def __init__(self, inputs: int, by_maximum: bool) -> None:
        super().__init__()
        self.by_maximum = by_maximum
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = (
            _Conv(inputs, 384),
            _Conv(384, 384, (1, 3)),
            _Conv(384, 384, (3, 1)),
        )
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = (
            _Conv(384, 384, (1, 3)),
            _Conv(384, 384, (3, 1)),
        )
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.by_maximum else _mean_of_neighbours(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        return torch.cat(
            [
                *parts,
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class InceptionV3(nn.Module):
    """x (B, 3, 299, 299) in [-1, 1] -> features (B, 2048), logits without bias (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = _Conv(32, 32, 3, same=False), _Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80), _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _C(768, 128),
            _C(768, 160),
            _C(768, 160),
            _C(768, 192),
        )
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _D(768), _E(1280, False), _E(2048, True)
        self.fc = nn.Linear(DIMENSIONS, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(
            _chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3), 3, 2
        )
        x = F.max_pool2d(_chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3), 3, 2)
        mixed = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
        features = _chain(x, *(getattr(self, f"Mixed_{name}") for name in mixed)).mean((2, 3))
        return features, features @ self.fc.weight.T
