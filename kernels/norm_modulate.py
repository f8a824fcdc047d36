"""LayerNorm + modulate in one pass: y = LN(x)*(1 + scale) + shift, LN without affine parameters.

x (B, N, D); modulation (B or 1, K), packed, of which shift and scale are D columns each; y (B, N,
D) in x's dtype. Arithmetic is float32. Bytes: one read and one write of (B, N, D); backward two
reads and one write, and B*N/16 rows of float32 partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import launch_options, require_device, wait_for_inputs
from odelt_fast.kernels.rows import (
    BACKWARD_TOKENS,
    EPS,
    backward_rows,
    check_modulation,
    check_tokens,
    column_gradient,
    empty_rows,
    modulate,
    normalize,
    normalize_backward,
    row_cases,
    row_launch,
    row_stride,
    rows,
    store_rows,
    token_strides,
)


def norm_modulate_reference(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> Tensor:
    """The same in plain PyTorch, in the dtype of its inputs."""
    size = x.shape[2]
    shift, scale = (
        modulation[:, None, column : column + size] for column in (shift_column, scale_column)
    )
    return torch.addcmul(shift, F.layer_norm(x, (size,), eps=eps), 1 + scale)


@triton.jit
def _forward_kernel(
    x, modulation, out, scales, tokens, x_batch, x_token, modulation_row, shift_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    chunks = tl.cdiv(tokens, ROWS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = (tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    mask = (o_n < tokens)[:, None] & m_d[None, :]
    b_x = tl.load(
        x + i_b * x_batch + o_n.to(tl.int64)[:, None] * x_token + o_d[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    p_row = modulation + i_b * modulation_row
    b_shift = tl.load(p_row + shift_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(p_row + scale_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normalized, _ = normalize(b_x, m_d, eps, D)
    store_rows(
        out,
        scales,
        modulate(b_normalized, b_shift, b_scale),
        (i_b * tokens + o_n)[:, None],
        o_d,
        mask,
        D,
    )


@triton.jit
def _backward_kernel(
    grad, x, modulation, grad_x, sums, tokens, grad_batch, grad_token, x_batch, x_token, modulation_row, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(tokens, TOKENS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_scale = tl.load(
        modulation + i_b * modulation_row + scale_column + o_d, mask=m_d, other=0.0
    ).to(tl.float32)
    b_shift_sum = tl.zeros((BLOCK,), tl.float32)
    b_scale_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.minimum(TOKENS, tokens - first), ROWS):
        o_n = (first + start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_n < tokens)[:, None] & m_d[None, :]
        b_grad = tl.load(
            grad + i_b * grad_batch + o_n[:, None] * grad_token + o_d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        b_x = tl.load(
            x + i_b * x_batch + o_n[:, None] * x_token + o_d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        b_normalized, rstd = normalize(b_x, m_d, eps, D)
        b_shift_sum += tl.sum(b_grad, axis=0)
        b_scale_sum += tl.sum(b_grad * b_normalized, axis=0)
        b_grad_x = normalize_backward(b_grad * (1.0 + b_scale)[None, :], b_normalized, rstd, D)
        tl.store(
            grad_x + (i_b * tokens + o_n)[:, None] * D + o_d[None, :],
            b_grad_x.to(grad_x.dtype.element_ty),
            mask=mask,
        )
    p_sums = sums + tl.program_id(0).to(tl.int64) * 2 * D + o_d
    tl.store(p_sums, b_shift_sum, mask=m_d)
    tl.store(p_sums + D, b_scale_sum, mask=m_d)


def launch_forward(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float, float8: bool
) -> tuple[Tensor, Tensor | None]:
    """y (B, N, D) in x's dtype and None, or in float8 and its scales (B, N)."""
    check_tokens("x", x)
    check_modulation("modulation", modulation, x, shift_column, scale_column)
    require_device("norm_modulate", x, modulation)
    x, modulation = rows(x), rows(modulation)
    batch, tokens, size = x.shape
    launch = row_launch(size)
    out, scales = empty_rows(x, float8)
    if out.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * triton.cdiv(tokens, launch.rows),)](
                x, modulation, out, scales, tokens, *token_strides(x), row_stride(modulation), shift_column, scale_column, eps,
                D=size, BLOCK=launch.block, ROWS=launch.rows, **launch_options(x.device, launch.warps),
            )  # fmt: skip
    return out, scales


@torch.library.custom_op("odelt_fast::norm_modulate", mutates_args=())
def norm_modulate(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> Tensor:
    """LN(x)*(1 + scale) + shift: x (B, N, D) float16, bfloat16 or float32 -> (B, N, D) in x's
    dtype, contiguous; differentiable.

    modulation (B or 1, K): shift is its columns shift_column .. + D, scale those from scale_column
    on. Any strides; a tensor whose last dimension is not contiguous is copied first. Raises
    ValueError for shapes, dtypes and devices that do not fit, and for D above 8192.
    """
    return launch_forward(x, modulation, shift_column, scale_column, eps, float8=False)[0]


@norm_modulate.register_fake
def _(
    x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::norm_modulate_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, N, D) and of modulation (B or 1, K; zero outside shift and scale) from
    that of the output."""
    check_tokens("grad", grad, like=x)
    require_device("norm_modulate", grad, x, modulation)
    grad, x, modulation = rows(grad), rows(x), rows(modulation)
    batch, tokens, size = x.shape
    launch = row_launch(size)
    grad_x = torch.empty((batch, tokens, size), dtype=x.dtype, device=x.device)
    chunks = triton.cdiv(tokens, BACKWARD_TOKENS)
    sums = torch.empty((batch, chunks, 2, size), dtype=torch.float32, device=x.device)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(batch * chunks,)](
                grad, x, modulation, grad_x, sums, tokens, *token_strides(grad), *token_strides(x),
                row_stride(modulation), scale_column, eps,
                D=size, BLOCK=launch.block, ROWS=backward_rows(launch, x.dtype), TOKENS=BACKWARD_TOKENS, num_warps=launch.warps,
            )  # fmt: skip
    return grad_x, column_gradient(modulation, sums, (shift_column, scale_column))


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, modulation: Tensor, shift_column: int, scale_column: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), modulation.new_empty(modulation.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, modulation, *ctx.arguments = inputs
    ctx.save_for_backward(x, modulation)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None


norm_modulate.register_autograd(_gradients, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Forward, also to float8, and backward for every dtype and network width."""
    yield from row_cases("norm_modulate/forward", _forward_kernel, ("scales",))
    yield from row_cases("norm_modulate/float8", _forward_kernel, float8=True)
    yield from row_cases("norm_modulate/overlapped", _forward_kernel, ("scales",), pdl=True)
    yield from row_cases("norm_modulate/backward", _backward_kernel)
