"""Where and how a kernel is launched.

On one CUDA device, from Hopper on overlapping the kernel before, or on the CPU in Triton's
interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_overlapping: ContextVar[bool] = ContextVar("overlapping", default=False)


@contextlib.contextmanager
def overlapped_launches() -> Iterator[None]:
    """Kernels launched inside start while the one before them ends: programmatic dependent launch.

    Each waits for the whole of the one before, and for its memory, ahead of its first access: what
    overlaps is the start. It holds for the kernels that take the constant PDL (linear, attention,
    patch, modulation, final_layer, the row kernels), eager or captured in a graph, from sm_90 on;
    elsewhere it changes nothing, and nowhere does it change a result.
    """
    token = _overlapping.set(True)
    try:
        yield
    finally:
        _overlapping.reset(token)


def launch_options(
    device: torch.device, num_warps: int, num_stages: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of a launch for a kernel that takes PDL and calls `wait_for_inputs`."""
    overlap = _overlapping.get() and device.type == "cuda" and architecture(device)[0] >= 90
    options: dict[str, Any] = {"num_warps": num_warps, "PDL": overlap}
    if num_stages is not None:
        options["num_stages"] = num_stages
    # Only with a value: on cards before Hopper, launches know no such argument.
    return options | ({"launch_pdl": True} if overlap else {})


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """With PDL: waits for the writes of the kernel before, then lets the one after be set up.

    Nothing may be read or written ahead of it. Every program must call it, so that waiting for one
    kernel means that all before it ended.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(matrix, o_row, rows, first, columns, LINES: tl.constexpr):
    """Fetches 128 * LINES bytes of each row of a matrix (rows, columns) into the L2.

    From column `first` on; contiguous; columns beyond the end stand for the last. Safe ahead of
    `wait_for_inputs`, whatever lies there: nothing is read into registers.
    """
    values: tl.constexpr = 1024 // matrix.dtype.element_ty.primitive_bitwidth
    o_column = tl.minimum(first + tl.arange(0, LINES) * values, columns - 1)
    o_line = tl.minimum(o_row, rows - 1).to(tl.int64)[:, None] * columns + o_column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(matrix + o_line).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def require_device(operator: str, *tensors: Tensor | None) -> None:
    """ValueError unless all tensors lie on one device on which Triton can run `operator`."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{operator}: all tensors must be on one device, not on {names}")
    device = devices.pop()
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return
    raise ValueError(
        f"{operator}: the kernel runs on CUDA tensors (on the CPU only under TRITON_INTERPRET=1),"
        f" not on {device}"
    )


def architecture(device: torch.device) -> tuple[int, int]:
    """(compute capability as a number, multiprocessors) of a CUDA device, else those of an H200."""
    if device.type != "cuda":
        return 90, 132
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count
