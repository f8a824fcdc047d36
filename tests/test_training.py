"""The training loop: draws, loader, checkpoints, exact resume, the two ways to start it."""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from odelt_fast import load_model
from odelt_fast.config import DiTConfig
from odelt_fast.images import open_source
from odelt_fast.train import loop
from odelt_fast.train.checkpoints import checkpoints
from odelt_fast.train.config import RECIPES, TrainConfig
from odelt_fast.train.data import Loader
from odelt_fast.train.draws import STREAMS, Draws, StepDraws, generator, global_rows
from odelt_fast.train.loop import Trainer, train
from odelt_fast.train.main import main, parse
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.targets import Networks, Objective, Targets

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = DiTConfig(image_size=8, channels=1, hidden_size=16, depth=4, depth_min=2, depth_group=2, num_heads=2, num_classes=10, dropout=0.1)


def small(folder: Path, **changes: object) -> TrainConfig:
    values = {"model": SMALL, "output_dir": folder, "steps": 8, "train_batch_size": 16, "warmup_steps": 2, "sampling_steps": 0}
    return replace(RECIPES["digits"], **(values | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small(tmp_path_factory.mktemp("whole") / "run", checkpointing_steps=3, checkpoints_total_limit=2))


def test_run_leaves_a_loadable_model_and_its_newest_checkpoints(whole_run: Path) -> None:
    assert [path.name for path in checkpoints(whole_run)] == ["checkpoint-6", "checkpoint-8"]
    assert not list(whole_run.glob("*.partial"))
    model = load_model(whole_run)
    assert model.config == SMALL
    newest = weights(whole_run / "checkpoint-8" / "ema")
    assert all(torch.equal(tensor, newest[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["latest", "folder"])
def test_resume_is_bitwise(whole_run: Path, tmp_path: Path, name: str) -> None:
    """Weights of the EMA and the live network, optimizer and losses equal those of the uninterrupted run (dropout is on)."""
    config = small(tmp_path / "run", checkpointing_steps=3)
    first = Trainer(config)
    for _ in range(5):
        first.step()
        if first.finished_steps == 3:
            saved = first.save()
    lost = [first.step() for _ in range(3)]  # to step 8; all after the checkpoint is to be repeated
    again = Trainer(config)
    assert again.resume("latest" if name == "latest" else str(saved))
    assert again.finished_steps == 3
    repeated = [again.step() for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(lost, repeated[2:]))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))
    assert all(torch.equal(again.ema.state_dict()[key], tensor) for key, tensor in weights(whole_run).items())
    for a, b in zip(first.optimizer.state_dict()["state"].values(), again.optimizer.state_dict()["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@dataclass
class Poisoned:
    """An objective whose targets are not finite at some steps."""

    objective: Objective
    steps: set[int]

    def __call__(self, networks: Networks, images: torch.Tensor, labels: torch.Tensor, draws: Draws, step: int) -> Targets:
        targets = self.objective(networks, images, labels, draws, step)
        bad = (math.nan, math.inf, -math.inf)[step % 3]
        return replace(targets, velocity=targets.velocity.index_fill(0, torch.tensor(step % 16), bad)) if step in self.steps else targets


def test_losses_that_are_not_finite_never_reach_the_weights(tmp_path: Path) -> None:
    """100 poisoned steps among 200: weights and optimizer stay as they were at each, and move at the others."""
    trainer = Trainer(small(tmp_path / "run", steps=250, warmup_steps=0))
    bad = set(np.random.default_rng(0).permutation(200)[:100].tolist())
    trainer.objective = Poisoned(trainer.objective, bad)
    for step in range(200):
        before = [p.clone() for p in trainer.model.parameters()]
        moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
        losses = trainer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
        assert same == (step in bad)
        assert losses.isfinite().all() == (step not in bad)
        if step in bad:
            assert all(torch.equal(a, state["exp_avg"]) for a, state in zip(moments, trainer.optimizer.state.values()))
    assert all(p.isfinite().all() for p in [*trainer.model.parameters(), *trainer.ema.parameters()])
    assert int(trainer.skipped_steps) == 100


def test_run_stops_when_no_loss_is_finite_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_objective", lambda config: Poisoned(build_objective(config), set(range(7, 100))))
    config = small(tmp_path / "run", steps=100, checkpointing_steps=5, logging_steps=5, max_skipped_steps=10)
    with pytest.raises(ValueError, match=r"not finite in the last \d+ steps, to step 20.*checkpoint-15"):
        train(config)
    assert all(tensor.isfinite().all() for tensor in weights(checkpoints(config.output_dir)[-1] / "ema").values())


@pytest.mark.parametrize("end", ["replaced", "partial", "deleted"])
def test_interrupted_save_is_recovered(tmp_path: Path, end: str) -> None:
    """A kill between any two renames of a save leaves a checkpoint of that number, and resuming clears the rest."""
    config = small(tmp_path / "run")
    trainer = Trainer(config)
    trainer.step()
    folder = trainer.save()
    other = folder.with_name(f"{folder.name}.{end}")
    if end == "replaced":
        os.replace(folder, other)
    else:
        shutil.copytree(folder, other)
    assert Trainer(config).resume("latest")
    assert [path.name for path in config.output_dir.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("size", [100, 20_000, 60_000])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, size: int) -> None:
    """Files stop growing at `size` bytes, as on a full disk: at the smallest, the largest or a middle file of a checkpoint."""
    trainer = Trainer(small(tmp_path / "run"))
    trainer.step()
    assert any(path.stat().st_size > size for path in trainer.save().rglob("*"))
    trainer.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"checkpoint-2 cannot be written.*the newest checkpoint is .*checkpoint-1"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert Trainer(small(tmp_path / "run")).resume("latest")
    trainer.save()  # the run itself is unharmed
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"


def test_unfinished_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path / "run"))
    trainer.step()
    trainer.save()
    (tmp_path / "run" / "checkpoint-7.partial").mkdir()
    (tmp_path / "run" / "checkpoint-9").mkdir()  # no state.json: not written by a finished save
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_training_learns(tmp_path: Path) -> None:
    """The loss of flow rows falls well below 1.2, that of a network that answers 0."""
    config = small(tmp_path / "run", steps=150, train_batch_size=64, learning_rate=3e-3)
    trainer = Trainer(config)
    sizes = config.row_sizes()
    flow = slice(sizes["time"], sizes["time"] + sizes["flow"])
    losses = [trainer.step()[flow].mean().item() for _ in range(config.steps)]
    assert np.mean(losses[:3]) > 1.1
    assert np.mean(losses[-20:]) < 0.85


def test_draws_belong_to_rows_of_the_global_batch() -> None:
    """Two parts of a batch draw what the whole batch draws: the number of processes changes nothing."""
    whole = StepDraws(7, 3, np.arange(32))
    sizes = (2, 12, 2)
    rows = [global_rows(sizes, part, 2) for part in range(2)]
    assert sorted(np.concatenate(rows)) == list(range(32))
    assert rows[1][:2].tolist() == [2, 3]  # the second part's time rows follow the first part's
    assert rows[1][2:14].tolist() == list(range(4 + 12, 4 + 24))
    everything, part_rows = slice(0, 32), slice(0, 16)
    for chosen in rows:
        part = StepDraws(7, 3, chosen)
        assert torch.equal(part.normal("noise", part_rows, (1, 4, 4)), whole.normal("noise", everything, (1, 4, 4))[chosen])
        assert torch.equal(part.uniform("time", part_rows), whole.uniform("time", everything)[chosen])
        assert torch.equal(part.integers("depth", part_rows, 3), whole.integers("depth", everything, 3)[chosen])
        assert torch.equal(part.bernoulli("label_drop", part_rows, 0.3), whole.bernoulli("label_drop", everything, 0.3)[chosen])


def test_draws_differ_between_steps_seeds_names_and_rows() -> None:
    seen = set()
    for seed in (0, 1):
        for step in (0, 1):
            for name in STREAMS:
                for row in (0, 1):
                    seen.add(generator(seed, name, step, row).integers(2**62))
    assert len(seen) == 2 * 2 * len(STREAMS) * 2


def test_draws_have_their_distributions() -> None:
    draws = StepDraws(0, 0, np.arange(20_000))
    rows = slice(0, 20_000)
    uniform = draws.uniform("time", rows)
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1
    assert torch.bincount(draws.integers("depth", rows, 3)).float().div(20_000).sub(1 / 3).abs().max() < 0.01
    assert draws.bernoulli("label_drop", rows, 0.1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    normal = StepDraws(0, 0, np.arange(200)).normal("noise", slice(0, 200), (100,))
    assert normal.mean().abs() < 0.02
    assert normal.std().item() == pytest.approx(1, abs=0.02)


def test_loader_shows_every_image_once_an_epoch() -> None:
    source = open_source("digits")
    loader = Loader(source, seed=1, global_batch=599)
    epochs = [torch.cat([loader.batch(step, np.arange(599))[0] for step in range(3 * epoch, 3 * epoch + 3)]) for epoch in range(2)]
    expected, labels = source.read_many(np.arange(len(source)), np.zeros(len(source), bool))
    for epoch in epochs:
        assert sorted(image.numpy().tobytes() for image in epoch) == sorted(image.tobytes() for image in expected)
    assert not torch.equal(*epochs)
    images, batch_labels = loader.batch(5, np.array([3, 70]))  # any rows of any step, without the ones before
    by_image = {image.tobytes(): label for image, label in zip(expected, labels)}
    assert [by_image[image.numpy().tobytes()] for image in images] == batch_labels.tolist()


def test_recipe_is_the_default_that_options_override() -> None:
    config = parse(["--recipe", "digits", "--model.depth", "8", "--learning_rate", "0.5"])
    assert config == replace(RECIPES["digits"], model=replace(RECIPES["digits"].model, depth=8), learning_rate=0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train-batch-size", "20"], "train_batch_size 20 is not divisible by"),
        (["--model.depth-min", "16"], "depth_min 16 is above depth 12"),
        (["--model.depth", "10"], "depth 10 is not depth_min + k*depth_group"),
        (["--denoise-timesteps", "100"], "denoise_timesteps must be a power of 2"),
        (["--ema-decay", "1.5"], "ema_decay must be in [0, 1]"),
        (["--model.num-classes", "3"], "--model.num-classes 10"),
        (["--resume-from-checkpoint", "nowhere"], "nowhere"),
        (["--no-such-option"], "no-such-option"),
        (["--recipe", "imaginary"], "imaginary"),
    ],
)
def test_mistake_is_one_short_message(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([*options, "--output-dir", str(tmp_path / "run")])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert says in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 12
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["kill_training.py --kills 2 --seed 1", "compare_processes.py"])
def test_script(script: str) -> None:
    """Small runs of the scripts that kill training and that compare numbers of processes. They fork: each has a process of its own."""
    name, *options = script.split()
    command = [sys.executable, REPOSITORY / "tests" / name, *options]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_accelerate_launch_trains(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "train/main.py", "--steps", "2", "--train-batch-size", "16"]
    command += ["--model.hidden-size", "16", "--output-dir", tmp_path / "run", "--sampling-steps", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "run").config.hidden_size == 16
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
