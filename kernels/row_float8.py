"""The row operators with float8 results, for float8 products: h is quantised row by row.

q (B, N, D) float8 e4m3 and scales (B, N) float32 take the place of h in norm_modulate,
gated_residual and group_end: h ~ q * scales, scales = max|h| / 448 of each row (quantize.py), made
from float32 by the kernel that makes h. Saves the write and read of h in 16 bits. Arguments and
errors are those of the operators of the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gated_residual import gated_residual_reference
from .group_end import group_end_reference
from .norm_modulate import launch_norm, norm_modulate_reference
from .quantize import FP8, quantize_rows_reference
from .residual_rows import Columns, GroupEnd, launch_residual
from .rows import like_first


def norm_modulate_float8_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    return quantize_rows_reference(norm_modulate_reference(*arguments))


def gated_residual_float8_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    total, h = gated_residual_reference(*arguments)
    return total, *quantize_rows_reference(h)


def group_end_float8_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    xr, vr, h = group_end_reference(*arguments)
    return xr, vr, *quantize_rows_reference(h)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("odelt_fast::norm_modulate_float8", mutates_args=())
def norm_modulate_float8(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int
) -> tuple[Tensor, Tensor]:
    """(q, scales) of norm_modulate's result."""
    q, scales = launch_norm(x, modulation, shift_column, scale_column, float8=True)
    assert scales is not None
    return q, scales


norm_modulate_float8.register_fake(_fake)


@torch.library.custom_op("odelt_fast::gated_residual_float8", mutates_args=())
def gated_residual_float8(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', q, scales): gated_residual's sum, and its normalised result in float8."""
    columns = Columns(gates, gate_column, modulation, shift_column, scale_column)
    total, q, scales = launch_residual(x, y, columns, float8=True)
    return total, q, scales


gated_residual_float8.register_fake(lambda x, *_: (like_first(x), *_fake(x)))


@torch.library.custom_op("odelt_fast::group_end_float8", mutates_args=())
def group_end_float8(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int, steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', q, scales): group_end's sums, and its normalised result in float8."""
    columns = Columns(gates, gate_column, modulation, shift_column, scale_column)
    xr, out_vr, q, scales = launch_residual(x, y, columns, GroupEnd(xr, vr, steps), float8=True)
    return xr, out_vr, q, scales


group_end_float8.register_fake(lambda x, *_: (like_first(x), like_first(x), *_fake(x)))
