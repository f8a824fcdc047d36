"""SiLU and the modulation of all blocks as one product: out = silu(condition) W^T + b.

condition (R, D), one row per distinct label or sample; W (K, D) and b (K,) are the blocks'
modulation weights one below the other, 6*D rows a block, in the order shift, scale, gate
(attention), shift, scale, gate (MLP); out (R, K). Block i of out is columns 6*D*i .. 6*D*(i + 1).
SiLU is float32. Bytes: K*D weights read once (DiT-B/2, 12 blocks, bfloat16: 85 MB). Up to 16 rows
that is all there is, and one kernel reads W while SiLU is computed in its registers; above, the
product is cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, WIDTHS, CompileCase, kernel_case
from .device import launch_options, require_device, wait_for_inputs
from .rows import check_layer, rows

FEW_ROWS = 16  # the narrow side of a tensor-core tile
# (rows of W, columns) of a tile: 64 x 128 in 16-bit dtypes is 64 KiB in flight a program. Exact
# float32 products use no tensor cores and would spill 3440 bytes a thread there.
_TILES = MappingProxyType(
    {torch.float16: (64, 128), torch.bfloat16: (64, 128), torch.float32: (16, 32)}
)
_WARPS, _STAGES = 4, 4


def modulation_reference(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch: SiLU in condition's dtype, the product in that of the weights."""
    return F.linear(F.silu(condition).to(weight.dtype), weight, bias)


@triton.jit
def _kernel(
    condition, weight, bias, out, count, columns, condition_row, weight_row,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BLOCK_K columns of out,); all rows of condition in each."""
    wait_for_inputs(PDL)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, BLOCK_R)
    m_k = o_k < columns
    m_r = o_r < count
    b_sum = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        o_weight = o_k.to(tl.int64)[:, None] * weight_row + o_d[None, :]
        b_weight = tl.load(weight + o_weight, mask=m_k[:, None] & m_d[None, :], other=0.0)
        p_condition = condition + o_r[None, :] * condition_row + o_d[:, None]
        b_condition = tl.load(p_condition, mask=m_d[:, None] & m_r[None, :], other=0.0)
        b_condition = b_condition.to(tl.float32)
        b_silu = b_condition / (1.0 + tl.exp(-b_condition))
        b_sum = tl.dot(b_weight, b_silu.to(b_weight.dtype), b_sum, input_precision="ieee")
    b_sum += tl.load(bias + o_k, mask=m_k, other=0.0).to(tl.float32)[:, None]
    o_out = o_r.to(tl.int64)[None, :] * columns + o_k[:, None]
    tl.store(out + o_out, b_sum, mask=m_k[:, None] & m_r[None, :])


@torch.library.custom_op("odelt_fast::modulation", mutates_args=())
def modulation(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(condition) W^T + b.

    Args:
        condition: (R, D) float16, bfloat16 or float32 (the model sums it in float32), any strides.
        weight, bias: (K, D) and (K,) of one of these dtypes, any strides.

    Returns:
        (R, K) in the dtype of weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if condition.dim() != 2 or condition.dtype not in DTYPES or not condition.shape[1]:
        raise ValueError(
            "condition must be (R, D) in float16, bfloat16 or float32, not"
            f" {tuple(condition.shape)} in {condition.dtype}"
        )
    (count, size), columns = condition.shape, len(weight)
    check_layer(weight, bias, "K", size)
    require_device("modulation", condition, weight, bias)
    if count > FEW_ROWS or not count * columns:
        # PyTorch's float16 products on a CPU take in what lies between the rows of a strided
        # operand; on a card nothing is copied as a rule.
        return modulation_reference(condition.contiguous(), weight.contiguous(), bias)
    condition, weight, bias = rows(condition), rows(weight), bias.contiguous()
    out = torch.empty((count, columns), dtype=weight.dtype, device=condition.device)
    blocks = _blocks(weight.dtype, size)
    with torch.cuda.device_of(condition):
        _kernel[(triton.cdiv(columns, blocks["BLOCK_K"]),)](
            condition, weight, bias, out, count, columns, condition.stride(0), weight.stride(0),
            **blocks, **launch_options(condition.device, _WARPS, _STAGES),
        )  # fmt: skip
    return out


def _blocks(dtype: torch.dtype, size: int) -> dict[str, int]:
    block_k, block_d = _TILES[dtype]
    block_d = min(block_d, max(16, triton.next_power_of_2(size)))
    return {"D": size, "BLOCK_R": FEW_ROWS, "BLOCK_K": block_k, "BLOCK_D": block_d}


modulation.register_fake(modulation_reference)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and width, with the model's float32 condition; in bfloat16 also overlapped."""
    for dtype, pdl in (*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)):
        kind = DTYPES[dtype]
        types = dict.fromkeys(("weight", "bias", "out"), f"*{kind}") | {"condition": "*fp32"}
        for size in WIDTHS:
            yield kernel_case(
                f"modulation/{'overlapped/' * pdl}{kind}/{size}", _kernel, types,
                {**_blocks(dtype, size), "PDL": pdl}, ("count",),
                num_warps=_WARPS, num_stages=_STAGES,
            )  # fmt: skip
