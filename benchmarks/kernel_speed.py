"""Times of the kernels: Triton, plain PyTorch and Inductor in turn, each checked first.

Checked against float64. Inputs are so many that each set has left the cache before its next use,
and all calls are one CUDA graph, so that the host does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from . import measure
from .ceilings import floor_seconds
from .kernel_table import KernelCase, Operator
from .measure import Record, Timer

# Several times the last cache: 60 MB on an H200.
COLD_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
MOST_SETS = 256


def relative_error(got: Any, exact: Any) -> float:
    """Largest relative L2 error over the outputs."""
    pairs = zip(*([value] if isinstance(value, Tensor) else value for value in (got, exact)))
    errors = [measure.relative_error(a.reshape(b.shape), b.double()) for a, b in pairs]
    return max(error if math.isfinite(error) else math.inf for error in errors)


class Prepared:
    """A case with its inputs drawn, and the float64 result of those that variants are checked on.

    These lie apart: some variants work in place, and to time one changes what it is timed on.

    Args:
        inductor: also the plain form, compiled, where the case allows it.
    """

    def __init__(
        self, case: KernelCase, dtype: torch.dtype, device: torch.device, inductor: bool = False
    ) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        needed = math.ceil(COLD_BYTES[device.type] / max(case.bytes, 1.0))
        self.sets = max(2, min(MOST_SETS, needed))
        self.checked = case.make(draw)
        self.arguments = [case.make(draw) for _ in range(self.sets)]
        self.variants = {"pytorch": case.plain, **case.others}
        if case.compiled and inductor:
            self.variants["inductor"] = torch.compile(case.plain, fullgraph=True, dynamic=False)
        wide = (each.double() if isinstance(each, Tensor) else each for each in self.checked)
        self.exact = (case.exact or case.plain)(*wide)
        self.pytorch_error = 0.0  # relative, once it is known

    def error(self, operator: Operator) -> float:
        """Relative error, on copies."""
        copies = (each.clone() if isinstance(each, Tensor) else each for each in self.checked)
        return relative_error(operator(*copies), self.exact)

    def variant(self, name: str) -> tuple[float, Timer]:
        """(relative error, timer) of a variant.

        Raises:
            ValueError: the error is above twice plain PyTorch's, and what rounding may cost.
        """
        if not self.pytorch_error:
            # A form that PyTorch lacks here sets no measure: rounding is the bound.
            with suppress(RuntimeError):
                self.pytorch_error = self.error(self.case.plain)
        operator = self.variants[name]
        bound = max(2 * self.pytorch_error, self.case.tolerance, torch.finfo(self.dtype).eps + 2e-6)
        error = measure.check_error(self.error(operator), bound)

        def call(index: int) -> Any:
            return operator(*self.arguments[index])

        return error, measure.graph_timer(call, self.sets, self.device)


def measure_kernel(
    case: KernelCase,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Mapping[str, float],
    seconds: float,
    inductor: bool,
    refused: Mapping[str, str],
) -> Record:
    """Samples, rates, share of the floor and error of every variant, or why it did not run.

    refused: why a variant must not be measured.
    """
    prepared = Prepared(case, dtype, device, inductor)
    rows: dict[str, Record] = {name: {} for name in prepared.variants}
    timers: dict[str, Timer] = {}
    for name, row in rows.items():
        start = time.perf_counter()
        with measure.reason_in(row):
            if name in refused:
                raise ValueError(refused[name])
            row["relative_error"], timers[name] = prepared.variant(name)
            row["setup_s"] = time.perf_counter() - start
    floor = floor_seconds(case.flops, case.bytes, case.rate, ceilings)
    for name, row in measure.measured(measure.take_turns(timers, seconds, most=100)).items():
        rows[name] |= row | rates(case, floor, row["median_s"])
    sizes = {"bytes": case.bytes, "flops": case.flops, "floor_s": floor, "sets": prepared.sets}
    return {"kernel": case.name, **sizes, "variants": rows}


def rates(case: KernelCase, floor: float, seconds: float) -> dict[str, float]:
    """What a call of `seconds` reaches, and the share of the ceilings' `floor` in it."""
    return {
        "gigabytes_per_s": case.bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "share_of_floor": floor / seconds,
    }
