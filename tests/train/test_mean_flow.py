"""Mean-velocity objectives: targets against independent computations, closed forms, whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.operation import step_index
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.effects import check_effects
from odelt_fast.train.loop import Trainer, row_losses, weighted
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.objectives.targets import Networks, StepBatch, Targets
from odelt_fast.train.objectives.teacher import start_from
from odelt_fast.train.recipes import RECIPES
from tests.helpers.small_model import random_model
from tests.helpers.training import SMALL, small_run


def test_adaptive_weights_carry_no_gradient() -> None:
    """p = 1 is MeanFlow's loss: each row's sum of squares over itself plus eps."""
    config = TrainConfig(loss_weight_power=1.0, loss_weight_eps=0.01)
    velocity = torch.randn(4, 2, 2, 2)
    guess = torch.zeros_like(velocity, requires_grad=True)
    targets = Targets(velocity, torch.zeros(4), torch.zeros(4), torch.zeros(4), velocity)
    errors = row_losses(lambda *_, **__: guess, targets)
    losses = weighted(errors, targets, config)
    squares = velocity.square().sum((1, 2, 3))
    torch.testing.assert_close(losses, squares / (squares + 0.01))
    losses.sum().backward()
    expected = -2 * velocity / (squares + 0.01)[:, None, None, None]
    torch.testing.assert_close(guess.grad, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 128, 500])
def test_any_number_of_steps_is_told(steps: int) -> None:
    assert step_index("mean_flow", steps) == pytest.approx(min(math.log2(steps), 7))
    assert step_index("mean_flow", steps, jumps=False) == 7
    model = random_model(sampling="mean_flow")
    assert Sampler(model, steps=min(steps, 10))(2).isfinite().all()


TOLD = replace(SMALL, guidance_max=4.0)
RUN = {"length_consistency_every": 8, "train_batch_size": 16, "checkpointing_steps": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "mean-flow", "target_network": "live", "loss_weight_power": 1.0},
        {
            "objective": "mean-flow",
            "loss_weight_power": 0.5,
            "mean_velocity": MeanVelocityOptions(
                tangent="data", derivative="jvp", times="logit-normal", grid_share=0.2
            ),
        },
        {"objective": "alpha-flow", "target_network": "fast-ema", "guidance_scale": 1.5},
        {
            "objective": "alpha-flow",
            "target_network": "live",
            "model": TOLD,
        },
        {"objective": "shortcut", "target_network": "fast-ema", "time_consistency_every": 4},
    ],
    ids=lambda options: f"{options['objective']}-{options.get('target_network', 'ema')}",
)
def test_a_run_resumes_bit_by_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole", steps=4, **RUN, **options)
    trainer = Trainer(whole)
    losses = [trainer.step() for _ in range(4)]
    first = Trainer(replace(whole, output_dir=tmp_path / "parts"))
    for _ in range(2):
        first.step()
    folder = first.save()
    second = Trainer(replace(whole, output_dir=tmp_path / "parts"))
    assert second.resume(str(folder))
    assert all(torch.equal(second.step(), losses[step]) for step in (2, 3))
    for name, weight in trainer.weights.items():
        assert torch.equal(weight, second.weights[name]), name
    config = trainer.model.config
    assert config.sampling == ("shortcut" if options["objective"] == "shortcut" else "mean_flow")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "flow", "target_network": "live"}, "target_network live is for shortcut"),
        ({"objective": "mean-flow", "fast_ema_decay": 0.9}, "goes with --target-network"),
        ({"objective": "mean-flow", "compat": "reference"}, "no objective mean-flow"),
        (
            {"objective": "shortcut", "mean_velocity": MeanVelocityOptions(grid_share=0.1)},
            "mean_velocity.grid_share has no effect",
        ),
        (
            {"objective": "mean-flow", "mean_velocity": MeanVelocityOptions(alpha_min=0.1)},
            "mean_velocity.alpha_min has no effect",
        ),
        (
            {"objective": "alpha-flow", "mean_velocity": MeanVelocityOptions(cfg_beta=2.0)},
            "mean_velocity.cfg_beta has no effect with model.guidance_max unset",
        ),
        ({"objective": "shortcut", "model": TOLD}, "tells the network no guidance scale"),
        (
            {"objective": "mean-flow", "model": TOLD, "guidance_scale": 1.5},
            "the network is told scales from 1 to 4",
        ),
        (
            {"objective": "mean-flow", "model": TOLD, "label_dropout": 0.0},
            "needs the null label",
        ),
        (
            {"objective": "alpha-flow", "mean_velocity": MeanVelocityOptions(tangent="data")},
            "mean_velocity.tangent has no effect",
        ),
        (
            {
                "objective": "mean-flow",
                "compile": True,
                "mean_velocity": MeanVelocityOptions(derivative="jvp"),
            },
            "no forward-mode derivative",
        ),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(("name", "depths"), [("b", (4, 8, 12)), ("xl", (12, 20, 28))])
def test_recipes_are_the_papers(name: str, depths: tuple[int, ...]) -> None:
    recipe = RECIPES[f"imagenet256-{name}-meanflow"]
    assert recipe.model.depths == depths
    assert recipe.model_config().sampling == "mean_flow"
    assert recipe.row_sizes() == {"time": 128, "flow": 96, "length": 32}  # half at d = 0
    assert (recipe.weight_power, recipe.loss_weight_eps) == (1, 0.01)
    assert recipe.model.guidance_max == 8
    # 240 epochs of ImageNet's 1 281 167 images
    assert recipe.steps * recipe.train_batch_size == pytest.approx(240 * 1_281_167, rel=1e-3)
    check_effects(replace(recipe, seed=1), recipe)


def test_values_that_cannot_be() -> None:
    for options in ({"time_share": 1.5}, {"alpha_fall": (0.5, 0.5)}, {"difference_step": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MeanVelocityOptions(**options)  # type: ignore[arg-type]
    assert DiTConfig(sampling="mean_flow").sampling == "mean_flow"


def test_a_network_that_is_told_scales_starts_as_what_it_was() -> None:
    plain = random_model(sampling="mean_flow")
    told = DiT(replace(plain.config, guidance_max=4.0))
    start_from(told, plain)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 10])
    assert torch.equal(told(x, 0.5, 1.5, y, guidance=3.0), plain(x, 0.5, 1.5, y))
    with pytest.raises(ValueError, match=r"set --model\.guidance-max 4"):
        start_from(plain, told)


@pytest.mark.parametrize("name", [None, "ema", "live", "fast-ema"])
def test_the_chosen_network_makes_a_runs_targets(name: str | None, tmp_path: Path) -> None:
    trainer = Trainer(small_run(tmp_path, objective="mean-flow", target_network=name, **RUN))
    objective, seen = trainer.objective, list[Any]()

    def watched(networks: Networks, batch: StepBatch) -> Targets:
        seen.append(networks.target)
        return objective(networks, batch)

    trainer.objective = watched
    trainer.step()
    networks = {"ema": trainer.ema, None: trainer.model, "live": trainer.model}
    networks["fast-ema"] = trainer.fast
    assert [id(each) for each in seen] == [id(networks[name])]


def test_the_fast_average_keeps_its_share(tmp_path: Path) -> None:
    """Of itself (1 + n)/(10 + n) at step n, at most fast_ema_decay."""
    options = {"objective": "mean-flow", "target_network": "fast-ema", "fast_ema_decay": 0.2}
    trainer = Trainer(small_run(tmp_path, **RUN, **options))
    assert trainer.fast is not None
    average = trainer.weights["patch_embed.weight"].detach().clone()
    for keep in (1 / 10, 2 / 11, 0.2):
        trainer.step()
        average = keep * average + (1 - keep) * trainer.weights["patch_embed.weight"].detach()
        torch.testing.assert_close(trainer.fast.patch_embed.weight, average)
