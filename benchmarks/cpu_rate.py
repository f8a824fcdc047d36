"""How near a CPU's evaluation comes to the rate of its own matrix products.

    python -m benchmarks.cpu_rate [--dtype float32 bfloat16]

DiT-B/2 at batch 8, l = 4, in turn with a product of 2048x768x3072 in the same dtype: operations of
the evaluation's matrix products over its time, as a share of the product's own rate; and the
Sampler's backend "auto" beside the eager model (one step each). Targets: at least 95 %, and auto no
slower than eager. Quiet machine wanted: the quantiles of the rounds' shares say how quiet it was.
On one that others use `--one-thread` counts the processor's time of a single thread, which their
work disturbs less. The native operators are built if need be.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import CPU_PRODUCT, evaluation_flops, product_timer
from benchmarks.measure import (
    Timer,
    command_parser,
    device_record,
    dtype_name,
    host_timer,
    measured,
    summary,
    take_turns,
    write_json,
)
from benchmarks.sampling import CONFIGS, Workload, sampler_call
from benchmarks.tables import spread, table
from odelt_fast.engine.cpu import choose
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load as load_operators
from odelt_fast.operation import Operation

CPU = torch.device("cpu")
TARGET = 0.95


def measure(load: Workload, duration: float, clock: Timer = time.perf_counter) -> dict[str, Any]:
    """Samples of each variant, and the shares that follow from each round.

    The variants: product, model (one evaluation), eager and auto (Sampler, one step).
    """
    model, (noise, labels) = load.model(CPU), load.inputs(CPU)

    @torch.inference_mode()
    def evaluate() -> torch.Tensor:
        return model(noise, 0.0, 0, torch.from_numpy(labels), depth=load.depth)  # type: ignore[no-any-return]

    calls = {"model": evaluate} | {
        backend: sampler_call(model, load, backend, noise, labels)[0]
        for backend in ("eager", "auto")
    }
    timers = {name: host_timer(call, CPU, clock) for name, call in calls.items()}
    product_timed = {"product": product_timer(load.dtype, CPU, CPU_PRODUCT, clock)}
    samples = take_turns(product_timed | timers, duration, least=5)
    product = 2.0 * math.prod(CPU_PRODUCT)
    evaluation = evaluation_flops(load.config, load.depth, load.batch)

    def quotients(a: str, b: str, factor: float = 1.0) -> dict[str, float]:
        return summary([factor * x / y for x, y in zip(samples[a], samples[b])])

    return {
        "cell": load.record(),
        "flops": evaluation,
        "product_flops": product,
        "share": {name: quotients("product", name, evaluation / product) for name in timers},
        "auto_to_eager": quotients("auto", "eager"),
        "variants": measured(samples),
    }


def operators(
    load: Workload, evaluations: int = 20, least: float = 0.005
) -> list[tuple[str, str, str]]:
    """Where an evaluation of "auto" spends its time, by PyTorch's profiler.

    Args:
        least: share of the time of an operator that gets a line.

    Returns:
        operator and shapes, calls, ms; the most first.
    """
    network, (noise, labels) = choose(load.model(CPU)), load.inputs(CPU)
    activities = [torch.profiler.ProfilerActivity.CPU]

    def evaluate(times: int) -> None:
        for _ in range(times):
            network(noise, 0.0, 0, torch.from_numpy(labels), load.depth)

    with torch.inference_mode():
        evaluate(3)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            evaluate(evaluations)
    events = profile.key_averages(group_by_input_shape=True)
    left = total = sum(event.self_cpu_time_total for event in events)
    per_ms = evaluations * 1e3  # the profiler's microseconds of all evaluations
    rows = []
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total):
        taken = event.self_cpu_time_total
        if taken >= least * total:
            shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
            calls = f"{event.count / evaluations:.4g}"
            rows.append((f"{event.key} {shapes[:80]}", calls, f"{taken / per_ms:.2f}"))
            left -= taken
    return [*rows, ("all else", "", f"{left / per_ms:.2f}")]


def print_tables(load: Workload, found: dict[str, Any]) -> None:
    rows = []
    for variant, row in found["variants"].items():
        flops = found["product_flops" if variant == "product" else "flops"]
        shown = ""
        if share := found["share"].get(variant):
            median, low, high = (f"{share[name]:.1%}" for name in ("median_s", "low_s", "high_s"))
            shown = f"{median} ({low} to {high})"
        rate = f"{flops / row['median_s'] / 1e9:.4g} GFLOP/s"
        rows.append((variant, spread(row), rate, shown))
    title = f"{load.network} {dtype_name(load.dtype)} batch {load.batch} l={load.depth}"
    print(table((title, "time", "rate", "share of the product's rate"), rows))


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("cpu_rate", __doc__)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--network", default="DiT-B/2", choices=tuple(CONFIGS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60, help="of each dtype")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="one thread, and its processor time instead of the clock's",
    )
    parser.add_argument(
        "--operators",
        action="store_true",
        help="print where an evaluation of auto spends its time, too",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the samples")
    options = parser.parse_args(arguments)
    if options.one_thread:
        torch.set_num_threads(1)
    clock = time.process_time if options.one_thread else time.perf_counter
    print(load_operators("cpu") or cpu_ops.describe())
    results = []
    for name in options.dtype:
        operation, dtype = Operation(depth=options.depth, steps=1), getattr(torch, name)
        load = Workload(options.network, operation, options.batch, dtype, ("eager", "auto"))
        found = measure(load, options.seconds, clock)
        results.append(found)
        print_tables(load, found)
        if options.operators:
            print(table((f"operator ({name})", "calls", "ms"), operators(load)))
        share, ratio = found["share"]["auto"]["median_s"], found["auto_to_eager"]["median_s"]
        print(
            f"auto: {share:.1%} of the product's rate (target {TARGET:.0%}); {ratio:.3f} of eager's"
            " time\n",
            flush=True,
        )
    if options.out:
        write_json(options.out, {"device": device_record(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
