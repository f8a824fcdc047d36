"""Options that have no effect beside the others are refused in one line, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.cli import main
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT

LIKELIHOOD = "likelihood --num-images 1"
EVALUATE = "evaluate --data digits --allow-few-samples"


@pytest.mark.parametrize(
    ("command", "unused", "why"),
    [
        ("sample --solver dopri5 --steps 10", "steps", "on dopri5, which chooses its own steps"),
        ("sample --solver torchdiffeq:bosh3 --steps 3", "steps", "chooses its own steps"),
        ("sample --rtol 1e-3", "rtol", "on euler, which takes equal steps"),
        ("sample --solver rk4 --atol 1e-3", "atol", "on rk4, which takes equal steps"),
        ("sample --solver torchdiffeq:rk4 --rtol 1e-3", "rtol", "takes equal steps"),
        ("sample --solver fixed:dopri5 --max-steps 9", "max-steps", "takes equal steps"),
        ("sample --error-norm batch", "error-norm", "on euler, which takes equal steps"),
        (
            "sample --solver torchdiffeq:dopri5 --error-norm batch",
            "error-norm",
            "which has one error for a batch",
        ),
        ("sample --frames 4", "frames", "without --interpolate"),
        ("sample --interpolate 1 2 --num-images 4", "num-images", "on --interpolate"),
        ("sample --interpolate 1 2 --seed 4", "seed", "on --interpolate"),
        ("sample --invert digits --seed 4", "seed", "on --invert, which draws no noise"),
        (f"{LIKELIHOOD} --steps 8", "steps", "on dopri5, which chooses its own steps"),
        (f"{LIKELIHOOD} --solver rk4 --rtol 1e-3", "rtol", "on rk4, which takes equal steps"),
        (f"{LIKELIHOOD} --solver euler --max-steps 9", "max-steps", "takes equal steps"),
        (f"{LIKELIHOOD} --exact --probes 2", "probes", "on --exact, which has no probes"),
        (f"{LIKELIHOOD} --exact --probe gaussian", "probe", "on --exact"),
        (f"{LIKELIHOOD} --null-label --label-column a", "label-column", "with --null-label"),
        (f"{EVALUATE} --tolerances 1e-3", "tolerances", "without solvers that choose"),
        (f"{EVALUATE} --solvers dopri5 --steps 4", "steps", "without solvers of equal steps"),
        (f"{EVALUATE} --trust-features", "trust-features", "which are no program"),
        (
            f"{EVALUATE} --guidance-scale 2 --paper-guidance --steps 4",
            "paper-guidance",
            "without --steps 128",
        ),
        (
            "evaluate --metrics recognised --stats a.npz",
            "stats",
            "on recognised, which compare nothing",
        ),
        ("evaluate --stats a.npz --split test", "split", "without --data"),
        ("evaluate --samples a --steps 4", "steps", "on --samples"),
        ("stats --features digits --trust-features", "trust-features", "which are no program"),
        ("profile --depths 4 --quality a", "quality", "beside --depths, --steps or --solvers"),
        ("profile --depths 4 --tolerances 1", "tolerances", "without solvers that choose"),
        ("profile --tolerances 1", "tolerances", "on the operations of the table of quality"),
        ("profile --solvers dopri5 --steps 4", "steps", "without solvers of equal steps"),
        ("plan --steps 8", "steps", "without --search-schedule"),
        ("plan --data digits", "data", "without --search-schedule"),
        ("plan --num-images 8", "num-images", "without --search-schedule"),
        ("plan --seeds 2", "seeds", "without --search-schedule"),
        ("plan --out there", "out", "without --search-schedule"),
        ("plan --search-schedule --data digits --all", "all", "with --search-schedule"),
        ("plot grid --metric kid", "metric", "on plot grid"),
        ("plot grid --results a", "results", "on plot grid"),
        ("plot grid --paper", "paper", "on plot grid"),
        ("plot pareto --results a --seed 3", "seed", "on plot pareto"),
        ("plot pareto --results a --steps 4", "steps", "on plot pareto"),
        ("plot scaling --results a --metric kid", "metric", "on plot scaling"),
        ("plot ablation --results a --paper", "paper", "on plot ablation"),
    ],
)
def test_option_without_effect_is_refused(
    command: str,
    unused: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --{unused} has no effect ")
    assert why in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DiTConfig(
        image_size=8, channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=1
    )
    return save_model(DiT(config), tmp_path_factory.mktemp("models") / "one-class")


@pytest.mark.parametrize(
    "command",
    [
        "sample --model {one} --guidance-scale 2",
        "sample --labels 10 --guidance-scale 2",
        "sample --model {one} --invert digits --num-images 1 --guidance-scale 2",
        "likelihood --num-images 1 --null-label --guidance-scale 2",
        "likelihood --num-images 1 --model {one} --guidance-scale 2",
        "evaluate --data digits --model {one} --guidance-scale 2 --out there",
        "profile --model {one} --guidance-scale 2",
        "plot grid --model {one} --guidance-scale 2",
        "plot grid --labels 10 --guidance-scale 2",
    ],
)
def test_guidance_without_labels_is_refused(
    command: str,
    one_class: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.format(one=one_class).split()) == 2
    error = capsys.readouterr().err.strip()
    assert "--guidance-scale has no effect where all images have the null label" in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_data_that_no_metric_compares_with_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--depths 4 --steps 1 --num-images 8 --batch-size 8 --seeds 1 --metrics recognised"
    command = f"evaluate {few} --data digits --allow-few-samples --out {tmp_path / 'out'}"
    assert main(command.split()) == 0
    error = capsys.readouterr().err
    assert "--data had no effect: none of --metrics compares" in error
    assert "--allow-few-samples had no effect without frechet" in error


def test_solvers_take_the_options_that_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = "sample --num-images 1 --depth 4 --quiet"
    assert main(f"{few} --solver dopri5 --rtol 0.1 --max-steps 99".split()) == 0
    assert main(f"{few} --solver torchdiffeq:implicit_adams --steps 2 --rtol 0.1".split()) == 0
