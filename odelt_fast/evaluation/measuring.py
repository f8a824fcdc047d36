"""What a measurement ran on: processes, device, peak memory, versions, and hashes of what was
measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from odelt_fast.checkpoints.lookup import find_folder


@dataclass(frozen=True)
class Processes:
    """This process among those of a run that torchrun or `accelerate launch` started. device: its
    own. barrier: waits for all."""

    index: int
    count: int
    device: torch.device
    barrier: Callable[[], None]

    @classmethod
    def of_this_run(cls, device: str = "auto") -> Processes:
        """device: auto (a GPU if there is one), cpu or cuda. ValueError for a GPU that is not
        there."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: PyTorch finds no CUDA GPU here: use --device cpu or auto"
            )
        gpu = device != "cpu" and torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, torch.device("cuda" if gpu else "cpu"), lambda: None)
        try:
            from accelerate import PartialState
        except ImportError:
            raise ValueError(
                "several processes need accelerate: pip install 'odelt-fast[eval]'"
            ) from None
        state = PartialState(cpu=not gpu)
        return cls(state.process_index, state.num_processes, state.device, state.wait_for_everyone)


class PeakMemory:
    """Peak bytes between start() and peak(), above what was in use when this was made: of the GPU's
    allocator, or resident on Linux.

    Make it before the model is loaded: its weights count. peak() is -1 where neither can be known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.release()
        self.before = (
            torch.cuda.memory_allocated(device)
            if device.type == "cuda"
            else self._resident("VmRSS")
        )

    def release(self) -> None:
        """Gives memory that is no longer used back to the operating system, which would count it as
        ours."""
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


def environment(device: torch.device, dtype: torch.dtype, processes: int) -> dict[str, Any]:
    """Device, dtype, processes and versions, for a table's heading."""
    from odelt_fast import __version__

    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU ({torch.get_num_threads()} threads)"
    many = "one process" if processes == 1 else f"{processes} processes"
    versions = {
        "odelt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": many,
        **versions,
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_hash(name: str) -> str:
    """SHA-256 of the files that make a model."""
    folder = find_folder(name)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return hashlib.sha256("".join(file_hash(path) for path in files).encode()).hexdigest()
