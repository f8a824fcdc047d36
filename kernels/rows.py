"""What the row kernels share: launches by row width, checks of layout, LayerNorm of a tile of rows.

A row is one token (D values); a tile is a few tokens of one sample, so that the sample's modulation
row is read once a tile. Modulation is packed: one row of K >= 6*D values per sample (or one for
all), from which a kernel takes shift, scale and gate by column offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, WIDTHS, CompileCase, kernel_case
from .quantize import FP8, quantize_tile

MAX_COLUMNS = 8192


def row_launch(size: int) -> tuple[dict[str, int], int]:
    """(constants, warps) of a launch for rows of `size` values.

    A tile is 2048 values, at most 32 rows and at least one, with 16 values a thread: they keep four
    loads of 16 bytes in flight in 16-bit dtypes without spilling in the widest kernel (group end: 4
    inputs).

    Raises:
        ValueError: above 8192 values, where a row no longer fits one program's registers.
    """
    if size > MAX_COLUMNS:
        raise ValueError(
            f"rows of {size} values are too wide for the row kernels: at most {MAX_COLUMNS}"
        )
    block = max(16, triton.next_power_of_2(size))
    count = min(32, max(1, 2048 // block))
    return {"D": size, "BLOCK": block, "ROWS": count}, block * count // 512


def check_tokens(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """ValueError unless x is (B, N, D) in a kernel's dtype, and of `like`'s shape and dtype."""
    if x.dim() != 3 or x.dtype not in DTYPES or not x.shape[2]:
        raise ValueError(
            f"{name} must be (B, N, D) in float16, bfloat16 or float32, not {tuple(x.shape)} in"
            f" {x.dtype}"
        )
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype):
        raise ValueError(
            f"{name} must be {tuple(like.shape)} in {like.dtype} as the first tensor is, not"
            f" {tuple(x.shape)} in {x.dtype}"
        )


def check_modulation(name: str, table: Tensor, x: Tensor, *columns: int) -> None:
    """ValueError unless table is (B or 1, K) and D columns from each of `columns` lie inside it."""
    if table.dim() != 2 or table.shape[0] not in (1, x.shape[0]) or table.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be (B or 1, K) = ({x.shape[0]} or 1, K) in float16, bfloat16 or float32,"
            f" not {tuple(table.shape)} in {table.dtype}"
        )
    for column in columns:
        if not 0 <= column <= table.shape[1] - x.shape[2]:
            raise ValueError(
                f"column {column} of {name}: {x.shape[2]} values from there do not lie in its"
                f" {table.shape[1]} columns"
            )


def check_layer(weight: Tensor, bias: Tensor, rows: int | str, size: int) -> None:
    """ValueError unless weight is (rows, size) and bias (rows,) in one dtype; a name takes any."""
    fits = weight.shape == (len(weight) if isinstance(rows, str) else rows, size)
    if not fits or bias.shape != weight.shape[:1] or not weight.dtype == bias.dtype in DTYPES:
        raise ValueError(
            f"weight and bias must be ({rows}, {size}) and ({rows},) in float16, bfloat16 or"
            f" float32, not {tuple(weight.shape)} in {weight.dtype} and {tuple(bias.shape)} in"
            f" {bias.dtype}"
        )


def rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous (any strides before it), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def row_stride(table: Tensor | None) -> int:
    """Stride from one sample's row to the next: 0 for one row that all samples share."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def empty_rows(x: Tensor, float8: bool) -> tuple[Tensor, Tensor | None]:
    """An output (B, N, D) in x's dtype and None, or in float8 and its scales (B, N) float32."""
    if not float8:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    scales = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=FP8, device=x.device), scales


def like_first(x: Tensor, *_: Any) -> Tensor:
    """The fake implementation of an operator whose result is like its first argument."""
    return x.new_empty(x.shape)


def likes_first(count: int) -> Callable[..., tuple[Tensor, ...]]:
    """The same for `count` results."""
    return lambda x, *_: tuple(like_first(x) for _ in range(count))


@triton.jit
def load_rows(x, i_b, o_n, o_d, mask, x_batch, x_token):
    """A tile (ROWS, BLOCK) of sample i_b in float32; o_n (ROWS, 1) int64 tokens, o_d (BLOCK,)."""
    p_x = x + i_b * x_batch + o_n * x_token + o_d[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(table, i_b, row_stride, column, o_d, m_d):
    """D columns of sample i_b's row of a packed modulation, (BLOCK,) float32."""
    p_row = table + i_b * row_stride
    return tl.load(p_row + column + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def normalize(b_x, m_d, eps, D: tl.constexpr):
    """LayerNorm of a tile b_x (ROWS, BLOCK) float32; b_x and the result are 0 in masked columns."""
    mean = tl.sum(b_x, axis=1) / D
    centered = tl.where(m_d[None, :], b_x - mean[:, None], 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)[:, None]


@triton.jit
def modulate(b_normalized, b_shift, b_scale):
    """normalised*(1 + scale) + shift, the product not rounded; shift and scale (BLOCK,)."""
    return tl.fma(b_normalized, (1.0 + b_scale)[None, :], b_shift[None, :])


@triton.jit
def store_rows(out, scales, b_h, o_row, o_d, mask, D: tl.constexpr):
    """Stores a tile (ROWS, BLOCK), 0 in masked columns, at rows o_row (ROWS, 1).

    With `scales` as float8, and one float32 scale a row.
    """
    if scales is None:
        tl.store(out + o_row * D + o_d[None, :], b_h, mask=mask)
    else:
        b_q, b_scale = quantize_tile(b_h)
        tl.store(out + o_row * D + o_d[None, :], b_q, mask=mask)
        # The mask of the first column is the mask of the row.
        m_row = tl.max(mask.to(tl.int32), axis=1, keep_dims=True) > 0
        tl.store(scales + o_row, b_scale[:, None], mask=m_row)


def row_cases(name: str, fn: Any, **constants: object) -> Iterator[CompileCase]:
    """A row kernel for every dtype and network width, overlapped (PDL) for bfloat16 alone.

    constants: beside those of the launch; None for a pointer that is absent. Without scales = None
    `out` is float8, which needs sm_89.
    """
    tensors = ("x", "y", "xr", "vr", "gates", "modulation", "out_x", "out_vr")
    constants = {"PDL": False, **constants}
    float8 = "scales" not in constants
    options = {"arches": (90, 100)} if float8 else {}
    for kind in ("bf16",) if constants["PDL"] else DTYPES.values():
        types = dict.fromkeys(tensors, f"*{kind}") | {"out": "*fp8e4nv" if float8 else f"*{kind}"}
        types |= dict.fromkeys(("steps", "scales"), "*fp32") | {"eps": "fp32"}
        for size in WIDTHS:
            blocks, warps = row_launch(size)
            yield kernel_case(
                f"{name}/{kind}/{size}", fn, types, blocks | constants, ("tokens", "step_row"),
                num_warps=warps, **options,
            )  # fmt: skip
