"""A run destroys no work: branches that are left, folders in use, damaged checkpoints, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from odelt_fast.train.checkpoints import checkpoints, set_aside
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import STOPPED
from odelt_fast.train.run import RunStopped, train
from odelt_fast.train.run_lock import held
from tests.helpers.training import SMALL, small_run

TINY: dict[str, Any] = {
    "model": replace(SMALL, depth=2, depth_min=1, depth_group=1),
    "train_batch_size": 8,
    "length_consistency_every": 4,
    "time_consistency_every": 4,
}


def run_of(folder: Path, **changes: Any) -> TrainConfig:
    return small_run(folder, **{**TINY, **changes})


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_after_a_rollback_later_checkpoints_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = {"checkpoints_total_limit": 4, "ema_widths": (0.1,), "ema_snapshot_steps": 5}
    train(run_of(run, steps=20, checkpointing_steps=5, **options))
    assert names(run) == [f"checkpoint-{n}" for n in (5, 10, 15, 20)]
    left = {n: weights(run / f"checkpoint-{n}" / "ema") for n in (10, 20)}
    start = str(run / "checkpoint-5")
    branch = run_of(run, steps=14, checkpointing_steps=2, learning_rate=1e-4, **options)
    train(replace(branch, resume_from_checkpoint=start))
    assert names(run) == [f"checkpoint-{n}" for n in (8, 10, 12, 14)]
    aside = run / "abandoned-1"
    assert names(aside) == [f"checkpoint-{n}" for n in (10, 15, 20)]
    assert sorted(path.name for path in (aside / "ema-snapshots").glob("*/*")) == [
        "step-10",
        "step-15",
        "step-20",
    ]
    for n, tensors in left.items():
        kept = weights(aside / f"checkpoint-{n}" / "ema")
        assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    said = capsys.readouterr().out
    assert "back at step 5" in said
    assert "abandoned-1" in said
    # `latest` is the new branch, and nothing more is set aside
    train(replace(branch, steps=16, resume_from_checkpoint="latest"))
    assert names(run)[-1] == "checkpoint-16"
    assert not (run / "abandoned-2").exists()
    assert set_aside(run, 14) == run / "abandoned-2"


def test_what_was_just_written_is_never_deleted(tmp_path: Path) -> None:
    """Even where higher numbers are there."""
    trainer = Trainer(run_of(tmp_path, checkpoints_total_limit=1))
    for _ in range(3):
        trainer.step()
    later = trainer.save()
    early = Trainer(run_of(tmp_path, checkpoints_total_limit=1))
    early.step()
    assert early.save().is_dir()
    assert later.is_dir()


def test_a_fresh_run_does_not_take_a_used_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    config = run_of(run, steps=4, checkpointing_steps=2)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(ValueError, match="holds the checkpoints of a run, the newest checkpoint-4"):
        train(replace(config, seed=1))
    mine = run / ".run.lock"
    after = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
    assert {**before, mine: 0} == {**after, mine: 0}
    train(replace(config, output_dir=other))
    with pytest.raises(ValueError, match="holds the checkpoints of a run"):
        train(replace(config, resume_from_checkpoint=str(other / "checkpoint-2")))
    train(replace(config, steps=2, seed=1, overwrite_output_dir=True))
    assert names(run) == ["checkpoint-2"]
    capsys.readouterr()
    train(replace(config, steps=1, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    assert "has 2 steps already, more than --steps 1" in said
    assert "EMA weights of 2 steps in" in said


HOLD = """
import sys, time
from pathlib import Path
from odelt_fast.train.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time_has_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(ValueError, match=f"in use by a run, process {first.pid} on"):
            train(run_of(run))
        assert names(run) == []
        first.kill()
    with held(run) as remark:
        assert remark is not None
        assert str(first.pid) in remark
    with held(run) as remark:
        assert remark is None


@pytest.mark.parametrize(
    "content",
    ['{"pid": 1, "host": "another"}', "{", "[]", '{"pid": "x"}', "", '{"pid": 4000000, "host": 3}'],
)
def test_a_stale_lock_is_no_lock(tmp_path: Path, content: str) -> None:
    (tmp_path / ".run.lock").write_text(content)
    with held(tmp_path):
        values = json.loads((tmp_path / ".run.lock").read_text())
        assert values["pid"] == os.getpid()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of its steps 1, 2 and 3, and a tracked average."""
    folder = tmp_path_factory.mktemp("three") / "run"
    train(
        run_of(
            folder, steps=3, checkpointing_steps=1, checkpoints_total_limit=None, ema_widths=(0.1,)
        )
    )
    return folder


def copied(run: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, target / "run"))


FILES = (
    *("model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json"),
    *("ema/model.safetensors", "ema/config.json", "power-0.1/model.safetensors"),
)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:64] = bytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, id=f"{name}-{damage.__name__}")
        for name in FILES
        for damage in (cut, empty, scramble, Path.unlink)
        # torch reads a zip archive from its end: the beginning is no part of the values
        if (name, damage) != ("random_states_0.pkl", scramble)
    ],
)
def test_latest_is_the_newest_whole_checkpoint(
    three: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copied(three, tmp_path)
    damage(run / "checkpoint-3" / name)
    config = run_of(run, ema_widths=(0.1,))
    gone = name == "state.json" and damage is Path.unlink  # an unfinished folder: none at all
    if not gone:
        with pytest.raises(ValueError, match="checkpoint-3 is damaged"):
            Trainer(config).resume(str(run / "checkpoint-3"))
    capsys.readouterr()
    trainer = Trainer(config)
    assert trainer.resume("latest")
    assert trainer.finished_steps == 2
    said = capsys.readouterr().out
    assert gone or "checkpoint-3 is damaged" in said
    assert gone or names(run / "abandoned-1") == ["checkpoint-3"]
    whole = Trainer(replace(config, output_dir=tmp_path / "other"))
    assert whole.resume(str(three / "checkpoint-2"))
    assert torch.equal(trainer.step(), whole.step())


@pytest.mark.parametrize("size", ["7", None, 1.5, True, []])
def test_a_hostile_state_is_damage(three: Path, tmp_path: Path, size: object) -> None:
    run = copied(three, tmp_path)
    state = run / "checkpoint-3" / "state.json"
    values = json.loads(state.read_text())
    for files in ({"model.safetensors": size}, {"../checkpoint-2/state.json": 1}):
        state.write_text(json.dumps({**values, "files": files}))
        with pytest.raises(ValueError, match="checkpoint-3 is damaged"):
            Trainer(run_of(run, ema_widths=(0.1,))).resume(str(state.parent))


def test_want_of_memory_is_no_damage(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(three, tmp_path)
    trainer = Trainer(run_of(run, ema_widths=(0.1,)))
    for error in (torch.OutOfMemoryError("full"), PermissionError("no"), OSError(24, "files")):

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(trainer.saver, "_load", failing)
        with pytest.raises(type(error)):
            trainer.resume("latest")
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_when_every_checkpoint_is_damaged(three: Path, tmp_path: Path) -> None:
    run = copied(three, tmp_path)
    for folder in checkpoints(run):
        empty(folder / "optimizer.bin")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        train(run_of(run, ema_widths=(0.1,), resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": replace(TINY["model"], hidden_size=32)}, "a model with hidden_size 16, this"),
        ({"model": replace(TINY["model"], depth=3)}, "a model with depth 2, this run's has 3"),
        ({"objective": "shortcut-models"}, "is of objective shortcut, this run's is"),
        ({"ema_widths": (0.2,)}, "holds no average of width 0.2"),
    ],
)
@pytest.mark.parametrize("name", ["latest", "checkpoint-3"])
def test_a_checkpoint_of_another_run_is_refused(
    three: Path, tmp_path: Path, changes: dict[str, Any], message: str, name: str
) -> None:
    run = copied(three, tmp_path)
    given = name if name == "latest" else str(run / name)
    with pytest.raises(ValueError, match=message):
        Trainer(run_of(run, **{"ema_widths": (0.1,), **changes})).resume(given)
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_checkpoints_of_the_version_before_are_taken(three: Path, tmp_path: Path) -> None:
    run = copied(three, tmp_path)
    for folder in checkpoints(run):
        state = json.loads((folder / "state.json").read_text())
        old = {name: state[name] for name in ("finished_steps", "skipped_steps")}
        (folder / "state.json").write_text(json.dumps(old))
    trainer = Trainer(run_of(run, ema_widths=(0.1,)))
    assert trainer.resume("latest")
    assert trainer.finished_steps == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path / "run", steps=6, checkpointing_steps=100)
    train(replace(config, output_dir=tmp_path / "whole"))
    step, handlers = Trainer.step, [signal.getsignal(each) for each in (number, signal.SIGINT)]

    def stepping(trainer: Trainer) -> torch.Tensor:
        if trainer.finished_steps == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the second changes nothing
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stepping)
        with pytest.raises(RunStopped, match=r"after step 3: .*checkpoint-3"):
            train(config)
    assert [signal.getsignal(each) for each in (number, signal.SIGINT)] == handlers
    assert names(tmp_path / "run") == ["checkpoint-3"]
    train(replace(config, resume_from_checkpoint="latest"))
    assert same(tmp_path / "run", tmp_path / "whole")


def test_the_command_ends_with_a_code_that_says_go_on(tmp_path: Path) -> None:
    """A real process, and what schedulers do to it."""
    program = (
        "import os, signal, sys\nfrom odelt_fast.train.loop import Trainer\n"
        "from odelt_fast.train.main import main\nstep = Trainer.step\n"
        "def stepping(trainer):\n"
        "    if trainer.finished_steps == 1: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return step(trainer)\n"
        "Trainer.step = stepping\nsys.exit(main(sys.argv[1:]))\n"
    )
    run = tmp_path / "run"
    options = ["--model.hidden-size=16", "--model.num-heads=2", "--model.depth=2"]
    options += ["--model.depth-min=1", "--model.depth-group=1", "--train-batch-size=8"]
    options += ["--steps=50", "--sampling-steps=0", f"--output-dir={run}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == STOPPED == 75, done.stderr
    assert "go on with --resume-from-checkpoint latest" in done.stderr.splitlines()[-1]
    assert names(run) == ["checkpoint-2"]


def test_every_file_has_the_mode_of_the_users_mask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        train(run_of(tmp_path / "run", steps=1, ema_widths=(0.1,)))
    finally:
        os.umask(before)
    found = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    assert set(found.values()) == {"0o664"}, found
