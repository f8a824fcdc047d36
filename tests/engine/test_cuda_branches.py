"""The CUDA branches of engine, trajectory, graphs, adaptive solve and training, without a GPU.

Tensors lie on a CUDA device that does not exist (`FakeTensorMode`: shapes, dtypes and devices, no
values). Our kernels' launchers really run, up to the launch, whose grid and arguments are checked.
Between the begin and the end of a capture nothing may be read on the host or copied from it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from odelt_fast.engine import device_adaptive
from odelt_fast.engine.adaptive import AdaptiveTrajectory, CapturedSolve
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.fused import Fused
from odelt_fast.engine.graphs import CaptureError, GraphCache, Pool, capture
from odelt_fast.engine.trajectory import Trajectory
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.train.ema import update_average
from odelt_fast.train.loop import Trainer, build_optimizer
from tests.helpers.engine_cases import random_model
from tests.helpers.training import small_run

CUDA = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "launch_cooperative_grid", "maxnreg")
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)


class Indexing(TorchFunctionMode):
    """By operators what Python's own forms of them do: those ask for the device, which does not
    exist."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        if function is Tensor.__invert__:
            return torch.bitwise_not(*args)
        if function is not Tensor.__getitem__ or not args[0].is_cuda:
            return function(*args, **(kwargs or {}))
        tensor, key = args
        dim = 0
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, int):
                tensor = tensor.select(dim, part)
                continue
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            else:
                tensor = tensor.index_select(dim, part)
            dim += 1
        return tensor


class Card(TorchDispatchMode):
    """Operators called, launches made, and what a capture forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False
        self.captured: list[list[str]] = []  # operators of each capture
        self.launches: list[tuple[str, tuple[int, ...]]] = []
        self.called: list[str] = []
        self.alone: list[str] = []  # kernels launched without overlap

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        self.called.append(name)
        if self.capturing:
            self.captured[-1].append(name)
            if name in READS:
                raise RuntimeError(f"{name} inside a capture")
        definition = OPDEFS.get(function._schema.name)
        if definition is None:
            result = function(*args, **kwargs)
        else:
            with torch._C._EnableTorchFunction(), Indexing():
                result = definition._init_fn(*args, **kwargs)
        if self.capturing and name in ("_to_copy", "copy_"):
            devices = {each.device.type for each in (result, *args) if isinstance(each, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name} between host and device inside a capture")
        return result

    def launch(
        self, kernel: Any, *given: Any, grid: Any, warmup: bool = False, **named: Any
    ) -> Any:
        if warmup:  # what a compiled kernel tells
            told = SimpleNamespace(shared=65536)
            return SimpleNamespace(n_regs=255, metadata=told, _init_handles=lambda: None)
        constants = {name: value for name, value in named.items() if name not in OPTIONS}
        bound = inspect.signature(kernel.fn).bind(*given, **constants)
        programs = tuple(grid(bound.arguments) if callable(grid) else grid)
        for count, most in zip(programs, MOST_PROGRAMS, strict=False):
            assert type(count) is int
            assert 0 < count <= most, (kernel.fn.__module__, programs)
        tensors = [each for each in given if isinstance(each, Tensor)]
        assert {each.device for each in tensors} <= {CUDA}
        self.launches.append((kernel.fn.__module__.split(".")[-1], programs))
        if not named.get("launch_pdl"):
            self.alone.append(self.launches[-1][0])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """An H100 that computes nothing, for the time of a test."""
    from triton.runtime import interpreter, jit

    card = Card()

    class Graph:
        def __init__(self, keep_graph: bool) -> None: ...

        def capture_begin(self, pool: int, capture_error_mode: str) -> None:
            card.capturing = True
            card.captured.append([])

        def capture_end(self) -> None:
            card.capturing = False

        def instantiate(self) -> None: ...

        def replay(self) -> None: ...

    class Stream(SimpleNamespace):
        cuda_stream = 0

        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

    facts = SimpleNamespace(multi_processor_count=132)
    for kind in jit.JITFunction, interpreter.InterpretedFunction:
        monkeypatch.setattr(kind, "run", lambda kernel, *a, **k: card.launch(kernel, *a, **k))
    for name, value in {
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: facts,
        "get_device_name": lambda device=None: "H100",
        "current_stream": lambda device=None: Stream(),
        "Stream": lambda device: Stream(),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "device_of": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr("odelt_fast.engine.graphs._STREAMS", {})
    monkeypatch.setattr(device_adaptive, "while_graph_unavailable", lambda: "there is no GPU")
    with torch.no_grad(), FakeTensorMode(), Indexing(), card:
        yield card


def on_the_card(dtype: torch.dtype, **changes: Any) -> DiT:
    model = random_model(**{"hidden_size": 64, "num_heads": 1, **changes}).requires_grad_(False)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return model


def inputs(samples: int = 2, guided: bool = True) -> tuple[Tensor, Tensor]:
    labels = torch.zeros(samples * (1 + guided), dtype=torch.int64, device=CUDA)
    return torch.zeros(samples, 2, 8, 8, device=CUDA), labels


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("dtype", "precision", "attention"),
    [
        (torch.float32, None, "auto"),
        (torch.float16, None, "triton"),
        (torch.bfloat16, None, "auto"),
        (torch.bfloat16, "fp8", "triton"),
    ],
)
def test_a_trajectory_is_captured(
    card: Card, dtype: torch.dtype, precision: str | None, attention: str
) -> None:
    engine = Engine(on_the_card(dtype), attention, precision)
    trajectory = Trajectory(engine, Operation(steps=2, guidance_scale=1.5))
    x, finite = GraphCache(CUDA).run("key", trajectory, inputs())
    assert (x.shape, x.dtype, x.device) == ((2, 2, 8, 8), torch.float32, CUDA)
    assert (finite.shape, finite.dtype) == ((2,), torch.bool)
    (captured,) = card.captured
    blocks = 2 * engine.config.live_blocks(engine.max_depth)
    assert captured.count("_scaled_mm") == (2 * blocks if precision else 0)
    assert captured.count("_addmm_activation") == (0 if precision else blocks)
    assert captured.count("attention") == (blocks if attention == "triton" else 0)
    ends = [programs for name, programs in card.launches if name == "final_layer"]
    assert len(ends) == 2 * 2  # the warm-up's and the capture's
    assert set(ends) == {(2,)}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_prepared_call_copies_replays_and_copies(card: Card) -> None:
    """Nothing else, and nothing is launched; labels that are known are not copied again."""
    engine, cache = Engine(on_the_card(torch.bfloat16)), GraphCache(CUDA)
    fused = Fused(lambda: (engine, cache), Operation(steps=2, guidance_scale=1.5))
    (x, _), asked = inputs(), fused.asked((2, 2, 8, 8), np.array([1, 2]))
    assert cache.replay(asked.key, (x, asked.labels, None, None), asked) is None
    cache.run(asked.key, Trajectory(engine, fused.operation), (x, asked.labels, None, None))
    cache.graphs[asked.key].labels.clear()  # values cannot be compared here
    launches, calls = len(card.launches), []
    for labels in ("new", "known"):
        card.called.clear()
        images, finite = cache.replay(asked.key, (x.cpu(), asked.labels, None, None), asked) or ()
        assert (images.shape, images.dtype, images.device) == ((2, 2, 8, 8), torch.float32, CUDA)
        assert (finite.shape, finite.dtype) == ((2,), torch.bool)
        calls.append(list(card.called))
        assert labels == "new" or calls[-1].count("copy_") == 1
    assert set(calls[1]) <= {"_to_copy", "copy_", "clone", "device"}  # its own, of a fake tensor
    assert len(card.launches) == launches


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("plan", "precision", "count"),
    [
        ("seven", None, 87),
        ("gated", None, 87),
        ("five", None, 63),
        ("whole", None, 3),
        ("seven", "fp8", 99),
        ("gated", "fp8", 99),
        ("five", "fp8", 63),
    ],
)
def test_launches_of_an_evaluation(
    card: Card, plan: str, precision: str | None, count: int
) -> None:
    """Twelve blocks of DiT-B/2 at batch 1; all of ours overlapped where the plan says so."""
    sizes = {"hidden_size": 768, "num_heads": 12, "depth": 12, "image_size": 32, "channels": 4}
    model = on_the_card(torch.bfloat16, depth_min=4, depth_group=4, **sizes)
    x = torch.zeros(1, 4, 32, 32, device=CUDA)
    for overlapped in (False, True) if plan != "whole" else (False,):
        engine = Engine(model, "triton", precision, plans=(plan + "+pdl" * overlapped,))
        condition = torch.zeros(1, 768, device=CUDA)
        card.alone.clear()
        tables = engine.modulations(condition, condition, 12)
        card.captured.append([])
        card.capturing, before = True, len(card.launches)
        engine.velocity(x, tables, 12)
        card.capturing = False
        products = ("addmm", "_addmm_activation", "_scaled_mm")
        of_pytorch = sum(map(card.captured[-1].count, products))
        launches = len(card.launches) - before + of_pytorch
        assert launches == count
        assert launches == engine.describe(1, 256, 12)["launches_per_evaluation"]
        # The quantisation of hidden values, which seven launches have with float8, never is.
        assert (set(card.alone) <= {"quantize"}) == overlapped
        if plan in ("five", "whole"):
            assert not of_pytorch
    if plan == "whole":  # no more programs than run at once, two on each processor
        assert dict(card.launches[before:])["whole_phases"] == (192,)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("norm", ["per_sample", "batch"])
def test_an_adaptive_solve_is_captured(card: Card, norm: Any) -> None:
    engine = Engine(on_the_card(torch.bfloat16))
    operation = Operation(solver="bosh3", guidance_scale=1.5, error_norm=norm)
    solve = CapturedSolve(AdaptiveTrajectory(engine, operation), inputs(), CUDA, Pool(), capture)
    x, counters = solve.outputs
    assert (x.shape, x.dtype) == ((2, 2, 8, 8), torch.float32)
    assert (counters.shape, counters.dtype) == ((4, 2), torch.int64)
    start, attempt = card.captured
    assert start.count("final_velocity") == 2
    assert attempt.count("final_velocity") == 3
    assert attempt.count("adaptive_step_update") == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(CUDA),
    ],
    ids=["item", "bool", "tolist", "cpu", "pageable"],
)
def test_a_host_read_breaks_a_capture(card: Card, read: Any) -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        if card.capturing:
            read(x)
        return (x,)

    with pytest.raises(CaptureError, match="inside a capture"):
        GraphCache(CUDA).run("key", function, (torch.zeros(3, device=CUDA),))


def test_after_the_backward_pass_a_training_step_waits_for_nothing(
    card: Card, tmp_path: Path
) -> None:
    """(The pass itself needs the streams of a device that exists.)"""
    model, config = on_the_card(torch.float32), small_run(tmp_path)
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer = build_optimizer(model, config)
    trainer: Any = SimpleNamespace(
        weights=weights,
        optimizer=SimpleNamespace(optimizer=optimizer),
        accelerator=SimpleNamespace(num_processes=1, scaler=None),
        skipped_steps=torch.zeros((), device=CUDA),
        skipped_in_a_row=torch.zeros((), device=CUDA),
    )

    def step() -> None:
        moved = 1 - Trainer._skip_if_not_finite(trainer)
        optimizer.step()
        live = list(weights.values())
        update_average([torch.zeros_like(weight) for weight in live], live, 0.1 * moved)

    capture(step, CUDA)
    assert "_fused_adamw_" in card.captured[0]
