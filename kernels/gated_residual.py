"""Gated residual, then LayerNorm + modulate of the sum, in one pass: x' = x + gate*y; h = LN(x')*(1 + scale) + shift.

x, y, x', h (B, N, D) in one dtype; gate comes from the packed row `gates` (B or 1, K), shift and scale from `modulation` (B or 1, K'),
which is the same tensor inside a block and the next block's across a border. Arithmetic is float32; h is made from x' before it is rounded.
Bytes: two reads and two writes of (B, N, D); backward four reads and two writes. With GROUP_END the kernels do what group_end.py says.
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
from odelt_fast.kernels.device import require_device
from odelt_fast.kernels.rows import (
    BACKWARD_TOKENS,
    EPS,
    check_modulation,
    check_tokens,
    column_gradient,
    empty_rows,
    normalize,
    normalize_backward,
    row_cases,
    row_launch,
    row_stride,
    rows,
    store_rows,
    token_strides,
)


def gated_residual_reference(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of its inputs."""
    size = x.shape[2]
    total = torch.addcmul(x, gates[:, None, gate_column : gate_column + size], y)
    shift, scale = (modulation[:, None, column : column + size] for column in (shift_column, scale_column))
    return total, torch.addcmul(shift, F.layer_norm(total, (size,), eps=eps), 1 + scale)


@triton.jit
def forward_kernel(
    x, y, xr, vr, gates, modulation, steps, out_x, out_vr, out, scales, tokens,
    x_batch, x_token, y_batch, y_token, xr_batch, xr_token, vr_batch, vr_token, gate_row, modulation_row, step_row,
    gate_column, shift_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP_END: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(tokens, ROWS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = ((tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    mask = (o_n < tokens) & m_d[None, :]
    o_row = i_b * tokens + o_n
    o_out = o_row * D + o_d[None, :]
    b_x = tl.load(x + i_b * x_batch + o_n * x_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(y + i_b * y_batch + o_n * y_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(gates + i_b * gate_row + gate_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_base = b_x + b_gate[None, :] * b_y
    if GROUP_END:
        b_velocity = b_base
        if steps is not None:
            b_velocity *= tl.load(steps + i_b * step_row)
        b_vr = b_velocity
        if vr is not None:
            b_vr += tl.load(vr + i_b * vr_batch + o_n * vr_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_vr + o_out, b_vr.to(out_vr.dtype.element_ty), mask=mask)
        b_base = b_vr
        if xr is not None:
            b_xr = tl.load(xr + i_b * xr_batch + o_n * xr_token + o_d[None, :], mask=mask, other=0.0)
            b_base = b_xr.to(tl.float32) + b_velocity
    if out_x is not None:
        tl.store(out_x + o_out, b_base.to(out_x.dtype.element_ty), mask=mask)
    p_row = modulation + i_b * modulation_row
    b_shift = tl.load(p_row + shift_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(p_row + scale_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_normalized, _ = normalize(b_base, m_d, eps, D)
    b_h = b_normalized * (1.0 + b_scale)[None, :] + b_shift[None, :]
    store_rows(out, scales, b_h, o_row, o_d, mask, D)


@triton.jit
def backward_kernel(
    grad_base, grad_vr, grad_h, base, y, gates, modulation, steps, out_base, out_x, out_y, sums, tokens,
    grad_base_batch, grad_base_token, grad_vr_batch, grad_vr_token, grad_h_batch, grad_h_token, base_batch, base_token, y_batch, y_token,
    gate_row, modulation_row, step_row, gate_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP_END: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(tokens, TOKENS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * TOKENS
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_scale = tl.load(modulation + i_b * modulation_row + scale_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gate = tl.load(gates + i_b * gate_row + gate_column + o_d, mask=m_d, other=0.0).to(tl.float32)
    step = 1.0
    if steps is not None:
        step = tl.load(steps + i_b * step_row)
    b_gate_sum = tl.zeros((BLOCK,), tl.float32)
    b_shift_sum = tl.zeros((BLOCK,), tl.float32)
    b_scale_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.minimum(TOKENS, tokens - first), ROWS):
        o_n = (first + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (o_n < tokens) & m_d[None, :]
        o_out = (i_b * tokens + o_n) * D + o_d[None, :]
        b_h = tl.load(grad_h + i_b * grad_h_batch + o_n * grad_h_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_base = tl.load(base + i_b * base_batch + o_n * base_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_normalized, rstd = normalize(b_base, m_d, eps, D)
        b_shift_sum += tl.sum(b_h, axis=0)
        b_scale_sum += tl.sum(b_h * b_normalized, axis=0)
        b_total = tl.load(grad_base + i_b * grad_base_batch + o_n * grad_base_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_total += normalize_backward(b_h * (1.0 + b_scale)[None, :], b_normalized, rstd, D)
        tl.store(out_base + o_out, b_total.to(out_base.dtype.element_ty), mask=mask)
        if GROUP_END:
            if grad_vr is not None:
                o_vr = i_b * grad_vr_batch + o_n * grad_vr_token + o_d[None, :]
                b_total += tl.load(grad_vr + o_vr, mask=mask, other=0.0).to(tl.float32)
            b_total *= step
            tl.store(out_x + o_out, b_total.to(out_x.dtype.element_ty), mask=mask)
        tl.store(out_y + o_out, (b_total * b_gate[None, :]).to(out_y.dtype.element_ty), mask=mask)
        b_y = tl.load(y + i_b * y_batch + o_n * y_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_gate_sum += tl.sum(b_total * b_y, axis=0)
    p_sums = sums + tl.program_id(0).to(tl.int64) * 3 * D + o_d
    tl.store(p_sums, b_gate_sum, mask=m_d)
    tl.store(p_sums + D, b_shift_sum, mask=m_d)
    tl.store(p_sums + 2 * D, b_scale_sum, mask=m_d)


def launch_forward(
    x: Tensor, y: Tensor, xr: Tensor | None, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float, group_end: bool, float8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', vr', h, scales of a float8 h), new and contiguous; what is not made (vr' without group_end, x' without xr then) is empty."""
    for name, tensor in (("x", x), ("y", y), ("xr", xr), ("vr", vr)):
        if tensor is not None:
            check_tokens(name, tensor, like=x)
    check_modulation("gates", gates, x, gate_column)
    check_modulation("modulation", modulation, x, shift_column, scale_column)
    require_device("gated_residual", x, y, xr, vr, gates, modulation, steps)
    x, y, gates, modulation = rows(x), rows(y), rows(gates), rows(modulation)
    xr, vr = (None if tensor is None else rows(tensor) for tensor in (xr, vr))
    batch, tokens, size = x.shape
    launch = row_launch(size)
    out, scales = empty_rows(x, float8)
    out_x = torch.empty_like(out, dtype=x.dtype) if xr is not None or not group_end else None
    out_vr = torch.empty_like(out, dtype=x.dtype) if group_end else None
    if out.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(batch * triton.cdiv(tokens, launch.rows),)](
                x, y, xr, vr, gates, modulation, steps, out_x, out_vr, out, scales, tokens,
                *token_strides(x), *token_strides(y), *token_strides(xr), *token_strides(vr),
                row_stride(gates), row_stride(modulation), 0 if steps is None else row_stride(steps),
                gate_column, shift_column, scale_column, eps,
                D=size, BLOCK=launch.block, ROWS=launch.rows, GROUP_END=group_end, num_warps=launch.warps,
            )  # fmt: skip
    nothing = out[:0]
    return tuple(nothing if made is None else made for made in (out_x, out_vr, out, scales))  # type: ignore[return-value]


def launch_backward(
    grad_base: Tensor, grad_vr: Tensor | None, grad_h: Tensor, base: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float, group_end: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of what `base` was added to, of x (empty without group_end: the same), of y, of gates and of modulation."""
    for name, tensor in (("grad_base", grad_base), ("grad_h", grad_h), ("grad_vr", grad_vr), ("y", y)):
        if tensor is not None:
            check_tokens(name, tensor, like=base)
    require_device("gated_residual", grad_base, grad_vr, grad_h, base, y, gates, modulation, steps)
    grad_base, grad_h, base, y, gates, modulation = (rows(tensor) for tensor in (grad_base, grad_h, base, y, gates, modulation))
    grad_vr = None if grad_vr is None else rows(grad_vr)
    batch, tokens, size = base.shape
    launch = row_launch(size)
    out_base = torch.empty((batch, tokens, size), dtype=base.dtype, device=base.device)
    out_y = torch.empty_like(out_base)
    out_x = torch.empty_like(out_base) if group_end else None
    chunks = triton.cdiv(tokens, BACKWARD_TOKENS)
    sums = torch.empty((batch, chunks, 3, size), dtype=torch.float32, device=base.device)
    if out_base.numel():
        with torch.cuda.device_of(base):
            backward_kernel[(batch * chunks,)](
                grad_base, grad_vr, grad_h, base, y, gates, modulation, steps, out_base, out_x, out_y, sums, tokens,
                *token_strides(grad_base), *token_strides(grad_vr), *token_strides(grad_h), *token_strides(base), *token_strides(y),
                row_stride(gates), row_stride(modulation), 0 if steps is None else row_stride(steps), gate_column, scale_column, eps,
                D=size, BLOCK=launch.block, ROWS=min(launch.rows, BACKWARD_TOKENS), TOKENS=BACKWARD_TOKENS, GROUP_END=group_end,
                num_warps=launch.warps,
            )  # fmt: skip
    grad_gates = column_gradient(gates, sums[:, :, :1], (gate_column,))
    grad_modulation = column_gradient(modulation, sums[:, :, 1:], (shift_column, scale_column))
    return out_base, out_base[:0] if out_x is None else out_x, out_y, grad_gates, grad_modulation


@torch.library.custom_op("odelt_fast::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(x + gate*y, LN of that * (1 + scale) + shift), both (B, N, D) in x's dtype, contiguous; differentiable.

    x, y (B, N, D) float16, bfloat16 or float32, of one dtype and any strides. gates (B or 1, K): gate is D columns from gate_column on;
    modulation (B or 1, K'): shift and scale likewise. Raises ValueError for shapes, dtypes and devices that do not fit, D above 8192 too.
    """
    total, _, h, _ = launch_forward(
        x, y, None, None, gates, gate_column, modulation, shift_column, scale_column, None, eps, group_end=False
    )
    return total, h


@gated_residual.register_fake
def _(
    x: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor, shift_column: int, scale_column: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::gated_residual_backward", mutates_args=())
def _backward(
    grad_total: Tensor, grad_h: Tensor, total: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, gates and modulation."""
    grad_x, _, *others = launch_backward(
        grad_total, None, grad_h, total, y, gates, gate_column, modulation, shift_column, scale_column, None, eps, group_end=False
    )
    return grad_x, others[0], others[1], others[2]


@_backward.register_fake
def _(
    grad_total: Tensor, grad_h: Tensor, total: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return y.new_empty(y.shape), y.new_empty(y.shape), gates.new_empty(gates.shape), modulation.new_empty(modulation.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gates, ctx.gate_column, modulation, *ctx.arguments = inputs
    ctx.save_for_backward(output[0], y, gates, modulation)


def _gradients(ctx: Any, grad_total: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    total, y, gates, modulation = ctx.saved_tensors
    grad_x, grad_y, grad_gates, grad_modulation = _backward(
        grad_total, grad_h, total, y, gates, ctx.gate_column, modulation, *ctx.arguments
    )
    return grad_x, grad_y, grad_gates, None, grad_modulation, None, None, None


gated_residual.register_autograd(_gradients, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Forward, also to float8, and backward for every dtype and network width."""
    absent = ("xr", "vr", "steps", "out_vr")
    yield from row_cases("gated_residual/forward", forward_kernel, (*absent, "scales"))
    yield from row_cases("gated_residual/float8", forward_kernel, absent, float8=True)
    yield from row_cases("gated_residual/backward", backward_kernel, ("grad_vr", "steps", "out_x"))
