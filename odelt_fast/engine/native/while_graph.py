"""CUDA graphs that the GPU repeats on its own (csrc/cuda)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .build import library_path, load

WHILE_NODES = 12040  # CUDA 12.4, the first with while nodes


def while_graph_unavailable(build_it: bool = True) -> str | None:
    """Why `WhileGraph` cannot run here, in one line; None if it can. build_it as for `load`."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    reason = load("cuda", build_it)
    if reason is not None:
        return reason
    driver, runtime = torch.ops.odelt_native.while_graph_versions()
    needed = max(WHILE_NODES, runtime // 1000 * 1000)
    if driver < needed:
        return (
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, while graphs need"
            f" {needed // 1000}.{needed % 1000 // 10}"
        )
    return None


class WhileGraph:
    """A captured CUDA graph that the GPU repeats on its own while `flag` is not 0: one launch, no
    host in between.

    body: captured with torch.cuda.CUDAGraph(keep_graph=True); it works on tensors that stay where
    they are, and writes flag. No random numbers and no cooperative kernels in it. flag (1,) int32
    on the GPU, read before every repetition, the first too. first: another such graph, which runs
    once before all. Keep the object until what it launched has ended. Raises ValueError for another
    flag, RuntimeError with CUDA's own words for a body that cannot be repeated.
    """

    def __init__(
        self, body: torch.cuda.CUDAGraph, flag: Tensor, first: torch.cuda.CUDAGraph | None = None
    ) -> None:
        if flag.shape != (1,) or flag.dtype != torch.int32 or not flag.is_cuda:
            raise ValueError(
                f"flag must be (1,) int32 on a GPU, not {tuple(flag.shape)} {flag.dtype} on"
                f" {flag.device}"
            )
        reason = while_graph_unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        self._kept = first, body, flag  # their memory is used by the graph
        self._device: int = flag.device.index
        graphs = 0 if first is None else first.raw_cuda_graph(), body.raw_cuda_graph()
        self._graph, self._executable = torch.ops.odelt_native.while_graph_create(
            self._device, *graphs, flag.data_ptr()
        )
        self._finalizer = weakref.finalize(
            self,
            torch.ops.odelt_native.while_graph_destroy,
            self._device,
            self._graph,
            self._executable,
        )
        self._finalizer.atexit = False  # the driver may be gone by then, and frees it anyway

    def launch(self) -> None:
        """Starts it on the current stream of its device and returns at once."""
        torch.ops.odelt_native.while_graph_launch(
            self._device, self._executable, torch.cuda.current_stream(self._device).cuda_stream
        )


def describe() -> str:
    """Whether while graphs are ready, or why not, in one line. Builds nothing."""
    reason = load("cuda", build_it=False) or while_graph_unavailable(build_it=False)
    return "native cuda while graph: " + (reason or f"ready, {library_path('cuda')}")
