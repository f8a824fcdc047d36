"""The fused backend of the Sampler: the engine's launches as CUDA graphs, with what happens where a
graph cannot be had.

Samplers of one model share its engine and its graphs.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.engine import availability
from odelt_fast.engine.adaptive import AdaptiveTrajectory, CapturedSolve
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.graphs import (
    Captured,
    CaptureError,
    Function,
    GraphCache,
    Inputs,
    node_count,
    place,
)
from odelt_fast.engine.trajectory import Trajectory
from odelt_fast.model import DiT
from odelt_fast.solvers.adaptive import Limits
from odelt_fast.solvers.solution import Solution
from odelt_fast.solvers.tableau import Tableau

# Above so many tokens an evaluation takes longer than launching it (a DiT-B/2 block: 0.8 ms against
# 0.2 ms), and a graph only holds memory.
GRAPH_TOKENS = 2**16

_ENGINES: weakref.WeakKeyDictionary[
    DiT, dict[tuple[str, str | None], tuple[Engine, GraphCache | None]]
] = weakref.WeakKeyDictionary()


def shared_engine(
    model: DiT, attention: str = "auto", precision: str | None = None
) -> tuple[Engine, GraphCache | None]:
    """The engine of this model and its graphs, made where there is none or the weights have
    changed; ValueError if it cannot run."""
    engines = _ENGINES.setdefault(model, {})
    key = attention, precision
    if key not in engines or not engines[key][0].weights.are_of(model):
        engines.pop(key, None)
        engine = Engine(model, attention, precision)
        engines[key] = engine, GraphCache(engine.device)
    return engines[key]


class Fused:
    """Solves on an engine, as CUDA graphs. strict: where none can be captured it raises ValueError;
    otherwise it warns once and launches.

    source: gives the engine and its graphs (None: launches only), again when the weights have
    changed. tableau, times, log2_steps, depth, guidance: those of a `Trajectory`; with limits in
    place of times those of an `AdaptiveTrajectory`. With neither there is use for `network` only,
    one evaluation at a time.
    """

    def __init__(
        self,
        source: Callable[[], tuple[Engine, GraphCache | None]],
        strict: bool = False,
        *,
        tableau: Tableau | None = None,
        times: Sequence[float] | None = None,
        limits: Limits | None = None,
        log2_steps: int = 7,
        depth: int | Callable[[float], int] = 0,
        guidance: float | None = None,
    ) -> None:
        self.source, self.strict = source, strict
        self.graphs_off: str | None = None
        self.loop_off: str | None = (
            None  # why CUDA does not repeat the steps of an adaptive solver by itself
        )
        self.last_key: Hashable = None

        def plan(engine: Engine) -> Trajectory | AdaptiveTrajectory | None:
            if limits is not None and tableau is not None and not callable(depth):
                return AdaptiveTrajectory(engine, tableau, log2_steps, depth, guidance, limits)
            return (
                None
                if times is None
                else Trajectory(engine, tableau, times, log2_steps, depth, guidance)
            )

        self._plan = plan
        self._prepare()

    def _prepare(self) -> None:
        self.engine, self.graphs = self.source()
        self.trajectory = self._plan(self.engine)

    def refresh(self) -> None:
        """Prepares the weights again if they have changed since."""
        if not self.engine.weights.is_current():
            self._prepare()

    def solve(
        self, x: Tensor, labels: np.ndarray, fresh: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x at the end (B, C, H, W) float32, whether each sample is finite (B,)) of fixed steps,
        new tensors on the engine's device.

        x and fresh (`Trajectory`) on any device; labels (B,) int64 on the host. Where the labels
        are all equal, less is computed.
        """
        return self._run_trajectory(x, labels, (fresh,), Captured)  # type: ignore[return-value]

    def solve_adaptive(self, x: Tensor, labels: np.ndarray) -> tuple[Solution, int]:
        """(solution, its x float32 on the engine's device and its counts on the host; steps that
        the batch attempted); as `solve`."""
        end, counters = self._run_trajectory(x, labels, (), CapturedSolve)
        solution = Solution(
            end, *counters.cpu()
        )  # all in one: each wait for the GPU takes longer than the copy
        return solution, int((solution.accepted + solution.rejected).max())

    def _run_trajectory(
        self, x: Tensor, labels: np.ndarray, more: tuple[Tensor | None, ...], kind: type[Captured]
    ) -> tuple[Tensor, ...]:
        trajectory = self.trajectory
        assert trajectory is not None
        guided = trajectory.guidance is not None
        null = self.engine.config.num_classes
        rows: Tensor | None = torch.from_numpy(
            np.concatenate([labels, np.full_like(labels, null)]) if guided else labels
        )
        if len(labels) == 1 or (labels == labels[0]).all():
            rows = None if labels[0] == null else rows if guided else rows[:1]  # type: ignore[index]
        guidance = None if rows is None else trajectory.guidance
        key = (
            "trajectory",
            trajectory.key,
            guidance,
            tuple(x.shape),
            0 if rows is None else len(rows),
        )
        samples = len(x) if guidance is None else 2 * len(x)
        return self._run(key, trajectory, (x, rows, *more), samples, kind)

    def network(
        self, x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, depth: int | None = None
    ) -> Tensor:
        """The velocity as the model gives it, with its signature: one evaluation as one graph."""
        engine, depth = self.engine, self.engine.max_depth if depth is None else depth

        def function(
            *inputs: Tensor,
        ) -> tuple[Tensor]:  # kept with its graph: it must not hold the model
            x, t, log2_steps, y = inputs
            return (engine(x, t, log2_steps, y, depth),)

        t = t.reshape(-1).float()
        key = ("network", depth, tuple(x.shape), len(t), len(log2_steps), len(y))
        return self._run(key, function, (x, t, log2_steps, y), len(x))[0]

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
        if self.graphs is None or self.graphs_off or (tokens > GRAPH_TOKENS and not self.strict):
            return function(*place(inputs, self.engine.device))
        self.last_key = key
        try:
            # A solve repeats its graph many times: it pays at the first call.
            results = self.graphs.run(
                key, function, inputs, self.strict or kind is CapturedSolve, kind
            )
            self._say_fallback(self.graphs.graphs.get(key))
            return results
        except CaptureError as error:
            reason = f"no CUDA graph could be captured ({error})"
            if self.strict:
                raise ValueError(f"backend 'fused' cannot run here: {reason}") from error
            self.graphs_off = reason
            warnings.warn(
                f"{reason}: the same kernels are launched one by one, which is slower for small"
                " batches",
                RuntimeWarning,
                7,
            )
        return function(*place(inputs, self.engine.device))

    def _say_fallback(self, captured: Captured | None) -> None:
        """Warns once where the steps of an adaptive solver are replayed from the host."""
        if self.loop_off or not isinstance(captured, CapturedSolve) or not captured.loop.fallback:
            return
        self.loop_off = captured.loop.fallback
        warnings.warn(
            f"the GPU cannot repeat a solver's steps by itself ({self.loop_off}): the host does, a"
            " little slower, with the same numbers",
            RuntimeWarning,
            8,
        )

    def explain(self, samples: int, tokens: int, depth: int) -> dict[str, Any]:
        """What runs on `samples` rows (guided ones count twice) of `tokens` tokens, and the graph
        that ran last."""
        told, config = self.engine.describe(samples, tokens, depth), self.engine.config
        head_dim = config.hidden_size // config.num_heads
        told["attentions"] = availability.describe_attentions(
            self.engine.device, self.engine.dtype, head_dim
        )
        if self.graphs is None or self.graphs_off:
            told["graph"] = f"none: {self.graphs_off or 'not asked for'}"
        elif samples * tokens > GRAPH_TOKENS and not self.strict:
            told["graph"] = (
                f"none: the batch has more than {GRAPH_TOKENS} tokens, and launching is not what"
                " takes the time"
            )
        elif self.last_key in self.graphs.graphs:
            captured = self.graphs.graphs[self.last_key]
            told["graph"] = "one evaluation" if self.trajectory is None else "the whole trajectory"
            if isinstance(captured, CapturedSolve):
                reason = captured.loop.fallback
                told["graph"] = (
                    f"one attempted step, replayed by the host ({reason})"
                    if reason
                    else "the whole solve, a while loop of CUDA's"
                )
            told["graph_nodes"] = node_count(captured.graph)
        else:
            at_once = self.strict or isinstance(self.trajectory, AdaptiveTrajectory)
            told["graph"] = (
                "captured at the first call"
                if at_once
                else "captured at the second call of a shape"
            )
        return told


def choose_fused(
    model: DiT, backend: str, attention: str, precision: str | None, **settings: Any
) -> tuple[Fused | None, str]:
    """The fused backend if `backend` ("auto", "fused", "eager", "compile") makes it run, else None
    and the reason why it does not.

    settings: those of `Fused`. On a GPU "auto" warns with the reason. Raises ValueError where the
    backend was asked for by name, or an attention or a precision that only it has.
    """

    def source() -> tuple[Engine, GraphCache | None]:
        unable = availability.fused_unavailable(
            model
        )  # asked again when the weights have changed: the model may have been moved
        if unable:
            raise RuntimeError(unable)
        return shared_engine(model, attention, precision)

    reason = f"backend {backend} was asked for"
    if backend in ("auto", "fused"):
        try:
            return Fused(source, backend == "fused", **settings), ""
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # auto never fails
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if backend == "fused":
            raise ValueError(f"backend 'fused' cannot run here: {reason}")
    for option, value, plain in (
        ("attention", attention, ("auto", "sdpa")),
        ("precision", precision, (None,)),
    ):
        if value not in plain:
            raise ValueError(
                f"{option} {value!r} is for the fused backend, which does not run: {reason}"
            )
    if backend == "auto" and model.device.type == "cuda":
        warnings.warn(
            f"the fused backend cannot run: {reason}; the model itself runs, which is slower",
            RuntimeWarning,
            stacklevel=4,
        )
    return None, reason
