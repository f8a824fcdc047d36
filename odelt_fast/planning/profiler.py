"""Profiling: what the operations of a model cost here, measured warm and taking turns.

The profile keeps them as they become known.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from odelt_fast.checkpoints.folder import load_model, read_config
from odelt_fast.evaluation.machine import model_hash, this_machine
from odelt_fast.evaluation.measuring import PeakMemory, timed
from odelt_fast.model import DiT
from odelt_fast.operation import Operation, effective_guidance
from odelt_fast.sampling.sampler import Sampler

from .profile import Measurement, Profile, read_profile, write_profile

_LEAST, _MOST = 5, 200  # rounds
# Operations that take turns on a GPU: samplers of a model share a cache of 32 graphs, from which
# none may drop out.
_GRAPHS = 16


class Profiler:
    """Measures a model on a device and keeps the profile in a file.

    Args:
        name: of the model: folder, bundled name, Hub id.
        device: what it runs on.
        path: the file.
        seconds: about how long the operations of one batch size take turns (16 at a time on a GPU),
            in at least 5 rounds and at most 200.
        again: measure also what the profile has.

    Raises:
        ValueError: for a file that holds the profile of another machine or model, or none.
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
        self.name, self.device, self.path = name, device, path
        self.seconds, self.again = seconds, again
        machine, config = this_machine(device), read_config(name)
        self.weights, self.profile = model_hash(name), Profile(machine, config, name)
        if path.exists():
            self.profile = read_profile(path)
            self.profile.check(machine, config, path)

    def missing(
        self, operations: Iterable[Operation], precision: str, batch: int
    ) -> list[Operation]:
        """Those of the operations that are not in the profile yet."""
        known = {
            m.operation
            for m in self.profile.measurements
            if (m.batch, m.precision) == (batch, precision) and m.weights in (None, self.weights)
        }
        return [operation for operation in operations if self.again or operation not in known]

    def run(
        self,
        operations: Iterable[Operation],
        batches: Iterable[int],
        precisions: Iterable[str] = ("float32",),
        report: Callable[[str], None] = lambda line: None,
    ) -> Profile:
        """Measures what is missing of every operation in every batch size and precision.

        The file grows by a batch size at a time, so that a run that was interrupted goes on.

        Args:
            operations: how to sample, at the guidance scales by which measurements name them.
            batches: images at a time.
            precisions: some of `profile.PRECISIONS`.
            report: called with a line for each thing that is begun.

        Returns:
            The profile with all that it has by then.
        """
        operations, sizes = tuple(operations), sorted(batches)
        for precision in precisions:
            missing = {batch: self.missing(operations, precision, batch) for batch in sizes}
            wanted = {batch: found for batch, found in missing.items() if found}
            if not wanted:
                continue
            write_profile(self.profile, self.path)  # refused before the work if it cannot be
            report(f"{precision}: peak memory")
            memory = self._memory(wanted, precision)
            model = self._load(precision, None)
            for batch, found in wanted.items():
                report(f"{precision}, batches of {batch}: latency of {len(found)} operations")
                rounds = self._rounds(model, found, precision, batch)
                self.profile = self.profile.adding(
                    Measurement(
                        operation,
                        batch,
                        precision,
                        *_summary([seconds for seconds, _ in rounds[operation]]),
                        rounds=len(rounds[operation]),
                        evaluations=statistics.fmean(count for _, count in rounds[operation]),
                        peak_memory=memory[operation, batch],
                        weights=self.weights if operation.adaptive else None,
                    )
                    for operation in found
                )
                write_profile(self.profile, self.path)
        return self.profile

    def _load(self, precision: str, depth: int | None) -> DiT:
        dtype = torch.bfloat16 if precision == "fp8" else getattr(torch, precision)
        return load_model(self.name, self.device, dtype, depth)

    @staticmethod
    def _sampler(model: DiT, operation: Operation, precision: str, batch: int) -> Sampler:
        lossy = "fp8" if precision == "fp8" else None
        return Sampler.of(model, operation, batch_size=batch, precision=lossy)

    def _memory(
        self, wanted: dict[int, list[Operation]], precision: str
    ) -> dict[tuple[Operation, int], int | None]:
        """Peak bytes of each operation and batch, with the weights of its own depth only.

        So `odelt-fast sample` loads them.
        """
        deepest = {op: op.deepest or 0 for operations in wanted.values() for op in operations}
        # What PyTorch sets up once in a process is none of an operation's memory.
        first = min(deepest, key=deepest.__getitem__)
        once = Operation(depth=deepest[first], steps=1, guidance_scale=first.guidance_scale)
        self._sampler(self._load(precision, once.depth), once, precision, 1)(1)
        memory, found = PeakMemory(self.device), dict[tuple[Operation, int], int | None]()
        for depth in sorted(set(deepest.values())):
            model = self._load(precision, depth)
            mine = [(op, size) for size in wanted for op in wanted[size] if deepest[op] == depth]
            for operation, batch in mine:
                sampler = self._sampler(model, operation, precision, batch)
                memory.release()
                memory.start()
                # The second call of a shape captures a graph.
                for _ in range(2 if self.device.type == "cuda" else 1):
                    sampler(batch)
                peak = memory.peak()
                found[operation, batch] = None if peak < 0 else peak
                if sampler.fused:
                    sampler.fused.release()  # graphs, which samplers of a model share
                del sampler
            del model
            memory.release()
        return found

    def _rounds(
        self, model: DiT, operations: Sequence[Operation], precision: str, batch: int
    ) -> dict[Operation, list[tuple[float, float]]]:
        """Seconds, and evaluations an image, of every operation in each of its rounds.

        None always follows the same one.
        """
        rounds: dict[Operation, list[tuple[float, float]]] = {each: [] for each in operations}
        for group in self._groups(operations):
            samplers = {each: self._sampler(model, each, precision, batch) for each in group}
            for sampler in samplers.values():
                for seed in range(2):
                    sampler(batch, seed=seed)
            begin, share = time.perf_counter(), self.seconds * len(group) / len(operations)
            for turn in range(_MOST):
                if turn >= _LEAST and time.perf_counter() - begin >= share:
                    break
                first = turn % len(group)
                for operation in (*group[first:], *group[:first]):
                    sampler = samplers[operation]
                    _, seconds = timed(partial(sampler, batch, seed=turn), self.device)
                    evaluations = sampler.stats["evaluations_per_image"]
                    rounds[operation].append((seconds, evaluations))
        return rounds

    def _groups(self, operations: Sequence[Operation]) -> list[Sequence[Operation]]:
        size = _GRAPHS if self.device.type == "cuda" else len(operations)
        return [operations[first : first + size] for first in range(0, len(operations), size)]


def _summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile."""
    ordered, last = sorted(samples), len(samples) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def operations_of(
    depths: Iterable[int],
    solvers: Iterable[str],
    steps: Iterable[int],
    tolerances: Iterable[float],
    guidance_scale: float | None = None,
) -> tuple[Operation, ...]:
    """Every depth with every solver, at all its steps or, if it chooses them, all tolerances.

    ValueError for an unknown solver.
    """
    steps, tolerances, found = tuple(steps), tuple(tolerances), []
    for depth, solver in itertools.product(depths, tuple(solvers)):
        scale = effective_guidance(guidance_scale)
        way = Operation(depth=depth, solver=solver, guidance_scale=scale)
        if way.adaptive:
            found += [replace(way, rtol=tolerance, atol=tolerance) for tolerance in tolerances]
        else:
            found += [replace(way, steps=count) for count in steps]
    return tuple(dict.fromkeys(found))
