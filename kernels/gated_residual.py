"""Gated residual, then LayerNorm + modulate of the sum, in one pass: x' = x + gate*y; h = LN(x')*(1
+ scale) + shift.

x, y, x', h (B, N, D) in one dtype; gate comes from the packed row `gates` (B or 1, K), shift and
scale from `modulation` (B or 1, K'), which is the same tensor inside a block and the next block's
across a border. Arithmetic is float32; h is made from x' before it is rounded. Bytes: two reads and
two writes of (B, N, D); backward four reads and two writes. Kernels: residual_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import launch_options, require_device
from odelt_fast.kernels.residual_rows import backward_kernel, forward_kernel
from odelt_fast.kernels.rows import (
    BACKWARD_TOKENS,
    EPS,
    backward_rows,
    check_modulation,
    check_tokens,
    column_gradient,
    empty_rows,
    row_cases,
    row_launch,
    row_stride,
    rows,
    token_strides,
)


def gated_residual_reference(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    gate_column: int,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of its inputs."""
    size = x.shape[2]
    total = torch.addcmul(x, gates[:, None, gate_column : gate_column + size], y)
    shift, scale = (
        modulation[:, None, column : column + size] for column in (shift_column, scale_column)
    )
    return total, torch.addcmul(shift, F.layer_norm(total, (size,), eps=eps), 1 + scale)


def launch_forward(
    x: Tensor, y: Tensor, xr: Tensor | None, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float, group_end: bool, float8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x', vr', h, scales of a float8 h), new and contiguous; what is not made (vr' without
    group_end, x' without xr then) is empty."""
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
                D=size, BLOCK=launch.block, ROWS=launch.rows, GROUP_END=group_end, **launch_options(x.device, launch.warps),
            )  # fmt: skip
    nothing = out[:0]
    return tuple(nothing if made is None else made for made in (out_x, out_vr, out, scales))  # type: ignore[return-value]


def launch_backward(
    grad_base: Tensor, grad_vr: Tensor | None, grad_h: Tensor, base: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float, group_end: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of what `base` was added to, of x (empty without group_end: the same), of y, of
    gates and of modulation."""
    for name, tensor in (
        ("grad_base", grad_base),
        ("grad_h", grad_h),
        ("grad_vr", grad_vr),
        ("y", y),
    ):
        if tensor is not None:
            check_tokens(name, tensor, like=base)
    require_device("gated_residual", grad_base, grad_vr, grad_h, base, y, gates, modulation, steps)
    grad_base, grad_h, base, y, gates, modulation = (
        rows(tensor) for tensor in (grad_base, grad_h, base, y, gates, modulation)
    )
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
                D=size, BLOCK=launch.block, ROWS=backward_rows(launch, base.dtype), TOKENS=BACKWARD_TOKENS, GROUP_END=group_end,
                num_warps=launch.warps,
            )  # fmt: skip
    grad_gates = column_gradient(gates, sums[:, :, :1], (gate_column,))
    grad_modulation = column_gradient(modulation, sums[:, :, 1:], (shift_column, scale_column))
    return out_base, out_base[:0] if out_x is None else out_x, out_y, grad_gates, grad_modulation


@torch.library.custom_op("odelt_fast::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    gate_column: int,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """(x + gate*y, LN of that * (1 + scale) + shift), both (B, N, D) in x's dtype, contiguous;
    differentiable.

    x, y (B, N, D) float16, bfloat16 or float32, of one dtype and any strides. gates (B or 1, K):
    gate is D columns from gate_column on; modulation (B or 1, K'): shift and scale likewise. Raises
    ValueError for shapes, dtypes and devices that do not fit, D above 8192 too.
    """
    total, _, h, _ = launch_forward(
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
    )
    return total, h


@gated_residual.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    gate_column: int,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::gated_residual_backward", mutates_args=())
def _backward(
    grad_total: Tensor, grad_h: Tensor, total: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, gates and modulation."""
    grad_x, _, *others = launch_backward(
        grad_total,
        None,
        grad_h,
        total,
        y,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        None,
        eps,
        group_end=False,
    )
    return grad_x, others[0], others[1], others[2]


@_backward.register_fake
def _(
    grad_total: Tensor, grad_h: Tensor, total: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        y.new_empty(y.shape),
        y.new_empty(y.shape),
        gates.new_empty(gates.shape),
        modulation.new_empty(modulation.shape),
    )


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
    yield from row_cases("gated_residual/overlapped", forward_kernel, (*absent, "scales"), pdl=True)
    yield from row_cases("gated_residual/backward", backward_kernel, ("grad_vr", "steps", "out_x"))
