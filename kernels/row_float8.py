"""The row kernels with float8 results, for float8 products: h is quantised row by row in the kernel
that makes it, from float32.

q (B, N, D) float8 e4m3 and scales (B, N) float32 take the place of h in norm_modulate,
gated_residual and group_end: h ~ q * scales, scales = max|h| / 448 of each row (quantize.py). Saves
the write and read of h in 16 bits. Sampling only: not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from odelt_fast.kernels import gated_residual, norm_modulate
from odelt_fast.kernels.group_end import check_steps
from odelt_fast.kernels.quantize import FP8
from odelt_fast.kernels.rows import EPS


@torch.library.custom_op("odelt_fast::norm_modulate_float8", mutates_args=())
def norm_modulate_float8(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(q, scales) of norm_modulate's result; arguments and errors as there."""
    return norm_modulate.launch_forward(x, modulation, shift_column, scale_column, eps, float8=True)  # type: ignore[return-value]


@norm_modulate_float8.register_fake
def _(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("odelt_fast::gated_residual_float8", mutates_args=())
def gated_residual_float8(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    gate_column: int,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', q, scales): gated_residual's sum, and its normalised result in float8; arguments and
    errors as there."""
    total, _, q, scales = gated_residual.launch_forward(
        x,
        y,
        None,
        None,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        None,
        eps,
        group_end=False,
        float8=True,
    )
    return total, q, scales


@gated_residual_float8.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    gate_column: int,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=FP8),
        x.new_empty(x.shape[:2], dtype=torch.float32),
    )


@torch.library.custom_op("odelt_fast::group_end_float8", mutates_args=())
def group_end_float8(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', q, scales): group_end's sums, and its normalised result in float8; arguments and
    errors as there."""
    check_steps(steps, x)
    return gated_residual.launch_forward(
        x,
        y,
        xr,
        vr,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        steps,
        eps,
        group_end=True,
        float8=True,
    )


@group_end_float8.register_fake
def _(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, scales = x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), q, scales
