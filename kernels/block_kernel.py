"""The kernel of block_products.py: a product with LayerNorm + modulate before it, the gated
residual or the end of a depth group after it.

Rows are tokens (batch, tokens); a tile of rows lies within one sample, so that its shift, scale and
gate are one row of the packed modulation. Pointers that are None are parts that are off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS

from .compile_case import DTYPES
from .device import architecture, launch_options, prefetch, require_device, wait_for_inputs
from .linear_tiles import gelu, put_share, take_shares, tile_position
from .moments import load_moments, part_width, store_moments
from .quantize import FP8, quantize_tile
from .residual_rows import GroupEnd, check_steps
from .rows import (
    check_modulation,
    load_columns,
    row_stride,
    rows,
)
from .tiles import Tile, choose_block_tile, workspace_elements

BLOCK = 128  # values of a row that share a scale
LINES = 8  # of 128 bytes: of each row of weights, fetched before the launch before has ended


@dataclass(frozen=True)
class Layer:
    """W (columns, inner), contiguous, b (columns,) and, of float8, a scale of each row of W."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Operand:
    """x (B, N, inner): h itself; float8 with scales (B, N, blocks); or with its moments and where
    in modulation (B or 1, K) shift and scale lie."""

    x: Tensor
    scales: Tensor | None = None
    moments: Tensor | None = None
    modulation: Tensor | None = None
    shift_column: int = 0
    scale_column: int = 0


@dataclass(frozen=True)
class Residual:
    """What a product is added to, x (B, N, columns); end: at the end of a depth group."""

    x: Tensor
    gates: Tensor
    gate_column: int
    end: GroupEnd | None = None


@triton.jit
def block_kernel(
    x, x_scales, moments, modulation, weight, weight_scale, bias, residual, gates, xr, vr, steps,
    out, out_scales, out_vr, out_moments, partial, counter,
    batch, tokens, columns, inner, modulation_row, shift_column, scale_column,
    gate_row, gate_column, step_row, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, EVEN_K: tl.constexpr,
    GELU: tl.constexpr, GROUP_END: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLITS); with SPLITS > 1 as linear_tiles.py has it.

    x (rows, inner): h itself; float8 with x_scales (rows, blocks of BLOCK_K); or with moments (2,
    rows, parts of WIDTH columns) what is normalised and modulated to h as it is loaded, and where
    the weight is float8 quantised, a block of BLOCK_K columns of a row at a time.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles = tl.num_programs(0)
    chunks = tl.cdiv(tokens, BLOCK_M)
    i_m, i_n = tile_position(tile, batch * chunks, tl.cdiv(columns, BLOCK_N), GROUP_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < columns
    p_weight = weight + o_n.to(tl.int64) * inner
    blocks = tl.cdiv(inner, BLOCK_K)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    if PDL:  # the weights do not depend on the launch before
        prefetch(weight, o_n, columns, first * BLOCK_K, inner, LINES)
    wait_for_inputs(PDL)
    i_b = (i_m // chunks).to(tl.int64)
    o_token = (i_m % chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_token < tokens
    o_row = i_b * tokens + o_token
    rows = batch * tokens
    if moments is not None:
        b_mean, b_inverse = load_moments(moments, o_row, m_m, rows, inner, eps, PARTS, WIDTH)
    o_k = tl.arange(0, BLOCK_K)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, min(first + share, blocks)):
        o_d = block * BLOCK_K + o_k
        m_d = o_d < inner
        p_x = x + o_row[:, None] * inner + o_d[None, :]
        p_w = p_weight[None, :] + o_d[:, None]
        if EVEN_K:
            b_x = tl.load(p_x, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            b_x = tl.load(p_x, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :] & m_d[:, None], other=0.0)
        if moments is not None:
            b_shift = load_columns(modulation, i_b, modulation_row, shift_column, o_d, m_d)
            b_scale = load_columns(modulation, i_b, modulation_row, scale_column, o_d, m_d)
            b_h = (b_x.to(tl.float32) - b_mean[:, None]) * b_inverse[:, None]
            b_h = tl.fma(b_h, (1.0 + b_scale)[None, :], b_shift[None, :])
            if weight_scale is not None:
                # Columns beyond the row's end would enter the largest value.
                b_q, b_s = quantize_tile(tl.where(m_d[None, :], b_h, 0.0))
                b_sum = tl.fma(tl.dot(b_q, b_w), b_s[:, None].broadcast_to(b_sum.shape), b_sum)
            else:
                b_sum = tl.dot(b_h.to(b_w.dtype), b_w, b_sum, input_precision="ieee")
        elif x_scales is not None:
            b_s = tl.load(x_scales + o_row * blocks + block, mask=m_m, other=0.0)
            b_sum = tl.fma(tl.dot(b_x, b_w), b_s[:, None].broadcast_to(b_sum.shape), b_sum)
        else:
            b_sum = tl.dot(b_x, b_w, b_sum, input_precision="ieee")

    done = True
    if SPLITS > 1:
        done = put_share(b_sum, partial, counter, tile, split, tiles, SPLITS)
        if done:
            b_sum = take_shares(b_sum, partial, tile, tiles, SPLITS)
            tl.store(counter + tile, 0)
    if done:
        if weight_scale is not None:
            b_sum *= tl.load(weight_scale + o_n, mask=m_n, other=0.0)[None, :]
        b_y = b_sum + tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            b_y = gelu(b_y)
        mask = m_m[:, None] & m_n[None, :]
        o_out = o_row[:, None] * columns + o_n[None, :]
        if residual is not None:
            b_gate = load_columns(gates, i_b, gate_row, gate_column, o_n, m_n)
            b_residual = tl.load(residual + o_out, mask=mask, other=0.0).to(tl.float32)
            b_y = tl.fma(b_gate[None, :], b_y, b_residual)
        if GROUP_END:
            if steps is not None:
                b_y *= tl.load(steps + i_b * step_row)
            b_vr = b_y
            if vr is not None:
                b_vr += tl.load(vr + o_out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_vr + o_out, b_vr, mask=mask)
            if xr is not None:
                b_y += tl.load(xr + o_out, mask=mask, other=0.0).to(tl.float32)
        if out_scales is not None:
            b_q, b_s = quantize_tile(tl.where(m_n[None, :], b_y, 0.0))
            tl.store(out + o_out, b_q, mask=mask)
            tl.store(out_scales + o_row * tl.cdiv(columns, BLOCK_N) + i_n, b_s, mask=m_m)
        elif out is not None:
            b_out = b_y.to(out.dtype.element_ty)
            tl.store(out + o_out, b_out, mask=mask)
            if out_moments is not None:
                store_moments(out_moments, b_out, o_row, m_m, rows, o_n, i_n, columns)


def block_tile(batch: int, tokens: int, weight: Tensor) -> Tile:
    """The launch configuration of a product of (batch, tokens) rows."""
    (columns, inner), processors = weight.shape, architecture(weight.device)[1]
    return choose_block_tile(batch, tokens, columns, inner, weight.dtype, processors)


def block_constants(tile: Tile, inner: int, parts: int = 1) -> dict[str, Any]:
    """Constants of a launch; parts: of the moments that are read."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    moments = {"PARTS": triton.next_power_of_2(parts), "WIDTH": part_width(inner, parts)}
    even = {"EVEN_K": inner % tile.block_k == 0, "LINES": LINES}
    return blocks | moments | even | {"GROUP_M": tile.group_m, "SPLITS": tile.splits}


def launch_block(
    operand: Operand, layer: Layer, activation: str = "none", residual: Residual | None = None,
    workspace: Tensor | None = None, float8: bool = False, tile: Tile | None = None,
) -> list[Tensor]:  # fmt: skip
    """[y], with float8 [q, scales]; with a residual [x', moments], at a group's end [xr', moments,
    vr'], at the last one's [vr'].

    workspace: see `linear.launch_linear`; tile: None takes the one that fits.
    """
    check_block(operand, layer, residual)
    x, end = operand.x.contiguous(), residual.end if residual else None
    (batch, tokens, inner), columns = x.shape, len(layer.weight)
    tile = tile or block_tile(batch, tokens, layer.weight)
    whole, blocks = (batch, tokens, columns), (batch, tokens, triton.cdiv(columns, BLOCK))
    parts = 2, batch * tokens, triton.cdiv(columns, tile.block_n)
    dtype, last = (residual.x if residual else layer.bias).dtype, end is not None and end.xr is None

    def empty(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    out = empty(not last, whole, FP8 if float8 else dtype)
    out_scales = empty(float8, blocks, torch.float32)
    moments = empty(residual is not None and not last, parts, torch.float32)
    out_vr = empty(end is not None, whole, dtype)
    counters, partials = workspace_elements(tokens, columns, tile, batch)
    if workspace is None:
        workspace = torch.zeros(counters + partials, dtype=torch.int32, device=x.device)
    if workspace.numel() < counters + partials:
        raise ValueError(f"workspace must have {counters + partials} zeroed elements of int32")
    partial = workspace[counters:].view(torch.float32) if counters else workspace
    table = None if operand.modulation is None else rows(operand.modulation)
    gates = rows(residual.gates) if residual else None
    added = (residual.x, *(end or (None,) * 3)) if residual else (None,) * 4
    base, xr, vr, steps = (None if each is None else each.contiguous() for each in added)
    read = 1 if operand.moments is None else operand.moments.shape[2]
    constants = block_constants(tile, inner, read) | {"GELU": activation == "gelu"}
    if x.numel():
        with torch.cuda.device_of(x):
            block_kernel[(batch * tile.count(tokens, columns), tile.splits)](
                x, operand.scales, operand.moments, table, layer.weight, layer.scale, layer.bias,
                base, gates, xr, vr, steps, out, out_scales, out_vr, moments, partial, workspace,
                batch, tokens, columns, inner, row_stride(table), operand.shift_column,
                operand.scale_column, row_stride(gates), residual.gate_column if residual else 0,
                row_stride(steps), LAYER_NORM_EPS, GROUP_END=end is not None, **constants,
                **launch_options(x.device, tile.num_warps, tile.num_stages),
            )  # fmt: skip
    return [each for each in (out, out_scales, moments, out_vr) if each is not None]


def check_block(operand: Operand, layer: Layer, residual: Residual | None) -> None:
    """ValueError unless shapes, dtypes and devices fit."""
    x, weight, dtype = operand.x, layer.weight, layer.bias.dtype
    fits = x.dim() == 3 and weight.dim() == 2 and x.shape[2:] == weight.shape[1:]
    if not fits or not weight.numel() or not weight.is_contiguous() or dtype not in DTYPES:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, N, inner) and"
            f" (columns, inner), contiguous, bias float16, bfloat16 or float32, not {dtype}"
        )
    (batch, tokens, inner), columns = x.shape, len(weight)
    float8, quantized = layer.scale is not None, operand.scales is not None
    made = (batch, tokens, columns)
    base, gates, end = (residual.x, residual.gates, residual.end) if residual else (None,) * 3
    parts: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("x", x, x.shape, FP8 if quantized else dtype),
        ("weight", weight, weight.shape, FP8 if float8 else dtype),
        ("bias", layer.bias, (columns,), dtype),
        ("weight_scale", layer.scale, (columns,), torch.float32),
        ("scales", operand.scales, (batch, tokens, triton.cdiv(inner, BLOCK)), torch.float32),
        ("residual", base, made, dtype),
        ("xr", end and end.xr, made, dtype),
        ("vr", end and end.vr, made, dtype),
    ]
    if operand.moments is not None:
        count = operand.moments.shape[-1]
        parts.append(("moments", operand.moments, (2, batch * tokens, count), torch.float32))
    for name, part, shape, kind in parts:
        if part is not None and (part.shape != shape or part.dtype != kind):
            raise ValueError(
                f"{name} must be {tuple(shape)} in {kind}, not {tuple(part.shape)} in {part.dtype}"
            )
    if float8 != quantized and not (float8 and operand.moments is not None):
        raise ValueError("float8 weights need float8 x, or x with its moments, and no others do")
    tables = operand.modulation, gates, end and end.steps
    if operand.modulation is not None:
        columns_of = operand.shift_column, operand.scale_column
        check_modulation("modulation", operand.modulation, x, *columns_of)
    if residual:
        check_modulation("gates", residual.gates, residual.x, residual.gate_column)
    check_steps(end and end.steps, x)
    others = operand.scales, operand.moments, layer.scale, *tables
    require_device("block", x, weight, layer.bias, *others, base)
