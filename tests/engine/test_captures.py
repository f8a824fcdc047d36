"""Captures: the order of their calls, recorded on any machine; on a CUDA GPU, what they leave
behind, and how threads share a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from odelt_fast.engine.graphs import CaptureError, GraphCache, Pool, capture
from tests.engine.test_graphs import CPU, NEEDS_CUDA

CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a capture, by a CUDA that only records them. (There is none without a GPU.)

    As torch 2.11's, it ends no pool whose capture broke.
    """
    made: list[str] = []

    def record(owner: Any, name: str, *, told: bool = False) -> None:
        def recorded(*given: object, **named: object) -> None:
            made.append(" ".join([name, *(str(each) for each in given[1:] if told)]))

        monkeypatch.setattr(owner, name, recorded, raising=False)

    class Graph:
        def __init__(self, keep_graph: bool) -> None:
            self.broken = False

        def capture_begin(self, pool: int, capture_error_mode: str) -> None:
            made.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self) -> None:
            made.append("end")
            if made[-2] == "breaks":
                raise RuntimeError("the capture is broken")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            made.append("new stream")

    for name in ("wait_stream", "synchronize"):
        record(Stream, name)
    record(Graph, "instantiate")
    record(torch._C, "_cuda_clearCublasWorkspaces")
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        record(torch._C, name, told=True)
    handles = iter(range(1, 99))
    monkeypatch.setattr("odelt_fast.engine.graphs._STREAMS", {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return made


def broken_at(calls: list[str], *attempts: int) -> Callable[[], str]:
    """A function whose runs say "runs", and at these "breaks" before they raise."""
    count = 0

    def function() -> str:
        nonlocal count
        count += 1
        calls.append("breaks" if count in attempts else "runs")
        if count in attempts:
            raise RuntimeError("not while capturing")
        return "result"

    return function


WARM = ["wait_stream", "runs", "synchronize", "_cuda_clearCublasWorkspaces"]
READY = ["_cuda_clearCublasWorkspaces", "instantiate"]


def test_workspaces_are_forgotten_before_and_after_a_capture(calls: list[str]) -> None:
    pool = Pool()
    for _ in range(2):
        assert capture(broken_at(calls), CPU, pool)[1] == "result"
    once = [*WARM, "begin 1 thread_local", "runs", "end", *READY]
    assert calls == ["new stream", *once, *once]


def test_a_broken_capture_is_made_once_more_in_another_pool(calls: list[str]) -> None:
    pool = Pool()
    assert capture(broken_at(calls, 2), CPU, pool)[1] == "result"
    ended = ["_cuda_endAllocateToPool 1", "_cuda_releasePool 1"]
    first = ["begin 1 thread_local", "breaks", "end", *ended]
    assert calls[1:] == [*WARM, *first, "begin 2 thread_local", "runs", "end", *READY]
    assert pool.handle == 2


def test_after_two_broken_captures_one_that_works_brings_the_generators_back(
    calls: list[str],
) -> None:
    with pytest.raises(CaptureError, match="not while capturing"):
        capture(broken_at(calls, 2, 3), CPU)
    begun = [call for call in calls if call.startswith("begin")]
    assert begun == [f"begin {pool} thread_local" for pool in (1, 2, 3)]
    assert calls[-3:] == [begun[2], "end", "_cuda_clearCublasWorkspaces"]
    assert [call for call in calls if call.startswith("_cuda_release")] == [
        "_cuda_releasePool 1",
        "_cuda_releasePool 2",
    ]


def test_what_fails_before_the_capture_is_not_tried_again(calls: list[str]) -> None:
    with pytest.raises(CaptureError, match="not while capturing"):
        capture(broken_at(calls, 1), CPU)
    assert calls[1:] == ["wait_stream", "breaks", "synchronize"]


def test_a_pool_whose_last_graph_is_gone_is_not_used_again(calls: list[str]) -> None:
    cache = GraphCache(CPU, limit=1)
    for key in "ab":
        with contextlib.suppress(AttributeError):  # a recorded graph replays nothing
            cache.run(key, lambda x: (x,), (torch.zeros(1),))
    assert [call for call in calls if call.startswith("begin")] == [
        "begin 1 thread_local",
        "begin 2 thread_local",
    ]


# From here on: on a CUDA GPU.


@pytest.fixture
def square() -> Tensor:
    return torch.randn(64, 64, device="cuda")


def segments_of(pool: Pool) -> list[dict]:
    """Of the allocator."""
    snapshot = torch.cuda.memory_snapshot()
    return [each for each in snapshot if each["segment_pool_id"] == pool.handle]


@NEEDS_CUDA
def test_cuda_workspaces_of_a_graphs_products_lie_in_its_pool(square: Tensor) -> None:
    """Elsewhere they are freed by others, while the graph goes on writing there."""
    pool = Pool()
    graph, (result,) = capture(lambda: (square @ square,), square.device, pool)
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do
    segments = segments_of(pool)
    assert sum(each["total_size"] for each in segments) > result.nbytes + 2**22
    # Ordinary memory, of whatever size: none of it is the graph's.
    others = [torch.full((2**size,), torch.nan, device="cuda") for size in range(8, 24)]
    graph.replay()
    torch.testing.assert_close(result, square @ square)
    assert all(other.isnan().all() for other in others)
    again = capture(lambda: (square @ square,), square.device, pool)
    assert len(segments_of(pool)) == len(segments)  # one set of workspaces for all graphs of a pool
    del again


@NEEDS_CUDA
@pytest.mark.parametrize("given", [False, True], ids=["own_pool", "given_pool"])
def test_cuda_a_broken_capture_leaves_nothing_behind(square: Tensor, given: bool) -> None:
    pool = Pool() if given else None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        with pytest.raises(CaptureError, match="captur"):
            capture(lambda: (torch.full((2**22,), square.sum().item(), device="cuda"),), CUDA, pool)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**22
    torch.randn(3, device="cuda")  # random numbers, too, are those of no graph
    ordinary = torch.ones(2**20, device="cuda")
    pools = {
        each["segment_pool_id"]
        for each in torch.cuda.memory_snapshot()
        if each["address"] <= ordinary.data_ptr() < each["address"] + each["total_size"]
    }
    assert pools == {(0, 0)}
    graph, (result,) = capture(lambda: (square + 1,), CUDA)
    square.zero_()
    graph.replay()
    assert result.eq(1).all()
    torch.cuda.empty_cache()


@NEEDS_CUDA
def test_cuda_a_capture_broken_by_another_thread_is_made_again(square: Tensor) -> None:
    calls: list[bool] = []

    def function() -> tuple[Tensor]:
        calls.append(torch.cuda.is_current_stream_capturing())
        if len(calls) == 2:
            other = threading.Thread(target=wait_for_the_device)
            other.start()
            other.join()
        return (square + 1,)

    def wait_for_the_device() -> None:
        with contextlib.suppress(RuntimeError):  # forbidden while there is a capture
            torch.cuda.synchronize()

    pool = Pool()
    graph, (result,) = capture(function, square.device, pool)
    assert calls == [False, True, True]
    assert segments_of(pool)
    square.zero_()
    graph.replay()
    assert result.eq(1).all()


@NEEDS_CUDA
def test_cuda_threads_that_capture_do_not_break_each_other(
    square: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    caches, results = [GraphCache(CUDA) for _ in range(4)], {}

    def work(index: int) -> None:
        for key in range(8):
            (result,) = caches[index].run(key, lambda x: (x @ square,), (square * index,))
            results[index, key] = result.clone()

    with caplog.at_level("INFO", logger="odelt_fast"):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not caplog.messages
    assert len(results) == 4 * 8
    for (index, _), result in results.items():
        torch.testing.assert_close(result, index * (square @ square), rtol=1e-4, atol=1e-3)
