"""How sampling is measured: in which processes, in what time, with how much memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from odelt_fast.checks import device_of

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun or `accelerate launch` started.

    device: its own. barrier: waits for all.
    """

    index: int
    count: int
    device: torch.device
    barrier: Callable[[], None]

    @classmethod
    def of_this_run(cls, device: str = "auto") -> Processes:
        """The process that asks.

        Args:
            device: auto (a GPU if there is one), cpu or cuda.

        Raises:
            ValueError: for a GPU that is not there, and without accelerate, which several
                processes need.
        """
        chosen = device_of(device)
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, chosen, lambda: None)
        try:
            from accelerate import PartialState
        except ImportError:
            raise ValueError(
                "several processes need accelerate: pip install 'odelt-fast[eval]'"
            ) from None
        state = PartialState(cpu=chosen.type == "cpu")
        return cls(state.process_index, state.num_processes, state.device, state.wait_for_everyone)


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
