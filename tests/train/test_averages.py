"""Power-function averages: their weights over time, their state in checkpoints, and the average of
any width made from snapshots."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from odelt_fast import load_model
from odelt_fast.cli import main
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.ema import PowerAverages, update_average
from odelt_fast.train.loop import Trainer
from odelt_fast.train.post_hoc import find_snapshots, reconstruct
from odelt_fast.train.power_functions import PowerFunction, exponent, inner_product, mixture
from odelt_fast.train.run import train
from tests.helpers.training import SMALLER, small_run

MODEL = replace(SMALLER, dropout=0.1)
STEPS, EVERY = 60, 3


def small(folder: Path, **changes: object) -> TrainConfig:
    values = {"steps": STEPS, "ema_snapshot_steps": EVERY, "checkpointing_steps": 30}
    values |= {"model": MODEL, "learning_rate": 3e-3, "time_consistency_every": 8}
    return small_run(folder, **(values | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tracks three widths; the third is to be made from the snapshots of the others."""
    return train(
        small(
            tmp_path_factory.mktemp("averages") / "run",
            ema_widths=(0.05, 0.1, 0.07),
            checkpoints_total_limit=None,
        )
    )


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    a_all, b_all = (
        torch.cat([weights[name].flatten().double() for name in sorted(b)]) for weights in (a, b)
    )
    return (torch.linalg.vector_norm(a_all - b_all) / torch.linalg.vector_norm(b_all)).item()


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_width_is_the_standard_deviation_of_the_power_function(width: float) -> None:
    g = exponent(width)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = (g + 1) * tau**g
    mean = (p * tau).mean()
    assert np.sqrt((p * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-5)
    # of two, over the time that both have
    shorter = np.where(tau < 0.6, 8.0 / 0.6 * (tau / 0.6) ** 7, 0)
    wide = PowerFunction((7 + 1) ** 0.5 / (7 + 2) / (7 + 3) ** 0.5, 0.6)
    assert inner_product(PowerFunction(width, 1.0), wide) == pytest.approx(
        (p * shorter).mean(), rel=1e-4
    )


def test_average_weighs_steps_by_its_power_function_and_leaves_out_skipped_ones() -> None:
    """theta_s has weight (s^(g+1) - (s-1)^(g+1))/t^(g+1), s counting the updates alone."""
    moved = [False, True, True, False, True, True, True, True, False, False, True]
    rng, width = np.random.default_rng(0), 0.1
    averages = PowerAverages((width,), {"w": torch.zeros(3)}, MODEL)
    updates, seen = torch.zeros(()), []
    for moves in moved:
        weights = (
            torch.tensor(rng.standard_normal(3), dtype=torch.float32)
            if moves
            else torch.full((3,), 1e3)
        )
        updates += float(moves)
        averages.update([weights], updates, torch.tensor(float(moves)))
        if moves:
            seen.append(weights)
    s, g = np.arange(1, len(seen) + 1), exponent(width)
    shares = (s ** (g + 1) - (s - 1) ** (g + 1)) / len(seen) ** (g + 1)
    expected = sum(share * weights for share, weights in zip(shares, seen))
    torch.testing.assert_close(averages.averages[width]["w"], expected, rtol=1e-5, atol=1e-6)


def test_update_of_the_ema_is_its_definition() -> None:
    average, live = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    expected = [0.9 * a + 0.1 * b for a, b in zip(average, live)]
    update_average(average, live, torch.tensor(0.1))
    for found, wanted in zip(average, expected):
        torch.testing.assert_close(found, wanted)
    before = [tensor.clone() for tensor in average]
    update_average(average, live, torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(average, before))


def test_mixture_of_stored_power_functions() -> None:
    """A stored one is itself; one between is the nearer the more snapshots there are;
    coefficients sum to 1."""
    errors = []
    for count in (5, 20, 80):
        ends = [100.0 * (i + 1) for i in range(count)]
        stored = [PowerFunction(width, end) for end in ends for width in (0.05, 0.1)]
        x, error = mixture(stored, stored[-3])
        assert np.abs(x - np.eye(len(stored))[-3]).max() < 1e-6
        assert error < 1e-6
        x, error = mixture(stored, PowerFunction(0.07, 100.0 * count))
        assert x.sum() == pytest.approx(1, abs=1e-12)
        errors.append(error)
    assert errors[0] < 0.04
    assert errors[1] < 0.004
    assert errors[2] < 0.0003


def test_third_width_is_made_from_the_snapshots_of_two(run: Path, tmp_path: Path) -> None:
    """20 snapshots of two widths give the average that was tracked at a third one to 2.5e-6 of its
    weights (power function: 2.5e-3)."""
    two = tmp_path / "run"
    shutil.copytree(run / "ema-snapshots", two / "ema-snapshots")
    shutil.rmtree(two / "ema-snapshots" / "0.07")
    model, made, error = reconstruct(two, 0.07)
    tracked = load_model(run / "ema-snapshots" / "0.07" / f"step-{STEPS}").state_dict()
    others = [
        load_model(run / "ema-snapshots" / width / f"step-{STEPS}").state_dict()
        for width in ("0.05", "0.1")
    ]
    found = apart(model.state_dict(), tracked)
    assert (made.step, made.updates) == (STEPS, STEPS)
    assert error < 0.004
    assert found < 1e-5
    assert found < 0.01 * min(apart(other, tracked) for other in others)


def test_stored_width_and_step_is_what_was_stored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["ema", str(run), "--width", "0.05", "--step", "30", "--out", str(out)]) == 0
    assert "width 0.05 at step 30" in capsys.readouterr().out
    stored = load_model(run / "ema-snapshots" / "0.05" / "step-30").state_dict()
    made = load_model(out)
    assert apart(made.state_dict(), stored) < 1e-7
    assert made.config == load_model(run).config
    with safe_open(out / "model.safetensors", "pt") as file:
        says = file.metadata()
    assert (says["width"], says["step"], says["weights"]) == ("0.05", "30", "power-ema")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--width", "0.07", "--step", "31"], "step 31 has no snapshot"),
        (["--width", "0.5"], "width must be above 0 and at most 0.2887"),
        (["--width", "0"], "width must be above 0"),
    ],
)
def test_average_that_cannot_be_made_is_refused(
    run: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ema", str(run), *options, "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_snapshots_of_an_abandoned_run_do_not_mix_with_those_of_the_next(tmp_path: Path) -> None:
    config = small(tmp_path / "run", ema_widths=(0.05, 0.1), steps=6)
    train(replace(config, seed=1))
    train(replace(config, steps=3, overwrite_output_dir=True))
    assert {snapshot.step for snapshot in find_snapshots(tmp_path / "run")} == {3}
    train(replace(config, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")))
    assert {snapshot.step for snapshot in find_snapshots(tmp_path / "run")} == {3, 6}


def test_run_without_snapshots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train with --ema-widths"):
        find_snapshots(tmp_path)


def test_resume_is_bitwise_with_power_averages_and_stratified_depths(tmp_path: Path) -> None:
    config = small(tmp_path / "run", ema_widths=(0.05, 0.1), depth_sampling="stratified")
    first = Trainer(config)
    for _ in range(3):
        first.step()
    first.save()
    lost = [first.step() for _ in range(3)]
    again = Trainer(config)
    assert again.resume("latest")
    assert all(torch.equal(again.step(), loss) for loss in lost)
    for width, average in first.power.averages.items():
        assert all(
            torch.equal(again.power.averages[width][name], tensor)
            for name, tensor in average.items()
        )
    with pytest.raises(ValueError, match=r"no average of width 0\.2"):
        Trainer(replace(config, ema_widths=(0.2,))).resume("latest")
