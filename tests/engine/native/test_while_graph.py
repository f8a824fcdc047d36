"""CUDA graphs that the GPU repeats: built and loaded without a GPU; on one, a loop counts to its
limit."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from odelt_fast.engine.native.build import build, cuda_toolkit, load
from odelt_fast.engine.native.while_graph import (
    WHILE_NODES,
    WhileGraph,
    describe,
    while_graph_unavailable,
)
from tests.helpers import engine_cases


@pytest.fixture(scope="module")
def cuda_library(native_cache: Path) -> Path:
    if cuda_toolkit() is None:
        pytest.skip("no nvcc")
    path = build("cuda")
    assert load("cuda", build_it=False) is None
    return path


def test_the_cuda_library_builds_and_loads_without_a_gpu(cuda_library: Path) -> None:
    driver, runtime = torch.ops.odelt_native.while_graph_versions()
    assert runtime >= WHILE_NODES
    if not torch.cuda.is_available():
        assert while_graph_unavailable() == "no CUDA GPU"
        assert "no CUDA GPU" in describe()
    elif driver < runtime // 1000 * 1000:
        assert "driver" in str(while_graph_unavailable())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU: CUDA's own error")
def test_cudas_own_words_come_back_as_an_error(cuda_library: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cuda[GS]etDevice.*: \w+.*(driver|device)"):
        torch.ops.odelt_native.while_graph_create(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (
            "no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder",
            pytest.skip.Exception,
        ),
        ("the driver supports CUDA 12.2, while graphs need 13.0", pytest.skip.Exception),
        ("while_graph.cu(52): error: expected a ';'", AssertionError),
    ],
)
def test_while_nodes_that_cannot_be_built_are_a_failure_and_not_absent(
    monkeypatch: pytest.MonkeyPatch, reason: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setattr(engine_cases, "while_graph_unavailable", lambda: reason)
    with pytest.raises(outcome, match=re.escape(reason)):
        engine_cases.needs_while_nodes()


def test_a_flag_that_is_none_is_refused() -> None:
    for flag in (
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(1),
    ):
        with pytest.raises(ValueError, match=r"flag must be \(1,\) int32 on a GPU"):
            WhileGraph(None, flag)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [0, 1, 1000])
def test_a_while_graph_counts_to_its_limit(cuda_library: Path, limit: int) -> None:
    count, flag, started = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(3))
    end = torch.full((1,), limit, dtype=torch.int32, device="cuda")

    def first() -> None:
        started.add_(1)
        count.zero_()
        flag.copy_(count < end)

    def body() -> None:
        count.add_(1)
        flag.copy_(count < end)

    graphs = []
    for function in (first, body):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            function()
        graphs.append(graph)
    loop = WhileGraph(graphs[1], flag, first=graphs[0])
    for launch in range(1, 4):
        loop.launch()
        assert (count.item(), started.item()) == (limit, launch)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_stays_the_current_one(cuda_library: Path) -> None:
    flag = torch.ones(1, dtype=torch.int32, device="cuda:1")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.device(1), torch.cuda.graph(graph):
        flag.zero_()
    loop = WhileGraph(graph, flag)
    assert current_device() == 0
    loop.launch()
    assert current_device() == 0
    assert flag.item() == 0
    del loop
    assert current_device() == 0


def current_device() -> int:
    """CUDA's, which torch takes for its own without asking."""
    device = ctypes.c_int(-1)
    version = str(torch.version.cuda).split(".")[0]
    assert ctypes.CDLL(f"libcudart.so.{version}").cudaGetDevice(ctypes.byref(device)) == 0
    return device.value
