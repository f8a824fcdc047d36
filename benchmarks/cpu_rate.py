"""How near a CPU's evaluation comes to the rate of its own matrix products: `python -m
benchmarks.cpu_rate [--dtype float32 bfloat16]`.

DiT-B/2 at batch 8, l = 4, in turn with a product of 2048x768x3072 in the same dtype: operations of
the evaluation's matrix products over its time, as a share of the product's own rate; and the
Sampler's backend "auto" beside the eager model (one step each). Targets: at least 95 %, and auto no
slower than eager. Quiet machine wanted: the quantiles of the rounds' shares say how quiet it was.
On one that others use `--one-thread` counts the processor's time of a single thread, which their
work disturbs less. The native operators are built if need be.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import CPU_PRODUCT, evaluation_flops, product_timer
from benchmarks.measure import Timer, device_record, host_timer, summary, take_turns, write_json
from benchmarks.report import spread, table
from benchmarks.sampling import CONFIGS, Cell, inputs, random_model, sampler_call
from odelt_fast.engine.cpu import choose
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load

TARGET = 0.95


def measure(
    dtype: torch.dtype, cell: Cell, duration: float, clock: Timer = time.perf_counter
) -> dict[str, Any]:
    """Samples of product, model (one evaluation), eager and auto (Sampler, one step), and the
    shares that follow from each round."""
    device = torch.device("cpu")
    config, model = (
        CONFIGS[cell.network],
        random_model(CONFIGS[cell.network], cell.depth, dtype, device),
    )
    noise, labels = inputs(cell, device)
    y = torch.from_numpy(labels)

    @torch.inference_mode()
    def evaluate() -> torch.Tensor:
        return model(noise, 0.0, 0, y, depth=cell.depth)  # type: ignore[no-any-return]

    timers = {
        "product": product_timer(dtype, device, CPU_PRODUCT, clock),
        "model": host_timer(evaluate, device, clock),
    }
    for variant in ("eager", "auto"):
        timers[variant] = host_timer(
            sampler_call(model, cell, variant, noise, labels)[0], device, clock
        )
    samples = take_turns(timers, duration, least=5)
    product, evaluation = (
        2.0 * CPU_PRODUCT[0] * CPU_PRODUCT[1] * CPU_PRODUCT[2],
        evaluation_flops(config, cell.depth, cell.batch),
    )
    share = {
        name: summary(
            [
                (evaluation / mine) / (product / other)
                for mine, other in zip(samples[name], samples["product"])
            ]
        )
        for name in ("model", "eager", "auto")
    }
    to_eager = summary([auto / eager for auto, eager in zip(samples["auto"], samples["eager"])])
    rows = {name: {"samples_s": taken} | summary(taken) for name, taken in samples.items()}
    return {
        "cell": cell.record(),
        "flops": evaluation,
        "product_flops": product,
        "share": share,
        "auto_to_eager": to_eager,
        "variants": rows,
    }


def operators(dtype: torch.dtype, cell: Cell, evaluations: int = 20) -> list[tuple[str, str, str]]:
    """Where an evaluation of "auto" spends its time, by PyTorch's profiler: operator and shapes,
    calls, ms; the most first."""
    device = torch.device("cpu")
    network = choose(random_model(CONFIGS[cell.network], cell.depth, dtype, device))
    noise, labels = inputs(cell, device)
    y = torch.from_numpy(labels)
    with torch.inference_mode():
        for _ in range(3):
            network(noise, 0.0, 0, y, cell.depth)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            for _ in range(evaluations):
                network(noise, 0.0, 0, y, cell.depth)
    events = sorted(
        profile.key_averages(group_by_input_shape=True),
        key=lambda event: -event.self_cpu_time_total,
    )
    total = sum(event.self_cpu_time_total for event in events)
    per_ms = evaluations * 1e3  # the profiler's microseconds of all evaluations
    shown = [event for event in events if event.self_cpu_time_total >= total / 200]
    rows = []
    for event in shown:
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
        rows.append(
            (
                f"{event.key} {shapes[:80]}",
                f"{event.count / evaluations:.4g}",
                f"{event.self_cpu_time_total / per_ms:.2f}",
            )
        )
    rest = total - sum(event.self_cpu_time_total for event in shown)
    return [*rows, ("all else", "", f"{rest / per_ms:.2f}")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16")
    )
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
    print(load("cpu") or cpu_ops.describe())
    results = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        cell = Cell(options.network, options.depth, 1, options.batch, dtype, ("eager", "auto"))
        found = measure(dtype, cell, options.seconds, clock)
        results.append(found)
        rows = []
        for variant, row in found["variants"].items():
            share = found["share"].get(variant)
            flops = found["product_flops"] if variant == "product" else found["flops"]
            shown = (
                f"{share['median_s']:.1%} ({share['low_s']:.1%} to {share['high_s']:.1%})"
                if share
                else ""
            )
            rows.append(
                (variant, spread(row), f"{flops / row['median_s'] / 1e9:.4g} GFLOP/s", shown)
            )
        print(
            table(
                (
                    f"{options.network} {name} batch {options.batch} l={options.depth}",
                    "time",
                    "rate",
                    "share of the product's rate",
                ),
                rows,
            )
        )
        if options.operators:
            print(table((f"operator ({name})", "calls", "ms"), operators(dtype, cell)))
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
