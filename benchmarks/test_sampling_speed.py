"""Sampling under pytest-benchmark: `pytest benchmarks/`.

DiT-B/2 in bfloat16 on a GPU; a smaller network and grid elsewhere. Groups are workloads (batch, l,
T), their rows the backends, each timed from the call to the finished
result and only after its samples were found right. A backend that cannot run here is skipped with
its reason. Interleaved peers, larger networks: `python -m benchmarks.card`.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from benchmarks.ceilings import evaluation_bytes, evaluation_flops, floor_seconds
from benchmarks.measure import Record, host_timer
from benchmarks.sampling import Workload, check, sampler_call, true_samples
from odelt_fast.operation import Operation

CUDA = torch.cuda.is_available()
NETWORK, DTYPE = ("DiT-B/2", torch.bfloat16) if CUDA else ("DiT-S/2", torch.float32)
DEPTHS = (4, 8, 12)
BATCHES = (1, 8, 128) if CUDA else (1,)
VARIANTS = ("eager", "auto", "fused", *(("fused-fp8", "compile") if CUDA else ()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("batch", BATCHES)
def test_trajectory(
    benchmark: Any,
    device: torch.device,
    ceilings: dict[str, float],
    record: Record,
    batch: int,
    steps: int,
    depth: int,
    variant: str,
) -> None:
    load = Workload(NETWORK, Operation(depth=depth, steps=steps), batch, DTYPE, (variant,))
    model, inputs = load.model(device), load.inputs(device)
    truth = true_samples(model, load, inputs)
    try:
        call, sampler = sampler_call(model, load, variant, inputs)
    except ValueError as error:
        pytest.skip(str(error))
    relative_error = check(variant, DTYPE, call(), *truth)
    benchmark.group = load.key
    rounds, warmup = (50, 3) if CUDA else (3, 1)
    benchmark.pedantic(host_timer(call, device), rounds=rounds, warmup_rounds=warmup)
    evaluation = statistics.median(benchmark.stats.stats.data) / steps
    flops = evaluation_flops(load.config, depth, batch)
    traffic = evaluation_bytes(load.config, depth, batch, DTYPE)
    benchmark.extra_info.update(
        record,
        cell=load.record(),
        backend=sampler.explain()["backend"],
        relative_error=relative_error,
        tflops=flops / evaluation / 1e12,
        share_of_floor=floor_seconds(flops, traffic, DTYPE, ceilings) / evaluation,
    )
