"""Models that are told their guidance scale: one evaluation is guided, on every backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odelt_fast import OdeltPipeline
from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.config import DiTConfig
from odelt_fast.demo.settings import Dials, check_setting
from odelt_fast.engine.cpu import CpuNetwork
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.serving.service import GenerateRequest, Service
from tests.helpers.engine_cases import random_model, run_fused_on_the_cpu
from tests.helpers.reference_cases import relative_error

LABELS = [3, 1, 10]
TOLD: dict[str, Any] = {"sampling": "mean_flow", "guidance_max": 8.0}


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model(**TOLD)


def noise() -> torch.Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("interval", [None, (0.25, 0.5)])
def test_one_pass_an_evaluation(model: DiT, interval: Any) -> None:
    """Outside the interval the network is told 1; rows with the null label always are."""
    x, y = noise(), torch.tensor(LABELS)
    for i in range(4):
        inside = interval is None or interval[0] <= i / 4 <= interval[1]
        x = x + model(x, i / 4, 2, y, guidance=3.0 if inside else 1.0) / 4
    options: dict[str, Any] = {"steps": 4, "backend": "eager", "guidance_interval": interval}
    sampler = Sampler(model, guidance_scale=3.0, **options)
    found = sampler(noise=noise(), labels=LABELS)
    assert relative_error(found, x) < 1e-6
    assert sampler.stats["evaluations_per_image"] == 4
    assert sampler.explain()["evaluations_per_image"] == 4
    assert sampler.operation.rows_per_image == 1
    plain = Sampler(model, steps=4, backend="eager")(noise=noise(), labels=LABELS)
    assert relative_error(found[:2], plain[:2]) > 1e-3
    assert torch.equal(found[2], plain[2])


def test_special_scales(model: DiT) -> None:
    def drawn(scale: float | None, labels: Any = LABELS) -> torch.Tensor:
        return Sampler(model, steps=2, guidance_scale=scale)(noise=noise(), labels=labels)

    assert torch.equal(drawn(1), drawn(None))
    assert torch.equal(drawn(0), drawn(None, 10))
    for scale in (0.5, -1.0, 8.5):
        with pytest.raises(ValueError, match="told scales from 1 to 8, or 0 for the null"):
            Sampler(model, guidance_scale=scale)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 3, "guidance_interval": (0.3, 1)},
        {"solver": "rk4", "steps": 2, "depth": 4},
        {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2, "guidance_interval": (0.2, 0.7)},
        {"solver": "bosh3", "error_norm": "batch", "guidance_interval": (0.2, 0.7)},
        {"solver": "torchdiffeq:rk4", "steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", [LABELS, 3, 10], ids=str)
def test_fused_samples_are_the_models(
    monkeypatch: pytest.MonkeyPatch, model: DiT, options: dict[str, Any], labels: Any
) -> None:
    eager = Sampler(model, backend="eager", guidance_scale=2.5, **options)
    expected = eager(noise=noise(), labels=labels)
    run_fused_on_the_cpu(monkeypatch)
    fused = Sampler(model, backend="fused", guidance_scale=2.5, **options)
    found = fused(noise=noise(), labels=labels)
    # Where a solver chooses its steps, a velocity that jumps at a time enlarges their rounding.
    bound = 1e-3 if fused.operation.adaptive else 3e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))
    for name in ("evaluations_needed", "evaluations_per_image"):
        assert fused.stats[name] == eager.stats[name], name


@torch.no_grad()
def test_native_operators_are_told_too(native_cache: Path) -> None:
    model = random_model(**TOLD, channels=1)
    x, y = noise()[:, :1], torch.tensor(LABELS)
    for scale in (None, 4.0, torch.tensor([1.0, 3.0, 7.0])):
        expected = model(x, 0.3, 2, y, depth=4, guidance=scale)
        assert relative_error(CpuNetwork(model)(x, 0.3, 2, y, 4, scale), expected) < 1e-5


def test_a_network_that_is_told_nothing_is_as_before(tmp_path: Path) -> None:
    """Old configurations load, and a new embedder says nothing until it has learnt something."""
    plain = random_model(sampling="mean_flow")
    old = {name: value for name, value in plain.config.to_dict().items() if "_max" not in name}
    assert DiTConfig.from_dict(old) == plain.config
    assert not any("guidance" in name for name in plain.state_dict())
    told = DiT(replace(plain.config, guidance_max=4.0))
    new = told.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("guidance_embed.") for name in new.missing_keys)
    x, y = noise(), torch.tensor(LABELS)
    assert torch.equal(told(x, 0.3, 2, y, guidance=4.0), plain(x, 0.3, 2, y))
    save_model(random_model(**TOLD), tmp_path / "told")
    again = load_model(tmp_path / "told")
    assert again.config.guidance_max == 8
    for value in (1, 0.5, "8", 2000):
        with pytest.raises(ValueError, match="guidance_max"):
            DiTConfig(guidance_max=value)
    with pytest.raises(ValueError, match="several classes"):
        DiTConfig(guidance_max=2, num_classes=1)


def test_the_pipeline_tells_it(model: DiT) -> None:
    draw = OdeltPipeline(model)
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    found = draw([3, 7], guidance_scale=3.0, **options).images
    assert torch.equal(found, Sampler(model, steps=2, guidance_scale=3)(2, [3, 7], seed=1))


def test_the_page_offers_the_scales_that_a_model_knows() -> None:
    plain, told = DiTConfig(), DiTConfig(guidance_max=4.0)
    assert check_setting(plain, 1, Dials(12, 0, guidance=0.5)).operation.guidance_scale == 0.5
    for wrong in (0.5, 4.25):
        with pytest.raises(ValueError, match="from 1 to 4 in steps"):
            check_setting(told, 1, Dials(12, 0, guidance=wrong))
    assert check_setting(told, 1, Dials(12, 0, guidance=4.0)).operation.guidance_scale == 4


def test_the_service_counts_one_evaluation_a_step(model: DiT) -> None:
    for network, counted in ((model, 4), (random_model(), 8)):
        wanted = GenerateRequest(steps=4, guidance_scale=2.0)
        key = Service(network)._key(wanted, 1, 0.0)
        assert key.operation.evaluations_per_image == counted


def test_operations_are_equal_whoever_they_are_for(model: DiT) -> None:
    operation = Operation(steps=2, guidance_scale=2.0, depth=4)
    told = operation.for_model(model)
    assert (operation.evaluations_per_image, told.evaluations_per_image) == (4, 2)
    assert told == operation
    assert hash(told) == hash(operation)
    assert repr(told) == repr(operation)
