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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from odelt_fast.engine.cpu import choose
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load as load_operators
from odelt_fast.operation import Operation

from .ceilings import CPU_PRODUCT, evaluation_flops, product_timer
from .measure import (
    Record,
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
from .sampling import Inputs, Workload, sampler_call
from .tables import spread, table

CPU = torch.device("cpu")
TARGET = 0.95


@torch.inference_mode()
def evaluate(network: Callable[..., object], load: Workload, inputs: Inputs) -> None:
    """One evaluation at t = 0."""
    labels = torch.from_numpy(inputs["labels"])
    network(inputs["noise"], 0.0, 0, labels, depth=load.depth)


def measure(load: Workload, duration: float, clock: Timer = time.perf_counter) -> Record:
    """Samples of each variant, and the shares that follow from each round.

    The variants: product, model (one evaluation), eager and auto (Sampler, one step).
    """
    model, inputs = load.model(CPU), load.inputs(CPU)
    calls: dict[str, Callable[[], object]] = {"model": partial(evaluate, model, load, inputs)}
    for backend in ("eager", "auto"):
        calls[backend], _ = sampler_call(model, load, backend, inputs)
    timers = {"product": product_timer(load.dtype, CPU, CPU_PRODUCT, clock)}
    timers |= {name: host_timer(call, CPU, clock) for name, call in calls.items()}
    samples = take_turns(timers, duration)
    product = 2.0 * math.prod(CPU_PRODUCT)
    evaluation = evaluation_flops(load.config, load.depth, load.batch)

    def quotients(a: str, b: str, factor: float = 1.0) -> dict[str, float]:
        return summary([factor * x / y for x, y in zip(samples[a], samples[b])])

    return {
        "cell": load.record(),
        "flops": evaluation,
        "product_flops": product,
        "share": {name: quotients("product", name, evaluation / product) for name in calls},
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
    network, inputs = choose(load.model(CPU)), load.inputs(CPU)
    activities = [torch.profiler.ProfilerActivity.CPU]
    for _ in range(3):
        evaluate(network, load, inputs)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(evaluations):
            evaluate(network, load, inputs)
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


def print_tables(load: Workload, found: Record) -> None:
    rows = []
    for variant, row in found["variants"].items():
        flops, shown = found["product_flops"], ""
        if share := found["share"].get(variant):
            flops = found["flops"]
            median, low, high = (f"{each:.1%}" for each in share.values())
            shown = f"{median} ({low} to {high})"
        rate = f"{flops / row['median_s'] / 1e9:.4g} GFLOP/s"
        rows.append((variant, spread(row), rate, shown))
    title = f"{load.network} {dtype_name(load.dtype)} batch {load.batch} l={load.depth}"
    print(table(f"{title} | time | rate | share of the product's rate", rows))


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("cpu_rate", __doc__)
    add, dtypes = parser.add_argument, ("float32", "bfloat16")
    add("--dtype", nargs="+", choices=dtypes, default=dtypes)
    add("--seconds", type=float, default=60, help="of each dtype")
    what = "one thread, and its processor time instead of the clock's"
    add("--one-thread", action="store_true", help=what)
    what = "print where an evaluation of auto spends its time, too"
    add("--operators", action="store_true", help=what)
    add("--out", type=Path, help="JSON file for the samples")
    options = parser.parse_args(arguments)
    clock = time.perf_counter
    if options.one_thread:
        torch.set_num_threads(1)
        clock = time.process_time
    print(load_operators("cpu") or cpu_ops.describe())
    results = []
    for name in options.dtype:
        operation = Operation(depth=4, steps=1)
        load = Workload("DiT-B/2", operation, 8, getattr(torch, name), ("eager", "auto"))
        found = measure(load, options.seconds, clock)
        results.append(found)
        print_tables(load, found)
        if options.operators:
            print(table(f"operator ({name}) | calls | ms", operators(load)))
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
