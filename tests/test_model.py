"""The network is the reference's: every recorded quantity of every recorded model, in float32 and
bfloat16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast.model import DiT
from odelt_fast.sampling.sampler import Sampler
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
