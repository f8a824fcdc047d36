"""The project's goals for DiT-B/2 and DiT-XL/2 in bfloat16 on one GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .measure import Record
from .tables import seconds

Parts = dict[str, Record]  # part -> content of its file
Sample = tuple[Record, str, Record]  # cell, variant, row
_BASE, _LARGE = "DiT-B/2", "DiT-XL/2"
_COMPILED = ("max-autotune", "reduce-overhead")  # modes of torch.compile


def samples(parts: Parts, *names: str, memory: bool = False) -> Iterator[Sample]:
    """(cell, variant, row) of the sampling cells of the named parts, or of their memory."""
    for name in names:
        for key, configuration in parts.get(name, {}).get("configurations", {}).items():
            if key.startswith("memory ") == memory and "cell" in configuration:
                for variant, row in configuration.get("variants", {}).items():
                    yield configuration["cell"], variant, row


def ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def targets(parts: Parts) -> Iterator[tuple[str, str, str, str]]:
    """(what, target, measured, verdict) of every goal."""
    rates = [
        run["ceilings"]["bfloat16"]
        for name in ("throughput", "xl", "peers")
        for run in parts.get(name, {"runs": []})["runs"]
        if "ceilings" in run
    ]

    medians: dict[tuple[object, ...], float] = {
        (part, cell["batch"], cell["depth"], cell["steps"], variant): row["median_s"]
        for part in parts
        for cell, variant, row in samples(parts, part)
        if (cell["network"], cell["solver"]) == (_BASE, "euler") and "median_s" in row
    }

    def median(*work: str | int, variants: Sequence[str] = ("fused",)) -> float | None:
        """The shortest of DiT-B/2's medians with Euler's solver at a part, batch, l, T."""
        found = (medians.get((*work, each)) for each in variants)
        return min(filter(None, found), default=None)

    def evaluation(part: str, batch: int, depth: int, steps: int) -> float | None:
        return ratio(median(part, batch, depth, steps), steps)

    def gain(batch: int, depth: int, *peers: str, ours: str = "fused") -> float | None:
        work = "peers", batch, depth, 4
        return ratio(median(*work, variants=peers), median(*work, variants=(ours,)))

    def rate(part: str, network: str, batch: int, depth: int) -> float | None:
        """The fused backend's share of the matrix-product rate."""
        reached = (
            row["tflops"] * 1e12
            for cell, variant, row in samples(parts, part)
            if (cell["network"], cell["batch"], cell["depth"]) == (network, batch, depth)
            and variant == "fused"
            and "tflops" in row
        )
        return ratio(max(reached, default=None), max(rates, default=None))

    peaks = {
        (cell["network"], cell["batch"], cell["depth"], variant): row.get("peak_bytes")
        for cell, variant, row in samples(parts, "latency", memory=True)
    }
    peak4, peak12 = (peaks.get((_BASE, 1, depth, "fused")) for depth in (4, 12))

    def goal(
        what: str,
        side: str,
        bound: float,
        value: float | None,
        show: Callable[[float], str] = seconds,
    ) -> tuple[str, str, str, str]:
        target = f"at {side} {show(bound)}"
        if value is None:
            return what, target, "not measured", ""
        met = value <= bound if side == "most" else value >= bound
        return what, target, show(value), "met" if met else "missed"

    times, percent, plain = "{:.2f}x".format, "{:.1%}".format, "{:.3f}".format
    trajectory = "evaluation in a trajectory (T = 128)"
    compiler, product = "over the better torch.compile mode", "of the matrix-product rate"
    for depth, bound in ((12, 180e-6), (4, 70e-6)):
        value = evaluation("latency", 1, depth, 128)
        yield goal(f"batch 1, l = {depth}, {trajectory}", "most", bound, value)
    value = evaluation("latency", 1, 4, 1)
    yield goal("batch 1, l = 4, one-step sample from call to result", "most", 120e-6, value)
    for depth in (12, 4):
        value = gain(1, depth, *_COMPILED)
        yield goal(f"batch 1, l = {depth}, {compiler}", "least", 1.6, value, times)
    value = rate("throughput", _BASE, 128, 12)
    yield goal(f"batch 128, l = 12, {product}", "least", 0.75, value, percent)
    value = gain(128, 12, *_COMPILED)
    yield goal(f"batch 128, l = 12, {compiler}", "least", 1.15, value, times)
    value = gain(128, 12, *_COMPILED, ours="fused-fp8")
    yield goal(f"batch 128, l = 12, float8, {compiler}", "least", 1.6, value, times)
    value = gain(128, 12, "jax")
    yield goal("batch 128, l = 12, over the JAX reference", "least", 2.5, value, times)
    value = rate("xl", _LARGE, 64, 28)
    yield goal(f"DiT-XL/2, batch 64, l = 28, {product}", "least", 0.75, value, percent)
    full = evaluation("throughput", 128, 12, 4)
    for depth in (4, 8):
        value = ratio(evaluation("throughput", 128, depth, 4), full)
        what = f"batch 128, latency at l = {depth} over l = 12"
        yield goal(what, "most", depth / 12 + 0.03, value, plain)
    value = ratio(peak4, peak12)
    yield goal("batch 1, peak memory at l = 4 over l = 12", "most", 0.45, value, plain)
