"""The kernels under pytest-benchmark (`pytest benchmarks/`): Triton on a GPU, and plain PyTorch.

A round is all calls of one variant over inputs that have left the cache between two uses
(extra_info: calls), and only after its result was found right. Inductor's forms: `python -m
benchmarks.card --only "kernels: *"`.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from benchmarks.ceilings import floor_seconds
from benchmarks.kernel_speed import Prepared, rates
from benchmarks.kernel_table import KernelCase, cases
from benchmarks.measure import Record
from benchmarks.sampling import CONFIGS

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = (("DiT-B/2", 1), ("DiT-B/2", 128)) if CUDA else (("DiT-S/2", 1),)
VARIANTS = [
    (case, variant)
    for network, batch in SHAPES
    for case in cases(CONFIGS[network], batch, DTYPE, CUDA)
    for variant in ("pytorch", *case.others)
]


@pytest.mark.parametrize(
    ("case", "variant"), VARIANTS, ids=[f"{case.name}-{variant}" for case, variant in VARIANTS]
)
def test_kernel(
    benchmark: Any,
    device: torch.device,
    ceilings: dict[str, float],
    record: Record,
    case: KernelCase,
    variant: str,
) -> None:
    prepared = Prepared(case, DTYPE, device)
    relative_error, timer = prepared.variant(variant)
    benchmark.group = case.name
    benchmark.pedantic(timer, rounds=20 if CUDA else 3, warmup_rounds=2 if CUDA else 1)
    each = statistics.median(benchmark.stats.stats.data) / prepared.sets
    floor = floor_seconds(case.flops, case.bytes, case.rate, ceilings)
    benchmark.extra_info.update(
        record, variant=variant, calls=prepared.sets, relative_error=relative_error,
        seconds_of_a_call=each, **rates(case, floor, each),
    )  # fmt: skip
