"""CUDA graphs: capture of a function that only launches, replay with new inputs, and a cache of
such graphs with one memory pool.

A graph replays into the tensors it was captured with, and graphs of one pool overwrite each
other's: inputs are copied in, results copied out, and graphs of one cache never run at the same
time. For graphs that CUDA itself repeats (a while node's body), `raw_cuda_graph()` of what
`capture` made is the node's child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.files import one_line

Function = Callable[..., tuple[Tensor, ...]]
Inputs = Sequence[Tensor | None]

logger = logging.getLogger(__name__)

MOST_GRAPHS = 32  # a graph of 128 steps and 12 blocks has 11 000 nodes
_LOCKS: dict[int | None, threading.RLock] = {}  # by index of the device
_STREAMS: dict[int | None, torch.cuda.Stream] = {}
_BROKEN: list[torch.cuda.CUDAGraph] = []  # see `_record`
_HERE = contextlib.nullcontext()


class Key(tuple):
    """A tuple that is hashed once: that of a trajectory of 128 steps takes 10 us."""

    _hash: int

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


class CaptureError(RuntimeError):
    """A function could not be captured; the message is the reason."""


class Pool:
    """Memory of graphs that never run at the same time. `renew` where it cannot be used again: its
    last graph is gone, or a capture in it broke. Graphs keep the memory that they were made in."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def renew(self) -> None:
        self._handle = None


def capture(
    function: Callable[[], Any], device: torch.device, pool: Pool | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, result): what `function()` launches, and the tensors it returned, which every replay
    writes. `graph.raw_cuda_graph()` stays valid, for a while node or to count nodes.

    Args:
        function: must only launch, on the current stream: no host synchronisation, no copy from
            pageable memory. It runs once before (compilation, cuBLAS's handle), and once more where
            its capture broke: another thread that waits for the whole device breaks it.
        pool: None: one of its own.

    Raises:
        CaptureError: with the streams, the allocator and the random generators as they were.
    """
    try:
        lock = _LOCKS.setdefault(device.index, threading.RLock())
        with lock, _capture_stream(device) as stream:
            try:
                function()
            finally:  # what was launched reads memory that the caller may free
                stream.synchronize()
            with _workspaces_in_the_pool():
                graph, result = _record_twice(function, device, pool or Pool())
            graph.instantiate()
    except torch.OutOfMemoryError as error:
        raise CaptureError("out of memory") from error
    except Exception as error:
        if is_bug(error):
            raise
        raise CaptureError(one_line(error)) from error
    return graph, result


@contextlib.contextmanager
def _capture_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """The one stream on which everything of this device is captured, as the current one: each would
    keep workspaces of cuBLAS (33 MiB on Hopper)."""
    if device.index not in _STREAMS:
        _STREAMS[device.index] = torch.cuda.Stream(device)
    stream = _STREAMS[device.index]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@contextlib.contextmanager
def _workspaces_in_the_pool() -> Iterator[None]:
    """cuBLAS's workspaces are allocated anew inside, and forgotten at the end.

    A graph reads them at the address that it was captured with. Those of the launches before lie in
    ordinary memory, which others free (torch.compile's graphs, the end of any graph).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _record_twice(function: Callable[[], Any], device: torch.device, pool: Pool) -> Any:
    """(graph, result) of a capture on the current stream, at the second attempt if the first
    breaks."""
    try:
        try:
            return _record(function, device, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            logger.info("a capture is tried once more", exc_info=True)
            return _record(function, device, pool)
    except BaseException:
        # torch 2.11's random generators leave a broken capture by one that works.
        with contextlib.suppress(RuntimeError):
            _record(torch.zeros(1, device=device).zero_, device, Pool())
        raise


def _record(function: Callable[[], Any], device: torch.device, pool: Pool) -> Any:
    """(graph, result). Whatever breaks, nothing is being captured afterwards."""
    graph, error = torch.cuda.CUDAGraph(keep_graph=True), None
    with _collector_paused():
        try:
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            result = function()
        except BaseException as raised:
            error = raised
        try:
            graph.capture_end()
        except RuntimeError as raised:
            # torch 2.11 then leaves its allocators in the capture; that of pinned memory cannot be
            # ended, and goes on asking the graph. Newer ones have ended it, and say so.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device.index, pool.handle)
                torch._C._cuda_releasePool(device.index, pool.handle)
                _BROKEN.append(graph)
            pool.renew()
            error = error or raised  # this one only repeats that the capture is broken
    if error is None:
        return graph, result
    try:
        raise error
    finally:
        error = None  # it holds this frame, and so the memory of what was captured


def is_bug(error: BaseException) -> bool:
    """Whether no fallback must hide an error: a fault of this package's own, where
    ODELT_FAST_STRICT is set, as in the tests."""
    own = (AssertionError, AttributeError, KeyError, NameError, TypeError)
    return isinstance(error, own) and bool(os.environ.get("ODELT_FAST_STRICT"))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection inside: what it frees (graphs, events) may be forbidden during a
    capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def node_count(graph: torch.cuda.CUDAGraph) -> int | None:
    """Nodes of a graph captured with keep_graph=True; None where the CUDA runtime cannot be
    asked."""
    try:
        version = (torch.version.cuda or "").split(".")[0]
        runtime = ctypes.CDLL(f"libcudart.so.{version}")  # the one that torch has loaded
        count, raw = ctypes.c_size_t(), ctypes.c_void_p(graph.raw_cuda_graph())
        code = runtime.cudaGraphGetNodes(raw, None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return count.value if code == 0 else None


class Captured:
    """One graph with the tensors it reads and writes."""

    def __init__(
        self,
        function: Function,
        inputs: Inputs,
        device: torch.device,
        pool: Pool,
        capture: Callable[..., Any],
    ) -> None:
        # Made outside the pool: graphs that share it may overwrite everything in it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [
                None if given is None else given.detach().to(device, copy=True) for given in inputs
            ]
        self.labels: dict[int, Tensor] = {}
        self.asked: object = None  # of the last replay
        self.function = function  # holds the weights and tables that the graph reads
        self.graph, self.outputs = self._capture(device, pool, capture)

    def _capture(
        self, device: torch.device, pool: Pool, capture: Callable[..., Any]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """(graph, what its replay writes)."""
        return capture(lambda: self.function(*self.inputs), device, pool)

    def launch(self) -> None:
        """Computes `outputs` from what lies in `inputs`."""
        self.graph.replay()

    def replay(self, inputs: Inputs, asked: object = None) -> tuple[Tensor, ...]:
        """The outputs for these inputs, as new tensors. asked: stands for all inputs but the first:
        those of the same object are equal."""
        known = asked is not None and asked is self.asked
        for i, (held, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if held is None or given is None or (i and (known or self._holds(i, given))):
                continue
            held.copy_(given, non_blocking=True)
        self.asked = asked
        self.launch()
        if not torch.is_inference_mode_enabled():
            return tuple([output.clone() for output in self.outputs])
        with torch.inference_mode(False), torch.no_grad():
            return tuple([output.clone() for output in self.outputs])

    def _holds(self, i: int, given: Tensor) -> bool:
        """Whether input i holds these values already: known for integers on the host (labels),
        which often stay the same."""
        if given.device.type != "cpu" or given.is_floating_point():
            return False
        if i in self.labels and torch.equal(self.labels[i], given):
            return True
        self.labels[i] = given.clone()
        return False


class GraphCache:
    """Captured functions by key, at most `limit`, the least recently used dropped first; one memory
    pool. Threads take turns."""

    def __init__(
        self, device: torch.device, limit: int = MOST_GRAPHS, capture: Callable[..., Any] = capture
    ) -> None:
        self.device, self.limit, self.capture = device, limit, capture
        self.graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool = Pool()
        self._stream: Any = None
        self._lock = threading.RLock()

    def run(
        self,
        key: Hashable,
        function: Function,
        inputs: Inputs,
        at_once: bool = True,
        kind: type[Captured] = Captured,
    ) -> tuple[Tensor, ...]:
        """function(*inputs) as new tensors, by replaying the graph of `key`, which is captured
        first where there is none.

        inputs: tensors of the key's shapes on any device, or None. at_once False: the first call of
        a key launches without capturing, since what is done once gains nothing by it. kind: how the
        function is captured. Raises CaptureError.
        """
        with self._lock, self._on_device():
            if key not in self.graphs:
                if not at_once and key not in self._seen:
                    self._seen.add(key)
                    return function(*place(inputs, self.device))
                self._capture(key, function, inputs, kind)
            self.graphs.move_to_end(key)
            return self.graphs[key].replay(inputs)

    def replay(
        self, key: Hashable, inputs: Inputs, asked: object = None
    ) -> tuple[Tensor, ...] | None:
        """As `run` for a key that has its graph; else None. asked: as of `Captured.replay`."""
        with self._lock:
            captured = self.graphs.get(key)
            if captured is None:
                return None
            self.graphs.move_to_end(key)
            with self._on_device():
                return captured.replay(inputs, asked)

    def expect(self, key: Hashable) -> None:
        """Has the first call of a key captured: it will come again."""
        self._seen.add(key)

    def clear(self) -> None:
        """Forgets all graphs; their memory is free again."""
        with self._lock:
            self.graphs.clear()
            self._seen.clear()

    def _capture(
        self, key: Hashable, function: Function, inputs: Inputs, kind: type[Captured]
    ) -> None:
        while len(self.graphs) >= self.limit:
            self.graphs.popitem(last=False)
        if not self.graphs:
            self._pool.renew()
        try:
            self.graphs[key] = kind(function, inputs, self.device, self._pool, self.capture)
        except (CaptureError, torch.OutOfMemoryError) as error:
            if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
            self.clear()
            raise CaptureError("out of memory") from error

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type != "cuda":
            return _HERE
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)  # the last replay, which used the same memory
        self._stream = stream
        return torch.cuda.device(self.device)


def place(inputs: Inputs, device: torch.device) -> list[Tensor | None]:
    """The inputs on the device."""
    return [None if given is None else given.to(device) for given in inputs]
