"""Targets, losses and whole optimizer steps are the reference's, for the recorded random draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelt_fast.checkpoints.reference import rename_parameters
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.ema import update_average
from odelt_fast.train.loop import build_optimizer, row_losses, zero_gradients
from odelt_fast.train.objectives.length_consistency import LengthConsistency
from odelt_fast.train.objectives.shortcut import Shortcut
from odelt_fast.train.objectives.targets import Networks, Objective, StepBatch, Targets
from tests.helpers.reference_cases import Case, load_case, relative_error, training_cases


class RecordedDraws:
    """The reference's draws under our names: each name holds the rows that were drawn for it, as
    (first row, values)."""

    def __init__(self, values: dict[str, tuple[int, Tensor]]) -> None:
        self.values = values

    def _rows(self, name: str, rows: slice) -> Tensor:
        first, values = self.values[name]
        return values[rows.start - first : rows.stop - first]

    def normal(self, name: str, rows: slice, shape: Sequence[int]) -> Tensor:
        found = self._rows(name, rows)
        assert tuple(found.shape[1:]) == tuple(shape)
        return found

    def uniform(self, name: str, rows: slice) -> Tensor:
        return self._rows(name, rows)

    def integers(self, name: str, rows: slice, high: int) -> Tensor:
        found = self._rows(name, rows)
        assert int(found.max()) < high
        return found.long()

    def bernoulli(self, name: str, rows: slice, probability: float) -> Tensor:
        return self._rows(name, rows)


def shortcut_draws(case: Case, prefix: str) -> RecordedDraws:
    def draw(i: int, kind: str) -> Tensor:
        return case.tensor(f"{prefix}/draw{i}_{kind}")

    time_rows = len(draw(0, "randint"))
    values = {
        "step_index": (0, draw(0, "randint")),
        "time": (0, torch.cat([draw(1, "uniform"), draw(4, "uniform")])),
        "noise": (0, torch.cat([draw(2, "normal"), draw(5, "normal")])),
        "label_drop": (time_rows, draw(3, "bernoulli")),
    }
    if f"{prefix}/draw6_randint" in case.arrays:
        batch = len(draw(6, "randint"))
        values |= {
            "depth": (0, draw(6, "randint")),
            "teacher_depth": (batch - len(draw(7, "randint")), draw(7, "randint")),
        }
    return RecordedDraws(values)


def recorded_batch(case: Case, prefix: str, step: int) -> StepBatch:
    images, labels = case.tensor("images"), case.tensor("labels").long()
    return StepBatch(images, labels, shortcut_draws(case, prefix), step)


def shortcut_objective(case: Case) -> Shortcut:
    flags = case.dictionary("shortcut/flags")
    return Shortcut(
        num_classes=flags["num_classes"],
        time_rows=flags["batch_size"] // flags["bootstrap_every"],
        log2_steps=flags["denoise_timesteps"].bit_length() - 1,
        label_dropout=flags["class_dropout_prob"],
        compat=True,
    )


def assert_targets(targets: Targets, case: Case, prefix: str) -> None:
    assert relative_error(targets.x_t, case.tensor(f"{prefix}/x_t")) < 1e-5
    assert relative_error(targets.velocity, case.tensor(f"{prefix}/v_target")) < 1e-5
    assert torch.equal(targets.t, case.tensor(f"{prefix}/t"))
    assert torch.equal(targets.log2_steps, case.tensor(f"{prefix}/dt_base").long())
    assert torch.equal(targets.y, case.tensor(f"{prefix}/labels").long())


@pytest.mark.parametrize("path", training_cases(), ids=lambda path: path.stem)
def test_recorded_shortcut_targets(path: Path) -> None:
    case = load_case(path)
    networks = Networks(live=case.model(), ema=case.model("params_ema"))
    targets = shortcut_objective(case)(networks, recorded_batch(case, "shortcut", 1))
    assert_targets(targets, case, "shortcut")


def test_recorded_training_cases_are_there() -> None:
    assert training_cases()


@pytest.fixture(scope="module", params=training_cases(), ids=lambda path: path.stem)
def updates(request: pytest.FixtureRequest) -> dict:
    """Three optimizer steps from the recorded start, with everything that the recording holds about
    them."""
    case = load_case(request.param)
    live, ema = case.model().train(), case.model("params_ema").requires_grad_(False)
    start = copy.deepcopy(ema.state_dict())
    config = TrainConfig(model=case.config, adam_beta1=0.9, adam_beta2=0.999, weight_decay=0.1)
    optimizer = build_optimizer(live, config)
    zero_gradients(list(live.parameters()))
    length_rows = len(case.arrays["update/step0/draw7_randint"])
    objective: Objective = LengthConsistency(
        shortcut_objective(case), case.config.depths, length_rows
    )
    steps = []
    for step in range(3):
        prefix = f"update/step{step}"
        targets = objective(Networks(live, ema), recorded_batch(case, prefix, step))
        losses = row_losses(live, targets)
        losses.mean().backward()
        gradient = {name: p.grad.clone() for name, p in live.named_parameters()}
        optimizer.param_groups[0]["lr"] = float(case.arrays["update/lr_schedule"][step])
        if step == 0:
            first_gradient = gradient
        steps.append((prefix, targets, losses.mean().item()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        update_average(list(ema.parameters()), list(live.parameters()), torch.tensor(1 - 0.999))
    return {
        "case": case,
        "steps": steps,
        "gradient": first_gradient,
        "live": live,
        "ema": ema,
        "start": start,
    }


@pytest.mark.parametrize("step", range(3))
def test_recorded_update_targets(updates: dict, step: int) -> None:
    case = updates["case"]
    prefix, targets, _ = updates["steps"][step]
    assert_targets(targets, case, prefix)
    assert targets.depth == case.arrays[f"{prefix}/depth"].tolist()


@pytest.mark.parametrize("step", range(3))
def test_recorded_update_loss(updates: dict, step: int) -> None:
    prefix, _, loss = updates["steps"][step]
    assert loss == pytest.approx(float(updates["case"].arrays[f"{prefix}/loss"]), rel=1e-5)


def test_recorded_first_gradient(updates: dict) -> None:
    case = updates["case"]
    expected = rename_parameters(case.parameters("update/step0/grad"), case.config)
    for name, gradient in updates["gradient"].items():
        if expected[name].any():
            assert relative_error(gradient, expected[name]) < 1e-5, name
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("network", ["params", "params_ema"])
def test_recorded_weights_after_three_steps(updates: dict, network: str) -> None:
    case = updates["case"]
    expected = rename_parameters(case.parameters(f"update/{network}_after3"), case.config)
    found = updates["live" if network == "params" else "ema"].state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("path", training_cases(), ids=lambda path: path.stem)
def test_recorded_learning_rates(path: Path) -> None:
    expected = load_case(path).arrays["update/lr_schedule"]
    config = TrainConfig(learning_rate=1e-3, warmup_steps=5, steps=100)
    assert [config.learning_rate_at(step) for step in range(len(expected))] == pytest.approx(
        expected.tolist(), rel=1e-5, abs=1e-9
    )
