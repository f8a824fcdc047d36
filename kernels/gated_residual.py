"""Gated residual, LayerNorm, modulate in one pass: x' = x + gate*y; h = LN(x')*(1 + scale) + shift.

x, y, x', h (B, N, D) in one dtype; gate comes from the packed row `gates` (B or 1, K), shift and
scale from `modulation` (B or 1, K'), which is the same tensor inside a block and the next block's
across a border. Arithmetic is float32; h is made from x' before it is rounded. Bytes: two reads and
two writes of (B, N, D). Kernel: residual_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .compile_case import CompileCase
from .norm_modulate import norm_modulate_reference
from .residual_rows import Columns, launch_residual, residual_kernel
from .rows import likes_first, row_cases


def gated_residual_reference(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, in the dtype of its inputs."""
    total = torch.addcmul(x, gates[:, None, gate_column : gate_column + x.shape[2]], y)
    return total, norm_modulate_reference(total, modulation, shift_column, scale_column)


@torch.library.custom_op("odelt_fast::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + gate*y, LN of that * (1 + scale) + shift).

    Args:
        x, y: (B, N, D) float16, bfloat16 or float32, of one dtype and any strides.
        gates: (B or 1, K), of which gate is D columns from gate_column on.
        modulation: (B or 1, K'), of which shift and scale are D columns each likewise.

    Returns:
        Two (B, N, D) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or D is above 8192.
    """
    columns = Columns(gates, gate_column, modulation, shift_column, scale_column)
    total, h = launch_residual(x, y, columns)
    return total, h


gated_residual.register_fake(likes_first(2))


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and network width, also to float8 and overlapped with the kernel before."""
    inner = {"xr": None, "vr": None, "steps": None, "out_vr": None, "GROUP_END": False}
    whole = {**inner, "scales": None}
    yield from row_cases("gated_residual/forward", residual_kernel, **whole)
    yield from row_cases("gated_residual/float8", residual_kernel, **inner)
    yield from row_cases("gated_residual/overlapped", residual_kernel, **whole, PDL=True)
