"""The suite's part "solvers": the paper's Table 3, a race against torchdiffeq on the same compiled
network, and what a solve launches.

Table 3 is a cell of sampling.py for each length and solver. In the race all take Dopri5's steps
with one error over the batch, as torchdiffeq does, on one network, compiled by torch.compile or
prepared by the engine; the error of each is held to the tolerance or twice torchdiffeq's own. The
proof counts what the host asks of CUDA between the start of a solve and its end, in a profiler's
trace.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Timer, host_timer, release, summary, synchronize, take_turns
from benchmarks.sampling import CONFIGS, LEAST_BOUND, Cell, inputs, random_model
from odelt_fast import DiT, Sampler
from odelt_fast.engine.device_adaptive import AdaptiveGraph, DeviceAdaptive, repeat
from odelt_fast.engine.graphs import capture
from odelt_fast.sampling.velocity import compiled
from odelt_fast.solvers.options import Limits
from odelt_fast.solvers.tableau import find_tableau

THEIRS = "torchdiffeq"
# Random weights at which Dopri5 takes 32 evaluations at 1e-2 and 50 at 1e-4 (DiT-S/2), near the
# paper's 33 to 34 and 71 to 72.
SCALE = 30.0
Outcome = tuple[Tensor, float]  # samples, and evaluations of the network for each


def table3_cells(
    network: str,
    depths: Iterable[int],
    steps: Iterable[int],
    tolerances: Iterable[float],
    batch: int,
    dtype: torch.dtype,
    variant: str,
) -> Iterator[Cell]:
    """Longest first, as in the paper; fixed steps before adaptive ones."""
    for depth in sorted(depths, reverse=True):
        for count in sorted(steps):
            yield Cell(network, depth, count, batch, dtype, (variant,), scale=SCALE)
        for tolerance in tolerances:
            yield Cell(network, depth, 1, batch, dtype, (variant,), "dopri5", tolerance, SCALE)


def one_launch(
    model: DiT, network: Callable[..., Tensor], cell: Cell, noise: Tensor, labels: np.ndarray
) -> Callable[[], Outcome]:
    """A solve on the device with `network` as it is: as CUDA graphs where there is a GPU, else
    launched step by step."""
    y, device = torch.from_numpy(labels).to(noise.device), noise.device
    index = torch.full((1,), 7.0, device=device)

    def field(t: Tensor, x: Tensor, log2_steps: int) -> Tensor:
        return network(x, t[:1].float(), index, y, depth=cell.depth).to(x.dtype)

    limits = Limits(cell.tolerance, cell.tolerance, error_norm="batch")
    with torch.inference_mode():  # as in a Sampler: for another mode a network is compiled anew
        ops = _operators(device)
        solve = DeviceAdaptive(
            field, noise.clone(), 7, find_tableau(cell.solver)[0], limits=limits, ops=ops
        )
        graph = AdaptiveGraph(solve, capturing=capture) if device.type == "cuda" else None

    def call() -> Outcome:
        with torch.inference_mode():
            solve.x0.copy_(noise)
            if graph:
                graph.replay()
            else:
                solve.start()
                repeat(solve.attempt, solve.flag)
            return solve.x.clone(), 2 + int(solve.attempts) * solve.evaluations_per_attempt

    return call


def _operators(device: torch.device) -> Any:
    from odelt_fast.engine import operators

    return operators.load_operators("kernels") if device.type == "cuda" else None


@dataclass(frozen=True)
class Racers:
    """Makes the calls of a race on one model. inductor False: the model itself stands in for its
    compiled form."""

    model: DiT
    cell: Cell
    noise: Tensor
    labels: np.ndarray
    inductor: bool

    def sampled(
        self, solver: str, backend: str, error_norm: str = "batch", tolerance: float | None = None
    ) -> Callable[[], Outcome]:
        """A `Sampler`, whose loop is torchdiffeq's, the host's or, with the fused backend, the
        device's."""
        tolerance = tolerance or self.cell.tolerance
        settings = {
            "rtol": tolerance,
            "atol": tolerance,
            "error_norm": error_norm,
            "batch_size": self.cell.batch,
        }
        sampler = Sampler(self.model, self.cell.depth, solver=solver, backend=backend, **settings)  # type: ignore[arg-type]

        def call() -> Outcome:
            return (
                sampler(noise=self.noise, labels=self.labels),
                sampler.stats["evaluations_per_image"],
            )

        return call

    def on_device(self, tolerance: float | None = None) -> Callable[[], Outcome]:
        cell = replace(self.cell, tolerance=tolerance or self.cell.tolerance)
        return one_launch(
            self.model,
            compiled(self.model) if self.inductor else self.model,
            cell,
            self.noise,
            self.labels,
        )

    def all(
        self, theirs: Callable[[], float | None], error: Callable[[Tensor], float]
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(name, what makes its call), torchdiffeq first. theirs() is its error, once it is known;
        error(samples) that of any samples."""
        name, backend = ("compiled", "compile") if self.inductor else ("eager", "eager")
        fast, ours = (
            ("fused", "one launch") if self.noise.is_cuda else ("auto", "steps on the device")
        )
        solver, host = self.cell.solver, f"host loop, {name} network"

        def as_accurate() -> Callable[[], Outcome]:
            """The coarsest of a few tolerances that is as accurate as torchdiffeq; equal tolerances
            do not give equal errors."""
            bound = theirs()
            if bound is None:
                raise ValueError("torchdiffeq did not run")
            for power in range(6, -1, -1):
                tolerance = self.cell.tolerance * 10 ** (power / 4)
                if error(self.sampled(solver, backend, tolerance=tolerance)()[0]) <= bound:
                    return self.on_device(tolerance)
            raise ValueError(
                f"no tolerance from {self.cell.tolerance:g} on is as accurate as torchdiffeq"
            )

        yield f"{THEIRS}, {name} network", lambda: self.sampled(f"torchdiffeq:{solver}", backend)
        yield host, lambda: self.sampled(solver, backend)
        yield f"{ours}, {name} network", self.on_device
        yield f"{ours}, {name} network, at torchdiffeq's error", as_accurate
        yield f"{THEIRS}, {fast} network", lambda: self.sampled(f"torchdiffeq:{solver}", fast)
        yield f"{ours}, {fast} network", lambda: self.sampled(solver, fast)
        yield (
            f"{ours}, {fast} network, steps of each image",
            lambda: self.sampled(solver, fast, "per_sample"),
        )


def measure_race(
    cell: Cell, device: torch.device, seconds: float, inductor: bool
) -> dict[str, Any]:
    """Every solver's time, evaluations, error and first call; or the reason why it did not run."""
    noise, labels = inputs(cell, device)
    config, timers, rows = CONFIGS[cell.network], dict[str, Timer](), dict[str, dict[str, Any]]()
    wide = random_model(config, cell.depth, torch.float32, device, cell.scale)
    reference = Sampler(
        wide,
        cell.depth,
        solver="dopri5",
        rtol=1e-5,
        atol=1e-5,
        backend="eager",
        batch_size=cell.batch,
    )
    exact = reference(noise=noise, labels=labels).double()
    del wide, reference
    release(device)

    def error(samples: Tensor) -> float:
        return float(
            torch.linalg.vector_norm(samples.double() - exact) / torch.linalg.vector_norm(exact)
        )

    def theirs() -> float | None:
        return next(
            (
                row["relative_error"]
                for name, row in rows.items()
                if name.startswith(THEIRS) and "relative_error" in row
            ),
            None,
        )

    racers = Racers(
        random_model(config, cell.depth, cell.dtype, device, cell.scale),
        cell,
        noise,
        labels,
        inductor,
    )
    for name, make in racers.all(theirs, error):
        row = rows[name] = dict[str, Any]()
        start = time.perf_counter()
        try:
            call = make()
            samples, row["evaluations"] = call()
            synchronize(device)
            row["setup_s"], row["relative_error"] = time.perf_counter() - start, error(samples)
            bound = max(2 * (theirs() or 0.0), LEAST_BOUND[cell.dtype], cell.tolerance)
            if not row["relative_error"] <= bound:  # NaN fails too
                raise ValueError(
                    f"its samples are wrong: relative error {row['relative_error']:.2e}, at most"
                    f" {bound:.2e} is allowed"
                )
            timers[name] = host_timer(call, device)
        # a compiler's or an allocator's fault has any type; the others are still to be measured
        except Exception as fault:
            row["reason"] = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
    for name, taken in (take_turns(timers, seconds * len(timers), 5) if timers else {}).items():
        rows[name] |= {"samples_s": taken} | summary(taken)
    return {"cell": replace(cell, variants=tuple(rows)).record(), "race": rows}


GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
LAUNCHES = (
    *GRAPH_LAUNCHES,
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
)
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def count_calls(
    events: Iterable[tuple[str, float, float]], begin: float, end: float
) -> tuple[dict[str, int], dict[str, int]]:
    """(launches, waits) by name among the host's calls (name, start, end) between two times."""
    inside = sorted(name for name, first, last in events if begin <= first and last <= end)
    counts = {name: len(list(same)) for name, same in itertools.groupby(inside)}
    return tuple(
        {name: counts[name] for name in names if name in counts} for names in (LAUNCHES, WAITS)
    )  # type: ignore[return-value]


def measure_proof(cell: Cell, device: torch.device) -> dict[str, Any]:
    """What a solve of the fused backend asks of CUDA, from a trace; ValueError unless it is one
    launch of a graph and no wait."""
    if device.type != "cuda":
        return {
            "cell": cell.record(),
            "proof": {"reason": "there is no GPU, on which alone a solve is one launch"},
        }
    from torch.profiler import ProfilerActivity, profile, record_function

    noise, labels = inputs(cell, device)
    model = random_model(CONFIGS[cell.network], cell.depth, cell.dtype, device, cell.scale)
    settings = {"rtol": cell.tolerance, "atol": cell.tolerance, "batch_size": cell.batch}
    sampler = Sampler(model, cell.depth, solver=cell.solver, backend="fused", **settings)  # type: ignore[arg-type]
    expected = sampler(noise=noise, labels=labels)
    assert sampler.fused is not None
    assert sampler.fused.graphs is not None
    told = sampler.explain()["graph"]
    (captured,) = (
        graph for key, graph in sampler.fused.graphs.graphs.items() if key == sampler.fused.last_key
    )
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with record_function("solve"):
                captured.launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)
    found = [(event.name, event.time_range.start, event.time_range.end) for event in trace.events()]
    begin, end = next((first, last) for name, first, last in found if name == "solve")
    launches, waits = count_calls(found, begin, end)
    proof = {
        "launches": launches,
        "waits": waits,
        "graph": told,
        "evaluations": sampler.stats["evaluations_per_image"],
    }
    if not torch.equal(captured.outputs[0], expected):
        raise ValueError("the traced solve gave other samples")
    if waits or launches not in [{name: 1} for name in GRAPH_LAUNCHES]:
        raise ValueError(f"a solve is not one launch without a wait: {proof}")
    return {"cell": cell.record(), "proof": proof}
