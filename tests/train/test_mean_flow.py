"""Mean-velocity objectives: targets against independent computations, closed forms, whole runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.operation import step_index
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import Trainer, row_losses, weighted
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.objectives.length_consistency import LengthConsistency
from odelt_fast.train.objectives.mean_flow import AlphaFlow, MeanFlow, MeanVelocity
from odelt_fast.train.objectives.targets import Networks, StepBatch, Targets
from tests.helpers.reference_cases import relative_error
from tests.helpers.small_model import random_model
from tests.helpers.training import small_run
from tests.train.test_objectives import BATCH, CLASSES, batch_of

ROWS = 16
KINDS: dict[str, dict[str, Any]] = {
    "mean-flow": {"derivative": "jvp"},
    "mean-flow-data": {"derivative": "jvp", "tangent": "data"},
    "alpha-flow": {},
}


def objective_of(kind: str, scale: float | None = None, **options: Any) -> MeanVelocity:
    chosen = MeanVelocityOptions(**{**KINDS[kind], **options})
    common: dict[str, Any] = {
        "num_classes": CLASSES, "time_rows": ROWS, "guidance_scale": scale, "options": chosen,
    }  # fmt: skip
    if kind == "alpha-flow":
        return AlphaFlow(total_steps=12, **common)
    return MeanFlow(**common)


def network(dtype: torch.dtype = torch.float64) -> DiT:
    model = random_model(
        image_size=4, channels=2, num_classes=CLASSES, depth=6, depth_min=2, depth_group=2
    )
    return model.to(dtype)


def double(batch: StepBatch) -> StepBatch:
    return replace(batch, images=batch.images.double())


def u(model: DiT, x: Tensor, t: Tensor, s: Tensor, y: Tensor, depth: Any) -> Tensor:
    """The mean velocity that the network stands for, written anew."""
    k = torch.minimum(torch.log2(1 / (s - t).clamp(min=1e-9)), torch.tensor(7.0).double())
    return model(x, t, k, y, depth=depth)


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_automatic_differentiation(kind: str, scale: float | None) -> None:
    """At the depth of each row, with and without guidance: reverse mode twice, in float64."""
    model, batch = network(), double(batch_of(4))
    objective = objective_of(kind, scale)
    wrapped = LengthConsistency(objective, (2, 4, 6), 0, "student")
    targets = wrapped(Networks(live=model, ema=model), batch)
    assert targets.depth is not None
    depth, n = targets.depth, ROWS
    t, s = objective.drawn_pairs(batch)
    torch.testing.assert_close(targets.t[:n], t)
    assert bool((s > t).all())
    assert not targets.velocity.requires_grad
    x, y, noise = targets.x_t, targets.y, batch.noise().double()
    v = batch.images - noise
    if scale is not None:
        with torch.no_grad():
            null = model(x, targets.t, 7.0, torch.full_like(y, CLASSES), depth=depth)
        guided = null + scale * (v - null)
        v = torch.where((y == CLASSES)[:, None, None, None], v, guided)
    torch.testing.assert_close(targets.velocity[n:], v[n:], rtol=1e-5, atol=1e-5)
    x, y, v, depth = x[:n], y[:n], v[:n], depth[:n]
    d = (s - t)[:, None, None, None].double()
    if kind == "alpha-flow":
        alpha = objective.alpha(batch.step)  # type: ignore[attr-defined]
        assert 0.05 < alpha < 1
        with torch.no_grad():
            later = u(model, x + alpha * d * v, t + alpha * (s - t), s, y, depth)
        expected = alpha * v + (1 - alpha) * later
        assert targets.weight is not None
        assert targets.weight.tolist() == pytest.approx([1 / alpha] * n + [1.0] * (BATCH - n))
    else:
        tangent = v
        if kind == "mean-flow":
            with torch.no_grad():
                tangent = model(x, t, 7.0, y, depth=depth)
        with sdpa_kernel(SDPBackend.MATH):
            _, derivative = torch.autograd.functional.jvp(
                lambda x, t: u(model, x, t, s.double(), y, depth),
                (x, t.double()),
                (tangent, torch.ones_like(t.double())),
            )
        expected = v + d * derivative
    assert relative_error(targets.velocity[:n], expected) < 1e-6


def test_the_difference_is_near_the_derivative() -> None:
    model, batch = network(torch.float32), batch_of(4)
    exact, near = (
        objective_of("mean-flow", derivative=how)(Networks(model, model), batch).velocity[:ROWS]
        for how in ("jvp", "difference")
    )
    assert relative_error(near, exact) < 5e-3
    assert not torch.equal(near, exact)


class Gaussians:
    """Noise N(0, 1), data N(m, c^2), independent: velocity and mean velocity in closed form, as a
    network that is told -log2 d. It keeps its inputs' gradients, as the live network does."""

    m, c = 0.7, 0.4

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x_t."""
        t = t[:, None, None, None]
        return t * self.m, ((1 - t) ** 2 + (t * self.c) ** 2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        mean, std = self.at(t)
        column = t[:, None, None, None]
        slope = (column * (1 + self.c**2) - 1) / std**2  # std'/std
        return self.m + slope * (x - mean)

    def __call__(self, x: Tensor, t: Tensor, k: Tensor, y: Tensor, depth: Any = None) -> Tensor:
        d = torch.exp2(-k)
        instant = self.velocity(x, t)
        (mean, std), (mean_s, std_s) = self.at(t), self.at(t + d)
        leap = (mean_s + std_s / std * (x - mean) - x) / d[:, None, None, None]
        return torch.where((k == 7)[:, None, None, None], instant, leap)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_in_closed_form_is_a_fixed_point(kind: str) -> None:
    """The expected target is u itself; of alpha-flow up to alpha, which divides its errors."""
    oracle, generator = Gaussians(), torch.Generator().manual_seed(0)
    t = 0.9 * torch.rand(ROWS, generator=generator).double()
    s = t + (1 - t) * (0.05 + 0.95 * torch.rand(ROWS, generator=generator).double())
    x = torch.randn(ROWS, 1, 2, 2, generator=generator).double()
    pairs = Targets(x, t, torch.zeros(ROWS), torch.zeros(ROWS), oracle.velocity(x, t))
    batch = replace(batch_of(), step=12)  # after alpha's fall
    exact = oracle(x, t, -torch.log2(s - t), pairs.y)
    if kind != "alpha-flow":
        found = objective_of(kind).taught(oracle, pairs, s, None, batch)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        return
    errors = [
        relative_error(
            objective_of(kind, alpha_min=alpha).taught(oracle, pairs, s, None, batch), exact
        )
        for alpha in (0.01, 0.001)
    ]
    assert errors[1] < 1e-3
    assert errors[0] == pytest.approx(100 * errors[1], rel=0.1)  # the equation holds to alpha^2


def test_pairs_lie_where_they_are_wanted() -> None:
    many = replace(batch_of(), images=torch.zeros(BATCH, 2, 4, 4))
    for share in (0.0, 1.0):
        t, s = objective_of("mean-flow", grid_share=share).drawn_pairs(many)
        power = -torch.log2(s - t)
        on_grid = (power == power.round()) & (t * 2**power == (t * 2**power).round())
        assert on_grid.float().mean() == share
        assert bool(((t >= 0) & (s <= 1) & (s > t)).all())
    wide, normal = (
        objective_of("mean-flow", grid_share=0.0, times=times).drawn_pairs(many)[0]
        for times in ("uniform", "logit-normal")
    )
    assert not torch.equal(wide, normal)


def test_alpha_falls() -> None:
    objective = AlphaFlow(
        CLASSES, time_rows=8, total_steps=100, options=MeanVelocityOptions(alpha_fall=(0.2, 0.6))
    )
    values = [objective.alpha(step) for step in range(101)]
    assert values[0] == values[20] == 1
    assert values[40] == pytest.approx(0.5)
    assert values[60] == values[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(values))


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


RUN = {"length_consistency_every": 8, "train_batch_size": 16, "checkpointing_steps": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "mean-flow", "target_network": "live", "loss_weight_power": 1.0},
        {"objective": "alpha-flow", "target_network": "fast-ema", "guidance_scale": 1.5},
        {"objective": "shortcut", "target_network": "fast-ema", "time_consistency_every": 4},
    ],
    ids=lambda options: f"{options['objective']}-{options['target_network']}",
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


def test_values_that_cannot_be() -> None:
    for options in ({"time_share": 1.5}, {"alpha_fall": (0.5, 0.5)}, {"difference_step": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MeanVelocityOptions(**options)  # type: ignore[arg-type]
    assert DiTConfig(sampling="mean_flow").sampling == "mean_flow"
