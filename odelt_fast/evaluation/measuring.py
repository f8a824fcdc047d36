"""How sampling is measured: in what time, with how much memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


class PeakMemory:
    """Peak bytes between start() and peak(), above what was in use when this was made.

    They are those of the GPU's allocator, or resident ones on Linux; peak() is -1 where neither can
    be known. Make it before the model is loaded: its weights count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.release()
        gpu = device.type == "cuda"
        self.before = torch.cuda.memory_allocated(device) if gpu else self._resident("VmRSS")

    def release(self) -> None:
        """Gives unused memory back to the operating system, which would count it as ours."""
        gc.collect()
        if self.device.type == "cpu":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # 5 resets the high-water mark of this process
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        highest = self._resident("VmHWM")
        return -1 if highest < 0 else max(0, highest - self.before)

    @staticmethod
    def _resident(name: str) -> int:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
        return -1


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call, and the seconds until the device, idle before it, is done with it."""
    _wait_for(device)
    start = time.perf_counter()
    result = call()
    _wait_for(device)
    return result, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # of the device would break captures
