"""One way of computing a network tried out: compared with the model itself, and timed.

`python -m odelt_fast.engine.trial` does it in a process of its own, which may crash or hang: it
reads a `Way` as JSON, and writes a line of JSON for each thing that it comes to know, so that those
before a crash are kept. Nothing here needs more than torch, and Triton for the kernels.

A network of random weights, in which every weight matters, draws two pictures. What counts is by
how much they moved away from the noise: its largest difference from that of the model in a wider
dtype, of the largest value. The model's own error in this dtype tells what can be asked for: a way
is right within three times of it (or a tenth of BOUNDS, below which the model's is luck), and never
beyond BOUNDS. Float8 is a rounding that the model does not make: there BOUNDS alone counts.
"""

from __future__ import annotations

import copy
import dataclasses
import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odelt_fast.config import DiTConfig
from odelt_fast.files import one_line
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.solvers.dispatch import solve

from .adaptive import AdaptiveTrajectory, CapturedSolve
from .compiled import compiled
from .cpu import CpuNetwork
from .engine import Engine
from .graphs import Captured, CaptureError, GraphCache
from .plans import DEFAULT, PLANS, Setting, capability_of
from .trajectory import Trajectory

BACKENDS = ("fused", "eager", "compile", "native")
BOUNDS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2, "fp8": 6e-2}
GUIDANCE, PICTURES, STEPS = 1.5, 2, 2
ROUNDS, SECONDS = 7, 0.3  # of a timing: at least, and about

Record = dict[str, Any]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Way:
    """A way of computing a network.

    Args:
        config: of the network.
        device: as torch names it.
        dtype: float32, bfloat16, float16.
        backend: fused, eager, compile, native (the operators of `engine.cpu`).
        attention, precision, plan: of the fused backend.
        adaptive: whether an adaptive solver's steps are tried, or equal ones.
        kind: of the fused backend's operators (`Engine`).
    """

    config: DiTConfig
    device: str
    dtype: str
    backend: str = "fused"
    attention: str = "auto"
    precision: str | None = None
    plan: str = DEFAULT
    adaptive: bool = False
    kind: str = "kernels"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(
        cls, config: DiTConfig, device: torch.device | str, dtype: torch.dtype, **rest: Any
    ) -> Way:
        """That of networks of this configuration, which share it where they differ in what PyTorch
        computes alone. (The times of an adaptive solver depend on rounding: of a network that
        multiplies them by 1000 two right solves differ.)"""
        plain = {
            name: getattr(DiTConfig, name)
            for name in ("sampling", "dropout", "time_scale", "time_period")
        }
        config = dataclasses.replace(config, **plain)
        return cls(config, str(device), str(dtype).removeprefix("torch."), **rest)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Way:
        return cls(**{**values, "config": DiTConfig.from_dict(values["config"])})

    @property
    def setting(self) -> Setting:
        dtype, device = getattr(torch, self.dtype), torch.device(self.device)
        given = dtype, self.precision, self.attention, capability_of(device, self.kind)
        return Setting(self.config, *given)

    @property
    def pictures(self) -> int:
        """PICTURES, or one where the plan does not serve as many with guidance."""
        samples, tokens = 2 * PICTURES, math.prod(self.config.grid)
        return 1 if PLANS[self.plan].refuses(self.setting, samples, tokens) else PICTURES

    def bound(self, model_error: float) -> float:
        """The largest error with which it is right, where the model's own in this dtype is that."""
        most = BOUNDS[self.precision or self.dtype]
        return most if self.precision else min(most, max(most / 10, 3 * model_error))


def random_model(way: Way, seed: int = 0) -> DiT:
    """A network of the way's configuration, device and dtype whose weights keep every activation
    near 1, and none of which is zero."""
    torch.manual_seed(seed)
    with torch.device(way.device):
        model = DiT(way.config).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.normal_(module.bias, std=0.1)  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if "modulation" in name:  # shift, scale and gate of about a half
            weight.mul_(0.5)
    return model.to(getattr(torch, way.dtype)).eval()


def operations(
    way: Way, steps: int = STEPS, scales: tuple[float | None, ...] = (GUIDANCE, None)
) -> Iterator[tuple[str, Operation]]:
    """What is tried, with its name: the shortest and the longest depth, with and without guidance.
    Of an adaptive solver every step is accepted: rounding decides nothing."""
    solver: Any = {"solver": "bosh3", "rtol": 10.0, "atol": 10.0} if way.adaptive else {}
    for depth in dict.fromkeys((way.config.depths[0], way.config.depths[-1])):
        for scale in scales:
            name = f"depth {depth}, {'unguided' if scale is None else 'guided'}"
            told = way.config.guidance_max is not None
            solver |= {"steps": steps, "guidance_scale": scale, "told": told}
            yield name, Operation(depth=depth, **solver)


def noise_and_labels(way: Way, count: int) -> tuple[Tensor, Tensor]:
    """x (count, C, H, W) float32, labels (count,), the last of them the null label if there are
    several."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *way.config.image_shape, generator=generator)
    labels = torch.arange(1, count + 1).flip(0) * way.config.num_classes // max(2, count)
    return x.to(way.device), labels.to(way.device)


def on_host(
    network: Callable[..., Tensor], config: DiTConfig, operation: Operation, x: Tensor, y: Tensor
) -> Tensor:
    """x at t = 1, the steps made by the host."""
    scale = operation.mixing_scale
    both = torch.cat([y, torch.full_like(y, config.num_classes)])

    def field(t: float | Tensor, state: Tensor, log2_steps: float) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float32, device=state.device).reshape(-1)
        step = torch.full((1,), float(log2_steps), device=state.device)
        if scale is None:
            told = {"guidance": operation.told_scale(t)} if operation.told else {}
            return network(state, time, step, y, depth=operation.depth, **told).to(state.dtype)
        time = time.repeat(2) if len(time) > 1 else time
        output = network(state.repeat(2, 1, 1, 1), time, step, both, depth=operation.depth)
        said, null = output.to(state.dtype).chunk(2)
        mixed = null + scale * (said - null)
        if config.guided_channels is not None:
            mixed[:, config.guided_channels :] = said[:, config.guided_channels :]
        return mixed

    return solve(field, x, operation.step_index(config.sampling), operation).x


class Runner:
    """Computes operations of a model in the way asked for.

    Raises:
        ValueError: it cannot, with the reason.
    """

    def __init__(self, model: DiT, way: Way) -> None:
        self.model, self.way, self.graphs = model, way, GraphCache(model.device)
        if way.backend == "fused":
            self.engine = Engine(model, way.attention, way.precision, way.kind, (way.plan,))
            return
        networks: dict[str, Callable[[DiT], Callable[..., Tensor]]] = {
            "eager": lambda model: model,
            "compile": compiled,
            "native": CpuNetwork,
        }
        self.network = networks[way.backend](model)

    def prepare(self, operation: Operation, x: Tensor, y: Tensor) -> tuple[Run, Run | None]:
        """(launches one by one, the same as a CUDA graph): each gives x at t = 1. None where there
        are no graphs; the second may raise CaptureError."""
        way = self.way
        if way.backend != "fused":
            return lambda: on_host(self.network, way.config, operation, x, y), None
        trajectory: Trajectory | AdaptiveTrajectory
        kind: type[Captured] = Captured
        if operation.adaptive:
            trajectory, kind = AdaptiveTrajectory(self.engine, operation), CapturedSolve
        else:
            trajectory = Trajectory(self.engine, operation)
        guided = trajectory.guidance is not None
        null = torch.full_like(y, way.config.num_classes)
        labels = torch.cat([y, null]) if guided else y
        rest: tuple[Any, ...] = (None, trajectory.scales)[operation.adaptive :]
        if not self.engine.on_gpu:
            return lambda: trajectory(x, labels, *rest)[0], None
        key = trajectory.key, trajectory.guidance, len(x)
        # Launched, x is written by an adaptive solve: it begins with a copy.
        return (
            lambda: trajectory(x.clone(), labels, *rest)[0],
            lambda: self.graphs.run(key, trajectory, (x, labels, *rest), True, kind)[0],
        )


def compare(way: Way) -> Iterator[Record]:
    """What is found out of a way: {"at": what comes next}, {"ready": True} when the model itself
    has run, {"what", "error" (None: not finite), "model_error", "bound"} and {"what", "equal"} of
    each comparison."""
    yield {"at": "the model itself"}
    model = random_model(way)
    x, y = noise_and_labels(way, way.pictures)
    wider = torch.float64 if way.dtype == "float32" else torch.float32
    exact, truths = copy.deepcopy(model).to(wider), {}
    for name, operation in operations(way):
        truths[name] = on_host(exact, way.config, operation, x.to(wider), y) - x
        largest = truths[name].abs().max().item()
        if not 1e-2 < largest < 1e3:
            raise ValueError(f"the model itself moves by {largest:g}: no measure")
    del exact
    errors = {}
    for name, operation in operations(way):
        moved = on_host(model, way.config, operation, x, y) - x
        errors[name] = largest_error(moved, truths[name])
    yield {"ready": True, "at": "preparing"}
    runner = Runner(model, way)
    for name, operation in operations(way):
        launched, replayed = runner.prepare(operation, x, y)
        yield {"at": name}
        end = launched()
        error, own = largest_error(end - x, truths[name]), errors[name]
        finite = error if math.isfinite(error) else None
        yield {"what": name, "error": finite, "model_error": own, "bound": way.bound(own)}
        yield {"what": f"{name}, once more", "equal": torch.equal(launched(), end)}
        if replayed is None:
            continue
        yield {"at": f"{name}, as a graph"}
        try:
            ends = [replayed(), replayed()]
        except CaptureError as error:  # then the launches are made one by one
            yield {"no_graph": one_line(error)}
            continue
        for end_of_graph, count in zip(ends, ("", ", again")):
            yield {"what": f"{name}, as a graph{count}", "equal": torch.equal(end_of_graph, end)}


def largest_error(moved: Tensor, truth: Tensor) -> float:
    """The largest difference, of the largest value."""
    return ((moved.to(truth.dtype) - truth).abs().max() / truth.abs().max()).item()


def measure(model: DiT, way: Way, batch: int = 1) -> dict[str, float]:
    """Microseconds from noise to pictures in one Euler step (adaptive: in a solve), unguided, at
    the shortest and the longest depth, by depth: the median of at least seven calls, warm, of a
    graph where there can be one."""
    runner, (x, y), found = Runner(model, way), noise_and_labels(way, batch), {}
    with torch.inference_mode():
        for _, operation in operations(way, 1, (None,)):
            launched, replayed = runner.prepare(operation, x, y)
            run = replayed or launched
            try:
                run()
            except CaptureError:
                run = launched
            found[str(operation.depth)] = microseconds(run, model.device)
    return found


def microseconds(run: Run, device: torch.device) -> float:
    """The median of a call, from an idle device to an idle device."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken: list[float] = []
    begin = time.perf_counter()
    for turn in range(10_000):
        if turn >= ROUNDS + 2 and time.perf_counter() - begin > SECONDS:
            break
        wait()
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(taken[2:]), 1)


def main() -> int:
    """Reads {"way": ..., "timed": whether to measure, too, "seconds": when to give up}; what
    libraries print goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    asked = json.load(sys.stdin)
    if hasattr(signal, "alarm"):  # whoever started it may be gone
        signal.alarm(max(1, math.ceil(asked["seconds"])))
    way = Way.from_dict(asked["way"])
    torch.backends.cudnn.allow_tf32 = False  # in which the model would embed its patches
    unable: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError, OSError)
    try:
        with torch.no_grad():
            for record in compare(way):
                print(json.dumps(record), file=lines)
            if asked["timed"]:
                print(json.dumps({"at": "timing"}), file=lines)
                print(json.dumps({"microseconds": measure(random_model(way), way)}), file=lines)
    except Exception as error:
        state = "undecided" if isinstance(error, unable) else "failed"
        print(json.dumps({"state": state, "reason": one_line(error)}), file=lines)
        raise
    print(json.dumps({"done": True}), file=lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
