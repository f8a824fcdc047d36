"""Times of the kernels: Triton, plain PyTorch and Inductor in turn, each checked first.

Checked against float64. Inputs are so many that each set has left the cache before its next use,
and all calls are one CUDA graph, so that the host does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import floor_seconds
from benchmarks.kernel_table import KernelCase, Operator
from benchmarks.measure import Timer, graph_timer, summary, take_turns

# Several times the last cache: 60 MB on an H200.
COLD_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
MOST_SETS = 256


def relative_error(got: Any, exact: Any) -> float:
    """Largest relative L2 error over the outputs."""
    pairs = zip(*([value] if isinstance(value, Tensor) else value for value in (got, exact)))
    norm = torch.linalg.vector_norm
    errors = [norm(a.double().reshape(b.shape) - b.double()) / norm(b.double()) for a, b in pairs]
    return max(float(error) if torch.isfinite(error) else math.inf for error in errors)


@dataclass
class Prepared:
    """A case with its inputs drawn, and the float64 result of the first of them.

    pytorch_error: relative, once it is known.
    """

    case: KernelCase
    dtype: torch.dtype
    device: torch.device
    variants: dict[str, Operator]
    arguments: list[Sequence[Any]]
    exact: Any
    pytorch_error: float = 0.0

    @property
    def sets(self) -> int:
        return len(self.arguments)

    def error(self, operator: Operator) -> float:
        """Relative error on the first set, on copies: some operators work in place."""
        return relative_error(operator(*(_copy(value) for value in self.arguments[0])), self.exact)

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
        error = self.error(operator)
        bound = max(2 * self.pytorch_error, self.case.tolerance, torch.finfo(self.dtype).eps + 2e-6)
        if not error <= bound:
            raise ValueError(
                f"its result is wrong: relative error {error:.2e}, at most {bound:.2e} is allowed"
            )

        def call(index: int) -> Any:
            return operator(*self.arguments[index])

        return error, graph_timer(call, self.sets, self.device)


def prepare(
    case: KernelCase, dtype: torch.dtype, device: torch.device, inductor: bool = False
) -> Prepared:
    """Draws the inputs; inductor: also the plain form, compiled, where the case allows it."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    sets = max(2, min(MOST_SETS, math.ceil(COLD_BYTES[device.type] / max(case.bytes, 1.0))))
    arguments = [case.make(draw) for _ in range(sets)]
    variants = {"pytorch": case.plain, **case.others}
    if case.compiled and inductor:
        variants["inductor"] = torch.compile(case.plain, fullgraph=True, dynamic=False)
    wide = [value.double() if isinstance(value, Tensor) else value for value in arguments[0]]
    return Prepared(case, dtype, device, variants, arguments, (case.exact or case.plain)(*wide))


def measure_kernel(
    case: KernelCase,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: dict[str, float],
    seconds: float,
    inductor: bool = True,
) -> dict[str, Any]:
    """Samples, rates, share of the floor and error of every variant, or why it did not run."""
    prepared = prepare(case, dtype, device, inductor)
    rows: dict[str, dict[str, Any]] = {name: {} for name in prepared.variants}
    timers: dict[str, Timer] = {}
    for name, row in rows.items():
        start = time.perf_counter()
        try:
            row["relative_error"], timers[name] = prepared.variant(name)
            row["setup_s"] = time.perf_counter() - start
        # A compiler's fault has any type; the other variants are still to be measured.
        except Exception as error:
            row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    floor = floor_seconds(case.flops, case.bytes, case.rate, ceilings)
    for name, taken in (take_turns(timers, seconds, most=100) if timers else {}).items():
        times = summary(taken)
        rows[name] |= {"samples_s": taken, **times, **rates(case, floor, times["median_s"])}
    sizes = {"bytes": case.bytes, "flops": case.flops, "floor_s": floor, "sets": prepared.sets}
    return {"kernel": case.name, **sizes, "variants": rows}


def rates(case: KernelCase, floor: float, seconds: float) -> dict[str, float]:
    """What a call of `seconds` reaches, and the share of the ceilings' `floor` in it."""
    return {
        "gigabytes_per_s": case.bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "share_of_floor": floor / seconds,
    }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
