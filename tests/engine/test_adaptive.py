"""Adaptive solves through the fused backend: the host loop's images, a cached graph for each kind
of solve, what runs without one."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from odelt_fast.engine import availability, device_adaptive, fused, operators
from odelt_fast.engine.adaptive import AdaptiveTrajectory
from odelt_fast.engine.device_adaptive import AdaptiveGraph, DeviceAdaptive
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.graphs import CaptureError, GraphCache, capture
from odelt_fast.operation import Operation
from odelt_fast.sampling.flow_map import flow
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.solvers.tableau import find_tableau
from tests.engine.test_device_adaptive import NoHost, smooth, states
from tests.engine.test_graphs import CPU, NEEDS_CUDA, Replayed, cuda_model, replayed, warned
from tests.helpers.engine_cases import needs_while_nodes, random_model, run_fused_on_the_cpu
from tests.helpers.reference_cases import relative_error
from tests.helpers.solving import solve_adaptive

STATS = ("accepted", "rejected", "evaluations_needed", "status")
KINDS = [
    {},
    {"solver": "bosh3"},
    {"rtol": 1e-3, "atol": 1e-3},
    {"error_norm": "batch"},
    {"depth": 2},
    {"guidance_scale": 2.0},
    {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.7)},
    {"guidance_scale": 0},
    {"max_steps": 50},
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    """Of the fused backend, on the CPU; what is captured there acts as a graph does."""
    cache = GraphCache(CPU, capture=replayed)
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    return cache


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_every_kind_of_solve_has_its_own_graph_and_the_hosts_images(graphs: GraphCache) -> None:
    model = random_model()
    for options in KINDS:
        settings = {"solver": "dopri5", "backend": "fused", **options}
        ours, eager = Sampler(model, **settings), Sampler(model, **{**settings, "backend": "eager"})
        calls: list[tuple[int, list[int] | int]] = [(0, [1, 2, 3]), (1, [3, 2, 1]), (2, 7)]
        for seed, labels in calls if not options or "guidance_scale" in options else calls[:1]:
            expected = eager(3, labels, seed)
            torch.testing.assert_close(
                ours(3, labels, seed), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
            )
            assert all(ours.stats[name] == eager.stats[name] for name in STATS)
    # Three labels, or one for all; the null label (guidance 0) is one kind, and guidance (at all
    # times, or on an interval) makes no difference between the others.
    assert len(graphs.graphs) == 2 + 5 + 2 + 1
    before = Replayed.captures
    Sampler(model, solver="dopri5", backend="fused")(3, [1, 2, 3])
    assert Replayed.captures == before


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_the_least_recently_used_solve_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = GraphCache(CPU, limit=2, capture=replayed), random_model()
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    for solver in ("dopri5", "bosh3", "dopri5", "euler", "euler"):
        Sampler(model, solver=solver)(2, 3)
    assert [type(each).__name__ for each in cache.graphs.values()] == ["CapturedSolve", "Captured"]


def test_where_the_gpu_cannot_repeat_a_step_the_host_does_with_one_warning(
    graphs: GraphCache,
) -> None:
    model = random_model()
    expected = Sampler(model, solver="tsit5", backend="eager")(4, seed=1)
    sampler = Sampler(model, solver="tsit5")
    assert sampler.explain()["graph"] == "captured at the first call"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(sampler(4, seed=1), expected, rtol=0, atol=1e-5)
    (message,) = warned(caught)
    assert message.startswith(
        "the GPU cannot repeat a solver's steps by itself (the model is on cpu)"
    )
    assert caught[0].filename == __file__
    assert (
        sampler.explain()["graph"]
        == "one attempted step, replayed by the host (the model is on cpu)"
    )


def test_without_a_graph_the_steps_are_launched_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: object) -> object:
        raise CaptureError("not here")

    model = random_model()
    expected = Sampler(model, solver="dopri5", backend="eager")(4, seed=1)
    run_fused_on_the_cpu(monkeypatch, lambda: GraphCache(CPU, capture=refused))
    sampler = Sampler(model, solver="dopri5")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(sampler(4, seed=1), expected, rtol=0, atol=1e-5)
    (message,) = warned(caught)
    assert message.startswith("no CUDA graph could be captured (not here)")
    assert sampler.explain()["graph"] == "none: no CUDA graph could be captured (not here)"
    with pytest.raises(
        ValueError, match="backend 'fused' cannot run here: no CUDA graph could be captured"
    ):
        Sampler(model, solver="dopri5", backend="fused")(4)


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_unfinished_images_are_named_as_by_the_host(graphs: GraphCache) -> None:
    settings = {"solver": "dopri5", "rtol": 1e-5, "atol": 1e-5, "max_steps": 2}
    said = []
    for backend in ("eager", "fused"):
        with pytest.raises(ValueError, match="took 2 steps and did not reach t = 1") as error:
            Sampler(random_model(), backend=backend, **settings)(3)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_weights_changed_in_place_are_seen_by_solves_and_flows(
    monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    """fp8 and the modulations of the null label are copies of weights: a graph alone would go on
    with the old ones."""
    monkeypatch.setattr(availability, "fused_unavailable", lambda model: None)
    monkeypatch.setattr(fused, "KIND", "reference")
    monkeypatch.setattr(fused, "GraphCache", functools.partial(GraphCache, capture=replayed))
    model, other = random_model(), random_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = {
        "solve": lambda sampler: sampler(noise=noise, labels=3),
        "solve, null label": lambda sampler: sampler(noise=noise, labels=10),
        "flow": lambda sampler: flow(sampler, noise).x,
    }
    for solver in ("euler", "dopri5"):
        for name, call in calls.items():
            options = {"solver": solver, "backend": "fused", "precision": precision}
            sampler = Sampler(model, **options)
            old = call(sampler)
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            model.load_state_dict(other.state_dict())
            new, expected = call(sampler), call(Sampler(other, **options))
            assert torch.equal(new, expected), (solver, name)
            assert relative_error(new, old) > 1e-2
            model.load_state_dict(weights)


@pytest.mark.parametrize("sampling", ["shortcut", "diffusion"])
@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@pytest.mark.parametrize(
    ("labels", "guidance"),
    [(None, None), ([3], None), ([1, 2, 3], None), ([1, 2, 3, 10, 10, 10], 2.0)],
    ids=str,
)
def test_a_solve_on_the_engine_reads_nothing_on_the_host(
    sampling: str, norm: str, labels: list[int] | None, guidance: float | None
) -> None:
    """What the GPU is to repeat must not ask the host; the reference operators do, so that here a
    step is PyTorch's own."""
    engine = Engine(random_model(sampling=sampling), kind="reference")
    engine.ops.MOST_SAMPLES = 0
    trajectory = AdaptiveTrajectory(
        engine,
        Operation(depth=4, solver="dopri5", guidance_scale=guidance, error_norm=norm),
    )
    with torch.no_grad():
        x, chosen = torch.randn(3, 2, 8, 8), None if labels is None else torch.tensor(labels)
        solve = trajectory.prepare(x, chosen)
        assert solve.ops is None
        engine.positions(8, 8)
        with NoHost():
            solve.start()
            solve.attempt()


# From here on: on a CUDA GPU.


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def while_nodes(monkeypatch: pytest.MonkeyPatch, native_folder: Path) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(native_folder))
    needs_while_nodes()


@NEEDS_CUDA
@pytest.mark.parametrize(
    "options", [{}, {"error_norm": "batch"}, {"guidance_scale": 2.0}, {"solver": "dop853"}], ids=str
)
def test_cuda_a_solve_of_one_launch_gives_the_host_loops_images(
    while_nodes: None, options: dict
) -> None:
    model = cuda_model(torch.float32, depth=8)
    settings = {"depth": 4, "solver": "dopri5", "rtol": 1e-4, "atol": 1e-4, **options}
    ours, eager = (
        Sampler(model, backend="fused", **settings),
        Sampler(model, backend="eager", **settings),
    )
    for seed in (0, 1, 0):
        assert (
            relative_error(ours(5, seed=seed), eager(5, seed=seed)) < 1e-3
        )  # the steps may fall a little apart
    assert ours.explain()["graph"] == "the whole solve, a while loop of CUDA's"


@NEEDS_CUDA
@pytest.mark.parametrize("replayed", [False, True], ids=["while_node", "replayed"])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dop853"])
def test_cuda_graphs_of_any_field_take_the_host_loops_steps(
    while_nodes: None, solver: str, kernels: bool, replayed: bool
) -> None:
    """In float64, where the kernels' order of summation changes no decision; to the last bit with
    PyTorch's own operators."""
    ops = operators.load_operators("kernels") if kernels else None
    x, tableau = states().double().cuda(), find_tableau(solver)[0]
    graph = AdaptiveGraph(DeviceAdaptive(smooth, x, 7, tableau, ops=ops))
    assert graph.fallback is None
    if replayed:
        graph.loop = None
    for seed in (1, 2, 1):
        x.copy_(states(seed))
        host = solve_adaptive(smooth, x, 7, tableau)
        graph.replay()
        found = graph.solve.solution()
        torch.testing.assert_close(
            found.x, host.x, rtol=1e-9 if kernels else 0, atol=1e-11 if kernels else 0
        )
        for part in ("status", "accepted", "rejected", "evaluations"):
            assert torch.equal(getattr(found, part), getattr(host, part)), part


@NEEDS_CUDA
def test_cuda_a_solve_does_not_wait_for_the_host(while_nodes: None) -> None:
    sampler = Sampler(cuda_model(depth=4), solver="dopri5", backend="fused")
    expected = sampler(2, labels=3)
    (captured,) = sampler.fused.graphs.graphs.values()
    with no_synchronisation():
        captured.loop.replay()
    assert torch.equal(captured.solve.solution().x, expected)


@NEEDS_CUDA
def test_cuda_steps_replayed_by_the_host_are_the_same(
    while_nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cuda_model(depth=4)
    expected = Sampler(model, solver="dopri5", backend="fused")(2, labels=3)
    monkeypatch.setattr(
        device_adaptive, "while_graph_unavailable", lambda build_it=True: "not today"
    )
    fresh = cuda_model(depth=4)
    fresh.load_state_dict(model.state_dict())
    sampler = Sampler(fresh, solver="dopri5", backend="fused")
    with pytest.warns(RuntimeWarning, match="not today"):
        assert torch.equal(sampler(2, labels=3), expected)
    assert sampler.explain()["graph"] == "one attempted step, replayed by the host (not today)"


@NEEDS_CUDA
def test_cuda_a_solve_that_cannot_be_captured_is_launched() -> None:
    model = cuda_model(depth=4)
    expected = Sampler(model, solver="dopri5", backend="eager")(2)
    sampler = Sampler(model, solver="dopri5")

    def waiting(function: Callable[[], object], device: torch.device, pool: object) -> object:
        return capture(lambda: (function(), torch.zeros(1, device=device).item()), device)

    sampler.fused.graphs.capture = waiting
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be captured"):
        assert relative_error(sampler(2), expected) < 3e-2
