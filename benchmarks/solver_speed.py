"""The part "solvers": Table 3, a race against torchdiffeq, and what a solve launches.

Table 3 is a workload of sampling.py for each length and solver. In the race all take Dopri5's steps
with one error over the batch, as torchdiffeq does, on one network, compiled by torch.compile or
prepared by the engine; the error of each is held to the tolerance or twice torchdiffeq's own. The
proof counts what the host asks of CUDA between the start of a solve and its end, in a profiler's
trace.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odelt_fast.engine import operators
from odelt_fast.engine.compiled import compiled
from odelt_fast.engine.device_adaptive import AdaptiveGraph, DeviceAdaptive, repeat
from odelt_fast.engine.graphs import capture
from odelt_fast.model import DiT
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.solvers.options import Limits
from odelt_fast.solvers.tableau import find_tableau

from .measure import (
    Record,
    Timer,
    check_error,
    exact_float32,
    host_timer,
    measured,
    reason_in,
    relative_error,
    release,
    synchronize,
    take_turns,
)
from .sampling import LEAST_BOUND, Inputs, Workload, dopri5
from .steps import MissingError

THEIRS = "torchdiffeq"
Outcome = tuple[Tensor, float]  # samples, and evaluations of the network for each


@dataclass(frozen=True)
class Racers:
    """Makes the calls of a race on one model.

    inductor False: the model itself stands in for its compiled form.
    """

    model: DiT
    load: Workload
    inputs: Inputs
    inductor: bool

    def sampled(self, backend: str, **changes: Any) -> Callable[[], Outcome]:
        """A `Sampler` of the operation with `changes`.

        Its loop is torchdiffeq's, the host's or, with the fused backend, the device's.
        """
        operation = replace(self.load.operation, **{"error_norm": "batch", **changes})
        sampler = Sampler.of(self.model, operation, backend=backend, batch_size=self.load.batch)

        def call() -> Outcome:
            return sampler(**self.inputs), sampler.stats["evaluations_per_image"]

        return call

    def on_device(self, tolerance: float | None = None) -> Callable[[], Outcome]:
        """A solve on the device: CUDA graphs where there is a GPU, else launched step by step."""
        network = compiled(self.model) if self.inductor else self.model
        noise, depth = self.inputs["noise"], self.load.depth
        y = torch.from_numpy(self.inputs["labels"]).to(noise.device)
        index = noise.new_full((1,), 7.0)

        def field(t: Tensor, x: Tensor, log2_steps: float) -> Tensor:
            return network(x, t[:1].float(), index, y, depth=depth).to(x.dtype)

        tolerance = tolerance or self.load.operation.rtol
        limits = Limits(tolerance, tolerance, error_norm="batch")
        tableau = find_tableau(self.load.operation.solver)[0]
        ops = operators.load_operators("kernels") if noise.is_cuda else None
        with torch.inference_mode():  # as in a Sampler: for another mode a network is compiled anew
            solve = DeviceAdaptive(field, noise.clone(), 7, tableau, limits=limits, ops=ops)
            graph = AdaptiveGraph(solve, capturing=capture) if ops else None

        @torch.inference_mode()
        def call() -> Outcome:
            solve.x0.copy_(noise)
            if graph:
                graph.replay()
            else:
                solve.start()
                repeat(solve.attempt, solve.flag)
            return solve.x.clone(), 2 + int(solve.attempts) * solve.evaluations_per_attempt

        return call

    def all(
        self, theirs: Callable[[], float | None], error: Callable[[Tensor], float]
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """(name, what makes its call), torchdiffeq first.

        Args:
            theirs: gives its error, once it is known.
            error: of any samples.
        """
        backend, name = ("compile", "compiled") if self.inductor else ("eager", "eager")
        cuda = self.inputs["noise"].is_cuda
        fast, ours = ("fused", "one launch") if cuda else ("auto", "steps on the device")
        coarsest = self.load.operation.rtol
        torchdiffeq = f"torchdiffeq:{self.load.operation.solver}"

        def as_accurate() -> Callable[[], Outcome]:
            """The coarsest of a few tolerances that is as accurate as torchdiffeq.

            Equal tolerances do not give equal errors.
            """
            bound = theirs()
            if bound is None:
                raise ValueError("torchdiffeq did not run")
            for power in range(6, -1, -1):
                tolerance = coarsest * 10 ** (power / 4)
                if error(self.sampled(backend, rtol=tolerance, atol=tolerance)()[0]) <= bound:
                    return self.on_device(tolerance)
            raise ValueError(f"no tolerance from {coarsest:g} on is as accurate as torchdiffeq")

        yield f"{THEIRS}, {name} network", partial(self.sampled, backend, solver=torchdiffeq)
        yield f"host loop, {name} network", partial(self.sampled, backend)
        yield f"{ours}, {name} network", self.on_device
        yield f"{ours}, {name} network, at torchdiffeq's error", as_accurate
        yield f"{THEIRS}, {fast} network", partial(self.sampled, fast, solver=torchdiffeq)
        yield f"{ours}, {fast} network", partial(self.sampled, fast)
        each = partial(self.sampled, fast, error_norm="per_sample")
        yield f"{ours}, {fast} network, steps of each image", each


def measure_race(load: Workload, device: torch.device, seconds: float, inductor: bool) -> Record:
    """Every solver's time, evaluations, error and first call; or the reason why it did not run."""
    inputs, finest = load.inputs(device), dopri5(load.depth, 1e-5)
    wide = load.model(device, torch.float32)
    with exact_float32():
        exact = Sampler.of(wide, finest, backend="eager", batch_size=load.batch)(**inputs).double()
    del wide
    release(device)
    timers: dict[str, Timer] = {}
    rows: dict[str, Record] = {}

    def theirs() -> float | None:
        known = (row.get("relative_error") for name, row in rows.items() if name.startswith(THEIRS))
        return next(filter(None, known), None)

    racers = Racers(load.model(device), load, inputs, inductor)
    for name, make in racers.all(theirs, lambda samples: relative_error(samples, exact)):
        row = rows[name] = {}
        start = time.perf_counter()
        with reason_in(row):
            call = make()
            samples, row["evaluations"] = call()
            synchronize(device)
            row["setup_s"] = time.perf_counter() - start
            row["relative_error"] = relative_error(samples, exact)
            least = max(LEAST_BOUND[load.dtype], load.operation.rtol)
            check_error(row["relative_error"], max(2 * (theirs() or 0.0), least))
            timers[name] = host_timer(call, device)
    for name, row in measured(take_turns(timers, seconds * len(timers), 5)).items():
        rows[name] |= row
    return {"cell": replace(load, variants=tuple(rows)).record(), "race": rows}


GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
LAUNCHES = (
    *GRAPH_LAUNCHES,
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "cudaMemcpyAsync",
)
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def count_calls(
    events: Iterable[tuple[str, float, float]], begin: float, end: float
) -> tuple[dict[str, int], dict[str, int]]:
    """(launches, waits) by name among the host's calls (name, start, end) between two times.

    Raises:
        MissingError: there are no calls of CUDA at all, though every trace ends with a wait.
    """
    events = list(events)
    if not any(name in (*LAUNCHES, *WAITS) for name, _, _ in events):
        raise MissingError("the profiler sees no calls of CUDA: CUPTI is missing or not permitted")
    inside = Counter(name for name, first, last in events if begin <= first and last <= end)
    launches, waits = (
        {name: inside[name] for name in names if name in inside} for names in (LAUNCHES, WAITS)
    )
    return launches, waits


def measure_proof(load: Workload, device: torch.device) -> Record:
    """What a solve of the fused backend asks of CUDA, from a trace.

    Raises:
        ValueError: unless it is one launch of a graph and no wait.
        MissingError: as of `count_calls`.
    """
    if device.type != "cuda":
        reason = "there is no GPU, on which alone a solve is one launch"
        return {"cell": load.record(), "proof": {"reason": reason}}
    from torch.profiler import ProfilerActivity, profile, record_function

    model = load.model(device)
    sampler = Sampler.of(model, load.operation, backend="fused", batch_size=load.batch)
    expected = sampler(**load.inputs(device))
    assert sampler.fused
    assert sampler.fused.graphs
    graph = sampler.explain()["graph"]
    captured = sampler.fused.graphs.graphs[sampler.fused.last_key]
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with record_function("solve"):
                captured.launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)
    ranges = ((event.name, event.time_range) for event in trace.events())
    events = [(name, times.start, times.end) for name, times in ranges]
    begin, end = next((first, last) for name, first, last in events if name == "solve")
    launches, waits = count_calls(events, begin, end)
    evaluations = sampler.stats["evaluations_per_image"]
    proof = {"launches": launches, "waits": waits, "graph": graph, "evaluations": evaluations}
    if not torch.equal(captured.outputs[0], expected):
        raise ValueError("the traced solve gave other samples")
    if waits or launches not in [{name: 1} for name in GRAPH_LAUNCHES]:
        raise ValueError(f"a solve is not one launch without a wait: {proof}")
    return {"cell": load.record(), "proof": proof}
