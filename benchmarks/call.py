"""What a call of the Sampler does on the host around its replay, with a replay that does nothing.

    python -m benchmarks.call --before CHECKOUT --out call.json

On the CPU, in microseconds, variants in turns: `draw`, the way batch by batch; `call` and
`prepared`, which replay; `new labels`, the prepared call with other labels each time; `copies`, of
noise in and of images and their check out, which no call can do without; and `before`, the call of
another checkout of the project, in a process of its own. The graph is one that was captured and
whose replay is empty: a call's time less that of the GPU.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import PRESETS
from odelt_fast.engine import availability, fused
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.graphs import GraphCache
from odelt_fast.model import DiT
from odelt_fast.sampling.sampler import Sampler

CALLS = 50  # of a sample: their median
CPU = torch.device("cpu")


class Empty:
    """A graph whose replay does nothing."""

    def replay(self) -> None: ...


def empty_graphs() -> GraphCache:
    """Captures run the function once, for its outputs."""
    return GraphCache(CPU, capture=lambda function, device, pool: (Empty(), function()))


@contextmanager
def fused_on_the_cpu() -> Iterator[None]:
    """Samplers made inside have the fused backend, with plain PyTorch's operators."""
    kept = availability.fused_unavailable, fused.shared_engine

    def engine(model: DiT, attention: str = "auto", precision: Any = None, *_: object) -> Any:
        return Engine(model, attention, precision, "reference"), empty_graphs()

    availability.fused_unavailable = lambda model: None
    fused.shared_engine = engine  # type: ignore[assignment]
    try:
        yield
    finally:
        availability.fused_unavailable, fused.shared_engine = kept


def warm_sampler(network: str, depth: int, noise: Tensor, labels: np.ndarray) -> Sampler:
    """A sampler whose graph of this call has been captured. (Used in other checkouts, too.)"""
    torch.manual_seed(0)
    model = DiT(PRESETS[network]).truncate(depth).eval().requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    with fused_on_the_cpu():
        sampler = Sampler(model, steps=1, backend="fused", batch_size=len(noise))
    for _ in range(3):
        sampler(noise=noise, labels=labels)
    return sampler


def inputs(network: str, batch: int) -> tuple[Tensor, np.ndarray]:
    config = PRESETS[network]
    noise = torch.randn(batch, *config.image_shape, generator=torch.Generator().manual_seed(1))
    return noise, np.arange(batch) % config.num_classes


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call: the median of CALLS, which a busy machine seldom interrupts."""
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


class Before:
    """The call of another checkout, in a process of its own."""

    def __init__(self, checkout: Path, network: str, depth: int, batch: int) -> None:
        if not (checkout / "odelt_fast" / "__init__.py").is_file():
            raise ValueError(f"--before {checkout}: it is no checkout of this project")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), network, str(depth), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
        )

    def timed(self) -> float:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the checkout's process ended with code {self.process.wait()}")
        return float(line)

    def close(self) -> None:
        self.process.communicate()


def serve(network: str, depth: int, batch: int) -> None:
    """Answers each line with the seconds of a call, until there are no more."""
    noise, labels = inputs(network, batch)
    sampler = warm_sampler(network, depth, noise, labels)
    for _ in sys.stdin:
        timed(lambda: sampler(noise=noise, labels=labels))  # its caches are cold
        print(timed(lambda: sampler(noise=noise, labels=labels)), flush=True)


def measure(
    network: str, depth: int, batch: int, before: Path | None, seconds: float
) -> dict[str, Any]:
    """Samples and medians of every variant at one shape."""
    from benchmarks.measure import measured, take_turns

    noise, labels = inputs(network, batch)
    sampler = warm_sampler(network, depth, noise, labels)
    prepared, others = sampler.prepare(batch), itertools.cycle((labels, labels[::-1] + 1))
    prepared(noise, labels)
    held, finite = torch.empty_like(noise), torch.ones(batch, dtype=torch.bool)

    def copies() -> bool:
        held.copy_(noise)
        held.clone()
        return all(finite.clone().tolist())

    calls: dict[str, Callable[[], object]] = {
        "draw": lambda: sampler.draw(noise.shape, noise, labels, 0, 0, None),
        "call": lambda: sampler(noise=noise, labels=labels),
        "prepared": lambda: prepared(noise, labels),
        "new labels": lambda: prepared(noise, next(others)),
        "copies": copies,
    }
    timers: dict[str, Callable[[], float]] = {
        name: partial(timed, call) for name, call in calls.items()
    }
    other = before and Before(before, network, depth, batch)
    if other:
        timers["before"] = other.timed
    try:
        samples = take_turns(timers, seconds, least=15)
    finally:
        if other:
            other.close()
    return {"network": network, "depth": depth, "batch": batch, "variants": measured(samples)}


def line(found: dict[str, Any]) -> list[str]:
    """A shape's medians, with the 10 % and 90 % quantiles, in microseconds."""
    cells = [str(found["batch"]), str(found["depth"])]
    for row in found["variants"].values():
        median, low, high = (1e6 * row[name] for name in ("median_s", "low_s", "high_s"))
        cells.append(f"{median:.1f} ({low:.1f} to {high:.1f})")
    return cells


def main() -> int:
    from benchmarks.measure import command_parser, device_record, write_json
    from benchmarks.tables import table

    parser = command_parser("call", __doc__)
    parser.add_argument("--before", type=Path, help="another checkout of the project")
    parser.add_argument("--network", default="DiT-B/2", choices=sorted(PRESETS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    parser.add_argument("--out", type=Path, help="file of the samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for batch, depth in itertools.product(options.batches, options.depths):
        try:
            found.append(measure(options.network, depth, batch, options.before, options.seconds))
        except ValueError as error:
            parser.error(str(error))
    if options.out:
        write_json(options.out, {"device": device_record(), "calls": found})
    names = list(found[0]["variants"])
    print(table(" | ".join(["batch", "l", *names]), map(line, found)))
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("-"):
        serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
