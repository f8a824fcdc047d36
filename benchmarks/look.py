"""What is looked at on a machine rather than timed: which kernels run, and what they cost."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from odelt_fast.config import DiTConfig
from odelt_fast.engine.native import build

from .ceilings import token_count
from .measure import Record, dtype_name, reason_in, synchronize
from .steps import MissingError

ROWS = 25  # of a profile


def machine() -> str:
    """Names this machine since its last start: what is in its caches is in no other's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def libraries(cuda: bool, _: Mapping[str, str]) -> Iterator[Record]:
    """Builds and loads the native operators; builds anew what another machine's build is no use.

    Raises:
        MissingError: they cannot be had.
    """
    wanted = "cuda" if cuda else "cpu"
    needed = ("cpu", "cuda") if cuda else ("cpu",)
    carried = all(build.library_path(name).exists() for name in needed)
    reason = build.load(wanted)
    if reason and carried:
        try:
            for name in needed:
                build.build(name, force=True)
        except build.BuildError as error:
            raise MissingError(f"carried: {reason}; built: {error}") from None
        # a library that could not be opened is not tried again by a process: the next ones open it
        yield {"built": f"anew: {reason}"}
        return
    if reason:
        raise MissingError(reason)
    yield {"built": "before" if carried else "here"}


def attention(
    config: DiTConfig,
    batches: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    _: Mapping[str, str],
) -> Iterator[Record]:
    """What PyTorch's attention dispatches to by itself, and which of its backends can run.

    {"dispatch": {"DTYPE batch N": {"operators", "kernels", "backends": {name: "" or why not}}}}
    """
    heads, tokens = config.num_heads, token_count(config)
    for batch in batches:
        for each in dict.fromkeys((dtype, torch.float32)):
            shape = batch, heads, tokens, config.hidden_size // heads
            q, k, v = (torch.randn(shape, device=device).to(each) for _ in range(3))

            def call(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> object:
                return F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1])

            rows = profile_rows(call, device)
            backends: dict[str, str] = {}
            for name in ("FLASH", "CUDNN", "EFFICIENT"):
                row: Record = {}
                with (
                    reason_in(row),
                    sdpa_kernel(getattr(SDPBackend, f"{name}_ATTENTION")),
                ):
                    call()
                    synchronize(device)
                backends[name.lower()] = row.get("reason", "")
            operators = [row["name"] for row in rows if "scaled_dot_product" in row["name"]]
            kernels = [row["name"] for row in rows if row["device"]]
            found = {"operators": operators, "kernels": kernels, "backends": backends}
            yield {"dispatch": {f"{dtype_name(each)} batch {batch}": found}}


def profile_rows(call: Callable[[], object], device: torch.device) -> list[Record]:
    """The costliest of what one call ran, on the device alone where it is a GPU.

    Each row: {"name", "calls", "us" (in all), "device": whether it is a kernel}. Kernels of a
    replayed graph count like any others.
    """
    call()
    synchronize(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        call()
        synchronize(device)
    rows = []
    for event in trace.key_averages():
        on_device = event.device_type != DeviceType.CPU
        spent: Any = event.self_device_time_total if on_device else event.self_cpu_time_total
        row = {"name": event.key, "calls": event.count, "us": spent, "device": on_device}
        rows.append(row)
    rows.sort(key=lambda row: (row["device"], row["us"]), reverse=True)
    return rows[:ROWS]
