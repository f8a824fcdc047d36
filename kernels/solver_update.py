"""Stage combination of a Runge-Kutta step: x' = x + h*sum_i a_i k_i.

x (B, ...): state; k (S, B, ...): stages, one buffer; a (S,): a row of the Butcher tableau, on the
device; h (B or 1,): step size, on the device, so that an adaptive solver needs no host. Sums are
float32, or float64 for a float64 state. A stage whose coefficient is 0 is not read. Bytes: reads
the used stages and x, writes x'.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, CompileCase, kernel_case
from .device import require_device
from .rows import like_first

STATES = {**DTYPES, torch.float64: "fp64"}
_BLOCK, _WARPS = 1024, 4
# Of Euler; Heun and midpoint; RK4 and Bogacki-Shampine; Dormand-Prince without, with its seventh.
_STAGES = (1, 2, 4, 6, 7)


def combine_stages_reference(
    x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor
) -> Tensor:
    """The same in plain PyTorch, in the state's dtype."""
    step = step.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return x + step * sum(a * k for a, k in zip(coefficients.to(x.dtype), stages.to(x.dtype)))


@triton.jit
def stage_sum(
    stages, coefficients, o_x, mask, stage_stride,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """sum_i a_i k_i of a block; a stage whose coefficient is 0 may hold anything."""
    b_sum = tl.zeros((BLOCK,), SUM)
    for i_stage in tl.static_range(STAGES):
        b_a = tl.zeros((BLOCK,), SUM) + tl.load(coefficients + i_stage).to(SUM)
        p_stage = stages + tl.full((), i_stage, tl.int64) * stage_stride + o_x
        b_sum = tl.fma(b_a, tl.load(p_stage, mask=mask & (b_a != 0.0), other=0.0).to(SUM), b_sum)
    return b_sum


@triton.jit
def _combine_kernel(
    x, stages, coefficients, step, out, count, stage_stride, step_row,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid (B * blocks of a sample's values,)."""
    chunks = tl.cdiv(count, BLOCK)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < count
    o_x = i_b * count + o_n
    b_sum = stage_sum(stages, coefficients, o_x, mask, stage_stride, STAGES, BLOCK, SUM)
    b_step = tl.load(step + i_b * step_row).to(SUM)
    b_x = tl.fma(b_step, b_sum, tl.load(x + o_x, mask=mask, other=0.0).to(SUM))
    tl.store(out + o_x, b_x, mask=mask)


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """In which type a state of `dtype` is added up."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@torch.library.custom_op("odelt_fast::combine_stages", mutates_args=())
def combine_stages(x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor) -> Tensor:
    """x + step*sum_i coefficients[i]*stages[i].

    Args:
        x: (B, ...) float16, bfloat16, float32 or float64.
        stages: (S, B, ...) in any of these; S is at least the number of coefficients.
        coefficients, step: (s,) and (B or 1,), float32 or float64.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() < 1 or x.dtype not in STATES:
        raise ValueError(
            "combine_stages: x must be (B, ...) in float16, bfloat16, float32 or float64, not"
            f" {tuple(x.shape)} in {x.dtype}"
        )
    count = coefficients.shape[0] if coefficients.dim() == 1 else 0
    fits = stages.shape[1:] == x.shape and len(stages) >= count and stages.dtype in STATES
    if not count or not fits:
        raise ValueError(
            f"combine_stages: stages must be (S, *{tuple(x.shape)}), S at least the number of"
            f" coefficients, not {tuple(stages.shape)} in {stages.dtype} for coefficients of shape"
            f" {tuple(coefficients.shape)}"
        )
    if step.shape not in ((1,), (x.shape[0],)):
        raise ValueError(
            f"combine_stages: step must be ({x.shape[0]} or 1,), not {tuple(step.shape)}"
        )
    if not {coefficients.dtype, step.dtype} <= {torch.float32, torch.float64}:
        raise ValueError(
            "combine_stages: coefficients and step must be float32 or float64, not"
            f" {coefficients.dtype} and {step.dtype}"
        )
    require_device("combine_stages", x, stages, coefficients, step)
    used = stages[:count]
    used = used if used[0].is_contiguous() else used.contiguous()
    x, coefficients, step = x.contiguous(), coefficients.contiguous(), step.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        values = x[0].numel()
        with torch.cuda.device_of(x):
            _combine_kernel[(len(x) * triton.cdiv(values, _BLOCK),)](
                x, used, coefficients, step, out, values, used.stride(0), int(len(step) > 1),
                STAGES=count, BLOCK=_BLOCK, SUM=sum_type(x.dtype), num_warps=_WARPS,
            )  # fmt: skip
    return out


combine_stages.register_fake(like_first)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype of the state (stages in it, coefficients float32) and number of stages."""
    for dtype, kind in STATES.items():
        types = dict.fromkeys(("x", "stages", "out"), f"*{kind}")
        types |= {"coefficients": "*fp32", "step": "*fp32"}
        for stages in _STAGES:
            yield kernel_case(
                f"solver_update/combine/{kind}/{stages}", _combine_kernel, types,
                {"STAGES": stages, "BLOCK": _BLOCK, "SUM": sum_type(dtype)}, ("step_row",),
                num_warps=_WARPS,
            )  # fmt: skip
