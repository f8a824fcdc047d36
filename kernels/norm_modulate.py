"""LayerNorm + modulate in one pass: y = LN(x)*(1 + scale) + shift, LN without affine parameters.

x (B, N, D); modulation (B or 1, K), packed, of which shift and scale are D columns each; y (B, N,
D) in x's dtype. Arithmetic is float32. Bytes: one read and one write of (B, N, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS

from .compile_case import CompileCase
from .device import launch_options, require_device, wait_for_inputs
from .rows import (
    check_modulation,
    check_tokens,
    empty_rows,
    like_first,
    load_columns,
    load_rows,
    modulate,
    normalize,
    row_cases,
    row_launch,
    row_stride,
    rows,
    store_rows,
    token_strides,
)


def norm_modulate_reference(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int
) -> Tensor:
    """The same in plain PyTorch, in the dtype of its inputs."""
    size = x.shape[2]
    shift, scale = (
        modulation[:, None, column : column + size] for column in (shift_column, scale_column)
    )
    return torch.addcmul(shift, F.layer_norm(x, (size,), eps=LAYER_NORM_EPS), 1 + scale)


@triton.jit
def _forward_kernel(
    x, modulation, out, scales, tokens,
    x_batch, x_token, modulation_row, shift_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks of ROWS tokens,)."""
    wait_for_inputs(PDL)
    chunks = tl.cdiv(tokens, ROWS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    mask = (o_n < tokens)[:, None] & m_d[None, :]
    b_x = load_rows(x, i_b, o_n.to(tl.int64)[:, None], o_d, mask, x_batch, x_token)
    b_shift = load_columns(modulation, i_b, modulation_row, shift_column, o_d, m_d)
    b_scale = load_columns(modulation, i_b, modulation_row, scale_column, o_d, m_d)
    b_h = modulate(normalize(b_x, m_d, eps, D), b_shift, b_scale)
    store_rows(out, scales, b_h, (i_b * tokens + o_n)[:, None], o_d, mask, D)


def launch_norm(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, float8: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y (B, N, D) in x's dtype and None, or in float8 and its scales (B, N)."""
    check_tokens("x", x)
    check_modulation("modulation", modulation, x, shift_column, scale_column)
    require_device("norm_modulate", x, modulation)
    x, modulation = rows(x), rows(modulation)
    batch, tokens, size = x.shape
    blocks, warps = row_launch(size)
    out, scales = empty_rows(x, float8)
    if out.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * triton.cdiv(tokens, blocks["ROWS"]),)](
                x, modulation, out, scales, tokens,
                *token_strides(x), row_stride(modulation), shift_column, scale_column,
                LAYER_NORM_EPS, **blocks, **launch_options(x.device, warps),
            )  # fmt: skip
    return out, scales


@torch.library.custom_op("odelt_fast::norm_modulate", mutates_args=())
def norm_modulate(x: Tensor, modulation: Tensor, shift_column: int, scale_column: int) -> Tensor:
    """LN(x)*(1 + scale) + shift.

    Args:
        x: (B, N, D) float16, bfloat16 or float32, any strides.
        modulation: (B or 1, K) in any of these dtypes, last dimension contiguous or copied.
        shift_column, scale_column: first of the D columns of each.

    Returns:
        (B, N, D) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or D is above 8192.
    """
    return launch_norm(x, modulation, shift_column, scale_column)[0]


norm_modulate.register_fake(like_first)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and network width, also to float8 and overlapped with the kernel before."""
    yield from row_cases("norm_modulate/forward", _forward_kernel, scales=None)
    yield from row_cases("norm_modulate/float8", _forward_kernel)
    yield from row_cases("norm_modulate/overlapped", _forward_kernel, scales=None, PDL=True)
