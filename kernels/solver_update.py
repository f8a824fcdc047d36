"""Arithmetic of a Runge-Kutta step: stage combination x + h*sum_i a_i k_i, and the error norm of
each sample.

x (B, ...): state; k (S, B, ...): stages, one buffer; a, e (S,): a row of the Butcher tableau and
its error weights, on the device, float32 or float64; h (B or 1,): step size, on the device, so that
an adaptive solver needs no host. Sums are float32, or float64 for a float64 state. A stage whose
coefficient is 0 is not read. Error norm: sqrt(mean_j((h*sum_i e_i k_ij / (atol + rtol*max(|x_j|,
|x'_j|)))^2)). Bytes: combination reads the used stages and x, writes x'; the norm reads the stages,
x and x'.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import require_device

STATES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_BLOCK, _WARPS = 1024, 4
# values whose squares one program adds: a sample of 4 x 32 x 32 latents needs no second pass
_CHUNK = 16384
_STAGES = (
    1,
    2,
    4,
    6,
    7,
    # of Euler, Heun and midpoint, RK4 and Bogacki-Shampine, Dormand-Prince without and with its seventh
)


def combine_stages_reference(
    x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor
) -> Tensor:
    """The same in plain PyTorch, in the state's dtype."""
    step = step.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return x + step * sum(a * k for a, k in zip(coefficients.to(x.dtype), stages.to(x.dtype)))


def error_norm_reference(
    x: Tensor,
    x_new: Tensor,
    stages: Tensor,
    weights: Tensor,
    step: Tensor,
    rtol: float,
    atol: float,
) -> Tensor:
    """The same in plain PyTorch, in the state's dtype."""
    error = combine_stages_reference(torch.zeros_like(x), stages, weights, step)
    return (
        (error / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
        .square()
        .flatten(1)
        .mean(1)
        .sqrt()
    )


@triton.jit
def stage_sum(
    stages,
    coefficients,
    o_x,
    mask,
    stage_stride,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
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
    chunks = tl.cdiv(count, BLOCK)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < count
    o_x = i_b * count + o_n
    b_sum = stage_sum(stages, coefficients, o_x, mask, stage_stride, STAGES, BLOCK, SUM)
    b_x = tl.fma(
        tl.load(step + i_b * step_row).to(SUM),
        b_sum,
        tl.load(x + o_x, mask=mask, other=0.0).to(SUM),
    )
    tl.store(out + o_x, b_x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _error_kernel(
    x, x_new, stages, weights, step, rtol, atol, out, count, stage_stride, step_row,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(count, CHUNK)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    b_h = tl.load(step + i_b * step_row).to(SUM)
    b_rtol = tl.load(rtol).to(SUM)
    b_atol = tl.load(atol).to(SUM)
    b_squares = tl.zeros((BLOCK,), SUM)
    for start in range(0, tl.minimum(CHUNK, count - first), BLOCK):
        o_n = first + start + tl.arange(0, BLOCK)
        mask = o_n < count
        o_x = i_b * count + o_n
        b_error = b_h * stage_sum(stages, weights, o_x, mask, stage_stride, STAGES, BLOCK, SUM)
        b_x = tl.abs(tl.load(x + o_x, mask=mask, other=0.0).to(SUM))
        b_new = tl.abs(tl.load(x_new + o_x, mask=mask, other=0.0).to(SUM))
        b_largest = tl.where(
            (b_x >= b_new) | (b_x != b_x), b_x, b_new
        )  # NaN in either state must reach the norm
        b_ratio = tl.where(mask, b_error / (b_atol + b_rtol * b_largest), 0.0)
        b_squares += b_ratio * b_ratio
    tl.store(out + tl.program_id(0), tl.sum(b_squares, axis=0))


def _check(
    operator: str, x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor, *others: Tensor
) -> Tensor:
    """The stages that have a coefficient, each of them contiguous; ValueError for what does not
    fit."""
    if x.dim() < 1 or x.dtype not in STATES:
        raise ValueError(
            f"{operator}: x must be (B, ...) in float16, bfloat16, float32 or float64, not"
            f" {tuple(x.shape)} in {x.dtype}"
        )
    count = coefficients.shape[0] if coefficients.dim() == 1 else 0
    if (
        not count
        or stages.shape[1:] != x.shape
        or stages.shape[0] < count
        or stages.dtype not in STATES
    ):
        raise ValueError(
            f"{operator}: stages must be (S, *{tuple(x.shape)}), S at least the number of"
            f" coefficients, not {tuple(stages.shape)} in {stages.dtype} for coefficients of shape"
            f" {tuple(coefficients.shape)}"
        )
    if step.shape not in ((1,), (x.shape[0],)):
        raise ValueError(f"{operator}: step must be ({x.shape[0]} or 1,), not {tuple(step.shape)}")
    if any(tensor.dtype not in (torch.float32, torch.float64) for tensor in (coefficients, step)):
        raise ValueError(
            f"{operator}: coefficients and step must be float32 or float64, not"
            f" {coefficients.dtype} and {step.dtype}"
        )
    require_device(operator, x, stages, coefficients, step, *others)
    used = stages[:count]
    return used if used[0].is_contiguous() else used.contiguous()


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """In which type a state of `dtype` is added up."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@torch.library.custom_op("odelt_fast::combine_stages", mutates_args=())
def combine_stages(x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor) -> Tensor:
    """x + step*sum_i coefficients[i]*stages[i]: x (B, ...) -> the same shape and dtype, contiguous.

    stages (S, B, ...), S at least len(coefficients); coefficients (s,), step (B or 1,) float32 or
    float64. Floating dtypes may differ. Raises ValueError for shapes, dtypes and devices that do
    not fit.
    """
    used = _check("combine_stages", x, stages, coefficients, step)
    x, coefficients, step = x.contiguous(), coefficients.contiguous(), step.contiguous()
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if out.numel():
        count = x[0].numel()
        with torch.cuda.device_of(x):
            _combine_kernel[(len(x) * triton.cdiv(count, _BLOCK),)](
                x, used, coefficients, step, out, count, used.stride(0), int(len(step) > 1),
                STAGES=len(used), BLOCK=_BLOCK, SUM=sum_type(x.dtype), num_warps=_WARPS,
            )  # fmt: skip
    return out


@combine_stages.register_fake
def _(x: Tensor, stages: Tensor, coefficients: Tensor, step: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::error_norm", mutates_args=())
def error_norm(
    x: Tensor,
    x_new: Tensor,
    stages: Tensor,
    weights: Tensor,
    step: Tensor,
    rtol: Tensor,
    atol: Tensor,
) -> Tensor:
    """Root mean square of error over tolerance of each sample: (B,) float32, or float64 for a
    float64 state; at most 1 is accepted.

    x, x_new (B, ...): the state before and after; stages, weights, step as for combine_stages;
    rtol, atol: (1,) float32 or float64. A NaN or infinite stage, step or state gives NaN or
    infinity. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    if x_new.shape != x.shape or x_new.dtype != x.dtype:
        raise ValueError(
            f"error_norm: x_new must be {tuple(x.shape)} in {x.dtype} as x is, not"
            f" {tuple(x_new.shape)} in {x_new.dtype}"
        )
    if any(
        tolerance.shape != (1,) or tolerance.dtype not in (torch.float32, torch.float64)
        for tolerance in (rtol, atol)
    ):
        raise ValueError(
            f"error_norm: rtol and atol must be (1,) float32 or float64, not {tuple(rtol.shape)}"
            f" and {tuple(atol.shape)}"
        )
    used = _check("error_norm", x, stages, weights, step, x_new, rtol, atol)
    x, x_new, weights, step = (
        x.contiguous(),
        x_new.contiguous(),
        weights.contiguous(),
        step.contiguous(),
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x[:1].numel() if len(x) else 0
    if not count:
        return torch.zeros(len(x), dtype=dtype, device=x.device)
    squares = torch.empty((len(x), triton.cdiv(count, _CHUNK)), dtype=dtype, device=x.device)
    block, warps = _error_launch(x.dtype)
    with torch.cuda.device_of(x):
        _error_kernel[(squares.numel(),)](
            x, x_new, used, weights, step, rtol, atol, squares, count, used.stride(0), int(len(step) > 1),
            STAGES=len(used), BLOCK=block, CHUNK=_CHUNK, SUM=sum_type(x.dtype), num_warps=warps,
        )  # fmt: skip
    return (squares.sum(1) / count).sqrt()


def _error_launch(dtype: torch.dtype) -> tuple[int, int]:
    # With the other's the norm spills: of seven float16 stages on sm_100 (Triton 3.8), of two
    # float64 ones on sm_80 and sm_90.
    return (_BLOCK, _WARPS) if dtype == torch.float64 else (2 * _BLOCK, 2 * _WARPS)


@error_norm.register_fake
def _(
    x: Tensor,
    x_new: Tensor,
    stages: Tensor,
    weights: Tensor,
    step: Tensor,
    rtol: Tensor,
    atol: Tensor,
) -> Tensor:
    return x.new_empty(
        x.shape[:1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype of the state (stages in it, coefficients float32) and number of stages."""
    for dtype, kind in STATES.items():
        total = sum_type(dtype)
        error_block, error_warps = _error_launch(dtype)
        for stages in _STAGES:
            for name, fn, warps, extra in (
                ("combine", _combine_kernel, _WARPS, {"BLOCK": _BLOCK}),
                ("error", _error_kernel, error_warps, {"BLOCK": error_block, "CHUNK": _CHUNK}),
            ):
                constants: dict[str, object] = {"STAGES": stages, "SUM": total, **extra}
                kinds = dict.fromkeys(("coefficients", "weights", "step", "rtol", "atol"), "*fp32")
                kinds |= {
                    **dict.fromkeys(("x", "x_new", "stages"), f"*{kind}"),
                    **dict.fromkeys(constants, "constexpr"),
                }
                kinds["out"] = (
                    f"*{kind}" if name == "combine" else "*fp64" if kind == "fp64" else "*fp32"
                )
                signature = {key: kinds.get(key, "i32") for key in fn.arg_names}
                divisible = tuple(
                    i
                    for i, key in enumerate(signature)
                    if key not in constants and key != "step_row"
                )
                yield CompileCase(
                    f"solver_update/{name}/{kind}/{stages}",
                    fn,
                    signature,
                    constants,
                    divisible,
                    warps,
                )
