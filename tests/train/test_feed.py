"""What workers make ahead is what a process makes itself, in its order, and they end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from odelt_fast.images import open_source
from odelt_fast.images.digits import DigitsSource
from odelt_fast.images.shards import LatentWriter
from odelt_fast.images.sources import ImageSource
from odelt_fast.model import DiT
from odelt_fast.train import loop, main
from odelt_fast.train.checkpoints import checkpoints
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.data import Loader
from odelt_fast.train.draws import StepDraws, generator, normal
from odelt_fast.train.feed import Feed, Packed, Share
from odelt_fast.train.loop import Trainer
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.pairs import PairSource, generate_pairs
from odelt_fast.train.objectives.targets import Networks, StepBatch
from odelt_fast.train.run import train
from tests.helpers.serving import HANG
from tests.helpers.training import ALONE, SMALL, SMALLER, small_run
from tests.images.test_images import class_folders, encode, picture, rows, write_parquet
from tests.images.test_webdataset import samples, written

ROWS = slice(0, 6)


def latents(folder: Path, std: float = 1.0) -> str:
    writer = LatentWriter(folder, 4, 3, ["a", "b"], shard_length=7)
    moments = np.random.default_rng(0).standard_normal((20, 2, 2, 4, 3, 3), np.float32)
    moments[:, :, 1] *= std
    writer.append(moments, np.arange(20) % 2)
    writer.finish()
    return str(folder)


def pairs(folder: Path) -> PairSource:
    config = small_run(
        folder, model=SMALLER, objective="reflow", pairs=folder / "pairs", num_pairs=20
    )
    return PairSource(generate_pairs(DiT(replace(SMALLER, sampling="flow")), config, ALONE))


def saved(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    values = {"img": rows(4), "label": [0, 1, 1, 0]}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(folder)
    return str(folder)


def arrays(path: Path) -> str:
    np.savez_compressed(path, np.stack([np.asarray(picture(i)) for i in range(9)]))
    return str(path)


def lance_table(path: Path) -> str:
    import pyarrow as pa

    images, labels = [encode(picture(i)) for i in range(7)], [i % 3 for i in range(7)]
    table = pa.table({"image": images, "label": labels})
    pytest.importorskip("lance").write_dataset(table, str(path))
    return str(path)


SOURCES: dict[str, Callable[[Path], str | ImageSource]] = {
    "digits": lambda folder: "digits",
    "folder": lambda folder: str(class_folders(folder, {"a": 9, "b": 8})),
    "table": lambda folder: str(write_parquet(folder / "x.parquet", rows(7), [0] * 7, ["a"])),
    "lance": lambda folder: lance_table(folder / "x.lance"),
    "shards": lambda folder: written(folder / "x.tar", samples(range(6))),
    "saved": lambda folder: saved(folder / "saved"),
    "arrays": lambda folder: arrays(folder / "x.npz"),
    "latents": lambda folder: latents(folder / "latents"),
    "pairs": pairs,
}


def share_of(source: ImageSource, seed: int = 3, count: int = 1) -> Share:
    sizes, parts = (2, 3, 1), 2 * count
    loader = Loader(source, seed, sum(sizes) * parts)
    return Share(loader, sizes, first=count, count=count, parts=parts, stratified=True)


def numbers(batch: StepBatch) -> list[torch.Tensor]:
    """All kinds of a step's numbers."""
    draws, shape = batch.draws, batch.images.shape[1:]
    drawn = [draws.normal("noise", ROWS, shape), draws.uniform("time", ROWS)]
    drawn += [draws.integers("step_index", slice(0, 2), 7), draws.integers("depth", ROWS, 2)]
    return [batch.images, batch.labels, *drawn, draws.bernoulli("label_drop", slice(2, 6), 0.4)]


@contextlib.contextmanager
def fed(share: Share, workers: int, prefetch: int = 2) -> Iterator[Feed]:
    feed = Feed(share, workers, prefetch)
    try:
        yield feed
    finally:
        feed.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", SOURCES)
def test_workers_read_every_kind_of_data(name: str, tmp_path: Path) -> None:
    data = SOURCES[name](tmp_path)
    share = share_of(data if isinstance(data, ImageSource) else open_source(data))
    alone = Feed(share, 0, 2)
    with fed(share, 1, 1) as ahead:
        for step in range(3):
            ((ours,), (theirs,)) = (tuple(feed.parts(step)) for feed in (ahead, alone))
            assert all(map(torch.equal, numbers(ours), numbers(theirs)))


def test_steps_come_in_order_from_any_number_of_workers_and_any_step_on(tmp_path: Path) -> None:
    share = share_of(open_source(latents(tmp_path / "latents")), count=2)
    alone = Feed(share, 0, 2)
    with fed(share, 2) as ahead:
        for step in (*range(5, 15), 7, 8):  # what is not the next one begins anew
            ours, theirs = ([*feed.parts(step)] for feed in (ahead, alone))
            assert len(ours) == len(theirs) == 2
            for a, b in zip(ours, theirs):
                assert all(map(torch.equal, numbers(a), numbers(b)))
                assert a.step == a.draws.step == step
        assert not a.draws.made.keys() - b.draws.asked - {"images", "labels"}
        assert a.draws.made.keys() >= b.draws.asked  # of a step that began anew, too


@pytest.mark.parametrize("stream", ["noise", "posterior"])
def test_draws_of_all_rows_are_those_of_each(stream: str) -> None:
    """Which runs of versions before drew."""
    chosen = np.array([5, 0, 2**40, 7])
    drawn = normal(2**63 + 1, stream, 9, chosen, (3, 2, 5))
    for row, values in zip(chosen, drawn):
        alone = generator(2**63 + 1, stream, 9, int(row))
        assert np.array_equal(values, alone.standard_normal((3, 2, 5), np.float32))


def test_latents_are_sampled_as_row_by_row(tmp_path: Path) -> None:
    source = open_source(latents(tmp_path / "latents"))
    images, labels = Loader(source, 4, 16).batch(3, np.arange(16))
    epoch, order = 3 * 16 // 20, [generator(4, "order", e).permutation(20) for e in range(4)]
    flips = generator(4, "flip", 3).random(16) < 0.5
    assert 0 < flips.sum() < 16
    assert epoch == 2
    for row in range(16):
        index = int(order[(48 + row) // 20][(48 + row) % 20])
        mean, std = source.moments(index, bool(flips[row]))
        noise = generator(4, "posterior", 3, row).standard_normal(mean.shape, np.float32)
        latent = (mean + std * noise) * np.float32(source.latents.scale)
        assert np.array_equal(images[row].numpy(), latent)
        assert labels[row] == source.labels[index]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "shortcut": {},
    "guided shortcut": {"objective": "shortcut", "guidance_scale": 1.5},
    "shortcut of the reference": {"objective": "shortcut", "compat": "reference"},
    "shortcut-models": {"objective": "shortcut-models"},
    "flow": {"objective": "flow", "path": "independent"},
    "flow of one class": {"objective": "flow", "model": replace(SMALL, num_classes=1)},
    "mean-flow": {"objective": "mean-flow"},
    "mean-flow that is told a scale": {
        "objective": "mean-flow",
        "model": replace(SMALL, guidance_max=4.0),
    },
    "alpha-flow": {"objective": "alpha-flow", "guidance_scale": 1.5},
    "live-reflow": {"objective": "live-reflow", "depth_sampling": "stratified"},
    "reflow": {"objective": "reflow", "pairs": Path("pairs")},
    "consistency": {"objective": "consistency"},
    "consistency-distillation": {"objective": "consistency-distillation", "init_from": "model"},
    "progressive": {"objective": "progressive", "init_from": "model"},
    "diffusion": {"objective": "diffusion", "times": "continuous"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_draws_nothing_that_the_steps_before_drew(name: str, tmp_path: Path) -> None:
    """So that workers make it."""
    config = small_run(tmp_path, steps=100, **OBJECTIVES[name])
    objective, classes = build_objective(config), config.model.num_classes
    stratified = config.depth_sampling == "stratified"
    loader = Loader(open_source("digits"), 0, 16)
    share = Share(loader, tuple(config.row_sizes().values()), 0, 1, 1, stratified)

    def network(x: torch.Tensor, *others: Any, **told: Any) -> torch.Tensor:
        return x / 2

    networks = Networks(network, network, network)
    asked: set[Any] = set()
    for step in (0, 1, 99):
        made = [*share.made(step, tuple(asked))]
        (ours,) = share.batches(step, made)
        (theirs,) = share.batches(step, share.made(step))
        if name == "reflow":
            ours, theirs = (replace(b, images=b.images.repeat(1, 2, 1, 1)) for b in (ours, theirs))
        a, b = (
            objective(networks, replace(batch, labels=batch.labels % classes))
            for batch in (ours, theirs)
        )
        for ours_of, theirs_of in zip((a.x_t, a.t, a.y), (b.x_t, b.t, b.y)):
            assert torch.equal(ours_of, theirs_of)
        assert torch.equal(a.velocity, b.velocity)
        assert not asked or made[0].keys() >= ours.draws.asked == asked
        asked = theirs.draws.asked
    assert len(asked) >= 1


def run_of(folder: Path, **changes: Any) -> TrainConfig:
    tiny = {"model": replace(SMALLER, dropout=0.1), "train_batch_size": 8}
    return small_run(
        folder, **tiny, **{"length_consistency_every": 4, "time_consistency_every": 4} | changes
    )


def losses(trainer: Trainer, steps: int) -> list[torch.Tensor]:
    return [trainer.step() for _ in range(steps)]


def test_a_run_is_bitwise_the_same_with_workers_and_resumed(tmp_path: Path) -> None:
    parts = {"gradient_accumulation_steps": 2, "steps": 9, "objective": "mean-flow"}
    alone = Trainer(run_of(tmp_path / "alone", **parts))
    expected = losses(alone, 9)
    first = Trainer(run_of(tmp_path / "run", dataloader_num_workers=2, **parts))
    found = losses(first, 4)
    first.save()
    first.feed.close()
    again = Trainer(run_of(tmp_path / "run", dataloader_num_workers=1, prefetch=3, **parts))
    assert again.resume("latest")
    found += losses(again, 5)
    again.feed.close()
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, again.weights.values(), alone.weights.values()))
    assert not multiprocessing.active_children()


def test_a_killed_worker_ends_the_run_with_one_line_and_latest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_of(tmp_path / "run", steps=40, checkpointing_steps=3)
    train(replace(config, output_dir=tmp_path / "whole"))
    step = Trainer.step

    def killing(trainer: Trainer) -> torch.Tensor:
        if trainer.finished_steps == 7:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", killing)
    monkeypatch.setattr(main, "parse", lambda arguments, prog: config)
    config = replace(config, dataloader_num_workers=2)
    capfd.readouterr()
    assert main.main([]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "which made batches, was killed by SIGKILL, as for want of memory: go on with" in said[0]
    assert not multiprocessing.active_children()
    kept = checkpoints(config.output_dir)
    assert kept
    assert all(path in kept for path in config.output_dir.glob("checkpoint-*"))
    monkeypatch.setattr(Trainer, "step", step)
    train(replace(config, resume_from_checkpoint="latest"))
    for name in ("model.safetensors", "checkpoint-40/model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("run", "whole"))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert not multiprocessing.active_children()


class Killing:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _die, ()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(DigitsSource):
    """Kills the worker that it is sent to; what follows is sent to nobody."""

    def __init__(self, size: int) -> None:
        super().__init__(8, 1)
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ([Killing(), bytes(self.size)],)


@pytest.mark.parametrize(
    ("when", "workers", "why"),
    [
        ("while it starts", 1, "worker process ended as soon as|was killed by SIGKILL"),
        ("while it is sent much", 2, "worker process cannot be started"),
        ("once it is started", 2, "was killed by SIGKILL"),
    ],
)
def test_a_worker_that_is_killed_early_ends_the_run_with_one_line_and_latest_goes_on(
    when: str,
    workers: int,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = run_of(tmp_path / "run", checkpointing_steps=3)
    train(replace(config, output_dir=tmp_path / "whole"))
    first = Trainer(config)
    losses(first, 3)
    first.save()
    config = replace(config, resume_from_checkpoint="latest", dataloader_num_workers=workers)
    monkeypatch.setattr(main, "parse", lambda arguments, prog: config)
    with monkeypatch.context() as patch:
        if when == "once it is started":
            begin = Feed._start

            def killing(feed: Feed, step: int) -> None:
                begin(feed, step)
                feed._processes[-1].kill()

            patch.setattr(Feed, "_start", killing)
        else:
            source = Deadly(1 << 24 if "much" in when else 0)
            patch.setattr(loop, "open_images", lambda config: source)
        capfd.readouterr()
        assert main.main([]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(why, said[0])
    assert "go on with --resume-from-checkpoint latest" in said[0]
    assert not multiprocessing.active_children()
    assert main.main([]) == 0
    for name in ("model.safetensors", "checkpoint-8/model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("run", "whole"))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def session(leader: int) -> set[int]:
    """The processes of a session that live."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.add(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("end", ["every process is asked to end", "the run is killed"])
def test_no_worker_outlives_its_run(end: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "odelt_fast.cli", "train", "--output-dir", str(run)]
    command += ["--dataloader-num-workers", "2", "--train-batch-size", "16", "--log-with"]
    command += ["--model.hidden-size=16", "--model.num-heads=2", "--checkpointing-steps=5"]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + HANG
        while not (run.exists() and checkpoints(run)) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert len(session(process.pid)) >= 4  # with the server that they are forked from
        if end == "the run is killed":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(HANG)
        log.seek(0)
        assert code == (-signal.SIGKILL if end == "the run is killed" else 75), log.read()
        while session(process.pid):
            assert time.monotonic() < until, session(process.pid)
            time.sleep(0.05)
    finally:
        for left in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        log.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_lie_pinned_for_a_gpu(tmp_path: Path) -> None:
    trainer = Trainer(run_of(tmp_path / "run", dataloader_num_workers=2))
    assert trainer.config.dataloader_num_workers == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6):
            (batch,) = trainer.feed.parts(step)
            drawn = numbers(batch)
            assert all(tensor.is_pinned() for tensor in (drawn if step > 4 else drawn[:2]))
            assert batch.to(trainer.accelerator.device).images.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.feed.close()


def test_what_a_worker_finds_is_said_as_if_the_run_had_found_it(tmp_path: Path) -> None:
    """A latent that has become unreadable is a warning, ten neighbours a mistake."""
    source = open_source(latents(tmp_path / "latents"))
    share = share_of(source)
    shard = tmp_path / "latents" / "moments-00000.npy"
    values = np.load(shard)
    values[2] = np.nan
    np.save(shard, values)
    with fed(share, 1) as feed, pytest.warns(UserWarning, match="row 2 of moments-00000.npy has"):
        [[*feed.parts(step)] for step in range(10)]
    for path in (tmp_path / "latents").glob("moments*"):
        np.save(path, np.full_like(np.load(path), np.nan))
    for workers in (0, 1):
        with fed(share, workers) as feed, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="8 neighbours have become unreadable") as mistake:
                [*feed.parts(0)]
        assert "\n" not in str(mistake.value)


def test_a_step_is_packed_without_loss() -> None:
    parts = [
        {
            "images": torch.randn(3, 2, 2),
            "kept": torch.tensor([True, False, True]),
            0: torch.ones(0),
        },
        {"images": torch.randn(1, 1), "labels": torch.arange(5), "one": torch.tensor(7.5)},
    ]
    packed = Packed.of(parts)
    assert packed.buffer.is_shared()
    for ours, theirs in zip(packed.tensors(), parts, strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor)
            assert ours[key].dtype == tensor.dtype


def test_a_run_that_fails_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(trainer: Trainer, *arguments: Any) -> None:
        assert len(multiprocessing.active_children()) == 1
        raise RuntimeError("as a fault of ours")

    monkeypatch.setattr(Trainer, "_accumulate", failing)
    with pytest.raises(RuntimeError, match="as a fault of ours"):
        train(run_of(tmp_path / "run", dataloader_num_workers=1))
    assert not multiprocessing.active_children()


def test_options_of_workers_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--prefetch has no effect without workers"):
        Trainer(run_of(tmp_path, prefetch=3))
    for wrong in ({"dataloader_num_workers": -1}, {"prefetch": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number from"):
            run_of(tmp_path, **wrong)


def test_draws_made_ahead_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second round of a worker on."""
    share = share_of(open_source("digits"))
    with fed(share, 1, 1) as feed:
        for step in range(2):
            (batch,) = feed.parts(step)
            numbers(batch)
        monkeypatch.setattr(StepDraws, "make", None)
        for step in range(2, 5):
            (batch,) = feed.parts(step)
            numbers(batch)
