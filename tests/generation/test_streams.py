"""Work beside work: order, and what happens when one side fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from odelt_fast.generation.streams import Abandoned, ahead, consumed


def test_what_is_prepared_ahead_comes_in_order() -> None:
    assert list(ahead(range(5), lambda item: item * item)) == [(i, i * i) for i in range(5)]
    assert list(ahead([], str)) == []


def test_the_next_is_prepared_while_one_is_in_use() -> None:
    begun = [threading.Event() for _ in range(3)]
    for item, _ in ahead(range(3), lambda item: begun[item].set()):
        if item < 2:
            assert begun[item + 1].wait(60)


def test_an_error_of_preparing_is_raised_at_its_item() -> None:
    stream = ahead([1, 0], lambda item: 1 // item)
    assert next(stream) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_all_that_is_put_is_consumed_in_order() -> None:
    found: list[int] = []
    with consumed(found.extend) as put:
        for item in range(100):
            put(item)
    assert found == list(range(100))


def test_an_error_of_the_consumer_ends_the_producer() -> None:
    def fail(items: Iterator[int]) -> None:
        next(items)
        raise OSError("the disk is full")

    def produce() -> None:
        with consumed(fail) as put:
            for item in range(100_000_000):
                put(item)

    with pytest.raises(OSError, match="full"):
        produce()


def test_an_error_of_the_producer_abandons_the_consumer() -> None:
    seen: list[type] = []

    def consume(items: Iterator[int]) -> None:
        try:
            list(items)
        except BaseException as error:
            seen.append(type(error))
            raise

    def produce() -> None:
        with consumed(consume) as put:
            put(1)
            raise KeyError("of the producer")

    with pytest.raises(KeyError):
        produce()
    assert seen == [Abandoned]
