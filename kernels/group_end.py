"""End of a depth group, across the block border, in one pass (Algorithm 2 of the paper): v =
step*(x + gate*y); xr' = xr + v; vr' = vr + v.

x + gate*y is the last block's output; xr is that block's input. Then h = LN(b)*(1 + scale) + shift
with the next layer's modulation: b = xr' before the next block (group_end), b = vr' before the
final layer (last_group_end, which has no use for xr). All tensors (B, N, D) in one dtype; gates and
modulation packed (B or 1, K). vr None is the first group's zero. steps (B or 1,) float32 are G/l of
each row for inner_step="inverse_depth", None is the reference's 1. Kernels: residual_rows.py.
Bytes: group_end four reads (three in the first group) and three writes of (B, N, D), last_group_end
three reads and two writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.gated_residual import launch_backward, launch_forward
from odelt_fast.kernels.residual_rows import backward_kernel, forward_kernel
from odelt_fast.kernels.rows import EPS, row_cases


def group_end_reference(
    x: Tensor, y: Tensor, xr: Tensor | None, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', h) in plain PyTorch, in the dtype of its inputs; xr None: the last group's, (None,
    vr', h)."""
    size = x.shape[2]
    velocity = torch.addcmul(x, gates[:, None, gate_column : gate_column + size], y)
    if steps is not None:
        velocity = velocity * steps[:, None, None].to(x.dtype)
    vr = velocity if vr is None else vr + velocity
    xr = None if xr is None else xr + velocity
    shift, scale = (
        modulation[:, None, column : column + size] for column in (shift_column, scale_column)
    )
    return (
        xr,
        vr,
        torch.addcmul(shift, F.layer_norm(vr if xr is None else xr, (size,), eps=eps), 1 + scale),
    )


def check_steps(steps: Tensor | None, x: Tensor) -> None:
    if steps is not None and (
        steps.dim() != 1 or steps.shape[0] not in (1, len(x)) or steps.dtype != torch.float32
    ):
        raise ValueError(
            f"steps must be ({len(x)} or 1,) float32, not {tuple(steps.shape)} in {steps.dtype}"
        )


@torch.library.custom_op("odelt_fast::group_end", mutates_args=())
def group_end(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', h) of the equations above, each (B, N, D) in x's dtype, new and contiguous;
    differentiable, but not in steps.

    x, y, xr, vr (B, N, D) float16, bfloat16 or float32, of one dtype and any strides; vr None is
    zero. gates (B or 1, K): gate is D columns from gate_column on; modulation (B or 1, K'): shift
    and scale likewise. steps (B or 1,) float32 or None (1). Raises ValueError for shapes, dtypes
    and devices that do not fit, and for D above 8192.
    """
    check_steps(steps, x)
    return launch_forward(
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
    )[:3]


@group_end.register_fake
def _(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::last_group_end", mutates_args=())
def last_group_end(
    x: Tensor, y: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(vr', h), h = LN(vr')*(1 + scale) + shift for the final layer; arguments and errors as for
    group_end; differentiable."""
    check_steps(steps, x)
    _, out_vr, h, _ = launch_forward(
        x,
        y,
        None,
        vr,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        steps,
        eps,
        group_end=True,
    )
    return out_vr, h


@last_group_end.register_fake
def _(
    x: Tensor, y: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::group_end_backward", mutates_args=())
def _backward(
    grad_base: Tensor, grad_vr: Tensor | None, grad_h: Tensor, base: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of xr (of vr in the last group), x, y, gates and modulation; base: what was
    normalised; grad_vr None: last group."""
    return launch_backward(
        grad_base,
        grad_vr,
        grad_h,
        base,
        y,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        steps,
        eps,
        group_end=True,
    )


@_backward.register_fake
def _(
    grad_base: Tensor, grad_vr: Tensor | None, grad_h: Tensor, base: Tensor, y: Tensor, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = y.shape, y.shape, y.shape
    return (
        *(y.new_empty(shape) for shape in shapes),
        gates.new_empty(gates.shape),
        modulation.new_empty(modulation.shape),
    )  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Both operators' arguments end alike; what was normalised is the first output of both.
    (
        *_,
        vr,
        gates,
        ctx.gate_column,
        modulation,
        ctx.shift_column,
        ctx.scale_column,
        steps,
        ctx.eps,
    ) = inputs
    ctx.has_vr = vr is not None
    ctx.save_for_backward(output[0], inputs[1], gates, modulation, steps)


def _apply(
    ctx: Any, grad_base: Tensor, grad_vr: Tensor | None, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    base, y, gates, modulation, steps = ctx.saved_tensors
    columns = ctx.shift_column, ctx.scale_column
    return _backward(
        grad_base,
        grad_vr,
        grad_h,
        base,
        y,
        gates,
        ctx.gate_column,
        modulation,
        *columns,
        steps,
        ctx.eps,
    )


def _group_gradients(
    ctx: Any, grad_xr: Tensor, grad_vr: Tensor, grad_h: Tensor
) -> tuple[Tensor | None, ...]:
    xr, x, y, gates, modulation = _apply(ctx, grad_xr, grad_vr, grad_h)
    return (
        x,
        y,
        xr,
        grad_vr if ctx.has_vr else None,
        gates,
        None,
        modulation,
        None,
        None,
        None,
        None,
    )


def _last_gradients(ctx: Any, grad_vr: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    vr, x, y, gates, modulation = _apply(ctx, grad_vr, None, grad_h)
    return x, y, vr if ctx.has_vr else None, gates, None, modulation, None, None, None, None


group_end.register_autograd(_group_gradients, setup_context=_save)
last_group_end.register_autograd(_last_gradients, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Forward and backward for every dtype and network width: first, middle and last group, float8,
    and per-row steps."""
    for name, absent in (
        ("forward", ("steps", "scales")),
        ("first", ("steps", "scales", "vr")),
        ("steps", ("scales",)),
        ("float8", ("steps",)),
    ):
        yield from row_cases(
            f"group_end/{name}", forward_kernel, absent, group_end=True, float8=name == "float8"
        )
    yield from row_cases(
        "group_end/last", forward_kernel, ("steps", "scales", "xr", "out_x"), group_end=True
    )
    yield from row_cases(
        "group_end/overlapped", forward_kernel, ("steps", "scales"), group_end=True, pdl=True
    )
    yield from row_cases("group_end/backward", backward_kernel, ("steps",), group_end=True)
    yield from row_cases(
        "group_end/backward_last", backward_kernel, ("steps", "grad_vr"), group_end=True
    )
