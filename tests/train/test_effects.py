"""Options of a run that would have no effect in their combination are refused, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.campaign import Options, Study
from benchmarks.study.runs import RUNS
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.model import DiT
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import parse
from odelt_fast.train.mean_velocity import MEAN_VELOCITY_DEFAULTS
from odelt_fast.train.recipes import RECIPES
from tests.helpers.training import small_run

PAIRS = "--objective reflow --pairs folder"
CONVENTIONAL = "--model.no-length-conditioned"


@pytest.mark.parametrize(
    ("options", "unused", "why"),
    [
        ("--pairs folder", "pairs", "with objective shortcut"),
        ("--objective flow --num-pairs 10", "num-pairs", "with objective flow"),
        (f"{PAIRS} --data cifar10", "data", "trains on --pairs"),
        (f"{PAIRS} --label-column fine_label", "label-column", "trains on --pairs"),
        ("--path-sigma 0.1", "path-sigma", "with objective shortcut"),
        ("--objective flow --path-sigma 0.1", "path-sigma", "on path rectified"),
        (
            "--objective flow --times continuous --denoise-timesteps 64",
            "denoise-timesteps",
            "with --times continuous",
        ),
        (
            "--objective flow --times continuous --compat reference",
            "compat",
            "with --times continuous",
        ),
        ("--objective flow --time-consistency-every 8", "time-consistency-every", "no such rows"),
        (
            "--objective mean-flow --time-consistency-every 8",
            "time-consistency-every",
            "--mean-velocity.time-share says",
        ),
        (
            "--time-consistency-every 0 --guidance-scale 2",
            "guidance-scale",
            "without time-consistency rows",
        ),
        (f"{CONVENTIONAL} --length-consistency-every 4", "length-consistency-every", "inner ODE"),
        (f"{CONVENTIONAL} --depth-sampling stratified", "depth-sampling", "inner ODE"),
        (f"{CONVENTIONAL} --teacher-depth student", "teacher-depth", "inner ODE"),
        (f"{CONVENTIONAL} --model.depth-min 3", "model.depth-min", "inner ODE"),
        ("--objective flow --teacher-depth student", "teacher-depth", "has no teacher"),
        (
            "--init-from digits --length-teacher init --length-consistency-every 4",
            "length-consistency-every",
            "teaches flow rows too",
        ),
        (
            f"{CONVENTIONAL} --time-consistency-every 0 --target-network live",
            "target-network",
            "without rows of time or length consistency",
        ),
        ("--model.num-classes 1 --label-dropout 0.2", "label-dropout", "of one class"),
        ("--loss-weight-eps 1", "loss-weight-eps", "while --loss-weight-power is 0"),
        ("--dropout 0.1 --model.dropout 0.2", "model.dropout", "beside --dropout"),
        ("--ema-snapshot-steps 10", "ema-snapshot-steps", "without --ema-widths"),
        ("--log-with --sampling-steps 10", "sampling-steps", "without a tracker"),
    ],
)
def test_option_without_effect_is_refused(options: str, unused: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{unused} has no effect .*{why}") as mistake:
        parse(options.split())
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"derivative": "jvp", "difference_step": 0.01}, "difference_step has.* derivative jvp"),
        ({"time_share": 0.0, "tangent": "data"}, "tangent has no effect with time_share 0"),
        ({"grid_share": 1.0, "times": "logit-normal"}, "times has no effect with grid_share 1"),
    ],
)
def test_mean_velocity_without_effect_is_refused(changes: dict[str, object], says: str) -> None:
    options = replace(MEAN_VELOCITY_DEFAULTS, **changes)
    with pytest.raises(ValueError, match=says):
        replace(RECIPES["digits"], objective="mean-flow", mean_velocity=options)


@pytest.mark.parametrize(
    "options",
    [
        "--objective flow --path independent --path-sigma 0.1",
        "--objective flow --times continuous --path independent --compat reference",
        "--objective flow --time-consistency-every 0",
        f"{CONVENTIONAL} --length-consistency-every 0",
        "--objective mean-flow --guidance-scale 2 --mean-velocity.time-share 0"
        " --teacher-depth student",
        "--loss-weight-power 1 --loss-weight-eps 1",
        "--log-with --sampling-steps 0",
        f"{PAIRS} --no-random-flip",
    ],
)
def test_option_with_an_effect_or_that_asks_for_none_is_taken(options: str) -> None:
    parse(options.split())


def test_recipes_and_the_study_give_no_option_without_effect(tmp_path: Path) -> None:
    for recipe in RECIPES:
        assert parse(["--recipe", recipe]) == RECIPES[recipe]
    study = Study(Options(out=tmp_path))
    shape = replace(parse(study.budget.options.split()).model, length_conditioned=False)
    save_model(DiT(shape), tmp_path / "teacher")
    for run in RUNS:
        parse(study.training(run))


@pytest.mark.parametrize("trackers", [("wandb",), ("tensorboard", "wandb")])
def test_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, trackers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
    with pytest.raises(ValueError, match="--log-with wandb: it is not installed: pip install"):
        Trainer(small_run(tmp_path / "run", log_with=trackers))
    assert not (tmp_path / "run").exists()
