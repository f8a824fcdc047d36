"""End of one attempted step of an adaptive solver: error norm, acceptance, next step size, state.

What `integrate_adaptive` decides on the host between two attempts, in three launches that a graph
can hold and a while node repeat. With x_new and the stages k_i of one attempt: norm of h*sum_i e_i
k_i over atol + rtol*max(|x|, |x_new|), root mean square of each sample or, shared, of all running
ones; taken where norm <= 1; the PI controller's next h (Hairer and Wanner II, IV.2), in float64;
then x and k_0 of the samples whose step is taken, their statistics, and times and step size of the
next attempt. A sample that has ended stays as it is.

Tensors of a solve, changed in place: x (B, ...) and stages (S, B, ...) in one dtype, the last stage
being the velocity at x_new, which is stage S - 1 of a FSAL method and one stage more of others;
control (5, B) float64: t, h, last good h, last accepted norm, limit of growth; counters (4, B)
int64: status (-1 running, then the index into `STATUSES`), accepted, rejected, evaluations; step
(B,) float64, signed; times (S, B) float64 of the stages; running (1,) int32: 0 once all have ended.
Bytes: reads x, x_new and the stages with an error weight, and for taken samples reads x_new and one
stage, writes x and k_0. Kernels: adaptive_kernels.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from odelt_fast.solvers.step_control import (
    RUNNING,
    Control,
    Counts,
    StepRules,
    decide,
    error_norm,
    proposed,
)

from .adaptive_kernels import commit_kernel, decide_kernel, norm_kernel
from .compile_case import CompileCase, kernel_case
from .device import require_device
from .solver_update import STATES, sum_type

MOST_SAMPLES = 1024  # whose step sizes one program decides: more spill
_BLOCK, _WARPS, _CHUNK = 1024, 4, 16384


def first_attempt(control: Tensor, nodes: Tensor, rules: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(step (B,), times (S, B), whether it is the last (B,)) of an attempt from control's t and h.

    nodes (S,) float64: c of each stage.
    """
    t0, t1, t = rules[0], rules[1], control[0]
    step, t_new, last = proposed(t, control[1], t1, torch.where(t1 < t0, -1.0, 1.0).double())
    times = torch.where(nodes[:, None] == 1, t_new, t + nodes[:, None] * step)
    return step, times.clamp(torch.minimum(t0, t1), torch.maximum(t0, t1)), last


def adaptive_step_update_reference(
    x: Tensor, x_new: Tensor, stages: Tensor, control: Tensor, counters: Tensor, step: Tensor,
    times: Tensor, running: Tensor, nodes: Tensor, error: Tensor, error3: Tensor | None,
    rules: Tensor, shared: bool, fsal: bool,
) -> None:  # fmt: skip
    """The same in plain PyTorch, with the decisions of step_control.py."""
    fixed = StepRules(*rules.tolist())
    column = (-1, *[1] * (x.dim() - 1))
    d = step.to(x.dtype).view(column)
    counts, last = Counts(*counters), first_attempt(control, nodes, rules)[2]
    is_running = counts.status == RUNNING

    def combination(weights: Tensor) -> Tensor:
        terms = [weight * k for weight, k in zip(weights.tolist(), stages) if weight]
        return d * sum(terms[1:], terms[0])

    estimate, estimate3 = combination(error), None if error3 is None else combination(error3)
    largest = torch.maximum(x.abs(), x_new.abs())
    norm = error_norm(estimate, estimate3, largest, is_running, fixed, shared)
    finite = (x_new.isfinite() & estimate.isfinite()).flatten(1).all(1)
    taken = (norm <= 1) & is_running
    x.copy_(torch.where(taken.view(column), x_new, x))
    stages[0] = torch.where(taken.view(column), stages[-1], stages[0])
    evaluations = is_running * (len(error) - 1) + (taken & ~last & (not fsal))
    counts = counts._replace(evaluations=counts.evaluations + evaluations)
    k_finite = stages[0].isfinite().flatten(1).all(1)
    decided, counts = decide(Control(*control), counts, norm, finite, k_finite, fixed, shared)
    control.copy_(torch.stack(decided))
    counters.copy_(torch.stack(counts))
    running.copy_((counters[0] == RUNNING).any())
    following, at, _ = first_attempt(control, nodes, rules)
    step.copy_(following)
    times.copy_(at)


@torch.library.custom_op(
    "odelt_fast::adaptive_step_update",
    mutates_args=("x", "stages", "control", "counters", "step", "times", "running"),
)
def adaptive_step_update(
    x: Tensor, x_new: Tensor, stages: Tensor, control: Tensor, counters: Tensor, step: Tensor,
    times: Tensor, running: Tensor, nodes: Tensor, error: Tensor, error3: Tensor | None,
    rules: Tensor, shared: bool, fsal: bool,
) -> None:  # fmt: skip
    """Changes what the module's text names, from x_new and the stages of an attempt.

    Args:
        step, times: those that the attempt was for; all tensors contiguous, on one device.
        nodes: (S,) float64, c of the tableau.
        error, error3: (S,) or, without FSAL, (S - 1,) float64, its error weights.
        rules: (11,) float64, a `StepRules`.
        shared: one norm, time and step for all samples.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit.
    """
    batch, count = len(x) if x.dim() else 0, len(stages)
    if not x.dim() or x.dtype not in STATES or batch > MOST_SAMPLES:
        raise ValueError(
            f"x must be (B, ...), B up to {MOST_SAMPLES}, in a floating dtype, not {tuple(x.shape)}"
            f" in {x.dtype}"
        )
    f64, weighed = torch.float64, (count - (not fsal),)
    _check(
        x=(x, x.shape, x.dtype), x_new=(x_new, x.shape, x.dtype),
        stages=(stages, (count, *x.shape), x.dtype), control=(control, (5, batch), f64),
        counters=(counters, (4, batch), torch.int64), step=(step, (batch,), f64),
        times=(times, (count, batch), f64), running=(running, (1,), torch.int32),
        nodes=(nodes, (count,), f64), error=(error, weighed, f64), error3=(error3, weighed, f64),
        rules=(rules, (11,), f64),
    )  # fmt: skip
    if not x.numel():
        return
    values, last_stage = x[0].numel(), count - 1
    chunks = triton.cdiv(values, _CHUNK)
    squares, squares3 = (
        None if weights is None else torch.empty((batch, chunks), dtype=f64, device=x.device)
        for weights in (error, error3)
    )
    faults = torch.empty((batch, chunks), dtype=torch.int32, device=x.device)
    taken = torch.empty((batch,), dtype=torch.int32, device=x.device)
    block = triton.next_power_of_2(batch)
    with torch.cuda.device_of(x):
        norm_kernel[(batch * chunks,)](
            x, x_new, stages, error, error3, step, rules, squares, squares3, faults,
            values, last_stage, stages.stride(0), STAGES=len(error), **_norm_constants(x.dtype),
            num_warps=_WARPS,
        )  # fmt: skip
        decide_kernel[(1,)](
            squares, squares3, faults, control, counters, step, times, nodes, rules, taken,
            running, batch, chunks, values, EVALUATIONS=len(error) - 1, NODES=count,
            SHARED=shared, FSAL=fsal, BLOCK=block, num_warps=_decide_warps(block),
        )  # fmt: skip
        commit_kernel[(batch * triton.cdiv(values, _BLOCK),)](
            x, x_new, stages, taken, values, last_stage, stages.stride(0),
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


adaptive_step_update.register_fake(lambda *_: None)


def _norm_constants(dtype: torch.dtype) -> dict[str, Any]:
    # 512 values of 12 stages and two sums spill in float64.
    block = _BLOCK // 4 if dtype == torch.float64 else _BLOCK
    return {"BLOCK": block, "CHUNK": _CHUNK, "SUM": sum_type(dtype)}


def _decide_warps(block: int) -> int:
    return min(16, max(1, block // 128))


def _check(**wanted: tuple[Tensor | None, tuple[int, ...], torch.dtype]) -> None:
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous {tuple(shape)} in {dtype}, not {tuple(tensor.shape)}"
                f" of strides {tensor.stride()} in {tensor.dtype}"
            )
    require_device("adaptive_step_update", *(tensor for tensor, _, _ in wanted.values()))


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype of the state, 7 stages (Dormand-Prince 5) and 12 with two estimates (DOP853).

    Decisions over few and many samples.
    """
    doubles = (
        "error",
        "error3",
        "step",
        "rules",
        "squares",
        "squares3",
        "control",
        "times",
        "nodes",
    )
    types = dict.fromkeys(doubles, "*fp64") | {"counters": "*i64"}
    types |= dict.fromkeys(("faults", "taken", "running"), "*i32")
    unaligned = ("last_stage", "batch", "chunks")
    for dtype, kind in STATES.items():
        types |= dict.fromkeys(("x", "x_new", "stages"), f"*{kind}")
        for stages in (7, 12):
            absent = dict.fromkeys(("error3", "squares3") if stages == 7 else ())
            constants = {"STAGES": stages, **_norm_constants(dtype), **absent}
            yield kernel_case(
                f"adaptive/norm/{stages}/{kind}", norm_kernel, types, constants, unaligned,
                num_warps=_WARPS,
            )  # fmt: skip
        yield kernel_case(
            f"adaptive/commit/{kind}", commit_kernel, types, {"BLOCK": _BLOCK}, unaligned,
            num_warps=_WARPS,
        )  # fmt: skip
    for block, shared in itertools.product((1, 128, MOST_SAMPLES), (False, True)):
        constants = {"EVALUATIONS": 6, "NODES": 7, "SHARED": shared, "FSAL": True, "BLOCK": block}
        # Decisions read a few numbers of each sample, in rows that start anywhere.
        yield kernel_case(
            f"adaptive/decide/{block}{'/shared' * shared}", decide_kernel, types,
            {**constants, "squares3": None}, unaligned,
            num_warps=_decide_warps(block), vector_bytes=8,
        )  # fmt: skip
