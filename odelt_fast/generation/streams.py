"""Work beside work: what comes next is prepared, and what has been made is put away, in threads,
while the device computes."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")
_MOMENT = 0.1  # seconds after which a full queue's consumer is looked at


def ahead(items: Iterable[T], prepare: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Each item with prepare(item), which is made while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Any = None
        for item in items:
            following = item, pool.submit(prepare, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


class Abandoned(Exception):
    """Raised in the consumer of a stream whose producer has failed."""


@contextlib.contextmanager
def consumed(
    consume: Callable[[Iterator[T]], None], room: int = 1
) -> Iterator[Callable[[T], None]]:
    """Gives a function that hands an item to consume(iterator of items), which runs in a thread.

    At most `room` items wait. Leaving waits for the consumer; what it raises is raised here, at the
    next item or at the end.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(room)

    def items() -> Iterator[T]:
        while (message := waiting.get())[0] == "item":
            yield message[1]
        if message[0] == "abandon":
            raise Abandoned

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(consume, items())

        def send(kind: str, item: Any = None) -> None:
            while not work.done():
                with contextlib.suppress(queue.Full):
                    waiting.put((kind, item), timeout=_MOMENT)
                    return

        def put(item: T) -> None:
            send("item", item)
            if work.done():
                work.result()  # raises

        try:
            yield put
        except BaseException:
            send("abandon")
            raise
        send("end")
        work.result()
