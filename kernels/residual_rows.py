"""The kernel of gated_residual.py and, with GROUP_END, of group_end.py, which have its equations.

Its launcher returns new, contiguous tensors, those that are made alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS

from .device import launch_options, require_device, wait_for_inputs
from .rows import (
    check_modulation,
    check_tokens,
    empty_rows,
    load_columns,
    load_rows,
    modulate,
    normalize,
    row_launch,
    row_stride,
    rows,
    store_rows,
    token_strides,
)


class Columns(NamedTuple):
    """Where gate, shift and scale lie: D columns each of packed modulations (B or 1, K)."""

    gates: Tensor
    gate_column: int
    modulation: Tensor
    shift_column: int
    scale_column: int


class GroupEnd(NamedTuple):
    """What the end of a depth group adds to: xr None in the last group, vr None in the first.

    steps (B or 1,) float32, None: 1.
    """

    xr: Tensor | None
    vr: Tensor | None
    steps: Tensor | None


@triton.jit
def residual_kernel(
    x, y, xr, vr, gates, modulation, steps, out_x, out_vr, out, scales, tokens,
    x_batch, x_token, y_batch, y_token, xr_batch, xr_token, vr_batch, vr_token,
    gate_row, modulation_row, step_row, gate_column, shift_column, scale_column, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP_END: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * chunks of ROWS tokens,). out_x is x', or xr' with GROUP_END; out is h."""
    wait_for_inputs(PDL)
    chunks = tl.cdiv(tokens, ROWS)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = ((tl.program_id(0) % chunks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    mask = (o_n < tokens) & m_d[None, :]
    o_row = i_b * tokens + o_n
    o_out = o_row * D + o_d[None, :]
    b_x = load_rows(x, i_b, o_n, o_d, mask, x_batch, x_token)
    b_y = load_rows(y, i_b, o_n, o_d, mask, y_batch, y_token)
    b_gate = load_columns(gates, i_b, gate_row, gate_column, o_d, m_d)
    b_base = tl.fma(b_gate[None, :], b_y, b_x)
    if GROUP_END:
        b_velocity = b_base
        if steps is not None:
            b_velocity *= tl.load(steps + i_b * step_row)
        b_vr = b_velocity
        if vr is not None:
            b_vr += load_rows(vr, i_b, o_n, o_d, mask, vr_batch, vr_token)
        tl.store(out_vr + o_out, b_vr, mask=mask)
        b_base = b_vr
        if xr is not None:
            b_base = load_rows(xr, i_b, o_n, o_d, mask, xr_batch, xr_token) + b_velocity
    if out_x is not None:
        tl.store(out_x + o_out, b_base, mask=mask)
    b_shift = load_columns(modulation, i_b, modulation_row, shift_column, o_d, m_d)
    b_scale = load_columns(modulation, i_b, modulation_row, scale_column, o_d, m_d)
    b_h = modulate(normalize(b_base, m_d, eps, D), b_shift, b_scale)
    store_rows(out, scales, b_h, o_row, o_d, mask, D)


def check_steps(steps: Tensor | None, x: Tensor) -> None:
    """ValueError unless steps are (B or 1,) float32, or None."""
    if steps is not None and (
        steps.dim() != 1 or steps.shape[0] not in (1, len(x)) or steps.dtype != torch.float32
    ):
        raise ValueError(
            f"steps must be ({len(x)} or 1,) float32, not {tuple(steps.shape)} in {steps.dtype}"
        )


def launch_residual(
    x: Tensor, y: Tensor, columns: Columns, end: GroupEnd | None = None, float8: bool = False
) -> list[Tensor]:
    """[x', h], at a group's end [xr', vr', h], at the last one's [vr', h]; float8: h and scales."""
    xr, vr, steps = end or GroupEnd(None, None, None)
    for name, tensor in (("x", x), ("y", y), ("xr", xr), ("vr", vr)):
        if tensor is not None:
            check_tokens(name, tensor, like=x)
    gates, gate, modulation, *norm = columns
    check_modulation("gates", gates, x, gate)
    check_modulation("modulation", modulation, x, *norm)
    check_steps(steps, x)
    require_device("gated_residual", x, y, xr, vr, gates, modulation, steps)
    x, y, gates, modulation = rows(x), rows(y), rows(gates), rows(modulation)
    xr, vr = (None if tensor is None else rows(tensor) for tensor in (xr, vr))
    batch, tokens, size = x.shape
    blocks, warps = row_launch(size)
    out, scales = empty_rows(x, float8)
    out_x = torch.empty_like(out, dtype=x.dtype) if not end or xr is not None else None
    out_vr = torch.empty_like(out, dtype=x.dtype) if end else None
    if out.numel():
        with torch.cuda.device_of(x):
            residual_kernel[(batch * triton.cdiv(tokens, blocks["ROWS"]),)](
                x, y, xr, vr, gates, modulation, steps, out_x, out_vr, out, scales, tokens,
                *token_strides(x), *token_strides(y), *token_strides(xr), *token_strides(vr),
                row_stride(gates), row_stride(modulation), row_stride(steps),
                gate, *norm, LAYER_NORM_EPS, **blocks, GROUP_END=end is not None,
                **launch_options(x.device, warps),
            )  # fmt: skip
    return [made for made in (out_x, out_vr, out, scales) if made is not None]
