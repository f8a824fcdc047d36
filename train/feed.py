"""What every step takes, made ahead: its images and all that it draws, in worker processes.

All of a step is a pure function of (seed, step, row), so that it does not matter who makes it: any
number of workers, and none, give the same numbers, and a resumed run begins at its step. A worker
makes whole steps, every `workers`-th, in their order. Which numbers a step draws, the steps before
tell: what is missing is made when it is asked for.

Workers are forked from a server that has imported torch and nothing else: no lock, thread, file or
CUDA context of the process that trains is in them. They end with it, however it ends; signals that
a scheduler sends to all processes of a run are left to it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection, forkserver, resource_tracker, util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from odelt_fast.files import one_line
from odelt_fast.images.pixels import num_threads

from .config import TrainConfig
from .data import Loader
from .draws import Request, StepDraws, global_rows
from .objectives.targets import StepBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["torch", "torch.utils.data", "numpy", "tyro"]
_ALIGNED = 64  # bytes
_IMAGES, _LABELS = "images", "labels"
Order = tuple[int, tuple[Request, ...]]  # a step, and what it draws
Tensors = dict[Hashable, Tensor]  # images, labels, and what was drawn by its Request


def with_workers(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The options with the number of workers that None stands for; their server starts now, while
    the data are opened. ValueError for steps ahead that nobody makes."""
    workers = config.dataloader_num_workers
    if workers is None:
        workers = min(2, num_threads()) if device.type == "cuda" else 0
    if not workers and config.prefetch != TrainConfig.prefetch:
        raise ValueError(
            "--prefetch has no effect without workers: leave it out, or set"
            " --dataloader-num-workers 2"
        )
    if workers and _METHOD == "forkserver":
        _start_server()
    return replace(config, dataloader_num_workers=workers)


def _start_server() -> None:
    resource_tracker.ensure_running()  # which would unblock the signals
    forkserver.set_forkserver_preload(_PRELOADED)
    # What is blocked here is in the server and its workers: the process that trains ends them.
    left = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, left)
    try:
        with _without_main():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start inside do not import the program's script again, which may train
    without asking for its __name__: workers take nothing from it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass(frozen=True)
class Share:
    """The rows that one process has in every step, which is all that a worker needs.

    Attributes:
        sizes: rows of each kind in a part.
        first, count: of the parts that are this process's.
        parts: of the global batch.
    """

    loader: Loader
    sizes: tuple[int, ...]
    first: int
    count: int
    parts: int
    stratified: bool

    def draws(self, step: int, part: int, made: Tensors) -> StepDraws:
        rows = global_rows(self.sizes, self.first + part, self.parts)
        kinds = [size * self.parts for size in self.sizes] if self.stratified else None
        return StepDraws(self.loader.seed, step, rows, kinds, made)  # type: ignore[arg-type]

    def made(self, step: int, requests: Sequence[Request] = ()) -> Iterator[Tensors]:
        """Of each part: images, labels and what `requests` name."""
        for part in range(self.count):
            draws = self.draws(step, part, {})
            images, labels = self.loader.batch(step, draws.global_rows)
            drawn: Tensors = {request: draws.make(request) for request in requests}
            yield {_IMAGES: images, _LABELS: labels} | drawn

    def batches(self, step: int, made: Iterable[Tensors]) -> Iterator[StepBatch]:
        for part, tensors in enumerate(made):
            draws = self.draws(step, part, tensors)
            yield StepBatch(tensors[_IMAGES], tensors[_LABELS], draws, step)


class Feed:
    """The batches of one process, step by step, on the CPU; pinned: in memory that a GPU reads
    itself. Workers start with the first step that is taken."""

    def __init__(self, share: Share, workers: int, prefetch: int, pinned: bool = False) -> None:
        self.share, self.workers, self.prefetch, self.pinned = share, workers, prefetch, pinned
        self._processes: list[Any] = []
        # Where nobody closes it: before multiprocessing waits for them at the process's end.
        util.Finalize(self, _kill, [self._processes], exitpriority=10)
        self._ahead: Iterator[Packed] | None = None
        self._next = 0
        self._requests: set[Request] = set()
        self._asked: list[set[Request]] = []  # by the step before

    @classmethod
    def of(cls, config: TrainConfig, loader: Loader, accelerator: Accelerator) -> Feed:
        """That of this process."""
        count = config.gradient_accumulation_steps or 1
        share = Share(
            loader,
            tuple(config.row_sizes().values()),
            first=accelerator.process_index * count,
            count=count,
            parts=accelerator.num_processes * count,
            stratified=config.depth_sampling == "stratified",
        )
        pinned = accelerator.device.type == "cuda"
        return cls(share, config.dataloader_num_workers or 0, config.prefetch, pinned)

    def parts(self, step: int) -> Iterable[StepBatch]:
        """The parts of this process's batch of step `step`; any step may follow any other, and the
        next one is ready.

        Raises:
            ValueError: in one line: the data have become unreadable; a worker was killed.
        """
        if not self.workers:
            return self.share.batches(step, self.share.made(step))
        if self._ahead is None or step != self._next:
            self.close()
            self._start(step)
        elif asked := set().union(*self._asked):
            self._requests.clear()
            self._requests.update(asked)
        packed = self._take()
        self._next = step + 1
        for text in packed.warnings:
            warnings.warn(text, stacklevel=2)
        if packed.mistake is not None:
            self.close()
            raise ValueError(packed.mistake)
        batches = [*self.share.batches(step, packed.tensors())]
        self._asked = [batch.draws.asked for batch in batches]
        return batches

    def close(self) -> None:
        """Ends the workers."""
        self._ahead = None  # they end with the step that they make
        _kill(self._processes)
        self._processes.clear()

    def _start(self, step: int) -> None:
        loader: DataLoader = DataLoader(
            _Worker(self.share),
            batch_size=None,
            sampler=_orders(step, self._requests),
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pinned,
            multiprocessing_context=_METHOD,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # torch's own is the network's
        )
        before = multiprocessing.active_children()
        try:
            with _without_main():
                self._ahead = iter(loader)
        except (RuntimeError, OSError, EOFError) as error:  # a pipe whose other end has died
            why = one_line(error)
            raise ValueError(f"a worker process cannot be started ({why}): {_AGAIN}") from error
        finally:
            started = [each for each in multiprocessing.active_children() if each not in before]
            self._processes.extend(started)
            if self._ahead is None:
                self.close()

    def _take(self) -> Packed:
        assert self._ahead is not None
        try:
            return next(self._ahead)
        except (RuntimeError, OSError, EOFError) as error:
            processes = self._processes
            if len(processes) < self.workers:
                _kill(processes)
                raise ValueError(
                    f"a worker process ended as soon as it was started: {_AGAIN}"
                ) from error
            # Its death may be known only after that of its connections.
            connection.wait([each.sentinel for each in processes], timeout=5)
            dead = [each for each in processes if not each.is_alive()]
            if not dead:
                raise
            _kill(processes)
            raise ValueError(_died(dead[0])) from error


@dataclass(frozen=True)
class Packed:
    """The tensors of a step in one piece of shared memory, which takes one descriptor to hand over.

    Attributes:
        places: of each part's tensors: first byte, dtype, shape.
        warnings: what a worker warned of.
        mistake: why there are none.
    """

    buffer: Tensor
    places: list[dict[Hashable, tuple[int, torch.dtype, torch.Size]]]
    warnings: list[str] = field(default_factory=list)
    mistake: str | None = None

    @classmethod
    def of(cls, parts: Sequence[Tensors]) -> Packed:
        """RuntimeError where there is too little shared memory."""
        places: list[dict[Hashable, tuple[int, torch.dtype, torch.Size]]] = []
        size = 0
        for part in parts:
            places.append({})
            for key, tensor in part.items():
                places[-1][key] = (size, tensor.dtype, tensor.shape)
                size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        packed = cls(torch.empty(size, dtype=torch.uint8).share_memory_(), places)
        for part, views in zip(parts, packed.tensors()):
            for key, tensor in part.items():
                views[key].copy_(tensor)
        return packed

    def tensors(self) -> list[Tensors]:
        """Of each part, in the buffer's memory."""
        return [
            {
                key: self.buffer[start : start + shape.numel() * dtype.itemsize]
                .view(dtype)
                .view(shape)
                for key, (start, dtype, shape) in part.items()
            }
            for part in self.places
        ]

    def pin_memory(self) -> Packed:
        """What torch's loader calls."""
        return replace(self, buffer=self.buffer.pin_memory())


class _Worker(Dataset[Packed]):
    """What runs in a worker: an order in, a packed step out."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __getitem__(self, order: Order) -> Packed:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                packed = Packed.of([*self.share.made(*order)])
            except ValueError as error:
                packed = Packed(torch.empty(0), [], mistake=str(error))
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
                packed = Packed(torch.empty(0), [], mistake=f"{_FULL}: {one_line(error)}")
        return replace(packed, warnings=[str(each.message) for each in caught])


def _orders(step: int, requests: set[Request]) -> Iterator[Order]:
    """From `step` on; what a step draws is looked up when it is ordered."""
    for number in itertools.count(step):
        yield number, tuple(requests)


def _end_with_parent(worker: int) -> None:
    """Has this process end when the one that trains does, even while it waits or reads."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


_AGAIN = "go on with --resume-from-checkpoint latest"
_LESS = "fewer --dataloader-num-workers, a smaller --prefetch"
_FULL = f"shared memory (/dev/shm) is full: make it larger, or set {_LESS}"


def _died(process: Any) -> str:
    code = process.exitcode
    who = f"the worker process {process.pid}, which made batches, "
    if code >= 0:
        return f"{who}ended with code {code}: {_AGAIN}, or set --dataloader-num-workers 0"
    if code == -signal.SIGBUS:
        return f"{who}was killed by SIGBUS: {_FULL}"
    why = ", as for want of memory" if code == -signal.SIGKILL else ""
    return f"{who}was killed by {signal.Signals(-code).name}{why}: {_AGAIN}, perhaps with {_LESS}"
