"""The training loop: draws, loader, checkpoints, exact resume, the two ways to start it."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from odelt_fast import load_model
from odelt_fast.config import DiTConfig
from odelt_fast.images import open_source
from odelt_fast.model import DiT
from odelt_fast.train import loop
from odelt_fast.train.checkpoints import checkpoints
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.data import Loader
from odelt_fast.train.draws import STREAMS, StepDraws, generator, global_rows
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import main, parse
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.targets import Networks, Objective, StepBatch, Targets
from odelt_fast.train.recipes import RECIPES
from odelt_fast.train.run import train
from tests.helpers.training import SMALL, small_run

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = replace(SMALL, dropout=0.1)


def small(folder: Path, **changes: object) -> TrainConfig:
    return small_run(folder, **({"model": MODEL} | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        small(
            tmp_path_factory.mktemp("whole") / "run",
            checkpointing_steps=3,
            checkpoints_total_limit=2,
        )
    )


def test_run_leaves_a_loadable_model_and_its_newest_checkpoints(whole_run: Path) -> None:
    assert [path.name for path in checkpoints(whole_run)] == ["checkpoint-6", "checkpoint-8"]
    assert not list(whole_run.glob("*.partial"))
    model = load_model(whole_run)
    assert model.config == MODEL
    newest = weights(whole_run / "checkpoint-8" / "ema")
    assert all(torch.equal(tensor, newest[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["latest", "folder"])
def test_resume_is_bitwise(whole_run: Path, tmp_path: Path, name: str) -> None:
    """Weights of the EMA and the live network, optimizer and losses equal those of the
    uninterrupted run (dropout is on)."""
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
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters())
    )
    assert all(
        torch.equal(again.ema.state_dict()[key], tensor)
        for key, tensor in weights(whole_run).items()
    )
    for a, b in zip(
        first.optimizer.state_dict()["state"].values(),
        again.optimizer.state_dict()["state"].values(),
    ):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@dataclass
class Poisoned:
    """An objective whose targets are not finite at some steps."""

    objective: Objective
    steps: set[int]

    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        targets, step = self.objective(networks, batch), batch.step
        if step not in self.steps:
            return targets
        bad = (math.nan, math.inf, -math.inf)[step % 3]
        row = torch.tensor(step % 16, device=targets.velocity.device)
        velocity = targets.velocity.index_fill(0, row, bad)
        return replace(targets, velocity=velocity)


def test_step_that_does_not_log_never_waits_for_the_device(tmp_path: Path) -> None:
    """No number of a tensor is read on the host, the check of the gradients included; on a GPU that
    would be a synchronisation."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
            )
            return function(*args, **(kwargs or {}))

    trainer = Trainer(small(tmp_path / "run", ema_widths=(0.1,)))
    with Reads() as reads:
        for _ in range(2):
            trainer.step()
    assert reads.count == 0
    with reads:
        trainer.check_skipped()
    assert reads.count > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("objective", ["shortcut", "flow", "consistency"])
def test_step_that_does_not_log_never_synchronises_a_gpu(objective: str, tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path / "run", ema_widths=(0.1,), objective=objective))
    trainer.step()  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("every", [5, 1000])
def test_run_whose_losses_stay_not_finite_goes_back_to_its_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Bad from step 7 on: the newest checkpoint is that of step 7, or a later one with the same
    weights, averages and optimizer."""
    monkeypatch.setattr(
        loop,
        "build_objective",
        lambda config: Poisoned(build_objective(config), set(range(7, 100))),
    )
    config = small(
        tmp_path / "run", steps=100, checkpointing_steps=every, logging_steps=5, ema_widths=(0.1,)
    )
    newest = 15 if every == 5 else 7
    with pytest.raises(
        ValueError,
        match=rf"in the last 13 steps, to step 20: .*; went back to step 7, .*checkpoint-{newest}",
    ) as mistake:
        train(config)
    assert "\n" not in str(mistake.value)
    again, good = Trainer(config), Trainer(replace(config, output_dir=tmp_path / "other"))
    assert again.resume("latest")
    assert (again.finished_steps, int(again.skipped_steps)) == (newest, newest - 7)
    for _ in range(7):
        good.step()
    averages = zip(again.power.averages.values(), good.power.averages.values())
    for ours, theirs in (
        (again.weights, good.weights),
        (again.ema_weights, good.ema_weights),
        *averages,
    ):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for a, b in zip(again.optimizer.state.values(), good.optimizer.state.values()):
        assert all(torch.equal(a[name], tensor) for name, tensor in b.items())


def test_run_without_a_single_good_step_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loop, "build_objective", lambda config: Poisoned(build_objective(config), set(range(100)))
    )
    with pytest.raises(ValueError, match=r"went back to step 0, there is no checkpoint"):
        train(small(tmp_path / "run", steps=100, logging_steps=5))


@pytest.mark.parametrize("end", ["replaced", "partial", "deleted"])
def test_interrupted_save_is_recovered(tmp_path: Path, end: str) -> None:
    """A kill between any two renames of a save leaves a checkpoint of that number, and resuming
    clears the rest."""
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
    """Files stop growing at `size` bytes, as on a full disk: at the smallest, the largest or a
    middle file of a checkpoint."""
    trainer = Trainer(small(tmp_path / "run"))
    trainer.step()
    assert any(path.stat().st_size > size for path in trainer.save().rglob("*"))
    trainer.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(
            ValueError,
            match=r"checkpoint-2 cannot be written.*the newest checkpoint is .*checkpoint-1",
        ):
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
    """Two parts of a batch draw what the whole batch draws: the number of processes changes
    nothing."""
    whole = StepDraws(7, 3, np.arange(32))
    sizes = (2, 12, 2)
    rows = [global_rows(sizes, part, 2) for part in range(2)]
    assert sorted(np.concatenate(rows)) == list(range(32))
    assert rows[1][:2].tolist() == [2, 3]  # the second part's time rows follow the first part's
    assert rows[1][2:14].tolist() == list(range(4 + 12, 4 + 24))
    everything, part_rows = slice(0, 32), slice(0, 16)
    for chosen in rows:
        part = StepDraws(7, 3, chosen)
        assert torch.equal(
            part.normal("noise", part_rows, (1, 4, 4)),
            whole.normal("noise", everything, (1, 4, 4))[chosen],
        )
        assert torch.equal(
            part.uniform("time", part_rows), whole.uniform("time", everything)[chosen]
        )
        assert torch.equal(
            part.integers("depth", part_rows, 3), whole.integers("depth", everything, 3)[chosen]
        )
        assert torch.equal(
            part.bernoulli("label_drop", part_rows, 0.3),
            whole.bernoulli("label_drop", everything, 0.3)[chosen],
        )


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
    assert (
        torch.bincount(draws.integers("depth", rows, 3)).float().div(20_000).sub(1 / 3).abs().max()
        < 0.01
    )
    assert draws.bernoulli("label_drop", rows, 0.1).float().mean().item() == pytest.approx(
        0.1, abs=0.01
    )
    normal = StepDraws(0, 0, np.arange(200)).normal("noise", slice(0, 200), (100,))
    assert normal.mean().abs() < 0.02
    assert normal.std().item() == pytest.approx(1, abs=0.02)


def test_loader_shows_every_image_once_an_epoch() -> None:
    source = open_source("digits")
    loader = Loader(source, seed=1, global_batch=599)
    epochs = [
        torch.cat(
            [loader.batch(step, np.arange(599))[0] for step in range(3 * epoch, 3 * epoch + 3)]
        )
        for epoch in range(2)
    ]
    expected, labels = source.read_many(np.arange(len(source)), np.zeros(len(source), bool))
    for epoch in epochs:
        assert sorted(image.numpy().tobytes() for image in epoch) == sorted(
            image.tobytes() for image in expected
        )
    assert not torch.equal(*epochs)
    images, batch_labels = loader.batch(
        5, np.array([3, 70])
    )  # any rows of any step, without the ones before
    by_image = {image.tobytes(): label for image, label in zip(expected, labels)}
    assert [by_image[image.numpy().tobytes()] for image in images] == batch_labels.tolist()


def test_images_are_mirrored_only_where_the_run_and_the_source_allow_it() -> None:
    source = open_source("digits")
    rows = np.arange(64)
    plain = Loader(source, seed=1, global_batch=64).batch(0, rows)[
        0
    ]  # a mirrored digit is no digit
    source.flippable = True
    mirrored, unmirrored = (
        Loader(source, seed=1, global_batch=64, random_flip=flip).batch(0, rows)[0]
        for flip in (True, False)
    )
    assert torch.equal(plain, unmirrored)
    same = [torch.equal(a, b) for a, b in zip(mirrored, plain)]
    assert 16 < sum(same) < 48
    assert all(torch.equal(a, b.flip(-1)) for a, b, kept in zip(mirrored, plain, same) if not kept)


def test_phases_have_their_own_warm_up_and_decay() -> None:
    """Table 7: 100K steps at 1e-4, 100K at 1e-5, each with 5000 of warm-up from 0 and a cosine to 0
    over its last 10 %."""
    config = RECIPES["celebahq256-b"]
    for phase, peak in enumerate((1e-4, 1e-5)):
        for step in (0, 1, 2500, 4999, 5000, 50_000, 89_999, 90_000, 90_001, 95_000, 99_999):
            expected = (
                peak * min(1, step / 5000)
                if step < 90_000
                else peak * (1 + math.cos(math.pi * (step - 90_000) / 10_000)) / 2
            )
            assert config.learning_rate_at(phase * 100_000 + step) == pytest.approx(
                expected, rel=1e-12, abs=1e-20
            )
    assert config.learning_rate_at(100_000) == 0
    assert (
        config.learning_rate_at(200_000)
        == config.learning_rate_at(10**6)
        == pytest.approx(0, abs=1e-20)
    )
    with pytest.raises(ValueError, match="steps 199999 are not divisible into 2 phases"):
        replace(config, steps=199_999)


def test_recipes_are_those_of_the_paper() -> None:
    for name, config in RECIPES.items():
        assert config.recipe == name
        assert config.output_dir == Path("runs") / name
        assert replace(config) == config  # validates again
        assert parse(["--recipe", name]) == config
    for name, blocks, batch, classes, width, heads, guidance in (
        ("celebahq256-b", (4, 12), 128, 1, 768, 12, None),
        ("imagenet256-b", (4, 12), 256, 1000, 768, 12, 1.5),
        ("imagenet256-xl", (12, 28), 256, 1000, 1152, 16, 1.5),
    ):
        config = RECIPES[name]
        model, group = config.model, 8 if name == "imagenet256-xl" else 4
        assert ((model.depth_min, model.depth), model.num_classes, model.hidden_size) == (
            blocks,
            classes,
            width,
        )
        assert (model.num_heads, model.depth_group, model.patch_size, model.mlp_ratio) == (
            heads,
            group,
            2,
            4.0,
        )
        assert (
            config.train_batch_size,
            config.guidance_scale,
            config.length_consistency_every,
        ) == (batch, guidance, 8)
        assert (
            config.steps,
            config.learning_rate,
            config.later_learning_rates,
            config.warmup_steps,
        ) == (200_000, 1e-4, (1e-5,), 5000)
        assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.ema_decay) == (
            0.9,
            0.999,
            0.1,
            0.999,
        )
    cifar10 = RECIPES["cifar10"]
    assert sum(p.numel() for p in DiT(cifar10.model).parameters()) * 2 <= 16e6
    assert all(size % len(cifar10.model.depths) == 0 for size in cifar10.row_sizes().values())


def test_dropout_is_that_of_the_network() -> None:
    assert parse(["--dropout", "0.2"]).model_config().dropout == 0.2
    assert parse(["--model.dropout", "0.3"]).model_config().dropout == 0.3
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        replace(RECIPES["digits"], dropout=1.0)


def test_every_option_is_explained_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = "".join(
        line.strip("│╭╰─ ╮╯").ljust(2) + "\n" for line in capsys.readouterr().out.splitlines()
    )
    options = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(TrainConfig)
        if field.name not in ("model", "mean_velocity")
    ]
    for name, parts in (("model", DiTConfig), ("mean-velocity", MeanVelocityOptions)):
        options += [f"--{name}.{field.name.replace('_', '-')}" for field in fields(parts)]
    entries = {entry.split()[0].rstrip(","): entry for entry in re.split(r"\n(?=--)", text)}
    for option in options:
        entry = entries[option]
        said = re.sub(r"^\S+.*?(\s{2,}|\n)", "", entry, count=1)
        assert "(default: " in entry, option
        assert len(said.split("(default: ")[0].split()) >= 2, (
            f"{option} has no explanation: {entry!r}"
        )


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--learning-rat", "--learning-rate"),
        ("--train_batch_sise=3", "--train-batch-size"),
        ("--model.dept", "--model.depth"),
    ],
)
def test_unknown_option_names_the_nearest(
    option: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option]) == 2
    error = capsys.readouterr().err
    assert f"perhaps {near}" in error
    assert len(error.strip().splitlines()) == 1


def test_recipe_is_the_default_that_options_override() -> None:
    config = parse(["--recipe", "digits", "--model.depth", "8", "--learning_rate", "0.5"])
    assert config == replace(
        RECIPES["digits"], model=replace(RECIPES["digits"].model, depth=8), learning_rate=0.5
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train-batch-size", "20"], "train_batch_size 20 is not divisible by"),
        (["--model.depth-min", "16"], "depth_min 16 is above depth 12"),
        (["--model.depth", "10"], "depth 10 is not depth_min + k*depth_group"),
        (["--denoise-timesteps", "100"], "denoise_timesteps must be a power of 2"),
        (["--ema-decay", "1.5"], "ema_decay must be a number from 0 to 1"),
        (["--model.num-classes", "3"], "--model.num-classes 10"),
        (["--resume-from-checkpoint", "nowhere"], "nowhere"),
        (["--no-such-option"], "no-such-option"),
        (["--recipe", "imaginary"], "imaginary"),
    ],
)
def test_mistake_is_one_short_message(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_accelerate_launch_trains(tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--cpu",
        "--mixed_precision",
        "bf16",
        "train/main.py",
        "--steps",
        "2",
        "--train-batch-size",
        "16",
    ]
    command += [
        "--model.hidden-size",
        "16",
        "--output-dir",
        tmp_path / "run",
        "--sampling-steps",
        "2",
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = "runs on cpu in bf16 mixed precision, batch 16 (1 process x 1 accumulation step x 16)"
    assert told in done.stdout
    assert load_model(tmp_path / "run").config.hidden_size == 16
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
