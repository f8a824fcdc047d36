"""Requests become batches: a bounded queue, and a thread that draws for several requests at once.

Jobs of one `Key` share batches; the key whose oldest job has waited longest is next. An image's
noise depends on its request's seed and its index alone, so sharing changes no picture. The asyncio
side submits and withdraws jobs and never waits for the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from odelt_fast.engine.availability import ContextLostError
from odelt_fast.operation import Operation

MISSING = (
    "odelt-fast serve needs FastAPI, uvicorn and prometheus_client: pip install 'odelt-fast[serve]'"
)
# Pixels of a batch that are encoded at once: handing them to another thread takes longer.
INLINE_BYTES = 1 << 16
_KEYS = 256  # keys whose durations are remembered


class Rejected(Exception):
    """A request that is not served.

    status: of HTTP. reason: a word for the metrics. retry_after: seconds in which it is useless to
    ask again.
    """

    def __init__(
        self, status: int, reason: str, message: str, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason
        self.retry_after = None if retry_after is None else min(60, max(1, math.ceil(retry_after)))

    @classmethod
    def hopeless(cls, wait: float) -> Rejected:
        """For a deadline that will have passed after `wait` seconds of others' work."""
        message = f"the deadline cannot be met: other requests take about {wait * 1e3:.0f} ms"
        return cls(503, "deadline", message, wait)


class Key(NamedTuple):
    """What the images of one batch have in common.

    alone: a number that no other request has, for one that shares no batch.
    """

    operation: Operation
    alone: int = 0


@dataclass(eq=False)
class Job:
    """The images of one request.

    labels: one each, or None to draw them from the seed. deadline: of time.monotonic().
    """

    key: Key
    seed: int
    num_images: int
    labels: np.ndarray | None
    deadline: float
    client: str
    future: asyncio.Future[bytes]
    encode: Callable[[Job], bytes]
    images: list[np.ndarray] = field(default_factory=list)  # (n, H, W, C), first to last
    begun: int = 0  # images that were given to the thread
    number: int = 0  # in the order of arrival

    @property
    def left(self) -> int:
        """Images that wait."""
        return self.num_images - self.begun


Part = tuple[Job, range]  # a job and the indices of its images
Draw = Callable[[Key, Sequence[Part]], np.ndarray]  # images (N, H, W, C), part after part


class Durations:
    """Seconds that batches took, by key and size: an optimistic estimate of what the next one
    takes."""

    def __init__(self) -> None:
        self.seconds = OrderedDict[Key, dict[int, float]]()

    def add(self, key: Key, images: int, seconds: float) -> None:
        sizes, size = self.seconds.setdefault(key, {}), _size_class(images)
        self.seconds.move_to_end(key)
        sizes[size] = 0.7 * sizes[size] + 0.3 * seconds if size in sizes else seconds
        if len(self.seconds) > _KEYS:
            self.seconds.popitem(last=False)

    def estimate(self, key: Key, images: int) -> float:
        """At least so long, as far as is known: 0 for a key never met."""
        sizes, size = self.seconds.get(key, {}), _size_class(images)
        if size in sizes:
            return sizes[size]
        return max(
            (seconds * min(1.0, size / known) for known, seconds in sizes.items()), default=0.0
        )

    def decay(self, key: Key) -> None:
        """Shrinks an estimate that no batch will correct: a request was rejected because of it."""
        sizes = self.seconds.get(key, {})
        for size in sizes:
            sizes[size] *= 0.9


def _size_class(images: int) -> int:
    return 1 << (images - 1).bit_length()


class Batcher:
    """Draws jobs in batches, in a thread of its own.

    Every submitted job's future gets the answer, or an exception: `Rejected`, or what draw raised
    (ValueError: the job's own fault).

    Args:
        draw: makes a batch's images of (key, parts), in the batcher's thread; `Job.encode` makes a
            job's answer there or in a pool.
        max_batch: images in a batch.
        max_queue: images that wait.
        max_client: images of one client that wait.
        on_batch: called with (jobs, images, seconds) after each batch.
    """

    def __init__(
        self,
        draw: Draw,
        *,
        max_batch: int = 32,
        max_queue: int = 1024,
        max_client: int = 1024,
        on_batch: Callable[[int, int, float], Any] = lambda jobs, images, seconds: None,
    ) -> None:
        self.draw, self.on_batch = draw, on_batch
        self.max_batch, self.max_queue, self.max_client = max_batch, max_queue, max_client
        self.durations, self._queues = Durations(), dict[Key, deque[Job]]()
        self._numbers, self._changed = itertools.count(), threading.Condition()
        self._stopped = self._lost = False  # told to end; the GPU is gone
        # Key, images and start of the batch that is being drawn.
        self._running: tuple[Key, int, float] | None = None
        self._pool = ThreadPoolExecutor(2, "encode")
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken and drawn."""
        return self._thread.is_alive() and not self._stopped and not self._lost

    @property
    def healthy(self) -> bool:
        """Whether the thread lives, or was told to end. Where the GPU is lost it ends by itself."""
        return self._stopped or (self._thread.is_alive() and not self._lost)

    @property
    def waiting(self) -> int:
        """Images that wait."""
        with self._changed:
            return sum(job.left for job in self._jobs())

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            Rejected: a queue is full, the batcher was stopped, or the deadline cannot be met.
        """
        with self._changed:
            if not self.alive:
                raise _stopping()
            wait, waiting = self.backlog(), self.waiting
            own = sum(other.left for other in self._jobs() if other.client == job.client)
            if waiting + job.num_images > self.max_queue:
                message = f"the queue is full: {waiting} images wait"
                raise Rejected(429, "queue", message, wait)
            if own + job.num_images > self.max_client:
                message = f"your queue is full: {own} of your images wait"
                raise Rejected(429, "client_queue", message, wait)
            least = self.durations.estimate(job.key, min(job.num_images, self.max_batch))
            if time.monotonic() + wait + least > job.deadline:
                self.durations.decay(job.key)
                raise Rejected.hopeless(wait)
            job.number = next(self._numbers)
            self._queues.setdefault(job.key, deque()).append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> bool:
        """Takes back the images of a job that have not been begun; False if there are none.

        The future is left to the caller.
        """
        with self._changed:
            if not job.left:
                return False
            queue = self._queues[job.key]
            queue.remove(job)
            if not queue:
                del self._queues[job.key]
            job.begun = job.num_images
            return True

    def backlog(self) -> float:
        """Seconds that the work before a new job takes, as far as is known."""
        with self._changed:
            seconds = 0.0
            if self._running:
                key, images, start = self._running
                ran = time.monotonic() - start
                seconds = max(0.0, self.durations.estimate(key, images) - ran)
            for key, queue in self._queues.items():
                whole, rest = divmod(sum(job.left for job in queue), self.max_batch)
                seconds += whole * self.durations.estimate(key, self.max_batch)
                seconds += self.durations.estimate(key, rest) if rest else 0.0
            return seconds

    def stop(self, seconds: float = 10.0) -> None:
        """Takes no more jobs, rejects those that wait, and waits at most so long for the batch that
        runs."""
        with self._changed:
            self._stopped = True
            left = [*self._jobs()]
            self._changed.notify()
        self._finish([(job, _stopping()) for job in left if self.withdraw(job)])
        self._thread.join(seconds)
        self._pool.shutdown(wait=False)

    def _jobs(self) -> Iterator[Job]:
        return itertools.chain.from_iterable(self._queues.values())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queues or self._stopped or self._lost):
                    self._changed.wait()
                if self._stopped or self._lost:
                    return
                parts = self._take()
            if parts:
                self._draw(parts)
                self._running = None

    def _take(self) -> list[Part]:
        """The next batch; jobs whose deadline it cannot meet are rejected on the way."""
        key = min(self._queues, key=lambda key: self._queues[key][0].number)
        queue, parts, late, room = self._queues[key], list[Part](), list[Job](), self.max_batch
        now, earliest = time.monotonic(), math.inf
        while queue and room:
            job = queue[0]
            count = min(room, job.left)
            if now + self.durations.estimate(key, count) > job.deadline:
                self.durations.decay(key)
                job.begun = job.num_images
                late.append(queue.popleft())
                continue
            earliest = min(earliest, job.deadline)
            together = self.durations.estimate(key, self.max_batch - room + count)
            if parts and now + together > earliest:
                break  # company that would make somebody late waits for the next batch
            parts.append((job, range(job.begun, job.begun + count)))
            job.begun += count
            room -= count
            if not job.left:
                queue.popleft()
        if not queue:
            del self._queues[key]
        self._running = (key, self.max_batch - room, now) if parts else None
        passed = Rejected(503, "deadline", "the deadline passed before it was this request's turn")
        self._finish([(job, passed) for job in late])
        return parts

    def _draw(self, parts: Sequence[Part]) -> None:
        key, start = parts[0][0].key, time.monotonic()
        try:
            images = self.draw(key, parts)
        except Exception as error:
            # One request's fault must not become another's.
            if isinstance(error, ValueError) and len(parts) > 1:
                for part in parts:
                    self._draw([part])
                return
            for job, _ in parts:
                self.withdraw(job)
            failed = [job for job, _ in parts]
            if isinstance(error, ContextLostError):  # nobody's turn will come
                with self._changed:
                    self._lost = True
                    failed += filter(self.withdraw, [*self._jobs()])
            self._finish([(job, error) for job in failed])
            return
        seconds, first, complete = time.monotonic() - start, 0, []
        with self._changed:
            self.durations.add(key, len(images), seconds)
        for job, indices in parts:
            job.images.append(images[first : first + len(indices)])
            first += len(indices)
            if indices.stop == job.num_images:
                complete.append(job)
        self.on_batch(len(parts), len(images), seconds)
        if images.nbytes <= INLINE_BYTES:
            self._encode(complete)
        else:
            for job in complete:
                self._pool.submit(self._encode, [job])

    def _encode(self, jobs: Sequence[Job]) -> None:
        answers: list[tuple[Job, bytes | Exception]] = []
        for job in jobs:
            try:
                answers.append((job, job.encode(job)))
            except Exception as error:
                answers.append((job, error))
        self._finish(answers)

    def _finish(self, answers: Sequence[tuple[Job, bytes | Exception]]) -> None:
        """Hands answers to their futures, in the event loop's thread: one wake-up for all of
        them."""

        def hand_out() -> None:
            for job, answer in answers:
                if job.future.done():
                    continue
                if isinstance(answer, Exception):
                    job.future.set_exception(answer)
                else:
                    job.future.set_result(answer)

        if answers:
            # A loop that has closed has nobody who waits.
            with contextlib.suppress(RuntimeError):
                answers[0][0].future.get_loop().call_soon_threadsafe(hand_out)


def _stopping() -> Rejected:
    return Rejected(503, "closing", "the server is shutting down")
