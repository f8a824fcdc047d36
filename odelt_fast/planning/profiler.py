"""Profiling: what the operations of a model cost here, measured warm and taking turns, kept in a
profile as they become known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from odelt_fast.checkpoints.folder import load_model, read_config
from odelt_fast.evaluation.measuring import PeakMemory, model_hash
from odelt_fast.model import DiT
from odelt_fast.planning.evidence import this_machine
from odelt_fast.planning.profile import (
    Measurement,
    Operation,
    Profile,
    effective_guidance,
    read_profile,
    write_profile,
)
from odelt_fast.sampling.sampler import Sampler

_LEAST, _MOST = 5, 200  # rounds
# operations that take turns on a GPU: samplers of a model share a cache of 32 graphs, from which
# none may drop out
_GRAPHS = 16


@dataclass(frozen=True)
class Grid:
    """What is profiled: every operation with every batch size and precision, at one guidance
    scale."""

    operations: tuple[Operation, ...]
    batches: tuple[int, ...] = (1, 4, 16)
    precisions: tuple[str, ...] = ("float32",)
    guidance_scale: float | None = None


class Profiler:
    """Measures the model `name` on `device` and keeps the profile at `path`.

    seconds: about how long the operations of one batch size take turns (16 at a time on a GPU), in
    at least 5 rounds and at most 200. again: measure also what the profile has. Raises ValueError
    for a profile at `path` that is of another machine or model, or none.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        path: Path,
        *,
        seconds: float = 10.0,
        again: bool = False,
    ) -> None:
        self.name, self.device, self.path, self.seconds, self.again = (
            name,
            device,
            path,
            seconds,
            again,
        )
        machine, config = this_machine(device), read_config(name)
        self.weights = model_hash(name)
        self.profile = Profile(machine, config, name)
        if path.exists():
            self.profile = read_profile(path)
            self.profile.check(machine, config, path)

    def missing(self, grid: Grid, precision: str, batch: int) -> list[Operation]:
        """What of the grid is not in the profile yet."""
        scale = effective_guidance(grid.guidance_scale)
        known = {
            m.operation
            for m in self.profile.measurements
            if (m.batch, m.precision) == (batch, precision) and self._holds(m, scale)
        }
        return [operation for operation in grid.operations if self.again or operation not in known]

    def run(self, grid: Grid, report: Callable[[str], None] = lambda line: None) -> Profile:
        """Measures what is missing; the file grows by a batch size at a time, so that a run that
        was interrupted goes on. report: told what is being done."""
        for precision in grid.precisions:
            wanted = {batch: self.missing(grid, precision, batch) for batch in sorted(grid.batches)}
            wanted = {batch: operations for batch, operations in wanted.items() if operations}
            if not wanted:
                continue
            write_profile(
                self.profile, self.path
            )  # a place that cannot be written is told before the work
            report(f"{precision}: peak memory")
            memory = self._memory(wanted, precision, grid.guidance_scale)
            model = self._load(precision, None)
            for batch, operations in wanted.items():
                report(f"{precision}, batches of {batch}: latency of {len(operations)} operations")
                samples, evaluations = (
                    dict[Operation, list[float]](),
                    dict[Operation, list[float]](),
                )
                for group in self._groups(operations):
                    samplers = {
                        operation: self._sampler(
                            model, operation, precision, batch, grid.guidance_scale
                        )
                        for operation in group
                    }
                    seconds = self.seconds * len(group) / len(operations)
                    for known, found in zip(
                        (samples, evaluations),
                        self._take_turns(samplers, batch, seconds),
                        strict=True,
                    ):
                        known.update(found)
                self.profile = self.profile.adding(
                    Measurement(
                        operation,
                        batch,
                        precision,
                        effective_guidance(grid.guidance_scale),
                        *_summary(samples[operation]),
                        rounds=len(samples[operation]),
                        evaluations=statistics.fmean(evaluations[operation]),
                        peak_memory=memory[operation, batch],
                        weights=self.weights if operation.steps is None else None,
                    )
                    for operation in operations
                )
                write_profile(self.profile, self.path)
        return self.profile

    def _holds(self, measurement: Measurement, scale: float | None) -> bool:
        return measurement.guidance_scale == scale and measurement.weights in (None, self.weights)

    def _load(self, precision: str, depth: int | None) -> DiT:
        return load_model(
            self.name,
            self.device,
            torch.bfloat16 if precision == "fp8" else getattr(torch, precision),
            depth,
        )

    def _sampler(
        self,
        model: DiT,
        operation: Operation,
        precision: str,
        batch: int,
        guidance_scale: float | None,
    ) -> Sampler:
        lossy = "fp8" if precision == "fp8" else None
        return Sampler(
            model,
            **operation.sampler_arguments(),
            guidance_scale=guidance_scale,
            batch_size=batch,
            precision=lossy,
        )

    def _memory(
        self, wanted: dict[int, list[Operation]], precision: str, scale: float | None
    ) -> dict[tuple[Operation, int], int | None]:
        """Peak bytes of each operation and batch, with the weights of its own depth only, as
        `odelt-fast sample` loads them."""
        every = {operation for operations in wanted.values() for operation in operations}
        shallow = min(operation.depth for operation in every)
        # What PyTorch sets up once in a process is none of an operation's memory.
        self._sampler(
            self._load(precision, shallow), Operation(shallow, steps=1), precision, 1, scale
        )(1)
        memory, found = PeakMemory(self.device), dict[tuple[Operation, int], int | None]()
        for depth in sorted({operation.depth for operation in every}):
            model = self._load(precision, depth)
            for batch, operations in wanted.items():
                for operation in (
                    operation for operation in operations if operation.depth == depth
                ):
                    sampler = self._sampler(model, operation, precision, batch, scale)
                    memory.release()
                    memory.start()
                    for _ in range(
                        2 if self.device.type == "cuda" else 1
                    ):  # the second call of a shape captures a graph
                        sampler(batch)
                    peak = memory.peak()
                    found[operation, batch] = None if peak < 0 else peak
                    if sampler.fused and sampler.fused.graphs:
                        sampler.fused.graphs.clear()  # which samplers of a model share
                    del sampler
            del model
            memory.release()
        return found

    def _groups(self, operations: Sequence[Operation]) -> list[Sequence[Operation]]:
        size = _GRAPHS if self.device.type == "cuda" else len(operations)
        return [operations[first : first + size] for first in range(0, len(operations), size)]

    @staticmethod
    def _take_turns(
        samplers: dict[Operation, Sampler], batch: int, seconds: float
    ) -> tuple[dict[Operation, list[float]], dict[Operation, list[float]]]:
        """Seconds and evaluations an image of every operation, in each round. None always follows
        the same one."""
        for sampler in samplers.values():
            for seed in range(2):
                timed(sampler, batch, seed)
        names = list(samplers)
        samples: dict[Operation, list[float]] = {name: [] for name in names}
        evaluations: dict[Operation, list[float]] = {name: [] for name in names}
        begin = time.perf_counter()
        for turn in range(_MOST):
            if turn >= _LEAST and time.perf_counter() - begin >= seconds:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(timed(samplers[name], batch, turn))
                evaluations[name].append(samplers[name].stats["evaluations_per_image"])
        return samples, evaluations


def timed(sampler: Sampler, batch: int, seed: int) -> float:
    """Seconds from the call to the finished images, by the host's clock; the device is idle
    before."""
    device = sampler.model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    sampler(batch, seed=seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile."""
    ordered, last = sorted(samples), len(samples) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def operations_of(
    depths: Iterable[int], solvers: Iterable[str], steps: Iterable[int], tolerances: Iterable[float]
) -> tuple[Operation, ...]:
    """The grid: every depth with every solver, at every number of steps or, if it chooses its own,
    every tolerance. ValueError for an unknown solver."""
    from odelt_fast.solvers.options import check_solver, is_adaptive

    steps, tolerances, found = tuple(steps), tuple(tolerances), list[Operation]()
    for depth in depths:
        for solver in map(check_solver, solvers):
            if is_adaptive(solver):
                found += [Operation(depth, solver, tolerance=tolerance) for tolerance in tolerances]
            else:
                found += [Operation(depth, solver, count) for count in steps]
    return tuple(dict.fromkeys(found))
