"""The network is the reference's: every recorded quantity of every recorded model, in float32 and
bfloat16."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.sampling.velocity import VelocityField
from tests.helpers.reference_cases import (
    FOLDER,
    Case,
    depth_of,
    inputs,
    load_case,
    model_cases,
    quantities,
    relative_error,
)
from tests.helpers.small_model import random_model


def masked_activations(model: DiT, case: Case) -> dict[str, Tensor]:
    """The reference's own order of work: every block for every row, group ends masked by (i < l).
    Made of the model's parts."""
    x, t, log2_steps, y = inputs(case)
    lengths = case.tensor("blocks").long()
    config = model.config
    found = {
        "patch_embed": model.patch_embed(x).flatten(2).transpose(1, 2),
        "pos_embed": model.positions[None],
        "time_embed": model.time_embed(t),
        "dt_embed": model.step_embed(
            log2_steps if config.step_conditioned else torch.zeros_like(log2_steps)
        ),
        "label_embed": model.label_embed(y),
        "block_embed": model.length_embed(lengths),
        "conditioning": model.condition(t, log2_steps, y),
    }
    xr = model.embed_patches(x)
    vr = torch.zeros_like(xr)
    condition = found["conditioning"] + found["block_embed"]
    for i, block in enumerate(model.blocks):
        found[f"dit_block_{i}"] = out = block(xr, condition)
        if i % config.depth_group == config.depth_group - 1:
            alive = (i < lengths)[:, None, None].to(out.dtype)
            xr, vr = xr + alive * out, vr + alive * out
        else:
            xr = out
    found["final_layer"] = model.final_layer(vr, found["conditioning"])
    found["velocity"] = model.unpatchify(found["final_layer"], *x.shape[2:])
    return found


def test_recorded_cases_are_there() -> None:
    assert model_cases(), f"no model_*.npz in {FOLDER}"


@pytest.mark.parametrize(("path", "name"), quantities(r"velocity_depth\d+"))
def test_recorded_velocity(path: Path, name: str) -> None:
    case = load_case(path)
    with torch.no_grad():
        velocity = case.model()(*inputs(case), depth=depth_of(name))
    assert relative_error(velocity, case.tensor(name)) < 2e-6


@pytest.mark.parametrize(("path", "name"), quantities("velocity_per_sample_depth"))
def test_recorded_velocity_of_mixed_depths(path: Path, name: str) -> None:
    case = load_case(path)
    with torch.no_grad():
        velocity = case.model()(*inputs(case), depth=case.tensor("blocks"))
    assert relative_error(velocity, case.tensor(name)) < 2e-6


@pytest.mark.parametrize(("path", "name"), quantities(r"activation/\w+"))
def test_recorded_activation(path: Path, name: str) -> None:
    case = load_case(path)
    with torch.no_grad():
        found = masked_activations(case.model(), case)
    assert relative_error(found[name.removeprefix("activation/")], case.tensor(name)) < 2e-6


@pytest.mark.parametrize(("path", "name"), quantities("velocity_per_sample_depth"))
def test_recorded_shrinking_prefixes_equal_masked_blocks(path: Path, name: str) -> None:
    """Rows, sorted and run as shrinking prefixes, give what masked full-depth computation gives:
    values and gradients, in float64."""
    case = load_case(path)
    model = case.model().double()
    case64 = Case(path)
    case64.arrays = {
        key: array.astype("float64") if array.dtype == "float32" else array
        for key, array in case.arrays.items()
    }
    x, t, log2_steps, y = inputs(case64)
    for velocity in (
        model(x, t, log2_steps, y, depth=case.tensor("blocks")),
        masked_activations(model, case64)["velocity"],
    ):
        model.zero_grad()
        velocity.square().sum().backward()
        gradients = {
            key: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for key, p in model.named_parameters()
        }
        if "sorted_gradients" not in locals():
            sorted_velocity, sorted_gradients = velocity.detach(), gradients
    assert relative_error(sorted_velocity, velocity) < 1e-12
    for key, gradient in gradients.items():
        assert relative_error(sorted_gradients[key] + 1, gradient + 1) < 1e-9, key


@pytest.mark.parametrize(("path", "name"), quantities(r"velocity_bf16_depth\d+"))
def test_recorded_bfloat16_error(path: Path, name: str) -> None:
    """Our bfloat16 is as near to the float32 truth as the reference's own bfloat16."""
    case = load_case(path)
    exact = case.tensor(name.replace("_bf16", ""))
    with torch.no_grad():
        velocity = case.model().to(torch.bfloat16)(*inputs(case), depth=depth_of(name))
    assert relative_error(velocity, exact) <= 1.05 * relative_error(case.tensor(name), exact)


@pytest.mark.parametrize(("path", "name"), quantities(r"sample_depth\d+_T\d+_cfg[\d.]+"))
def test_recorded_euler_sample(path: Path, name: str) -> None:
    case = load_case(path)
    steps, scale = re.search(r"_T(\d+)_cfg([\d.]+)", name).groups()
    sampler = Sampler(
        case.model(), depth=depth_of(name), steps=int(steps), guidance_scale=float(scale)
    )
    images = sampler(noise=case.tensor("noise"), labels=case.tensor("y"))
    assert relative_error(images, case.tensor(name)) < 1e-5


def test_residual_wiring_reads_the_tokens_after_l_blocks() -> None:
    """By definition, at one depth and at mixed ones; at full depth with a silent length table it is
    the conventional network."""
    model = random_model(depth=5, depth_min=1, depth_group=2, inner_step="residual")
    x, t, y = torch.randn(5, *model.config.image_shape), torch.rand(5), torch.arange(5)
    lengths = [3, 1, 5, 3, 5]
    with torch.no_grad():
        expected = []
        for row, length in enumerate(lengths):
            condition = model.condition(t[row : row + 1], 3, y[row : row + 1])
            condition = condition + model.length_embed.weight[length]
            tokens = model.embed_patches(x[row : row + 1])
            for block in model.blocks[:length]:
                tokens = block(tokens, condition)
            expected.append(model.unpatchify(model.final_layer(tokens, condition), *x.shape[2:]))
        torch.testing.assert_close(model(x, t, 3, y, depth=lengths), torch.cat(expected))
        for row, length in enumerate(lengths):
            alone = model(x[row : row + 1], t[row : row + 1], 3, y[row : row + 1], depth=length)
            torch.testing.assert_close(alone, expected[row])

        model.length_embed.weight.zero_()
        conventional = DiT(replace(model.config, length_conditioned=False))
        conventional.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(conventional(x, t, 3, y), model(x, t, 3, y))


def test_residual_wiring_runs_every_block_of_a_length() -> None:
    config = DiTConfig(depth=28, depth_min=12, depth_group=8, inner_step="residual")
    assert [config.live_blocks(depth) for depth in config.depths] == [12, 20, 28]
    assert not any(config.ends_group(block) for block in range(28))


def test_time_features_of_other_projects() -> None:
    """In float64: the angles are time_scale t time_period^(-k/128)."""
    model = random_model(time_scale=1000.0, time_period=10000.0 ** (128 / 127))
    embed, t = model.time_embed, torch.tensor([0.0, 0.125, 0.75, 1.0])
    k = torch.arange(128, dtype=torch.float64)
    angles = 1000 * t.double()[:, None] * 10000 ** (-k / 127)
    features = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    with torch.no_grad():
        expected = embed.linear_out(torch.nn.functional.silu(embed.linear_in(features)))
        torch.testing.assert_close(embed(t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_scale": 0.0}, "time_scale must be above 0"),
        ({"time_period": 1.0}, "time_period above 1"),
        ({"guided_channels": 3, "channels": 2}, "from 1 to 2"),
        ({"guided_channels": 0}, "guided_channels must be a whole number"),
        ({"inner_step": "parallel"}, "unit, inverse_depth, residual"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)  # type: ignore[arg-type]


def test_guidance_of_the_first_channels() -> None:
    model = random_model(channels=4, guided_channels=3)
    x, y = torch.randn(3, *model.config.image_shape), torch.tensor([1, 2, 3])
    field = VelocityField(model, Operation(guidance_scale=1.5), y)
    with torch.no_grad():
        label, null = (model(x, 0.25, 7, rows) for rows in (y, torch.full_like(y, 10)))
        velocity = field(0.25, x, 7)
    torch.testing.assert_close(velocity[:, :3], (null + 1.5 * (label - null))[:, :3])
    torch.testing.assert_close(velocity[:, 3], label[:, 3])
