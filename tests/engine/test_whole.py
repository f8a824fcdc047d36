"""The plan "whole" is the model, makes three launches, and leaves what it does not serve to the
default plan, or says why it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from odelt_fast.config import PRESETS
from odelt_fast.engine import trial
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.plans import PLANS, Setting
from odelt_fast.engine.trial import Way
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.engine_cases import random_model, run_fused_on_the_cpu
from tests.helpers.reference_cases import relative_error


def by_whole(model: Any, **options: Any) -> Engine:
    return Engine(model, kind="reference", plans=("whole",), **options)


def noise_and_labels(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 8, 8, generator=generator), torch.arange(count) % 4


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 12, "depth_min": 4, "depth_group": 4},  # 4, 8 and 12 blocks
        {"inner_step": "inverse_depth"},
        {"inner_step": "residual", "depth": 7, "depth_min": 3},
        {"length_conditioned": False},
        {"depth": 7, "depth_min": 3, "depth_group": 4},  # depth 3 runs no block
    ],
    ids=str,
)
def test_every_wiring_and_depth_in_three_launches(changes: dict[str, object]) -> None:
    model = random_model(**changes)
    engine, (x, y) = by_whole(model), noise_and_labels()
    launched: list[str] = []

    def counted(name: str, operator: Any) -> Any:
        return lambda *given, **named: (launched.append(name), operator(*given, **named))[1]

    for name, operator in vars(engine.ops).items():
        setattr(engine.ops, name, counted(name, operator))
    for depth in model.config.depths:
        with torch.no_grad():
            assert relative_error(engine(x, 0.3, 2, y, depth), model(x, 0.3, 2, y, depth)) < 2e-6
        blocks = "whole" if model.config.live_blocks(depth) else "norm_modulate"
        made = [name for name in launched if name != "modulation"]
        assert made == ["patch_embed", blocks, "final_velocity"]
        launched.clear()
        told = engine.describe(2, 16, depth)
        assert (told["plan"], told["launches_per_evaluation"]) == ("whole", 3)
        assert told["attention"] == "triton"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.5},
        {"guidance_scale": 1.5, "guidance_interval": (0.2, 0.7)},
        {"solver": "rk4", "steps": 2},
        {"depth_schedule": [(0, 2), (0.4, 6), (0.7, 4)], "guidance_scale": 2.0},
        {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3, "guidance_scale": 2.0, "depth": 4},
        {"solver": "bosh3", "error_norm": "batch", "depth_schedule": [(0, 2), (0.5, 6)]},
    ],
    ids=str,
)
def test_samples_are_the_models(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model = random_model()
    expected = Sampler(model, backend="eager", **options)(5, labels=[1, 0, 3, 9, 10], seed=3)
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(model, backend="fused", plan="whole", **options)
    images = sampler(5, labels=[1, 0, 3, 9, 10], seed=3)
    torch.testing.assert_close(images, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))
    assert sampler.explain()["plan"] == "whole"


def test_what_it_does_not_serve_runs_the_default_plan() -> None:
    model = random_model()
    engine = by_whole(model)
    assert (engine.plan_choice(64, 16), engine.plan_choice(65, 16)) == ("whole", "seven")
    assert "plans_not_taken" not in engine.describe(64, 16, 6)
    told = engine.describe(65, 16, 6)
    assert (told["plan"], told["launches_per_evaluation"]) == ("seven", 45)
    assert told["plans_not_taken"] == {
        "whole": "it serves at most 1024 rows (samples x tokens), not 1040"
    }
    for count in (32, 33, 65):  # 33 with guidance are too many
        (x, y), scale = noise_and_labels(count), None if count == 65 else 1.5
        both = y if scale is None else torch.cat([y, torch.full_like(y, 10)])
        with torch.no_grad():
            final = engine.condition(torch.full((1,), 0.3), 2.0) + engine.weights.label_embed(both)
            tables = engine.modulations(final + engine.length_rows(4), final, 4)
            expected = said = model(x, 0.3, 2, y, depth=4)
            if scale is not None:
                null = model(x, 0.3, 2, torch.full_like(y, 10), depth=4)
                expected = null + scale * (said - null)
            found = engine.velocity(x, tables, 4, scale)
        assert relative_error(found, expected) < 5e-6


def setting(network: str = "DiT-B/2", **changes: Any) -> Setting:
    return Setting(PRESETS[network], torch.bfloat16, None, "auto", (9, 0))._replace(**changes)


@pytest.mark.parametrize(
    ("given", "tokens", "reason"),
    [
        (setting(), 256, None),
        (setting(attention="triton", dtype=torch.float32, capability=(8, 6)), 256, None),
        (setting("DiT-XL/2", capability=(12, 0)), 256, None),
        (setting(precision="fp8"), 256, "it has no form for precision 'fp8'"),
        (setting(attention="cudnn"), 256, "its attention is its own, not 'cudnn'"),
        (
            setting("DiT-XL/2", capability=(8, 0)), 256,
            "with 256 tokens of width 1152 in torch.bfloat16 it is for cards of sm_90 and sm_100"
            " alone",
        ),
        (
            setting(dtype=torch.float32, capability=(10, 0)), 17,
            "with 17 tokens of width 768 in torch.float32 it is for cards of sm_80 and sm_90 alone",
        ),
        (setting(dtype=torch.float32, capability=(10, 3)), 16, None),
        (setting(), 1025, "it serves at most 1024 rows (samples x tokens), not 1025"),
    ],
)  # fmt: skip
def test_what_it_serves(given: Setting, tokens: int, reason: str | None) -> None:
    assert PLANS["whole"].refuses(given, 1, tokens) == reason
    assert all(plan.refuses(given, 1, tokens) is None for plan in PLANS.values() if not plan.limits)


def test_what_it_has_no_form_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plan 'whole' cannot run here: it has no form for prec"):
        by_whole(random_model(), precision="fp8")
    with pytest.raises(ValueError, match="its attention is its own, not 'sdpa'"):
        by_whole(random_model(), attention="sdpa")
    with pytest.raises(ValueError, match="head dimensions up to 128"):
        by_whole(random_model(hidden_size=256, num_heads=1))
    odd = random_model()
    odd.blocks[2].mlp_in.bias = nn.Parameter(torch.zeros(129)[1:])
    with pytest.raises(ValueError, match="begin at a multiple of 16 bytes"):
        by_whole(odd)
    run_fused_on_the_cpu(monkeypatch)
    with pytest.raises(ValueError, match="'whole' cannot run here: it has no form for precision"):
        Sampler(random_model(), plan="whole", precision="fp8")


def test_a_trial_draws_no_more_than_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the default plan would be found right in its place."""
    config = random_model().config
    for side, pictures in ((32, 2), (40, 1)):  # patches of 2: 256 and 400 tokens
        large = Way.of(random_model(image_size=side).config, "cpu", torch.float32, plan="whole")
        assert (large.pictures, large.config.grid) == (pictures, (side // 2, side // 2))
    assert Way.of(config, "cpu", torch.float32).pictures == trial.PICTURES == 2
    way = Way.of(config, "cpu", torch.float32, plan="whole", kind="reference")
    ran = []
    runner = trial.Runner(trial.random_model(way), way)
    operator = runner.engine.ops.whole
    runner.engine.ops.whole = lambda *given: (ran.append(len(given[0])), operator(*given))[1]
    monkeypatch.setattr(trial, "Runner", lambda model, way: runner)
    with torch.no_grad():
        found = [*trial.compare(way)]
    assert set(ran) == {2, 4}
    assert all(each["error"] < each["bound"] for each in found if "error" in each)


def test_counters_are_kept_for_graphs_of_every_size() -> None:
    """A graph goes on using those that it was captured with."""
    engine = by_whole(random_model())
    first = engine.kept["whole"].counters(engine)
    used, operator = [], engine.ops.whole
    engine.ops.whole = lambda *given: (used.append(given[-1]), operator(*given))[1]
    with torch.no_grad():
        for count in (1, 64):
            x, y = noise_and_labels(count)
            engine(x, 0.3, 2, y)
    assert [each is first for each in used] == [True, True]
