"""The fused backend of the Sampler: the engine's launches as CUDA graphs, with what happens where a
graph cannot be had.

Samplers of one model share its engine and its graphs.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.engine import availability, selfcheck
from odelt_fast.files import one_line
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.solvers.solution import BatchResult, Counts, Hook, Noise, Solution
from odelt_fast.solvers.step_control import DONE, NON_FINITE

from .adaptive import AdaptiveTrajectory, CapturedSolve
from .engine import Engine
from .graphs import (
    Captured,
    CaptureError,
    Function,
    GraphCache,
    Inputs,
    is_bug,
    node_count,
    place,
)
from .plans import DEFAULT
from .trajectory import Trajectory

logger = logging.getLogger(__name__)

# Above so many values of the hidden state (tokens x width) an evaluation takes longer than
# launching it, and a graph only holds memory. A DiT-B/2 block of 65 536 tokens: 0.8 ms against
# 0.2 ms; in narrower networks it is memory traffic that takes the time, and goes with the width.
GRAPH_VALUES = 2**16 * 768

KIND = "kernels"  # of the operators (`Engine`)

Prepared = tuple[Engine, GraphCache | None]
_ENGINES = weakref.WeakKeyDictionary[DiT, dict[Hashable, Prepared]]()


def shared_engine(
    model: DiT,
    attention: str = "auto",
    precision: str | None = None,
    plans: tuple[str, ...] = (DEFAULT,),
) -> Prepared:
    """The engine of this model and its graphs, made where there is none or the weights have
    changed; ValueError if it cannot run."""
    engines = _ENGINES.setdefault(model, {})
    key = attention, precision, plans
    if key not in engines or not engines[key][0].weights.are_of(model):
        engines.pop(key, None)
        engine = Engine(model, attention, precision, KIND, plans)
        engines[key] = engine, GraphCache(engine.device)
    return engines[key]


@dataclass(frozen=True)
class Asked:
    """What the labels and the shape of a batch mean for a trajectory.

    key: of its graph. labels: what the graph takes, on the host; None: the null label alone.
    guidance: None where the labels leave nothing to guide. counts: of equal steps that all samples
    end.
    """

    trajectory: Trajectory | AdaptiveTrajectory
    key: Hashable
    labels: Tensor | None
    guidance: float | None
    counts: Counts | None


class Unavailable(RuntimeError):
    """The fused backend cannot run here; the message is the reason."""


class Fused:
    """Solves an operation on an engine, as CUDA graphs.

    `trajectory` is None where the steps are the host's (torchdiffeq's solvers; an adaptive one
    whose depth changes with the time, which the device alone knows): then there is use for
    `network` only, one evaluation at a time. `fallbacks`: what runs slower than it might, and why.

    Args:
        source: gives the engine and its graphs (None: launches only), again when the weights have
            changed.
        strict: whether a graph that cannot be captured is a ValueError; else the same launches are
            made without one.
    """

    def __init__(
        self, source: Callable[[], Prepared], operation: Operation, strict: bool = False
    ) -> None:
        self.source, self.operation, self.strict = source, operation, strict
        self.graphs_off: dict[Hashable, str] = {}  # why a shape has no graph
        # Why CUDA does not repeat the steps of an adaptive solver by itself.
        self.loop_off: str | None = None
        self.last_key: Hashable = None
        self._prepare()

    def _prepare(self) -> None:
        self.engine, self.graphs = self.source()
        operation = self.operation
        self.trajectory: Trajectory | AdaptiveTrajectory | None = None
        if operation.torchdiffeq:
            return
        if not operation.adaptive:
            self.trajectory = Trajectory(self.engine, operation)
            self.calls = operation.network_evaluations(self.trajectory.evaluations)
        elif operation.depth_schedule is None:
            self.trajectory = AdaptiveTrajectory(self.engine, operation)

    def refresh(self) -> None:
        """Prepares the weights again if they have changed since."""
        if not self.engine.weights.is_current():
            self._prepare()

    def release(self) -> None:
        """Gives back the memory of all graphs."""
        if self.graphs:
            self.graphs.clear()

    @property
    def replays(self) -> bool:
        """Whether a call can be one replay: equal steps, and no fresh noise between them."""
        return isinstance(self.trajectory, Trajectory) and not self.trajectory.renoises

    def has_graph(self, key: Hashable) -> bool:
        return self.graphs is not None and key in self.graphs.graphs

    @property
    def fallbacks(self) -> list[str]:
        """A sentence for each thing that could not be done in the fastest way so far."""
        sentences = [
            f"{reason}: the same kernels are launched one by one, which is slower for small batches"
            for reason in dict.fromkeys(self.graphs_off.values())
        ]
        if self.loop_off:
            sentences.append(
                f"the GPU cannot repeat a solver's steps by itself ({self.loop_off}): the host"
                " does, a little slower, with the same numbers"
            )
        return sentences

    def solve(
        self, x: Tensor, labels: np.ndarray, fresh: Noise, progress: Hook | None
    ) -> BatchResult:
        """One batch from t = 0 to 1: x float32, a new tensor on the engine's device.

        Where the labels are all equal, less is computed.

        Args:
            x: (B, C, H, W) at t = 0, on any device.
            labels: (B,) int64, on the host.
            fresh: the noise of step i (B, C, H, W), for consistency models.
            progress: called with B for each step, at the end.
        """
        operation, asked = self.operation, self.asked(tuple(x.shape), labels)
        key, trajectory, rows = asked.key, asked.trajectory, asked.labels
        samples = len(x) if asked.guidance is None else 2 * len(x)
        if isinstance(trajectory, AdaptiveTrajectory):
            inputs: tuple[Tensor | None, ...] = (x, rows, trajectory.scales)
            end, counters = self._run(key, trajectory, inputs, samples, CapturedSolve)
            # All in one: each wait for the GPU takes longer than the copy.
            solution = Solution(end, *counters.cpu())
            steps = int((solution.accepted + solution.rejected).max())
            calls = trajectory.evaluations(steps) * operation.rows_per_image
            result = BatchResult.of(solution, calls)
        else:
            steps = len(trajectory.times) - 1
            noise = None
            if trajectory.renoises:
                noise = torch.stack([fresh(i) for i in range(steps - 1)])
            inputs = (x, rows, noise, trajectory.scales)
            end, finite = self._run(key, trajectory, inputs, samples)
            assert asked.counts
            result = BatchResult(end, asked.counts)
            if not all(found := finite.tolist()):
                status = [DONE if each else NON_FINITE for each in found]
                result = BatchResult(end, replace(asked.counts, status=status))
        if progress:
            for _ in range(steps):
                progress(len(labels))
        return result

    def asked(self, shape: tuple[int, ...], labels: np.ndarray) -> Asked:
        """What `solve` runs for images (B, C, H, W) with these labels (B,), which must not change
        afterwards."""
        trajectory, operation, batch = self.trajectory, self.operation, shape[0]
        assert trajectory is not None
        null, guided = self.engine.config.num_classes, trajectory.guidance is not None
        nulls = np.full_like(labels, null) if guided or operation.guidance_scale == 0 else labels
        if operation.guidance_scale == 0:
            labels = nulls
        both = torch.from_numpy(np.concatenate([labels, nulls]) if guided else labels)
        rows: Tensor | None = both
        if len(labels) == 1 or (labels == labels[0]).all():
            rows = None if labels[0] == null else both if guided else both[:1]
        guidance = None if rows is None else trajectory.guidance
        key = ("trajectory", trajectory.key, guidance, shape, 0 if rows is None else len(rows))
        counts = None
        if isinstance(trajectory, Trajectory):
            steps, evaluations = len(trajectory.times) - 1, trajectory.evaluations
            counts = Counts.of_fixed_steps(batch, steps, evaluations, self.calls)
        return Asked(trajectory, key, rows, guidance, counts)

    def replay(self, asked: Asked, x: Tensor) -> Tensor | None:
        """x at t = 1 as `solve` gives it where `replays`, by a graph that is there. None: there is
        none, the weights have changed, or something is not finite; `solve` has to be called."""
        if self.graphs is None or not self.engine.weights.is_current():
            return None
        inputs = (x, asked.labels, None, asked.trajectory.scales)
        results = self.graphs.replay(asked.key, inputs, asked)
        if results is None or not all(results[1].tolist()):
            return None
        self.last_key = asked.key
        return results[0]

    def network(
        self,
        x: Tensor,
        t: Tensor,
        log2_steps: Tensor,
        y: Tensor,
        depth: int | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity as the model gives it, with its signature: one evaluation as one graph."""
        engine, depth = self.engine, self.engine.max_depth if depth is None else depth

        # Kept with its graph: it must not hold the model.
        def function(
            x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, guidance: Tensor | None
        ) -> tuple[Tensor]:
            return (engine(x, t, log2_steps, y, depth, guidance),)

        t = t.reshape(-1).float()
        scales = 0 if guidance is None else len(guidance)
        key = ("network", depth, tuple(x.shape), len(t), len(log2_steps), len(y), scales)
        return self._run(key, function, (x, t, log2_steps, y, guidance), len(x))[0]

    def _run(
        self,
        key: Hashable,
        function: Function,
        inputs: Inputs,
        samples: int,
        kind: type[Captured] = Captured,
    ) -> tuple[Tensor, ...]:
        """function(*inputs), whose first input is the state, evaluated on that many samples at a
        time."""
        assert inputs[0] is not None
        tokens = samples * inputs[0][0, 0].numel() // self.engine.config.patch_size**2
        self.last_key = key
        if self.graphs is None or key in self.graphs_off or self._too_large(tokens):
            return function(*place(inputs, self.engine.device))
        try:
            # A solve repeats its graph many times: it pays at the first call.
            at_once = self.strict or kind is CapturedSolve
            results = self.graphs.run(key, function, inputs, at_once, kind)
            captured = self.graphs.graphs.get(key)
            if isinstance(captured, CapturedSolve) and captured.loop.fallback:
                self.loop_off = captured.loop.fallback
            return results
        except CaptureError as error:
            availability.check_context(self.engine.device, error)
            reason = f"no CUDA graph could be captured ({error})"
            if self.strict:
                raise ValueError(f"backend 'fused' cannot run here: {reason}") from error
            logger.info("%s", reason, exc_info=True)
            self.graphs_off[key] = reason
        return function(*place(inputs, self.engine.device))

    def _too_large(self, tokens: int) -> bool:
        """Whether that many tokens are launched one by one, unless a graph was asked for."""
        return tokens * self.engine.config.hidden_size > GRAPH_VALUES and not self.strict

    def explain(self, samples: int, tokens: int, depth: int) -> dict[str, Any]:
        """What runs on `samples` rows (guided ones count twice) of `tokens` tokens, and the graph
        that ran last."""
        engine = self.engine
        about: dict[str, Any] = engine.describe(samples, tokens, depth)
        given = engine.attention, engine.precision, engine.kind, about["plan"]
        about["self_check"] = selfcheck.told(selfcheck.way_of(engine, self.operation, *given))
        about["attentions"] = availability.describe_attentions(
            engine.device, engine.dtype, engine.head_dim
        )
        captured = self.graphs.graphs.get(self.last_key) if self.graphs else None
        at_once = self.strict or isinstance(self.trajectory, AdaptiveTrajectory)
        about["graph"] = f"captured at the {'first call' if at_once else 'second call of a shape'}"
        if self.graphs is None or self.last_key in self.graphs_off:
            about["graph"] = f"none: {self.graphs_off.get(self.last_key, 'not asked for')}"
        elif self._too_large(samples * tokens):
            most = GRAPH_VALUES // engine.config.hidden_size
            about["graph"] = (
                f"none: the batch has more than {most} tokens, and launching is not what takes the"
                " time"
            )
        elif captured is not None:
            about["graph"] = "one evaluation" if self.trajectory is None else "the whole trajectory"
            if isinstance(captured, CapturedSolve):
                about["graph"] = "the whole solve, a while loop of CUDA's"
                if captured.loop.fallback:
                    reason = captured.loop.fallback
                    about["graph"] = f"one attempted step, replayed by the host ({reason})"
            about["graph_nodes"] = node_count(captured.graph)
        return about


def choose_fused(
    model: DiT,
    operation: Operation,
    backend: str,
    attention: str,
    precision: str | None,
    plan: str = "auto",
) -> tuple[Fused | None, str]:
    """The fused backend if `backend` ("auto", "fused", "eager", "compile") makes it run, else None
    and the reason why it does not.

    Raises:
        ValueError: where the backend was asked for by name, or an attention, a precision or a plan
            that only it has.
    """

    def source() -> Prepared:
        # Asked again when the weights have changed: the model may have been moved.
        unavailable = availability.fused_unavailable(model)
        if unavailable:
            raise Unavailable(unavailable)
        way = selfcheck.way_of(model, operation, attention, precision, KIND)
        plans = selfcheck.trusted_plans(way, plan)
        return shared_engine(model, attention, precision, plans)

    selfcheck.mode()  # a mistake in it must not become a reason
    reason = f"backend {backend} was asked for"
    if backend in ("auto", "fused"):
        try:
            return Fused(source, operation, backend == "fused"), ""
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except (Unavailable, selfcheck.NotTrustedError) as error:
            reason = str(error)
        except Exception as error:  # auto never fails
            if is_bug(error):
                raise
            availability.check_context(model.device, error)
            logger.info("the fused backend cannot run", exc_info=True)
            reason = one_line(error)
        if backend == "fused":
            raise ValueError(f"backend 'fused' cannot run here: {reason}")
    for option, value in ("attention", attention), ("precision", precision), ("plan", plan):
        if value not in ("auto", "sdpa", None):
            raise ValueError(
                f"{option} {value!r} is for the fused backend, which does not run: {reason}"
            )
    return None, reason
