"""Captured graphs: the cache, what happens where nothing can be captured or memory runs out, and,
on a CUDA GPU, the graphs themselves."""

from __future__ import annotations

import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odelt_fast.engine import availability
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.fused import GRAPH_VALUES
from odelt_fast.engine.graphs import CaptureError, GraphCache, capture
from odelt_fast.engine.operators import SDPA_KERNELS
from odelt_fast.model import Block, DiT
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.engine_cases import random_model, run_fused_on_the_cpu
from tests.helpers.reference_cases import load_case, quantities, relative_error

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Replayed:
    """Acts as a CUDA graph does: reads and writes the tensors that it was captured with. (CUDA
    graphs do not exist on a CPU.)"""

    captures = 0

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        self.function, self.outputs = function, function()
        Replayed.captures += 1

    def replay(self) -> None:
        with torch.inference_mode():  # a graph asks for no mode
            for held, made in zip(self.outputs, self.function()):
                held.copy_(made)


def replayed(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: object
) -> tuple[Replayed, tuple[Tensor, ...]]:
    graph = Replayed(function)
    return graph, graph.outputs


def double(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
    return (2 * x if y is None else 2 * x + y,)


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def test_a_replay_reads_new_inputs_and_leaves_earlier_results_alone() -> None:
    cache = GraphCache(CPU, capture=replayed)
    first = cache.run("key", double, (torch.tensor([1.0]), torch.tensor([5])))[0]
    second = cache.run("key", double, (torch.tensor([2.0]), torch.tensor([6])))[0]
    third = cache.run("key", double, (torch.tensor([3.0]), torch.tensor([6])))[0]
    assert [result.tolist() for result in (first, second, third)] == [[7], [10], [12]]


def test_labels_changed_in_place_are_seen() -> None:
    cache, labels = GraphCache(CPU, capture=replayed), torch.tensor([1])
    results = []
    for label in (1, 1, 4):
        labels[0] = label
        results.append(cache.run("key", double, (torch.zeros(1), labels))[0].item())
    assert results == [1, 1, 4]


def test_the_least_recently_used_graph_is_dropped() -> None:
    cache = GraphCache(CPU, limit=2, capture=replayed)
    for key in "abaca":
        cache.run(key, double, (torch.zeros(1),))
    assert list(cache.graphs) == ["c", "a"]
    before = Replayed.captures
    cache.run("a", double, (torch.zeros(1),))
    cache.run("b", double, (torch.zeros(1),))
    assert Replayed.captures == before + 1


def test_what_runs_once_is_not_captured() -> None:
    cache = GraphCache(CPU, capture=replayed)
    before = Replayed.captures
    for captures in (0, 1, 1):
        assert cache.run("key", double, (torch.ones(1),), at_once=False)[0].item() == 2
        assert Replayed.captures == before + captures


def test_threads_take_turns() -> None:
    cache, wrong = GraphCache(CPU, capture=replayed), []

    def work(value: float) -> None:
        for _ in range(50):
            if cache.run("key", double, (torch.full((100,), value),))[0].unique().tolist() != [
                2 * value
            ]:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_capture_forgets_all_graphs_and_says_why() -> None:
    def failing(function: Callable[[], Any], device: torch.device, pool: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cache = GraphCache(CPU, capture=replayed)
    cache.run("a", double, (torch.zeros(1),))
    cache.capture = failing
    with pytest.raises(CaptureError, match="out of memory"):
        cache.run("b", double, (torch.zeros(1),))
    assert not cache.graphs


def test_a_failed_capture_switches_graphs_off_for_its_shape_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_small_batches(
        function: Callable[[], Any], device: torch.device, pool: object
    ) -> tuple[Replayed, Any]:
        graph, result = replayed(function, device, pool)
        if len(result[0]) > 2:
            raise CaptureError("too many images")
        return graph, result

    cache, model = GraphCache(CPU, capture=of_small_batches), random_model()
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    sampler = Sampler(model)
    expected = {count: Sampler(model, backend="eager")(count) for count in (2, 3)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (2, 2, 3, 3, 3, 2):
            torch.testing.assert_close(sampler(count), expected[count], rtol=0, atol=1e-5)
            if count == 3:
                graph = sampler.explain()["graph"]
    assert len(warned(caught)) == 1
    assert graph == "none: no CUDA graph could be captured (too many images)"
    assert sampler.explain()["graph"] == "the whole trajectory"
    assert len(cache.graphs) == 1


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine on which nothing can be captured"
)
def test_where_nothing_can_be_captured_auto_launches_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model()
    expected = Sampler(model, backend="eager")(4, seed=1)
    with pytest.raises(CaptureError):
        capture(lambda: (torch.zeros(1),), CPU)
    run_fused_on_the_cpu(monkeypatch, lambda: GraphCache(CPU))
    sampler = Sampler(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            torch.testing.assert_close(sampler(4, seed=1), expected, rtol=0, atol=1e-5)
    (message,) = warned(caught)
    assert message.startswith("no CUDA graph could be captured (")
    assert (
        message.removeprefix("no CUDA graph could be captured (")
        in sampler.explain()["graph"] + message
    )
    assert sampler.explain()["graph"].startswith("none: no CUDA graph could be captured")
    with pytest.raises(
        ValueError, match="backend 'fused' cannot run here: no CUDA graph could be captured"
    ):
        Sampler(model, backend="fused")(4)


def test_a_kernel_that_fails_leaves_auto_with_the_model_and_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model()
    expected = Sampler(model, backend="eager")(2)
    run_fused_on_the_cpu(monkeypatch)

    def broken(*arguments: object) -> None:
        raise RuntimeError("no kernel image is available")

    for solver in ("euler", "dopri5"):
        sampler, named = (
            Sampler(model, solver=solver),
            Sampler(model, solver=solver, backend="fused"),
        )
        for each in (sampler, named):
            each.fused.engine.ops.gated_residual = broken
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = [sampler(2), sampler(2)]
        if solver == "euler":
            assert torch.equal(images[1], expected)
        assert warned(caught) == [
            "the fused backend failed (no kernel image is available): the model itself runs, which"
            " is slower"
        ]
        assert sampler.explain()["backend"] == "eager"
        assert sampler.explain()["not_taken"]["fused"] == "no kernel image is available"
        with pytest.raises(RuntimeError, match="no kernel image"):
            named(2)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_where_memory_runs_out_auto_takes_fewer_images_at_a_time(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model, sizes, forward = random_model(), [], Block.forward
    expected = Sampler(model, backend="eager", batch_size=2)(7, seed=2)

    def small_memory(block: Block, x: Tensor, condition: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x))
        return forward(block, x, condition)

    monkeypatch.setattr(Block, "forward", small_memory)
    sampler = Sampler(model, backend=backend)
    if backend == "eager":
        with pytest.raises(torch.OutOfMemoryError):
            sampler(7)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(sampler(7, seed=2), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(sampler(7, seed=2), expected, rtol=0, atol=1e-5)
    assert warned(caught) == [
        "out of memory with 7 images at a time: fewer are taken, the images stay the same"
    ]
    assert max(sizes) == 1
    assert sampler.stats["images"] == len(sampler.stats["status"]) == 7


def test_a_batch_that_is_slow_to_compute_is_not_captured_by_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_fused_on_the_cpu(monkeypatch, lambda: GraphCache(CPU, capture=replayed))
    model = random_model()
    # Two images of 16 tokens.
    monkeypatch.setattr("odelt_fast.engine.fused.GRAPH_VALUES", 2 * 16 * model.config.hidden_size)
    before, sampler = Replayed.captures, Sampler(model)
    for count, captures in ((3, 0), (3, 0), (2, 0), (2, 1)):
        sampler(count)
        assert Replayed.captures == before + captures
    assert "captured" not in sampler.explain()["graph"]
    sampler(3)
    assert "more than 32 tokens" in sampler.explain()["graph"]
    half = Sampler(random_model(hidden_size=model.config.hidden_size // 2))
    for count, captures in ((4, 1), (4, 2), (5, 2), (5, 2)):
        half(count)  # half as wide: twice as many tokens are as quick
        assert Replayed.captures == before + captures


def test_every_shape_and_guidance_has_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = GraphCache(CPU, capture=replayed)
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    model = random_model()
    for depth in (2, 6):
        for steps in (1, 3):
            for guidance in (None, 0, 1.5, 2.5):
                for labels in (None, 4, 10):
                    options = {"depth": depth, "steps": steps, "guidance_scale": guidance}
                    fused, eager = (
                        Sampler(model, backend="fused", **options),
                        Sampler(model, backend="eager", **options),
                    )
                    for seed in (0, 1):
                        expected = eager(3, labels=labels, seed=seed)
                        torch.testing.assert_close(
                            fused(3, labels=labels, seed=seed), expected, rtol=0, atol=1e-4
                        )
    # Guidance 0 and the null label are one; with guidance one label for all is no special case.
    assert len(cache.graphs) == 2 * 2 * (1 + 2 + 2)


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_one_graph_serves_every_scale_that_a_network_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = GraphCache(CPU, capture=replayed)
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    model = random_model(sampling="mean_flow", guidance_max=8.0)
    for solver in ("euler", "dopri5"):
        for guidance in (None, 1.5, 8.0):
            fused, eager = (
                Sampler(model, solver=solver, steps=2, guidance_scale=guidance, backend=backend)
                for backend in ("fused", "eager")
            )
            for seed in (0, 1):
                expected = eager(3, labels=[4, 1, 10], seed=seed)
                found = fused(3, labels=[4, 1, 10], seed=seed)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(cache.graphs) == 2
    # Prepared calls in turn: each tells its own scale again.
    scales, options = (2.0, 6.0), {"steps": 2}
    calls = [
        Sampler(model, guidance_scale=scale, backend="fused", **options).prepare(3)
        for scale in scales
    ]
    for _ in range(3):
        for scale, call in zip(scales, calls, strict=True):
            eager = Sampler(model, guidance_scale=scale, backend="eager", **options)
            expected = eager(3, labels=[4, 1, 10], seed=2)
            found = call(labels=[4, 1, 10], seed=2)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(cache.graphs) == 2


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_graphs_do_not_keep_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = GraphCache(CPU, capture=replayed), random_model()
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    for solver in ("euler", "dopri5"):
        Sampler(model, solver=solver, backend="fused")(2)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert len(cache.graphs) == 2
    assert dead() is None


# From here on: on a CUDA GPU.


def cuda_model(dtype: torch.dtype = torch.bfloat16, **changes: object) -> DiT:
    """Head dimension 64 and 256 tokens, as in the published networks, but narrow."""
    sizes = {
        "image_size": 32,
        "channels": 4,
        "hidden_size": 256,
        "num_heads": 4,
        "depth": 12,
        "depth_min": 4,
        "depth_group": 4,
    }
    model = random_model(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return model.to("cuda", dtype)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN rounds the model's float32 patch embedding to TF32, which the engine's does
    not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "name"), quantities(r"sample_depth\d+_T\d+_cfg[\d.]+"))
def test_cuda_graph_replays_the_recorded_sample(path: Path, name: str, dtype: torch.dtype) -> None:
    """float32 to 1e-4 of the recording (the card's products sum in another order); bfloat16 no
    worse than the model in bfloat16."""
    case = load_case(path)
    depth, steps, scale = re.search(r"depth(\d+)_T(\d+)_cfg([\d.]+)", name).groups()
    options = {"depth": int(depth) or None, "steps": int(steps), "guidance_scale": float(scale)}
    exact, model = case.tensor(name), case.model().to("cuda", dtype)
    noise, labels = case.tensor("noise"), case.tensor("y")
    eager = Sampler(model, backend="eager", **options)(noise=noise, labels=labels).cpu()
    fused = Sampler(model, backend="fused", **options)
    first, again = (fused(noise=noise, labels=labels).cpu() for _ in range(2))
    assert torch.equal(first, again)
    assert fused.explain()["graph"] == "the whole trajectory"
    bound = 1e-4 if dtype == torch.float32 else 1.5 * relative_error(eager, exact) + 1e-3
    assert relative_error(first, exact) < bound


@NEEDS_CUDA
@pytest.mark.parametrize("attention", ["sdpa", *SDPA_KERNELS, "triton"])
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_cuda_attention_and_precision(attention: str, precision: str | None) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    model = cuda_model()
    exact_model = cuda_model(torch.float32)
    exact_model.load_state_dict(model.state_dict())
    x, y = torch.randn(3, 4, 32, 32, device="cuda"), torch.tensor([1, 5, 10], device="cuda")
    with torch.inference_mode():
        exact, eager = exact_model(x, 0.3, 7, y, depth=8), model(x, 0.3, 7, y, depth=8)
        velocity = Engine(model, attention, precision)(x, 0.3, 7, y, 8)
    assert relative_error(velocity, exact) < (
        4e-2 if precision else 1.2 * relative_error(eager, exact)
    )


@NEEDS_CUDA
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "rk4"},
        {"solver": "dopri5"},
        {"solver": "torchdiffeq:rk4"},
        {"guidance_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inner_step": "inverse_depth"},
        {"inner_step": "residual", "guided_channels": 3},
        {"sampling": "consistency"},
        {"sampling": "diffusion"},
    ],
    ids=str,
)
def test_cuda_every_solver_and_kind(
    options: dict, changes: dict, monkeypatch: pytest.MonkeyPatch, native_folder: Path
) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(native_folder))  # while nodes as built or carried
    if changes.get("sampling") == "consistency":
        options = {
            name: value for name, value in options.items() if name != "solver"
        }  # they have a rule of their own
    if options.get("solver", "").startswith("torchdiffeq"):
        pytest.importorskip("torchdiffeq", reason="a machine that is lent may not have it")
    model = cuda_model(torch.float32, depth=8, **changes)
    expected = Sampler(model, depth=4, backend="eager", **options)(5, seed=1)
    fused = Sampler(model, depth=4, backend="fused", **options)
    for _ in range(2):
        # The steps of an adaptive solver may fall a little apart.
        assert relative_error(fused(5, seed=1), expected) < (
            1e-2 if fused.operation.adaptive else 1e-3
        )


@NEEDS_CUDA
def test_cuda_a_thousand_replays_are_equal_bit_by_bit() -> None:
    sampler = Sampler(cuda_model(), depth=8, steps=4, guidance_scale=1.5, backend="fused")
    noise, labels = torch.randn(8, 4, 32, 32, device="cuda"), list(range(8))
    first = sampler(noise=noise, labels=labels)
    assert all(torch.equal(sampler(noise=noise, labels=labels), first) for _ in range(1000))


@NEEDS_CUDA
def test_cuda_ten_thousand_calls_leave_memory_flat() -> None:
    model = cuda_model(depth=4)
    samplers = [Sampler(model, steps=steps, backend="fused") for steps in (1, 2)]
    noise = torch.randn(2, 4, 32, 32, device="cuda")

    def calls(count: int) -> int:
        for i in range(count):
            samplers[i % 2](noise=noise, labels=[i % 10, 3])
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    before = calls(100)
    assert calls(10_000) == before


@NEEDS_CUDA
def test_cuda_weights_are_in_proportion_to_the_live_blocks() -> None:
    taken = {}
    for depth in (4, 8, 12):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = cuda_model(torch.float32).cpu().truncate(depth).to("cuda", torch.bfloat16)
        engine = Engine(model)
        taken[depth] = torch.cuda.memory_allocated() - before - model.positions.nbytes
        told = engine.weights.nbytes
        assert taken[depth] == pytest.approx(
            told["ends"] + depth * told["per_block"], rel=0.02
        )  # allocations are rounded up
        del model, engine
    assert taken[12] - taken[8] == pytest.approx(taken[8] - taken[4], rel=0.01)


@NEEDS_CUDA
@pytest.mark.parametrize("depth", [4, 12])
def test_cuda_launches_are_those_explained(depth: int) -> None:
    """Of one step inside a trajectory: the difference of two graphs that differ in the number of
    steps."""
    model = cuda_model()
    nodes = {}
    for steps in (2, 4):
        sampler = Sampler(model, depth=depth, steps=steps, backend="fused")
        sampler(noise=torch.randn(1, 4, 32, 32), labels=[3])
        told = sampler.explain()
        nodes[steps] = told["graph_nodes"]
    if nodes[2] is None:
        pytest.skip("the CUDA runtime cannot be asked for the nodes of a graph")
    per_step = (nodes[4] - nodes[2]) / 2
    # cuBLAS may add a kernel that sums split-K partial results, or a memset, to a product.
    assert (
        told["launches_per_evaluation"] <= per_step <= told["launches_per_evaluation"] + 4 * depth
    )


@NEEDS_CUDA
def test_cuda_a_broken_capture_falls_back_once_and_leaves_the_device_usable() -> None:
    """Provoked for real: an operator that waits for the device inside the capture."""
    model = cuda_model(depth=4)
    expected = Sampler(model, backend="fused")(2)
    sampler, named = Sampler(model), Sampler(model, backend="fused", steps=3)
    for each in (sampler, named):
        ops = each.fused.engine.ops
        if not hasattr(ops, "unbroken"):
            ops.unbroken = ops.norm_modulate
            ops.norm_modulate = lambda x, *rest, whole=ops.norm_modulate: (
                x.sum().item(),
                whole(x, *rest),
            )[1]
        each.fused.graphs.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert (
                relative_error(sampler(2), expected) < 5e-3
            )  # cuBLAS may choose another algorithm outside a graph
    assert len(warned(caught)) == 1
    with pytest.raises(ValueError, match="no CUDA graph could be captured"):
        named(2)
    ops.norm_modulate = ops.unbroken
    fresh = Sampler(model, backend="fused")
    assert torch.equal(fresh(2), expected)
    assert fresh.explain()["graph"] == "the whole trajectory"


@NEEDS_CUDA
def test_cuda_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cuda_model(depth=4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0 (Ampere) or newer" in availability.fused_unavailable(model)
    with pytest.warns(RuntimeWarning, match=r"7\.5"):
        sampler = Sampler(model)
    assert sampler.explain()["backend"] == "eager"
    with pytest.raises(ValueError, match=r"7\.5"):
        Sampler(model, backend="fused")


@NEEDS_CUDA
def test_cuda_large_batches_are_launched_by_auto() -> None:
    model = cuda_model(depth=4)
    count = GRAPH_VALUES // (256 * model.config.hidden_size) + 1
    sampler = Sampler(model, steps=1, batch_size=count)
    sampler(count)
    sampler(count)
    assert "tokens" in sampler.explain()["graph"]


@NEEDS_CUDA
def test_cuda_the_attention_that_pytorch_chooses_is_named() -> None:
    sampler = Sampler(cuda_model(depth=4), backend="fused", attention="sdpa")
    told = re.fullmatch(r"sdpa \((\w+)\)", sampler.explain()["attention"])
    assert told
    assert told[1] in SDPA_KERNELS  # "math" would be slow and no choice of an H100's
    named = Sampler(sampler.model, backend="fused", attention=told[1])
    assert named.explain()["attention"] == told[1]
    assert torch.equal(named(2), sampler(2))


@NEEDS_CUDA
def test_cuda_each_stream_has_counters_of_its_own() -> None:
    """Those of split-K products: launches that are no graph may run on two streams at once."""
    engine, streams = Engine(cuda_model(depth=4)), [torch.cuda.Stream() for _ in range(2)]
    taken = []
    for stream in (*streams, *streams):
        with torch.cuda.stream(stream):
            taken.append(engine.workspace())
    assert taken[0] is taken[2]
    assert taken[1] is taken[3]
    assert taken[0].data_ptr() != taken[1].data_ptr()
    assert not torch.cat(taken).any()
