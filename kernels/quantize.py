"""Row-wise float8 (e4m3) quantisation: q = round(x / s), s = max|x| / 448 of each row, so that x ~
q * s.

x (..., D) -> q (..., D) float8_e4m3fn and s (...) float32. `quantize_tile` is the device function
for kernels that hold whole rows in registers and write float8 themselves; the operator here serves
weights, once, and inputs that no such kernel makes. Bytes moved: x once, q once (half of 16-bit x),
4 bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import require_device

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-100  # of a row of zeros; its reciprocal is still finite
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_COLUMNS = 16384


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    scale = (x.float().abs().amax(-1) * (1.0 / FP8_MAX)).clamp_min(SMALLEST_SCALE)
    return (x.float() * (1.0 / scale)[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@triton.jit
def quantize_tile(values):
    """values (ROWS, COLUMNS) float32, 0 in masked places -> (q (ROWS, COLUMNS) float8 e4m3, scale
    (ROWS,) float32)."""
    # The literals repeat FP8_MAX and SMALLEST_SCALE: compiled code cannot read a module's plain
    # variables.
    scale = tl.maximum(tl.max(tl.abs(values), 1) * (1.0 / 448.0), 7.888609052210118e-31)
    scaled = values * (1.0 / scale)[:, None]
    # The product of a value and a rounded reciprocal may pass 448 by one bit, and e4m3 has no
    # infinity to round to. NaN stays NaN.
    low = tl.maximum(scaled, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv), scale


@triton.jit
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, rows, row_stride, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """Grid (row tiles,): BLOCK_ROWS whole rows a program."""
    offs_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.arange(0, BLOCK_COLUMNS)
    mask_r = offs_r < rows
    mask = mask_r[:, None] & (offs_c < COLUMNS)[None, :]
    values = tl.load(
        x_ptr + offs_r.to(tl.int64)[:, None] * row_stride + offs_c[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    q, scale = quantize_tile(values)
    tl.store(q_ptr + offs_r.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :], q, mask=mask)
    tl.store(scale_ptr + offs_r, scale, mask=mask_r)


def choose_blocks(columns: int) -> tuple[int, int, int]:
    """(BLOCK_COLUMNS, BLOCK_ROWS, warps): about 2048 values a program, 16 values a thread in wider
    rows."""
    block = max(16, triton.next_power_of_2(columns))
    return block, max(1, 2048 // block), min(16, max(4, block // 512))


@torch.library.custom_op("odelt_fast::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q (..., D) float8_e4m3fn, scale (...) float32) of x (..., D), float32, bfloat16 or float16,
    of any layout (copied where its rows are not contiguous). ValueError for other dtypes, for D
    above 16384, and off the GPU.

    A NaN stays NaN and leaves its row's scale alone; an infinity makes the scale infinite, and so
    the whole row NaN when multiplied back.
    """
    if x.dtype not in TYPES or not x.dim() or not 0 < x.shape[-1] <= MAX_COLUMNS:
        raise ValueError(
            f"quantize_rows: x must be (..., D), D from 1 to {MAX_COLUMNS}, float32, bfloat16 or"
            f" float16, not {tuple(x.shape)} {x.dtype}"
        )
    require_device("quantize_rows", x)
    columns = x.shape[-1]
    q = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    block_columns, block_rows, warps = choose_blocks(columns)
    if len(rows):
        with torch.cuda.device_of(x):
            quantize_kernel[(triton.cdiv(len(rows), block_rows),)](
                rows,
                q,
                scale,
                len(rows),
                rows.stride(0),
                columns,
                block_columns,
                block_rows,
                num_warps=warps,
            )
    return q, scale


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[:-1], dtype=torch.float32
    )


def compile_cases() -> Iterator[CompileCase]:
    """Each input type at the widths of the presets and of their hidden layers; float8 conversion
    needs sm_89 or later."""
    for columns in (768, 1152, 3072, 4608):
        for kind in TYPES.values():
            block_columns, block_rows, warps = choose_blocks(columns)
            constexprs = {
                "COLUMNS": columns,
                "BLOCK_COLUMNS": block_columns,
                "BLOCK_ROWS": block_rows,
            }
            types = {"x_ptr": f"*{kind}", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
            signature = {
                name: "constexpr" if name in constexprs else types.get(name, "i32")
                for name in quantize_kernel.arg_names
            }
            yield CompileCase(
                f"quantize/{columns}/{kind}", quantize_kernel, signature, constexprs, (0, 1, 2, 4), warps, 1, arches=(90, 100)
            )  # fmt: skip
