"""Targets of the mean-velocity objectives: independent computations, closed forms, pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import row_losses, weighted
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.objectives.length_consistency import LengthConsistency
from odelt_fast.train.objectives.mean_flow import AlphaFlow, MeanFlow, MeanVelocity
from odelt_fast.train.objectives.shortcut import Shortcut
from odelt_fast.train.objectives.targets import (
    Networks,
    StepBatch,
    Targets,
    guided,
    two_half_steps,
)
from tests.helpers.reference_cases import relative_error
from tests.helpers.small_model import random_model
from tests.train.test_objectives import BATCH, CLASSES, batch_of

ROWS = 16
KINDS: dict[str, dict[str, Any]] = {
    "mean-flow": {"derivative": "jvp"},
    "mean-flow-data": {"derivative": "jvp", "tangent": "data"},
    "mean-flow-difference": {"derivative": "difference", "difference_step": 1e-4},
    "alpha-flow": {},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def objective_of(kind: str, scale: float | None = None, **options: Any) -> MeanVelocity:
    chosen = MeanVelocityOptions(**{**KINDS[kind], **options})
    common: dict[str, Any] = {
        "num_classes": CLASSES, "time_rows": ROWS, "guidance_scale": scale, "options": chosen,
    }  # fmt: skip
    if kind == "alpha-flow":
        return AlphaFlow(total_steps=12, **common)
    return MeanFlow(**common)


def network(dtype: torch.dtype = torch.float64, seed: int = 1) -> DiT:
    model = random_model(
        image_size=4, channels=2, num_classes=CLASSES, depth=6, depth_min=2, depth_group=2
    )
    for weight in model.parameters():
        weight.data *= 1 + 0.1 * seed
    return model.to(dtype)


class Smooth:
    """A network of two layers in float64 that sees the time in float64, as a DiT does not."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = 2 * 4 * 4 + 4
        first = torch.randn(inputs, 48, generator=generator) / inputs**0.5
        second = torch.randn(48, 2 * 4 * 4, generator=generator) / 48**0.5
        self.first, self.second = first.double(), second.double()

    def __call__(self, x: Tensor, t: Tensor, k: Tensor, y: Tensor, depth: Any = None) -> Tensor:
        length = torch.tensor([8] * len(x) if depth is None else depth)
        told = torch.stack([2 * t, k / 3, y / 2, length / 8], dim=1)
        hidden = torch.cat([x.flatten(1), told.double()], dim=1) @ self.first
        return (torch.tanh(hidden) @ self.second).view_as(x)


def double(batch: StepBatch) -> StepBatch:
    return replace(batch, images=batch.images.double())


def u(model: Any, x: Tensor, t: Tensor, s: Tensor, y: Tensor, depth: Any) -> Tensor:
    """The mean velocity that the network stands for, written anew."""
    k = torch.minimum(torch.log2(1 / (s - t).clamp(min=1e-9)), torch.tensor(7.0).double())
    return model(x, t, k, y, depth=depth)


def mean_velocity(
    model: Any, kind: str, v: Tensor, x: Tensor, t: Tensor, s: Tensor, y: Tensor, depth: Any
) -> Tensor:
    """v + d du/dt along the kind's tangent, by reverse mode twice."""
    tangent = v
    if kind != "mean-flow-data":
        with torch.no_grad():
            tangent = model(x, t, torch.full_like(t, 7.0), y, depth=depth)
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.autograd.functional.jvp(
            lambda x, t: u(model, x, t, s.double(), y, depth),
            (x, t.double()),
            (tangent, torch.ones_like(t.double())),
        )
    return v + (s - t)[:, None, None, None].double() * derivative


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
@every_kind
def test_targets_are_those_of_automatic_differentiation(
    kind: str, times: Any, scale: float | None
) -> None:
    """At the depth of each row, with and without guidance, in float64."""
    model, batch = network(), double(batch_of(4))
    objective = objective_of(kind, scale, times=times)
    wrapped = LengthConsistency(objective, (2, 4, 6), 0, "student")
    targets = wrapped(Networks(live=model, ema=model), batch)
    assert targets.depth is not None
    depth, n = targets.depth, ROWS
    t, s = objective.drawn_pairs(batch)
    torch.testing.assert_close(targets.t[:n], t)
    torch.testing.assert_close(targets.log2_steps[:n], -torch.log2((s - t).clamp(min=1 / 128)))
    assert bool((targets.log2_steps[n:] == 7).all())
    assert bool((s > t).all())
    assert not targets.velocity.requires_grad
    x, y, noise = targets.x_t, targets.y, batch.noise().double()
    v = batch.images - noise
    if scale is not None:
        with torch.no_grad():
            null = model(x, targets.t, 7.0, torch.full_like(y, CLASSES), depth=depth)
        guided = null + scale * (v - null)
        v = torch.where((y == CLASSES)[:, None, None, None], v, guided)
    assert relative_error(targets.velocity[n:], v[n:]) < 1e-6
    x, y, v, depth = x[:n], y[:n], v[:n], depth[:n]
    d = (s - t)[:, None, None, None].double()
    if kind == "alpha-flow":
        alpha = objective.alpha(batch.step)  # type: ignore[attr-defined]
        assert 0.05 < alpha < 1
        with torch.no_grad():
            later = u(model, x + alpha * d * v, t + alpha * (s - t), s, y, depth)
        expected = alpha * v + (1 - alpha) * later
    else:
        expected = mean_velocity(model, kind, v, x, t, s, y, depth)
    # A DiT sees times in float32: too coarse for a difference, which the next test is of.
    bound = 2e-2 if kind == "mean-flow-difference" else 1e-6
    assert relative_error(targets.velocity[:n], expected) < bound


@every_kind
def test_targets_of_a_network_that_is_told_its_guidance_scale(kind: str) -> None:
    """Improved MeanFlow's: v + (1 - 1/w)(u(label, w) - u(null)), w of each row; the length rows'
    teacher is told the same."""
    plain = network()
    model = DiT(replace(plain.config, guidance_max=6.0)).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    for weight in model.guidance_embed.parameters():
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    batch = double(batch_of(4))
    objective = replace(objective_of(kind), guidance_max=6.0)
    networks = Networks(live=refused, ema=refused, chosen=model)
    targets = LengthConsistency(objective, (2, 4, 6), 4, "student")(networks, batch)
    w, depth, x, t, y = targets.guidance, targets.depth, targets.x_t, targets.t, targets.y
    assert w is not None
    assert depth is not None
    assert bool(((w >= 1) & (w <= 6)).all())
    null = torch.full_like(y, CLASSES)
    with torch.no_grad():
        own, without = (model(x, t, 7.0, label, depth=depth, guidance=w) for label in (y, null))
    # The null label's row is the same whatever it is told.
    assert torch.equal(without, model(x, t, 7.0, null, depth=depth).detach())
    v = batch.images - batch.noise().double()
    v = v + (1 - 1 / w.double())[:, None, None, None] * (own - without)
    n, last = ROWS, slice(BATCH - 4, BATCH)
    assert relative_error(targets.velocity[n:-4], v[n:-4]) < 1e-6
    other = [(2, 4, 6)[i] for i in batch.draws.integers("teacher_depth", last, 3).tolist()]
    taught = model(x[last], t[last], 7.0, y[last], depth=other, guidance=w[last])
    assert relative_error(targets.velocity[last], taught.detach()) < 1e-6

    def told(x: Tensor, t: Tensor, k: Tensor, y: Tensor, depth: Any) -> Tensor:
        return model(x, t, k, y, depth=depth, guidance=w[:n])

    _, s = objective.drawn_pairs(batch)
    x, t, y, v, depth = x[:n], t[:n], y[:n], v[:n], depth[:n]
    if kind == "alpha-flow":
        alpha = objective.alpha(batch.step)  # type: ignore[attr-defined]
        leap = (s - t)[:, None, None, None].double() * alpha
        with torch.no_grad():
            later = u(told, x + leap * v, t + alpha * (s - t), s, y, depth)
        expected = alpha * v + (1 - alpha) * later
    else:
        expected = mean_velocity(told, kind, v, x, t, s, y, depth)
    bound = 2e-2 if kind == "mean-flow-difference" else 1e-6
    assert relative_error(targets.velocity[:n], expected) < bound


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_told_scales_have_their_density(beta: float) -> None:
    """w^-beta between 1 and the largest: P(w < 2) by its integral."""
    objective = replace(objective_of("alpha-flow", cfg_beta=beta), guidance_max=8.0)
    drawn = [objective.drawn_guidance(batch_of(step)) for step in range(200)]
    scales = torch.cat([each for each in drawn if each is not None])
    assert len(scales) == 200 * BATCH
    assert 1 <= scales.min() < 1.05
    assert scales.max() <= 8

    def integral(largest: float) -> float:
        return math.log(largest) if beta == 1 else (largest ** (1 - beta) - 1) / (1 - beta)

    share = (scales < 2).float().mean().item()
    assert share == pytest.approx(integral(2) / integral(8), abs=0.02)


@every_kind
def test_targets_at_real_times(kind: str) -> None:
    """The same where times are float64, so that a small difference is a derivative."""
    model, batch = Smooth(), double(batch_of(4))
    generator = torch.Generator().manual_seed(2)
    first, last = torch.rand(2, ROWS, generator=generator).double().sort(dim=0).values
    x, v = batch.images[:ROWS], batch.noise().double()[:ROWS]
    y, depth = batch.labels[:ROWS], [2, 4, 6, 8] * (ROWS // 4)
    pairs = Targets(x, first, torch.zeros(ROWS), y, v)
    objective = objective_of(kind)
    found = objective.taught(model, pairs, last, depth, batch)
    if kind == "alpha-flow":
        leap = objective.alpha(batch.step) * (last - first)  # type: ignore[attr-defined]
        column = leap[:, None, None, None]
        share = (leap / (last - first))[:, None, None, None]
        later = u(model, x + column * v, first + leap, last, y, depth)
        expected = share * v + (1 - share) * later
    else:
        expected = mean_velocity(model, kind, v, x, first, last, y, depth)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("scale", [None, 2.5])
def test_shortcut_targets_are_two_half_steps(scale: float | None) -> None:
    """At the depth of each row, by the network that was chosen; the second half guided."""
    model, batch = network(), double(batch_of(4))
    objective = Shortcut(CLASSES, time_rows=ROWS, guidance_scale=scale)
    wrapped = LengthConsistency(objective, (2, 4, 6), 0, "student")
    targets = wrapped(Networks(live=network(seed=2), ema=network(seed=3), chosen=model), batch)
    assert targets.depth is not None
    assert not targets.velocity.requires_grad
    n, depth = ROWS, targets.depth[:ROWS]
    x, t, y, k = (each[:n] for each in (targets.x_t, targets.t, targets.y, targets.log2_steps))
    half = 0.5 ** (k + 1).double()
    column = half[:, None, None, None]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        label = model(x, t, k + 1, y, depth=depth)
        if scale is None:
            return label
        null = model(x, t, k + 1, torch.full_like(y, CLASSES), depth=depth)
        is_guided = (torch.arange(n) >= n // 2)[:, None, None, None]
        return torch.where(is_guided, null + scale * (label - null), label)

    with torch.no_grad():
        first = velocity(x, t)
        expected = (first + velocity(x + column * first, t + half)) / 2
    assert relative_error(targets.velocity[:n], expected) < 1e-6


class Watched:
    """A network that tells whether it is called as teachers are."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        assert not torch.is_grad_enabled()
        out: Tensor = self.model(*arguments, **options)
        assert out.grad_fn is None
        assert not out.requires_grad
        return out


def refused(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("another network makes the targets")


def saved(_: Tensor) -> None:
    raise AssertionError("a graph is built")


@pytest.mark.parametrize("kind", [*KINDS, "shortcut"])
@pytest.mark.parametrize("chosen", ["ema", "live", "fast-ema"])
def test_targets_are_the_chosen_network_s_and_build_no_graph(kind: str, chosen: str) -> None:
    """Forward mode too: a graph would hold every activation of the teacher, and let gradients flow
    through targets."""
    model = network(torch.float32)
    watched, n = Watched(model), ROWS
    objective: Any = Shortcut(CLASSES, time_rows=n, guidance_scale=1.5)
    if kind != "shortcut":
        objective = objective_of(kind, 1.5)
    networks = Networks(live=refused, ema=refused, chosen=watched)
    if chosen == "ema":
        networks = Networks(live=refused, ema=watched)
    with torch.autograd.graph.saved_tensors_hooks(saved, saved):
        targets = LengthConsistency(objective, (2, 4, 6), 4, "student")(networks, batch_of(4))
    assert watched.calls > 1
    assert not any(
        value.requires_grad for value in vars(targets).values() if isinstance(value, Tensor)
    )
    row_losses(model, targets).mean().backward()  # the live network is its own teacher
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    again = {name: value.clone() for name, value in vars(targets).items() if name == "velocity"}
    row_losses(model, replace(targets, **again)).mean().backward()
    for before, weight in zip(gradients, model.parameters(), strict=True):
        assert before is None or torch.equal(before, weight.grad)


class Gaussians:
    """Noise N(0, 1), data N(m, c^2), independent: velocity and mean velocity in closed form, as a
    network that is told -log2 d. Every label has its own m; the null label another.

    Guidance moves m alone: with scale w it is the flow to m_null + w (m - m_null). w is `scale`, or
    what the network is told.
    """

    c = 0.4

    def __init__(self, scale: float | None = None) -> None:
        self.scale = 1.0 if scale is None else scale

    def mean_of(self, y: Tensor, scale: Any) -> Tensor:
        """Mean of the data (B, 1, 1, 1)."""
        null, label = -0.2, 0.7 - 0.1 * y
        mean = torch.where(y == CLASSES, null, null + scale * (label - null))
        return mean[:, None, None, None].double()

    def velocity(self, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        t = t[:, None, None, None]
        slope = (t * (1 + self.c**2) - 1) / ((1 - t) ** 2 + (t * self.c) ** 2)  # std'/std
        return m + slope * (x - t * m)

    def __call__(
        self, x: Tensor, t: Tensor, k: Tensor, y: Tensor, depth: Any = None, guidance: Any = None
    ) -> Tensor:
        m, d = self.mean_of(y, self.scale if guidance is None else guidance), torch.exp2(-k)
        instant = self.velocity(x, t, m)
        t, d = t[:, None, None, None], d[:, None, None, None]
        std, later = (((1 - s) ** 2 + (s * self.c) ** 2).sqrt() for s in (t, t + d))
        leap = ((t + d) * m + later / std * (x - t * m) - x) / d
        return torch.where((k == 7)[:, None, None, None], instant, leap)


@pytest.mark.parametrize("scale", [None, 2.5, "told"])
@every_kind
def test_a_flow_in_closed_form_is_a_fixed_point(kind: str, scale: Any) -> None:
    """The expected target is u itself; of alpha-flow up to alpha, which divides its errors. Scales
    that the network is told differ from row to row."""
    generator, told = torch.Generator().manual_seed(0), None
    if scale == "told":
        scale, told = None, 1 + 3 * torch.rand(ROWS, generator=generator).double()
    oracle = Gaussians(scale)
    t = 0.9 * torch.rand(ROWS, generator=generator).double()
    s = t + (1 - t) * (0.05 + 0.95 * torch.rand(ROWS, generator=generator).double())
    x = torch.randn(ROWS, 1, 2, 2, generator=generator).double()
    y = torch.arange(ROWS) % (CLASSES + 1)
    # The conditional velocity, of which what is drawn, data less noise, is the mean.
    rows = Targets(x, t, torch.zeros(ROWS), y, oracle.velocity(x, t, oracle.mean_of(y, 1.0)))
    batch = replace(batch_of(), step=12)  # after alpha's fall
    exact = oracle(x, t, -torch.log2(s - t), y, guidance=told)
    rows = replace(rows, guidance=told)

    def taught(**options: Any) -> Tensor:
        objective = objective_of(kind, scale, **options)
        pairs = rows
        if scale is not None or told is not None:
            pairs = replace(rows, velocity=objective.guided_velocity(oracle, rows, None))
        return objective.taught(oracle, pairs, s, None, batch)

    if kind != "alpha-flow":
        torch.testing.assert_close(taught(), exact, rtol=1e-6, atol=1e-6)
        return
    errors = [relative_error(taught(alpha_min=alpha), exact) for alpha in (0.01, 0.001)]
    assert errors[1] < 1e-3
    assert errors[0] == pytest.approx(100 * errors[1], rel=0.1)  # the equation holds to alpha^2


@pytest.mark.parametrize("scale", [None, 2.5])
def test_a_flow_in_closed_form_is_a_fixed_point_of_shortcuts(scale: float | None) -> None:
    """One step ends where two of half its length do. Guidance acts on every step size: the mean of
    two guided mean velocities is the guided mean velocity where the flow is affine with one slope,
    as here."""
    oracle, k = Gaussians(), torch.arange(ROWS) % 6
    t = torch.zeros(ROWS).double()
    x = torch.randn(ROWS, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(ROWS) % CLASSES
    teacher = guided(oracle, scale, CLASSES)
    found = two_half_steps(teacher, x, t, (k + 1).double(), y, None)
    torch.testing.assert_close(found, Gaussians(scale)(x, t, k.double(), y), rtol=1e-6, atol=1e-6)


def test_pairs_lie_where_they_are_wanted() -> None:
    many = replace(batch_of(), images=torch.zeros(BATCH, 2, 4, 4))
    for share in (0.0, 1.0):
        t, s = objective_of("mean-flow", grid_share=share).drawn_pairs(many)
        power = -torch.log2(s - t)
        on_grid = (power == power.round()) & (t * 2**power == (t * 2**power).round())
        assert on_grid.float().mean() == share
        assert bool(((t >= 0) & (s <= 1) & (s > t)).all())


def test_logit_normal_times_have_the_mean_and_deviation_of_the_papers() -> None:
    """MeanFlow's logits have mean -0.4 where time runs from data to noise, ours the other way."""
    objective = replace(
        objective_of("mean-flow", grid_share=0.0, times="logit-normal"), time_rows=BATCH
    )
    pairs = [objective.drawn_pairs(batch_of(step)) for step in range(200)]
    logits = torch.logit(torch.stack([torch.stack(pair) for pair in pairs]).double())
    assert logits.mean().item() == pytest.approx(0.4, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_alpha_falls() -> None:
    objective = AlphaFlow(
        CLASSES, time_rows=8, total_steps=100, options=MeanVelocityOptions(alpha_fall=(0.2, 0.6))
    )
    values = [objective.alpha(step) for step in range(101)]
    assert values[0] == values[20] == 1
    assert values[40] == pytest.approx(0.5)
    assert values[60] == values[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_gradients_of_alpha_flow_become_those_of_mean_flow(power: float) -> None:
    """As alpha falls, at any power of the adaptive weight: 1/alpha without it, alpha with p = 1."""
    model, batch = Smooth(), replace(double(batch_of(4)), step=12)
    generator = torch.Generator().manual_seed(2)
    t, s = torch.rand(2, ROWS, generator=generator).double().sort(dim=0).values
    x, v = batch.images[:ROWS], batch.noise().double()[:ROWS]
    y = batch.labels[:ROWS]
    pairs = Targets(x, t, -torch.log2(s - t), y, v)
    config = TrainConfig(loss_weight_power=power, loss_weight_eps=1e-12)
    alpha = 1e-4
    flow = replace(objective_of("alpha-flow", alpha_min=alpha), weight_power=power)
    gradients = []
    for objective in (flow, objective_of("mean-flow-data")):
        velocity = objective.taught(model, pairs, s, None, batch)
        weight = objective.weights(batch, ROWS)
        targets = replace(
            pairs, velocity=velocity, weight=None if weight is None else weight[:ROWS]
        )
        guess = u(model, x, t, s, y, None).requires_grad_()
        errors = (guess - velocity).square().flatten(1).mean(1)
        weighted(errors, targets, config).sum().backward()
        gradients.append(guess.grad)
    assert relative_error(*gradients) < 1e-2
    assert flow.weights(batch, ROWS)[ROWS - 1].item() == pytest.approx(alpha ** (2 * power - 1))
    assert bool((flow.weights(batch, ROWS)[ROWS:] == 1).all())
