"""SiLU and the modulation of all blocks as one product: out = silu(condition) W^T + b, W of all
blocks stacked; SiLU in float32.

condition (R, D), one row per distinct label or sample; W (K, D) and b (K,) are the blocks'
modulation weights one below the other, 6*D rows a block, in the order shift, scale, gate
(attention), shift, scale, gate (MLP); out (R, K). Block i of out is columns 6*D*i .. 6*D*(i + 1).
Bytes: K*D weights read once (DiT-B/2, 12 blocks, bfloat16: 85 MB). Up to 16 rows that is all there
is, and one kernel reads W while SiLU is computed in its registers; above, the product is cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase, overlap_options
from odelt_fast.kernels.device import launch_options, require_device, wait_for_inputs
from odelt_fast.kernels.rows import DTYPES, WIDTHS, rows

FEW_ROWS = 16  # the narrow side of a tensor-core tile
# (rows of W, columns) of a tile: 64 x 128 in 16-bit dtypes is 64 KiB in flight a program. Exact
# float32 products use no tensor cores and would spill 3440 bytes a thread there.
_TILES = {"fp16": (64, 128), "bf16": (64, 128), "fp32": (16, 32)}
_WARPS, _STAGES = 4, 4


def stack_modulation(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The blocks' modulation weights (6*D, D) and biases (6*D,) one below the other: (K, D) and
    (K,), contiguous."""
    return torch.cat(list(weights)).contiguous(), torch.cat(list(biases)).contiguous()


def modulation_reference(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch: SiLU in the dtype of condition, the product in that of the
    weights."""
    return F.linear(F.silu(condition).to(weight.dtype), weight, bias)


@triton.jit
def _kernel(
    condition, weight, bias, out, count, columns, condition_row, weight_row,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
        b_condition = tl.load(
            condition + o_r[None, :] * condition_row + o_d[:, None],
            mask=m_d[:, None] & m_r[None, :],
            other=0.0,
        )
        b_condition = b_condition.to(tl.float32)
        b_silu = b_condition / (1.0 + tl.exp(-b_condition))
        b_sum = tl.dot(b_weight, b_silu.to(b_weight.dtype), b_sum, input_precision="ieee")
    b_sum += tl.load(bias + o_k, mask=m_k, other=0.0).to(tl.float32)[:, None]
    o_out = o_r.to(tl.int64)[None, :] * columns + o_k[:, None]
    tl.store(out + o_out, b_sum.to(out.dtype.element_ty), mask=m_k[:, None] & m_r[None, :])


@torch.library.custom_op("odelt_fast::modulation", mutates_args=())
def modulation(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(condition) W^T + b: condition (R, D), weight (K, D), bias (K,) -> (R, K);
    differentiable.

    weight and bias of one dtype among float16, bfloat16 and float32, which is the result's;
    condition of any of these (the model sums it in float32); any strides. Raises ValueError for
    shapes, dtypes and devices that do not fit.
    """
    if condition.dim() != 2 or condition.dtype not in DTYPES or not condition.shape[1]:
        raise ValueError(
            "condition must be (R, D) in float16, bfloat16 or float32, not"
            f" {tuple(condition.shape)} in {condition.dtype}"
        )
    count, size = condition.shape
    columns = weight.shape[0]
    if (
        weight.shape != (columns, size)
        or bias.shape != (columns,)
        or not weight.dtype == bias.dtype
        or weight.dtype not in DTYPES
    ):
        raise ValueError(
            f"weight and bias must be (K, {size}) and (K,) in float16, bfloat16 or float32, "
            f"not {tuple(weight.shape)} in {weight.dtype} and {tuple(bias.shape)} in {bias.dtype}"
        )
    require_device("modulation", condition, weight, bias)
    if count > FEW_ROWS or not count * columns:
        return modulation_reference(
            condition.contiguous(), weight.contiguous(), bias
        )  # see _gradients
    condition, weight, bias = rows(condition), rows(weight), bias.contiguous()
    out = torch.empty((count, columns), dtype=weight.dtype, device=condition.device)
    with torch.cuda.device_of(condition):
        block_k, block_d = _tile(DTYPES[weight.dtype], size)
        _kernel[(triton.cdiv(columns, block_k),)](
            condition, weight, bias, out, count, columns, condition.stride(0), weight.stride(0),
            D=size, BLOCK_R=FEW_ROWS, BLOCK_K=block_k, BLOCK_D=block_d, **launch_options(condition.device, _WARPS, _STAGES),
        )  # fmt: skip
    return out


def _tile(dtype: str, size: int) -> tuple[int, int]:
    block_k, block_d = _TILES[dtype]
    return block_k, min(block_d, max(16, triton.next_power_of_2(size)))


@modulation.register_fake
def _(condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight.new_empty((condition.shape[0], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # PyTorch's float16 products on a CPU take in what lies between the rows of a strided operand;
    # on a card nothing is copied as a rule.
    condition, weight, grad = (tensor.contiguous() for tensor in (*ctx.saved_tensors, grad))
    needs_condition, needs_weight, needs_bias = ctx.needs_input_grad
    grad_condition = (
        torch.ops.aten.silu_backward((grad @ weight).to(condition.dtype), condition)
        if needs_condition
        else None
    )
    return (
        grad_condition,
        grad.t() @ F.silu(condition).to(weight.dtype) if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


modulation.register_autograd(_gradients, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and network width, with the model's float32 condition; in bfloat16 also
    overlapped with the kernel before."""
    for dtype, pdl in (*((dtype, False) for dtype in DTYPES.values()), ("bf16", True)):
        for size in WIDTHS:
            block_k, block_d = _tile(dtype, size)
            constants: dict[str, object] = {
                "D": size,
                "BLOCK_R": FEW_ROWS,
                "BLOCK_K": block_k,
                "BLOCK_D": block_d,
                "PDL": pdl,
            }
            pointers = ("condition", "weight", "bias", "out")
            kinds = {
                **dict.fromkeys(pointers, f"*{dtype}"),
                "condition": "*fp32",
                **dict.fromkeys(constants, "constexpr"),
            }
            signature = {name: kinds.get(name, "i32") for name in _kernel.arg_names}
            name = f"modulation/{'overlapped/' * pdl}{dtype}/{size}"
            yield CompileCase(
                name,
                _kernel,
                signature,
                constants,
                (0, 1, 2, 3, 5, 6, 7),
                _WARPS,
                _STAGES,
                **overlap_options(pdl),
            )
