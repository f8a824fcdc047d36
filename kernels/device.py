"""Where a kernel may run: on one CUDA device, or on the CPU under Triton's interpreter."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def require_device(operator: str, *tensors: Tensor | None) -> None:
    """ValueError unless all tensors lie on one device on which Triton can run `operator`."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ValueError(f"{operator}: all tensors must be on one device, not on {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return
    raise ValueError(f"{operator}: the kernel runs on CUDA tensors (on the CPU only under TRITON_INTERPRET=1), not on {device}")


def architecture(device: torch.device) -> tuple[int, int]:
    """(compute capability as a number, multiprocessors) of a CUDA device; under the interpreter those of an H200."""
    if device.type != "cuda":
        return 90, 132
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count
