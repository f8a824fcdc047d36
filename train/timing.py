"""Where the time of training goes: of a step, of waiting for its batch, of a process's own work;
and which process holds up the others."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
SLOW = 1.5  # times the median of all processes
_SHARE = 0.1  # of a step that the rest of it must take, to be told


class StepTimes:
    """Those of one process since the last report.

    Its own work is what it does before it must wait for the others: its batch, and the forward
    passes. Of sharded weights these wait too, block by block: the batch alone.
    """

    def __init__(self, device: torch.device, sharded: bool) -> None:
        self.device, self.sharded = device, sharded
        self._reset()

    def _reset(self) -> None:
        self.steps, self.apart, self.data, self.forward = 0, 0.0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """What is no part of a step: a checkpoint, a sample grid."""
        begin = time.perf_counter()
        yield
        self.apart += time.perf_counter() - begin

    def waited(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of a step, and the time until each is there."""
        self.steps += 1
        source = iter(batches)
        while True:
            begin = time.perf_counter()
            batch = next(source, None)
            self.data += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Of a forward pass: on a GPU, of the device, which is not waited for."""
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            begin = time.perf_counter()
            yield
            self.forward += time.perf_counter() - begin

    def report(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """Seconds a step, the slowest process's; and a line for each that is slow. Every process
        must call it, after it has waited for its device."""
        self.forward += sum(first.elapsed_time(last) for first, last in self._events) / 1000
        count = max(1, self.steps)
        own = self.data if self.sharded else self.data + self.forward
        whole = time.perf_counter() - self._since - self.apart
        mine = torch.tensor([whole, self.data, own], device=accelerator.device) / count
        steps, waits, works = accelerator.gather(mine[None]).T.tolist()
        values = {"step_seconds": max(steps), "data_seconds": max(waits)}
        lines = []
        if slow := slow_ones(works, max(steps)):
            from accelerate.utils import gather_object

            hosts: list[str] = gather_object([socket.gethostname()])
            usual = statistics.median_low(works)
            lines = [
                f"process {rank} on {hosts[rank]} is slow: {works[rank]:.3g} s of its own work a"
                f" step ({waits[rank]:.3g} s for its batch), {usual:.3g} s is the median, in the"
                f" last {count} steps"
                for rank in slow
            ]
        self._reset()
        return values, lines


def slow_ones(works: Sequence[float], step: float) -> list[int]:
    """Numbers of the processes whose own work takes more than `SLOW` times the median of all, and
    so holds up a step by a share that counts.

    Args:
        works: seconds a step, of each process.
        step: of a whole step.
    """
    usual = statistics.median_low(works)
    return [
        rank
        for rank, work in enumerate(works)
        if work > SLOW * usual and work - usual > _SHARE * step
    ]
