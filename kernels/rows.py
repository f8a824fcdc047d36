"""What the row kernels share: launch parameters by row width, checks of layout, and LayerNorm of a
tile of rows.

A row is one token (D values); a tile is a few tokens of one sample, so that the sample's modulation
row is read once a tile. Modulation is packed: one row of K >= 6*D values per sample (or one for
all), from which a kernel takes shift, scale and gate by column offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS
from odelt_fast.kernels.compile_case import CompileCase, overlap_options
from odelt_fast.kernels.quantize import FP8, quantize_tile

EPS = LAYER_NORM_EPS
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# tokens whose gradients to the modulation are added in one program: (B*N/16, D) float32 partial
# sums
BACKWARD_TOKENS = 16
WIDTHS = (
    384,
    768,
    1024,
    1152,
)  # of the published networks (S, B, L, XL): what the compile gate compiles

_INPUTS = (
    "x",
    "y",
    "xr",
    "vr",
    "gates",
    "modulation",
    "grad",
    "grad_base",
    "grad_vr",
    "grad_h",
    "base",
)
_POINTERS = (*_INPUTS, "out", "out_x", "out_vr", "grad_x", "out_base", "out_y")


@dataclass(frozen=True)
class RowLaunch:
    """block: columns of a tile, a power of two; rows: tokens of a forward tile; warps."""

    block: int
    rows: int
    warps: int


# 16 values a thread keep four loads of 16 bytes in flight in 16-bit dtypes without spilling in the
# widest kernel (group end: 4 inputs).
_LAUNCHES = (
    RowLaunch(16, 32, 1),
    RowLaunch(32, 32, 2),
    RowLaunch(64, 32, 4),
    RowLaunch(128, 16, 4),
    RowLaunch(256, 8, 4),
    RowLaunch(512, 4, 4),
    RowLaunch(1024, 2, 4),
    RowLaunch(2048, 1, 4),
    RowLaunch(4096, 1, 8),
    RowLaunch(8192, 1, 16),
)


def row_launch(size: int) -> RowLaunch:
    """Launch parameters for rows of `size` values; ValueError above 8192, where a row no longer
    fits one program's registers."""
    for launch in _LAUNCHES:
        if size <= launch.block:
            return launch
    raise ValueError(
        f"rows of {size} values are too wide for the row kernels: at most {_LAUNCHES[-1].block}"
    )


def backward_rows(launch: RowLaunch, dtype: torch.dtype) -> int:
    """Tokens of a backward tile. In float32 half as many as forward: five inputs of 16 values a
    thread spill there (Triton 3.8, sm_90)."""
    return min(max(1, launch.rows // (1 + (dtype == torch.float32))), BACKWARD_TOKENS)


def check_tokens(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """ValueError unless x is (B, N, D) in a kernel's dtype and, when `like` is given, of its shape
    and dtype."""
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


def check_modulation(name: str, modulation: Tensor, x: Tensor, *columns: int) -> None:
    """ValueError unless modulation is (B or 1, K) in a kernel's dtype and D columns from each of
    `columns` on lie inside it."""
    if (
        modulation.dim() != 2
        or modulation.shape[0] not in (1, x.shape[0])
        or modulation.dtype not in DTYPES
    ):
        raise ValueError(
            f"{name} must be (B or 1, K) = ({x.shape[0]} or 1, K) in float16, bfloat16 or float32, "
            f"not {tuple(modulation.shape)} in {modulation.dtype}"
        )
    for column in columns:
        if not 0 <= column <= modulation.shape[1] - x.shape[2]:
            raise ValueError(
                f"column {column} of {name}: {x.shape[2]} values from there do not lie in its"
                f" {modulation.shape[1]} columns"
            )


def rows(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous (any strides before it, 0 too), else a
    contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def empty_rows(x: Tensor, float8: bool) -> tuple[Tensor, Tensor | None]:
    """An output (B, N, D) in x's dtype and None, or in float8 and its scales (B, N) float32."""
    if not float8:
        return torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device), None
    shape = (x.shape[0], x.shape[1])
    return torch.empty(tuple(x.shape), dtype=FP8, device=x.device), torch.empty(
        shape, dtype=torch.float32, device=x.device
    )


def row_stride(table: Tensor) -> int:
    """Stride from one sample's row to the next: 0 for one row that all samples share."""
    return table.stride(0) if table.shape[0] > 1 else 0


def column_gradient(like: Tensor, sums: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Gradient of a packed modulation `like` (B or 1, K): of sums (B, chunks, parts, D) float32
    part i goes to columns[i], 0 elsewhere."""
    total = (
        sums.sum(1) if like.shape[0] > 1 else sums.sum((0, 1))[None]
    )  # fixed order: equal bits at every repeat
    gradient = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for part, column in enumerate(columns):
        gradient[:, column : column + sums.shape[3]] += total[:, part]
    return gradient.to(like.dtype)


def row_cases(
    name: str,
    fn: Any,
    absent: tuple[str, ...] = (),
    group_end: bool = False,
    float8: bool = False,
    pdl: bool = False,
) -> Iterator[CompileCase]:
    """A row kernel for every dtype and network width, without the pointers in `absent`; float8:
    with a float8 `out` and `scales`."""
    for dtype in (torch.bfloat16,) if pdl else DTYPES:
        for size in WIDTHS:
            launch = row_launch(size)
            constants: dict[str, object] = {
                "D": size,
                "BLOCK": launch.block,
                "ROWS": launch.rows,
                "GROUP_END": group_end,
                "PDL": pdl,
            }
            if "TOKENS" in fn.arg_names:
                constants |= {"ROWS": backward_rows(launch, dtype), "TOKENS": BACKWARD_TOKENS}
            constants = {
                key: value for key, value in constants.items() if key in fn.arg_names
            } | dict.fromkeys(absent)
            types = {
                **dict.fromkeys(_POINTERS, f"*{DTYPES[dtype]}"),
                "sums": "*fp32",
                "steps": "*fp32",
                "scales": "*fp32",
                "eps": "fp32",
            }
            if float8:
                types["out"] = "*fp8e4nv"
            signature = {
                key: "constexpr" if key in constants else types.get(key, "i32")
                for key in fn.arg_names
            }
            divisible = tuple(
                i
                for i, key in enumerate(signature)
                if key not in {"tokens", "step_row", "eps", *constants}
            )
            limits = (
                {"arches": (90, 100)} if float8 else overlap_options(pdl)
            )  # float8 conversion needs sm_89
            yield CompileCase(
                f"{name}/{DTYPES[dtype]}/{size}",
                fn,
                signature,
                constants,
                divisible,
                launch.warps,
                **limits,
            )


@triton.jit
def normalize(b_x, m_columns, eps, D: tl.constexpr):
    """LayerNorm of a tile b_x (ROWS, BLOCK) float32 whose masked columns are 0: the normalised
    tile, 0 there too, and 1/std (ROWS, 1)."""
    mean = tl.sum(b_x, axis=1) / D
    centered = tl.where(m_columns[None, :], b_x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)[:, None]
    return centered * rstd, rstd


@triton.jit
def modulate(b_normalized, b_shift, b_scale):
    """normalised*(1 + scale) + shift of a tile (ROWS, BLOCK); shift and scale (BLOCK,); the product
    is not rounded."""
    return tl.fma(b_normalized, (1.0 + b_scale)[None, :], b_shift[None, :])


@triton.jit
def normalize_backward(b_grad, b_normalized, rstd, D: tl.constexpr):
    """Gradient of LayerNorm's input (ROWS, BLOCK) from that of its output, both 0 in masked
    columns."""
    mean = tl.sum(b_grad, axis=1) / D
    product = tl.sum(b_grad * b_normalized, axis=1) / D
    return (b_grad - mean[:, None] - b_normalized * product[:, None]) * rstd


@triton.jit
def store_rows(out, scales, b_h, o_row, o_d, mask, D: tl.constexpr):
    """Stores a tile (ROWS, BLOCK), 0 in masked columns, at rows o_row (ROWS, 1); with `scales` as
    float8 and one float32 scale a row."""
    if scales is None:
        tl.store(out + o_row * D + o_d[None, :], b_h.to(out.dtype.element_ty), mask=mask)
    else:
        b_q, b_scale = quantize_tile(b_h)
        tl.store(out + o_row * D + o_d[None, :], b_q, mask=mask)
        # The mask of the first column is the mask of the row.
        tl.store(
            scales + o_row,
            b_scale[:, None],
            mask=tl.max(mask.to(tl.int32), axis=1, keep_dims=True) > 0,
        )
