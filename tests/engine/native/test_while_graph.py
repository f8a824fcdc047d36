"""CUDA graphs that the GPU repeats: built and loaded without a GPU; on one, a loop counts to its
limit."""

from __future__ import annotations

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
    with pytest.raises(RuntimeError, match=r"cudaSetDevice.*: \w+.*(driver|device)"):
        torch.ops.odelt_native.while_graph_create(0, 0, 0, 0)


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
