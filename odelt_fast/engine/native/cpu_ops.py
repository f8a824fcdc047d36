"""The native operators on a CPU (csrc/cpu), which `build.load("cpu")` makes callable.

Row operators: x (B, N, D), float32 or bfloat16, D up to 8192, any strides; every other (B, N, D)
tensor of its dtype. Arithmetic is float32. Results overwrite contiguous tensors, which may be
inputs of the same place in memory. y and out, which matrix products write and read, may be in tiles
(`tiled`), contiguous. All raise RuntimeError for shapes and dtypes that do not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS as EPS

from .build import LEVELS, library_path, load

PANEL, TILE, MAX_TOKENS, MAX_HEAD_DIM = 32, 32, 1024, 192  # of csrc/cpu/products.h


class Modulation(NamedTuple):
    """Where gate, shift and scale lie: D columns, from the one named on, of packed rows (B or 1,
    K), float32 or bfloat16."""

    gates: Tensor
    gate_column: int
    table: Tensor
    shift_column: int
    scale_column: int


class InnerState(NamedTuple):
    """The inner ODE at a group's end: xr and vr (B, N, D), None for the last group's xr and the
    first's vr; step (B or 1,) float32, None for 1."""

    xr: Tensor | None
    vr: Tensor | None
    step: Tensor | None = None


def describe() -> str:
    """What the operators run on, or why they are not there, in one line. Builds nothing."""
    reason = load("cpu", build_it=False)
    if reason is None:
        bits = 32 * torch.ops.odelt_native.cpu_width()
        reason = f"{level()}, vectors of {bits} bits, {library_path('cpu')}"
    return f"native cpu operators: {reason}"


def level() -> str:
    """The instructions that the operators use: one of `LEVELS`."""
    return LEVELS[torch.ops.odelt_native.cpu_level()]


def gated_residual(
    x: Tensor, y: Tensor, bias: Tensor | None, modulation: Modulation, *, out_x: Tensor, out: Tensor
) -> None:
    """out_x = x + gate*(y + bias); out = LN(that)*(1 + scale) + shift. bias (D,)."""
    torch.ops.odelt_native.gated_residual(x, y, bias, *modulation, EPS, out_x, out)


def group_end(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    inner: InnerState,
    modulation: Modulation,
    results: tuple[Tensor | None, Tensor, Tensor],
) -> None:
    """v = step*(x + gate*(y + bias)); results: (xr + v, vr + v, LN(xr + v)*(1 + scale) + shift);
    without xr the norm is of vr + v."""
    xr, vr, step = inner
    torch.ops.odelt_native.group_end(x, y, bias, xr, vr, *modulation, step, EPS, *results)


def bias_gelu_(x: Tensor, bias: Tensor | None) -> None:
    """x = GELU(x + bias) in its tanh form, in place; x (..., D) contiguous, float32 or bfloat16;
    bias (D,)."""
    torch.ops.odelt_native.bias_gelu_(x, bias)


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions for `linear` and `attention`: AVX-512 for
    float32, AMX for bfloat16."""
    return dtype in (torch.float32, torch.bfloat16) and bool(
        torch.ops.odelt_native.has_products(torch.empty(0, dtype=dtype))
    )


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether `linear`, `mlp` and `attention` take tensors in tiles (`tiled`) of this dtype, which
    they read and write fastest."""
    return dtype == torch.bfloat16 and has_products(dtype)


def tiled(batch: int, tokens: int, size: int) -> tuple[int, int, int, int, int]:
    """Shape of (B, N, D) in tiles of 32 tokens and 32 values: (B, N/32, D/32, 32, 32)."""
    if tokens % TILE or size % TILE:
        raise ValueError(
            f"{tokens} tokens of {size} values are not whole tiles: both must be multiples of"
            f" {TILE}"
        )
    return batch, tokens // TILE, size // TILE, TILE, TILE


def pack_weight(weight: Tensor) -> Tensor:
    """The copy of a weight (N, K) that `linear` reads, N and K filled up to multiples of 32; K even
    in bfloat16."""
    columns, inner = (-(-size // PANEL) * PANEL for size in weight.shape)
    packed = torch.empty(columns, inner, dtype=weight.dtype)
    torch.ops.odelt_native.pack_weight(weight, packed)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """out = x W^T + bias; x (M, K), packed from W (N, K), bias (N,), out (M, N). Sums are float32.

    x, packed and out have one dtype, for which `has_products` holds; rows are contiguous. Where
    `has_tiles` holds, x and out may be in tiles, (M/32, K/32, 32, 32), contiguous.
    """
    torch.ops.odelt_native.linear(x, packed, bias, out)


def mlp(x: Tensor, packed_in: Tensor, bias_in: Tensor, packed_out: Tensor, *, out: Tensor) -> None:
    """out = GELU(x W_in^T + bias_in) W_out^T, GELU in its tanh form; x (M, K), W_in (H, K), bias_in
    (H,), W_out (N, H), out (M, N).

    As `linear` otherwise. What lies between the two layers is rounded to the dtype, and its memory
    kept for the next call.
    """
    torch.ops.odelt_native.mlp(x, packed_in, bias_in, packed_out, out)


def attention(qkv: Tensor, heads: int, scale: float, *, out: Tensor) -> None:
    """out = softmax(scale q k^T) v; qkv (B, N, 3*D), packed as (q, k, v), out (B, N, D); scale > 0.
    dtypes as for `linear`. Where `has_tiles` holds and D/heads is a multiple of 32, qkv and out may
    be in tiles (`tiled`).

    N up to MAX_TOKENS, D/heads up to MAX_HEAD_DIM and even in bfloat16.
    """
    torch.ops.odelt_native.attention(qkv, heads, scale, out)
