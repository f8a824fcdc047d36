"""Row-wise float8 (e4m3) quantisation: q = round(x / s), s = max|x| / 448 of each row; x ~ q * s.

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

from .compile_case import DTYPES, CompileCase, kernel_case
from .device import require_device

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-100  # of a row of zeros; its reciprocal is still finite
MAX_COLUMNS = 16384


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    scale = (x.float().abs().amax(-1) * (1.0 / FP8_MAX)).clamp_min(SMALLEST_SCALE)
    return (x.float() * (1.0 / scale)[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@triton.jit
def quantize_tile(values):
    """values (ROWS, COLUMNS) float32, 0 in masked places -> q (ROWS, COLUMNS), scale (ROWS,)."""
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
    x_ptr, q_ptr, scale_ptr, rows, row_stride,
    COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles,): BLOCK_ROWS whole rows a program."""
    offs_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.arange(0, BLOCK_COLUMNS)
    mask_r = offs_r < rows
    mask = mask_r[:, None] & (offs_c < COLUMNS)[None, :]
    p_x = x_ptr + offs_r.to(tl.int64)[:, None] * row_stride + offs_c[None, :]
    q, scale = quantize_tile(tl.load(p_x, mask=mask, other=0.0).to(tl.float32))
    tl.store(q_ptr + offs_r.to(tl.int64)[:, None] * COLUMNS + offs_c[None, :], q, mask=mask)
    tl.store(scale_ptr + offs_r, scale, mask=mask_r)


def _launch_parameters(columns: int) -> tuple[dict[str, int], int]:
    """(constants, warps): about 2048 values a program, 16 values a thread in wider rows."""
    block = max(16, triton.next_power_of_2(columns))
    blocks = {"COLUMNS": columns, "BLOCK_COLUMNS": block, "BLOCK_ROWS": max(1, 2048 // block)}
    return blocks, min(16, max(4, block // 512))


@torch.library.custom_op("odelt_fast::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of the module's equation.

    A NaN stays NaN and leaves its row's scale alone; an infinity makes the scale infinite, and so
    the whole row NaN when multiplied back.

    Args:
        x: (..., D) float32, bfloat16 or float16, any layout; copied where rows are not contiguous.

    Returns:
        q (..., D) float8_e4m3fn and scale (...) float32.

    Raises:
        ValueError: another dtype, D above 16384, or off the GPU.
    """
    if x.dtype not in DTYPES or not x.dim() or not 0 < x.shape[-1] <= MAX_COLUMNS:
        raise ValueError(
            f"quantize_rows: x must be (..., D), D from 1 to {MAX_COLUMNS}, float32, bfloat16 or"
            f" float16, not {tuple(x.shape)} {x.dtype}"
        )
    require_device("quantize_rows", x)
    q = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    blocks, warps = _launch_parameters(x.shape[-1])
    if len(rows):
        grid = (triton.cdiv(len(rows), blocks["BLOCK_ROWS"]),)
        with torch.cuda.device_of(x):
            quantize_kernel[grid](
                rows, q, scale, len(rows), rows.stride(0), **blocks, num_warps=warps
            )
    return q, scale


quantize_rows.register_fake(lambda x: quantize_rows_reference(x.contiguous()))


def compile_cases() -> Iterator[CompileCase]:
    """Each dtype at the widths of the presets and their hidden layers; float8 needs sm_89."""
    for columns in (768, 1152, 3072, 4608):
        for kind in DTYPES.values():
            types = {"x_ptr": f"*{kind}", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
            blocks, warps = _launch_parameters(columns)
            yield kernel_case(
                f"quantize/{columns}/{kind}", quantize_kernel, types, blocks, ("rows",),
                num_warps=warps, num_stages=1, arches=(90, 100),
            )  # fmt: skip
