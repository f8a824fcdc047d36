"""Guidance on an interval of time: by hand, on the engine, in files and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odelt_fast import Sampler
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.cli import main
from odelt_fast.engine import fused
from odelt_fast.engine.graphs import GraphCache
from odelt_fast.evaluation.cells import plan_cells
from odelt_fast.evaluation.operation_fields import operation_fields, read_operation
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.planning.profile import Measurement, _measurement
from odelt_fast.sampling.likelihood import log_likelihood
from odelt_fast.solvers.adaptive import integrate_adaptive
from tests.engine.test_graphs import CPU, replayed
from tests.helpers.engine_cases import run_fused_on_the_cpu
from tests.helpers.reference_cases import relative_error
from tests.helpers.small_model import random_model

SCALE, INTERVAL = 2.5, (0.25, 0.625)
LABELS = [3, 1, 10]


def by_hand(model: DiT, t: float, x: Tensor, index: float) -> Tensor:
    """The guided velocity of every row on its own, at one time."""
    y, null = torch.tensor(LABELS), torch.full((len(LABELS),), 10)
    label = model(x, t, index, y)
    if not INTERVAL[0] <= t <= INTERVAL[1]:
        return label
    unguided = model(x, t, index, null)
    return unguided + SCALE * (label - unguided)


def noise(rows: int = 3) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model(sampling="flow")


@torch.no_grad()
def test_fixed_steps_are_guided_inside_alone(model: DiT) -> None:
    options: dict[str, Any] = {"guidance_scale": SCALE, "backend": "eager"}
    x = noise()
    for i in range(8):
        x = x + by_hand(model, i / 8, x, 7) / 8
    sampler = Sampler(model, steps=8, guidance_interval=INTERVAL, **options)
    ours = sampler(noise=noise(), labels=LABELS)
    assert relative_error(ours, x) < 1e-5
    # t = 2/8, 3/8, 4/8, 5/8 are inside
    assert sampler.stats["evaluations_per_image"] == 8 + 4
    assert sampler.stats["evaluations_needed"] == [12, 12, 12]
    assert sampler.explain()["evaluations_per_image"] == 12
    everywhere = Sampler(model, steps=8, **options)(noise=noise(), labels=LABELS)
    assert relative_error(everywhere, ours) > 1e-2
    whole = Sampler(model, steps=8, guidance_interval=(0, 1), **options)
    assert whole.operation == Sampler(model, steps=8, **options).operation
    assert torch.equal(whole(noise=noise(), labels=LABELS), everywhere)


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "fixed:dopri5"])
def test_evaluations_are_counted_where_they_are_made(model: DiT, solver: str) -> None:
    sampler = Sampler(
        model,
        steps=3,
        solver=solver,
        guidance_scale=SCALE,
        guidance_interval=INTERVAL,
        backend="eager",
    )
    asked: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, arguments: asked.append(len(arguments[0])))
    sampler(noise=noise(), labels=LABELS)
    hook.remove()
    assert set(asked) == {3, 6}
    each = sum(asked) // 3
    assert sampler.operation.evaluations_per_image == each
    assert sampler.stats["evaluations_per_image"] == each
    assert sampler.stats["evaluations_needed"] == [each] * 3


@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@torch.no_grad()
def test_adaptive_steps_are_guided_by_each_images_own_time(model: DiT, norm: str) -> None:
    operation = Operation(
        solver="dopri5",
        rtol=1e-3,
        atol=1e-3,
        error_norm=norm,
        guidance_scale=SCALE,
        guidance_interval=INTERVAL,
    )

    def field(t: Tensor, x: Tensor, index: float) -> Tensor:
        times = t.expand(len(x)).tolist()
        rows = []
        for row, time in enumerate(times):
            whole = by_hand(model, time, x, index)
            rows.append(whole[row])
        return torch.stack(rows)

    solution = integrate_adaptive(field, noise(), 7, operation.tableau, operation.limits)
    sampler = Sampler.of(model, operation, backend="eager")
    ours = sampler(noise=noise(), labels=LABELS)
    # The velocity jumps at the interval's ends, where steps feel rounding: half the tolerance.
    assert relative_error(ours, solution.x) < 5e-4


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 8},
        {"steps": 3, "solver": "rk4"},
        {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3},
        {"steps": 4, "guidance_interval": (0.9, 1.0)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("labels", [LABELS, 3, 10])
@pytest.mark.parametrize("changes", [{"sampling": "flow"}, {"sampling": "diffusion"}])
@pytest.mark.filterwarnings("ignore:the GPU cannot repeat")
def test_engine_draws_the_same(
    options: dict[str, Any], labels: Any, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = GraphCache(CPU, capture=replayed)
    run_fused_on_the_cpu(monkeypatch, lambda: cache)
    model = random_model(**changes)
    settings = {"guidance_scale": SCALE, "guidance_interval": INTERVAL, **options}
    ours, eager = (Sampler(model, backend=name, **settings) for name in ("fused", "eager"))
    assert isinstance(ours.fused, fused.Fused)
    # The velocity jumps at the interval's ends: the steps there feel rounding.
    bound = options.get("rtol", 1e-4)
    for _ in range(2):  # launched, then as a graph
        drawn = ours(noise=noise(), labels=labels)
        assert relative_error(drawn, eager(noise=noise(), labels=labels)) < bound
    assert ours.stats["evaluations_per_image"] == eager.stats["evaluations_per_image"]
    plain = Sampler(model, backend="fused", **{**settings, "guidance_interval": None})
    if labels == LABELS and options != {"steps": 4, "guidance_interval": (0.9, 1.0)}:
        assert relative_error(plain(noise=noise(), labels=labels), drawn) > 1e-3


def test_torchdiffeq_is_guided_on_an_interval_too(model: DiT) -> None:
    options: dict[str, Any] = {"guidance_scale": SCALE, "guidance_interval": INTERVAL, "steps": 8}
    ours, theirs = (
        Sampler(model, solver=solver, backend="eager", **options)
        for solver in ("rk4", "torchdiffeq:rk4")
    )
    assert theirs.operation.evaluations_per_image is None
    # theirs is the 3/8 rule, with other times inside a step
    assert theirs(noise=noise(), labels=LABELS).isfinite().all()
    euler = [
        Sampler(model, solver=solver, backend="eager", **options)(noise=noise(), labels=LABELS)
        for solver in ("euler", "torchdiffeq:euler")
    ]
    assert relative_error(*euler) < 1e-4
    assert ours(noise=noise(), labels=LABELS).isfinite().all()


def test_likelihood_follows_the_guided_flow(model: DiT) -> None:
    images = noise().clamp(-1, 1)
    options: dict[str, Any] = {"guidance_scale": SCALE, "guidance_interval": INTERVAL}
    sampler = Sampler(model, steps=4, backend="eager", **options)
    found = log_likelihood(sampler, images, LABELS, probes=1)
    with torch.no_grad():
        x = images
        for i in range(4, 0, -1):
            x = x - by_hand(model, i / 4, x, 7) / 4
    assert relative_error(found.noise, x) < 1e-5
    assert found.log_prob.isfinite().all()


@pytest.mark.parametrize(
    ("interval", "scale", "says"),
    [
        ((0.5, 0.2), 2.0, "first not above the second"),
        ((0.5,), 2.0, "two times"),
        ((-0.1, 1), 2.0, r"\[0, 1\]"),
        ((0, float("nan")), 2.0, r"\[0, 1\]"),
        ("0.2 0.5", 2.0, "two times"),
        ((0.2, 0.5), None, "needs guidance"),
        ((0.2, 0.5), 1, "needs guidance"),
        ((0.2, 0.5), 0, "needs guidance"),
    ],
)
def test_interval_that_cannot_be_is_refused(interval: Any, scale: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as mistake:
        Operation(guidance_scale=scale, guidance_interval=interval)
    assert "\n" not in str(mistake.value)


def test_files_keep_the_interval() -> None:
    operation = Operation(depth=4, guidance_scale=SCALE, guidance_interval=INTERVAL)
    assert read_operation(json.loads(json.dumps(operation_fields(operation)))) == operation
    plain = Operation(depth=4, guidance_scale=SCALE)
    assert "guidance_interval" not in operation_fields(plain)
    for each in (operation, plain):
        measured = Measurement(each, 1, "float32", 0.2, 0.1, 0.3, 2, 6.0)
        assert _measurement(json.loads(json.dumps(measured.fields()))) == measured
    settings = Evaluation(
        data="digits", steps=(4,), guidance_scale=SCALE, guidance_interval=INTERVAL, seeds=1
    )
    cells = plan_cells(settings, random_model().config)
    assert {cell.operation.guidance_interval for cell in cells} == {INTERVAL}
    assert cells[0].record()["guidance_interval"] == list(INTERVAL)
    with pytest.raises(ValueError, match="--guidance-scale"):
        Evaluation(data="digits", guidance_interval=INTERVAL)


def test_commands_take_the_interval(
    model: DiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_model(model, tmp_path / "model"))
    sample = ["sample", "--model", folder, "--steps=4", "--num-images=2", "--labels", "1", "2"]
    sample += ["--out", str(tmp_path / "x.png"), "--json"]
    interval = ["--guidance-interval", "0.25", "0.625"]
    assert main([*sample, "--guidance-scale=2.5", *interval]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations_per_image"] == 4 + 2
    assert main([*sample, *interval]) == 2
    assert "needs guidance" in capsys.readouterr().err
    sample.remove("--steps=4")
    assert main([*sample, "--guidance-scale=2", *interval, "--max-latency=1s"]) == 2
    assert "guidance-interval" in capsys.readouterr().err
    evaluate = ["evaluate", "--model", folder, "--data=digits", "--num-images=70", "--seeds=1"]
    evaluate += ["--steps=4", "--depths=4", "--out", str(tmp_path / "out"), "--quiet", "--json"]
    assert main([*evaluate, "--guidance-scale=2.5", *interval]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["rows"][0]["guidance_interval"] == [0.25, 0.625]
    assert results["rows"][0]["evaluations"] == 6
    assert "for t from 0.25 to 0.625" in (tmp_path / "out" / "results.md").read_text()
