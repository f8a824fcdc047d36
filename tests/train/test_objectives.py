"""Objectives: known answers, what changes their targets and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.train.draws import StepDraws, global_rows
from odelt_fast.train.loop import row_losses
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.objectives.consistency import Consistency, ConsistencyDistillation
from odelt_fast.train.objectives.flow_matching import Diffusion, FlowMatching
from odelt_fast.train.objectives.length_consistency import LengthConsistency
from odelt_fast.train.objectives.live_reflow import LiveReflow
from odelt_fast.train.objectives.mean_flow import AlphaFlow, MeanFlow
from odelt_fast.train.objectives.progressive import Progressive, stage
from odelt_fast.train.objectives.shortcut import Shortcut
from odelt_fast.train.objectives.shortcut_models import ShortcutModels
from odelt_fast.train.objectives.targets import Networks, Objective, StepBatch, Targets, guided
from odelt_fast.train.paths import IndependentCFM, Rectified, VariancePreserving

CLASSES, BATCH, SHAPE = 5, 32, (2, 4, 4)


@dataclass
class Linear:
    """A velocity field with known answers, a x + b t + c k + e y + g l (l = 8 for full depth), that
    keeps a record of its calls."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    e: float = 0.0
    g: float = 0.0
    calls: list[dict] = field(default_factory=list)

    def __call__(
        self, x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, depth: list[int] | None = None
    ) -> Tensor:
        assert len(x) == len(t) == len(log2_steps) == len(y)
        assert depth is None or len(depth) == len(x)
        self.calls.append({"x": x, "t": t, "k": log2_steps, "y": y, "depth": depth})
        length = torch.tensor([8.0] * len(x) if depth is None else depth)
        offset = self.b * t + self.c * log2_steps + self.e * y + self.g * length
        return self.a * x + offset[:, None, None, None]


def batch_of(step: int = 3, seed: int = 0, rows: np.ndarray | None = None) -> StepBatch:
    """Rows of one batch of 32 (None: all); the same images whatever the step and the seed."""
    generator = np.random.default_rng(3)
    images = generator.uniform(-1, 1, (BATCH, *SHAPE)).astype(np.float32)
    labels = generator.integers(0, CLASSES, BATCH)
    rows = np.arange(BATCH) if rows is None else rows
    draws = StepDraws(seed, step, rows)
    return StepBatch(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), draws, step)


def run(objective: Objective, model: Linear, step: int = 3, **networks: object) -> Targets:
    every = Networks(live=model, ema=model, teacher=model, **networks)
    return objective(every, batch_of(step))


def objectives(
    time_rows: int = 8, drop: float = 0.3, scale: float | None = None
) -> dict[str, Objective]:
    return {
        "shortcut": Shortcut(
            CLASSES, time_rows=time_rows, label_dropout=drop, guidance_scale=scale
        ),
        "shortcut-models": ShortcutModels(
            CLASSES, time_rows=time_rows, label_dropout=drop, guidance_scale=scale
        ),
        "mean-flow": MeanFlow(
            CLASSES, time_rows=time_rows, label_dropout=drop, guidance_scale=scale
        ),
        "mean-flow-jvp": MeanFlow(
            CLASSES,
            time_rows=time_rows,
            label_dropout=drop,
            guidance_scale=scale,
            options=MeanVelocityOptions(tangent="data", derivative="jvp", times="logit-normal"),
        ),
        "alpha-flow": AlphaFlow(
            CLASSES,
            time_rows=time_rows,
            label_dropout=drop,
            guidance_scale=scale,
            total_steps=4,
        ),
        "flow": FlowMatching(CLASSES, path=Rectified(), label_dropout=drop),
        "flow-independent": FlowMatching(
            CLASSES, path=IndependentCFM(0.1), label_dropout=drop, times="continuous"
        ),
        "live-reflow": LiveReflow(
            CLASSES, reflow_rows=time_rows, label_dropout=drop, guidance_scale=scale
        ),
        "consistency": Consistency(CLASSES, total_steps=700, label_dropout=drop),
        "consistency-distillation": ConsistencyDistillation(
            CLASSES, label_dropout=drop, guidance_scale=scale
        ),
        "progressive": Progressive(
            CLASSES, total_steps=700, label_dropout=drop, guidance_scale=scale
        ),
        "diffusion": Diffusion(CLASSES, label_dropout=drop),
    }


every_objective = pytest.mark.parametrize("name", list(objectives()))


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def test_flow_rows_lie_on_the_line_that_their_target_follows() -> None:
    targets = run(FlowMatching(CLASSES, path=Rectified()), Linear())
    images = batch_of().images
    torch.testing.assert_close(
        targets.x_t + column(1 - targets.t) * targets.velocity, images, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(targets.t * 128, (targets.t * 128).round())
    assert (targets.log2_steps == 7).all()


def test_continuous_times_are_not_on_the_grid_and_never_reach_the_end() -> None:
    targets = run(FlowMatching(CLASSES, path=VariancePreserving(), times="continuous"), Linear())
    assert (targets.t * 128 != (targets.t * 128).round()).all()
    assert targets.t.max() <= VariancePreserving.last_time


def test_independent_noise_around_the_mean_is_not_the_noise_of_x0() -> None:
    """The reference adds sigma x0 again; in a linear path that is visible as x_t - mean being a
    multiple of x0."""
    sigma, batch = 0.25, batch_of()
    images, x0 = batch.images, batch.noise()
    for compat in (False, True):
        targets = run(
            FlowMatching(CLASSES, path=IndependentCFM(sigma), times="continuous", compat=compat),
            Linear(),
        )
        extra = (targets.x_t - torch.lerp(x0, images, column(targets.t))) / sigma
        correlation = (extra * x0).mean() / x0.square().mean()
        assert extra.std().item() == pytest.approx(1, abs=0.1)
        assert correlation.item() == pytest.approx(1.0 if compat else 0.0, abs=0.1)


@pytest.mark.parametrize("kind", [Shortcut, ShortcutModels])
def test_time_consistency_target_is_two_half_steps(kind: Callable[..., Objective]) -> None:
    """With v = a x + b t + c k: one step of the target from x_t, by 2d, ends where two steps d of
    the teacher do."""
    model = Linear(a=0.2, b=0.3, c=0.1)
    targets = run(kind(CLASSES, time_rows=16, label_dropout=0.0), model)
    rows = slice(0, 16)
    x, t, k = targets.x_t[rows], targets.t[rows], targets.log2_steps[rows]
    d = 2.0 ** -(k + 1.0)
    middle = x + column(d) * model(x, t, k + 1, targets.y[rows])
    end = middle + column(d) * model(middle, t + d, k + 1, targets.y[rows])
    torch.testing.assert_close(
        x + column(2 * d) * targets.velocity[rows], end, rtol=1e-5, atol=1e-5
    )
    assert (t + 2 * d <= 1).all()
    assert len(k.unique()) > 3
    assert (targets.log2_steps[16:] == 7).all()


def test_clips_of_shortcut_models() -> None:
    targets = run(ShortcutModels(CLASSES, time_rows=16), Linear(a=50.0))
    assert targets.velocity[:16].abs().max() == 4
    state = [
        call["x"] for call in run_calls(ShortcutModels(CLASSES, time_rows=16), Linear(a=50.0))
    ][1]
    assert state.abs().max() == 4


def run_calls(objective: Objective, model: Linear) -> list[dict]:
    run(objective, model)
    return model.calls


def test_guided_shortcut_rows_follow_the_guidance_formula() -> None:
    """v = e y: the label's velocity is e y, the null one e*5; the second half of the time rows is
    guided at every k."""
    w, e = 2.5, 0.1
    targets = run(Shortcut(CLASSES, time_rows=16, label_dropout=0.4, guidance_scale=w), Linear(e=e))
    y = targets.y[:16].float()
    expected = torch.cat([e * y[:8], e * CLASSES + w * (e * y[8:] - e * CLASSES)])
    torch.testing.assert_close(
        targets.velocity[:16], column(expected).expand(16, *SHAPE), rtol=1e-5, atol=1e-6
    )
    assert (targets.y[8:16] == CLASSES).any()


def test_guided_second_step_is_taken_at_the_guided_point() -> None:
    """The reference evaluates the label's velocity of the second step on the unguided line
    instead."""
    w, model = 2.0, Linear(a=0.5, e=0.1)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    t, k = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    y = torch.tensor([0, 1, 2, 5])

    def expected(x: Tensor) -> Tensor:
        null = torch.full_like(y, CLASSES)
        return model(x, t, k, null) + w * (model(x, t, k, y) - model(x, t, k, null))

    torch.testing.assert_close(guided(model, w, CLASSES)(x, t, k, y), expected(x))
    targets = run(Shortcut(CLASSES, time_rows=8, label_dropout=0.0, guidance_scale=w), model)
    rows = slice(4, 8)
    x, y, d = targets.x_t[rows], targets.y[rows], column(2.0 ** -(targets.log2_steps[rows] + 1.0))
    first = expected(x)
    torch.testing.assert_close(
        targets.velocity[rows], (first + expected(x + d * first)) / 2, rtol=1e-5, atol=1e-5
    )


def test_guidance_of_chosen_rows_and_its_special_scales() -> None:
    model = Linear(e=1.0)
    x, t, k = torch.zeros(4, *SHAPE), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    y = torch.tensor([0, 1, 2, 3])

    def velocities(scale: float | None, rows: list[int] | None = None) -> list[float]:
        index = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        v = guided(model, scale, CLASSES, index)(x, t, k, y, depth=[2, 4, 6, 8])
        return v[:, 0, 0, 0].tolist()

    assert velocities(None) == velocities(1.0) == velocities(3.0, []) == [0, 1, 2, 3]
    assert velocities(0.0) == [5, 5, 5, 5]
    assert velocities(0.0, [1]) == [0, 5, 2, 3]
    assert velocities(2.0, [3, 0]) == [-5, 1, 2, 1]
    assert model.calls[-1]["depth"] == [2, 4, 6, 8, 8, 2]


def test_shortcut_models_guides_the_finest_step_size_only() -> None:
    w, e = 3.0, 0.1
    targets = run(
        ShortcutModels(CLASSES, time_rows=BATCH, label_dropout=0.0, guidance_scale=w), Linear(e=e)
    )
    y, finest = targets.y.float(), targets.log2_steps == 6
    assert finest.any()
    assert not finest.all()
    expected = torch.where(finest, e * CLASSES + w * (e * y - e * CLASSES), e * y)
    torch.testing.assert_close(
        targets.velocity, column(expected).expand_as(targets.velocity), rtol=1e-5, atol=1e-6
    )


def test_live_reflow_integrates_the_live_network() -> None:
    """v = b t: eight Euler steps end at x0 + b * mean(0, 1/8, .. 7/8); the student is told index 0,
    its teacher 7."""
    live, ema = Linear(b=2.0), Linear()
    objective = LiveReflow(CLASSES, reflow_rows=8, label_dropout=0.5)
    targets = objective(Networks(live=live, ema=ema), batch_of(1))
    torch.testing.assert_close(
        targets.velocity[:8], torch.full((8, *SHAPE), 2.0 * 7 / 16), rtol=1e-5, atol=1e-5
    )
    assert targets.log2_steps.tolist() == [0] * 8 + [7] * 24
    assert not ema.calls
    assert all((call["k"] == 7).all() for call in live.calls)
    assert len(live.calls) == 8


def test_live_reflow_without_labels_has_the_null_label_for_teacher_and_student() -> None:
    model = Linear(e=1.0)
    targets = run(LiveReflow(CLASSES, reflow_rows=8, guidance_scale=0.0), model)
    assert (targets.y[:8] == CLASSES).all()
    assert all((call["y"] == CLASSES).all() for call in model.calls)


def test_live_reflow_switches_dropout_off_and_on_again() -> None:
    model = DiT(
        DiTConfig(
            image_size=4,
            channels=2,
            hidden_size=16,
            depth=2,
            depth_min=2,
            depth_group=2,
            num_heads=2,
            num_classes=5,
            dropout=0.9,
        )
    )
    torch.nn.init.normal_(model.final_layer.out.weight)
    model.train()
    objective = LiveReflow(CLASSES, reflow_rows=8)
    found = [objective(Networks(live=model, ema=model), batch_of(1)).velocity for _ in range(2)]
    assert torch.equal(*found)
    assert model.training


def test_progressive_stages_halve_the_steps_and_guide_the_first() -> None:
    total, seen = 700, []
    for step in (0, 99, 100, 350, 699, 5000):
        model = Linear(e=0.1)
        targets = run(
            Progressive(CLASSES, total_steps=total, label_dropout=0.0, guidance_scale=2.0),
            model,
            step,
        )
        k = int(targets.log2_steps[0])
        assert torch.equal(targets.t * 2**k, (targets.t * 2**k).floor())
        assert all((call["k"] == k + 1).all() for call in model.calls)
        guided = not torch.allclose(
            targets.velocity, column(0.1 * targets.y.float()).expand_as(targets.velocity)
        )
        seen.append((k, guided))
    assert seen == [(6, True), (6, True), (5, False), (3, False), (0, False), (0, False)]
    assert [stage(step, 20, 7) for step in range(20)] == sorted(
        stage(step, 20, 7) for step in range(20)
    )
    assert {stage(step, 20, 7) for step in range(20)} == set(range(7))


@pytest.mark.parametrize("name", ["consistency", "consistency-distillation"])
def test_consistency_targets_lead_to_the_predicted_data(name: str) -> None:
    """x_t + (1-t) target is the data that the EMA network predicts a step later; from an EMA that
    knows the data, the data."""
    images = batch_of().images

    def oracle(x: Tensor, t: Tensor, k: Tensor, y: Tensor, depth: None = None) -> Tensor:
        return (images - x) / column(1 - t).clamp_min(1e-6)

    networks = Networks(live=oracle, ema=oracle, teacher=oracle)
    for step in (0, 300, 699):
        targets = objectives()[name](networks, batch_of(step))
        torch.testing.assert_close(
            targets.x_t + column(1 - targets.t) * targets.velocity, images, rtol=1e-3, atol=1e-3
        )
    model = Linear(a=0.3, b=0.2)
    targets = run(objectives()[name], model)
    later = model.calls[-1]
    data = later["x"] + column(1 - later["t"]) * (0.3 * later["x"] + 0.2 * column(later["t"]))
    torch.testing.assert_close(
        targets.x_t + column(1 - targets.t) * targets.velocity, data, rtol=1e-4, atol=1e-4
    )
    assert (later["t"] > targets.t).all()


def test_diffusion_target_is_the_noise_in_the_state() -> None:
    targets = run(Diffusion(CLASSES), Linear())
    images = batch_of().images
    path = VariancePreserving()
    expected = (
        column(path.mean(targets.t, torch.ones(BATCH), torch.ones(BATCH))[0]) * images
        + column(path.std(targets.t)[0]) * targets.velocity
    )
    torch.testing.assert_close(targets.x_t, expected, rtol=1e-5, atol=1e-6)
    assert targets.velocity.std().item() == pytest.approx(1, abs=0.1)


@every_objective
def test_null_label_is_trained_at_every_step_index(name: str) -> None:
    """A sampler with guidance asks for the null label at any step index: it must have been trained
    there."""
    dropped, kept = set(), set()
    for step in range(0, 700, 35):
        targets = run(objectives()[name], Linear(), step)
        index = targets.log2_steps.float().floor()  # of any duration: real numbers
        dropped |= set(index[targets.y == CLASSES].tolist())
        kept |= set(index[targets.y < CLASSES].tolist())
    assert dropped == kept


@every_objective
def test_time_rows_and_flow_rows_have_images_of_their_own(name: str) -> None:
    """The reference repeats the first images; by default every image of the batch is used."""
    labels = batch_of().labels
    targets = run(objectives(drop=0.0)[name], Linear())
    assert torch.equal(targets.y, labels)
    assert len({row.numpy().tobytes() for row in targets.x_t}) == BATCH


@every_objective
@pytest.mark.parametrize("parts", [2, 4])
def test_number_of_processes_changes_no_target(name: str, parts: int) -> None:
    """The rows of a batch split over processes are those of the whole batch, guided ones
    included."""
    if name == "flow-independent":
        sizes, scale = [32 // parts], None
    else:
        sizes, scale = [4 // parts, 4 // parts, 24 // parts], 1.5
    model = Linear(a=0.2, b=0.1, c=0.05, e=0.1)
    networks = Networks(live=model, ema=model, teacher=model)
    whole = objectives(8, scale=scale)[name](networks, batch_of(50, seed=1))
    for part in range(parts):
        rows = global_rows(sizes, part, parts)
        found = objectives(8 // parts, scale=scale)[name](networks, batch_of(50, 1, rows))
        for quantity in dataclasses.fields(Targets):
            expected = getattr(whole, quantity.name)
            if quantity.name == "depth" or expected is None:
                continue
            torch.testing.assert_close(
                getattr(found, quantity.name), expected[torch.from_numpy(rows)], rtol=1e-6,
                atol=1e-6, msg=quantity.name,
            )  # fmt: skip


def networks_with_weights() -> Iterator[DiT]:
    config = DiTConfig(
        image_size=4,
        channels=2,
        hidden_size=16,
        depth=8,
        depth_min=2,
        depth_group=2,
        num_heads=2,
        num_classes=CLASSES,
    )
    for seed in range(3):
        torch.manual_seed(seed)
        model = DiT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        yield model


@every_objective
def test_targets_build_no_graph_and_length_consistency_wraps_them(name: str) -> None:
    """The last rows learn what the EMA network says at another depth; the loss reaches the live
    network only."""
    live, ema, teacher = networks_with_weights()
    depths, rows = ema.config.depths, 8
    networks = Networks(live=live, ema=ema, teacher=teacher)
    objective = objectives(scale=1.5)[name]
    batch = batch_of()
    plain = objective(networks, batch)
    targets = LengthConsistency(objective, depths, rows)(networks, batch)
    for quantity in (targets.x_t, targets.velocity, targets.t):
        assert not quantity.requires_grad
    assert torch.equal(targets.velocity[:-rows], plain.velocity[:-rows])
    last = slice(BATCH - rows, BATCH)
    drawn = batch.draws.integers("teacher_depth", last, len(depths))
    other = [depths[i] for i in drawn.tolist()]
    expected = ema(
        targets.x_t[last], targets.t[last], targets.log2_steps[last], targets.y[last], depth=other
    )
    torch.testing.assert_close(targets.velocity[last], expected.detach())
    assert targets.depth is not None
    assert set(targets.depth) <= set(depths)
    row_losses(live, targets).mean().backward()
    assert live.patch_embed.weight.grad.abs().max() > 0
    assert all(
        parameter.grad is None for network in (ema, teacher) for parameter in network.parameters()
    )


@pytest.mark.parametrize(
    "name", [name for name in objectives() if not name.startswith(("flow", "diffusion"))]
)
@pytest.mark.parametrize("teacher_depth", ["full", "student"])
def test_teachers_run_at_full_depth_or_at_the_student_s(name: str, teacher_depth: str) -> None:
    depths, model = (2, 4, 6, 8), Linear(g=1.0)
    wrapped = LengthConsistency(objectives(drop=0.0)[name], depths, 0, teacher_depth)
    targets = wrapped(Networks(live=model, ema=model, teacher=model), batch_of())
    assert model.calls
    for call in model.calls:
        rows = len(call["x"])
        student = targets.depth[:rows]
        if name == "mean-flow" and rows == 16:  # both sides of a difference
            student = targets.depth[:8] * 2
        assert call["depth"] == (student if teacher_depth == "student" else None)
    if name == "shortcut":
        taught = targets.velocity[:8, 0, 0, 0].tolist()
        assert taught == pytest.approx(
            targets.depth[:8] if teacher_depth == "student" else [8.0] * 8
        )
