"""Sampling under pytest-benchmark: `pytest benchmarks/`. DiT-B/2 in bfloat16 on a GPU; a smaller
network and grid elsewhere.

Groups are cells (batch, l, T), their rows the backends, each timed from the call to the finished
result and only after its samples were found right. A backend that cannot run here is skipped with
its reason. Interleaved peers, larger networks: `python -m benchmarks.suite`.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from benchmarks.ceilings import evaluation_bytes, evaluation_flops, floor_seconds
from benchmarks.measure import host_timer
from benchmarks.sampling import CONFIGS, Cell, check, inputs, random_model, sampler_call

CUDA = torch.cuda.is_available()
NETWORK, DTYPE = ("DiT-B/2", torch.bfloat16) if CUDA else ("DiT-S/2", torch.float32)
DEPTHS = (4, 8, 12)
WORK = [(batch, steps) for batch in (1, 8, 128) for steps in (1, 4)] if CUDA else [(1, 1), (1, 4)]
VARIANTS = (
    ("eager", "auto", "fused", "fused-fp8", "compile") if CUDA else ("eager", "auto", "fused")
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("batch", "steps"), WORK)
def test_trajectory(
    benchmark: Any,
    device: torch.device,
    ceilings: dict[str, float],
    record: dict[str, Any],
    batch: int,
    steps: int,
    depth: int,
    variant: str,
) -> None:
    cell = Cell(NETWORK, depth, steps, batch, DTYPE, (variant,))
    config = CONFIGS[NETWORK]
    noise, labels = inputs(cell, device)
    exact = sampler_call(
        random_model(config, depth, torch.float32, device), cell, "eager", noise, labels
    )[0]().double()
    model = random_model(config, depth, DTYPE, device)
    eager = sampler_call(model, cell, "eager", noise, labels)[0]()
    try:
        call, sampler = sampler_call(model, cell, variant, noise, labels)
    except ValueError as error:
        pytest.skip(str(error))
    relative_error = check(variant, cell, call(), eager, exact)
    benchmark.group = cell.key
    benchmark.pedantic(
        host_timer(call, device), rounds=50 if CUDA else 3, warmup_rounds=3 if CUDA else 1
    )
    median = statistics.median(benchmark.stats.stats.data)
    flops = steps * evaluation_flops(config, depth, batch)
    floor = steps * floor_seconds(
        flops / steps, evaluation_bytes(config, depth, batch, DTYPE), DTYPE, ceilings
    )
    benchmark.extra_info.update(
        record, cell=cell.record(), backend=sampler.explain()["backend"], relative_error=relative_error, tflops=flops / median / 1e12,
        share_of_floor=floor / median,
    )  # fmt: skip
