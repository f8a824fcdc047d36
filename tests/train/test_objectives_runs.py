"""Reflow's pairs, teachers and starting weights, the options that choose an objective, and a few
steps of each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.draws import StepDraws
from odelt_fast.train.loop import Trainer
from odelt_fast.train.methods import SAMPLING, WITH_TIME_ROWS
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.flow_matching import Reflow
from odelt_fast.train.objectives.pairs import PairSource, generate_pairs
from odelt_fast.train.objectives.targets import Networks, StepBatch
from odelt_fast.train.objectives.teacher import start_from
from tests.helpers.reference_cases import relative_error
from tests.helpers.training import ALONE, SMALL, small_run


@pytest.fixture(scope="module")
def teacher() -> DiT:
    torch.manual_seed(0)
    model = DiT(replace(SMALL, sampling="flow", step_conditioned=False))
    torch.nn.init.normal_(model.final_layer.out.weight, std=0.1)
    return model.eval()


def pairs(
    teacher: DiT, folder: Path, count: int, state: Any = ALONE, **options: object
) -> PairSource:
    """Makes `count` pairs in `folder`. state: what accelerate says of the processes."""
    config = TrainConfig(
        model=SMALL,
        objective="reflow",
        pairs=folder,
        num_pairs=count,
        length_consistency_every=0,
        **options,
    )
    return PairSource(generate_pairs(teacher, config, state))


def test_pairs_are_the_teacher_s_euler_solutions(teacher: DiT, tmp_path: Path) -> None:
    options = {"denoise_timesteps": 4, "label_dropout": 0.3, "seed": 4}
    source = pairs(teacher, tmp_path / "pairs", 10, train_batch_size=4, **options)
    images, labels = source.read_many(np.arange(10))
    assert (len(source), source.channels, source.image_size, source.num_classes, images.shape) == (
        10,
        1,
        8,
        10,
        (10, 2, 8, 8),
    )
    x, y = torch.from_numpy(images[:, :1]), torch.from_numpy(labels)
    with torch.no_grad():
        for i in range(4):
            x = x + teacher(x, i / 4, 2, y) / 4
    assert relative_error(torch.from_numpy(images[:, 1:]), x) < 1e-5
    assert images[:, 0].std() == pytest.approx(1, abs=0.1)
    # pair i depends on the seed and i alone, not on the batches or the number of pairs
    other = pairs(teacher, tmp_path / "other", 7, train_batch_size=7, **options)
    np.testing.assert_allclose(other.read_many(np.arange(7))[0], images[:7], rtol=1e-4, atol=1e-5)
    batch = StepBatch(torch.from_numpy(images), y, StepDraws(0, 0, np.arange(10)), 0)
    targets = Reflow(10)(Networks(teacher, teacher), batch)
    torch.testing.assert_close(
        targets.x_t,
        torch.lerp(
            torch.from_numpy(images[:, :1]),
            torch.from_numpy(images[:, 1:]),
            targets.t[:, None, None, None],
        ),
    )
    assert torch.equal(targets.velocity, torch.from_numpy(images[:, 1:] - images[:, :1]))
    assert torch.equal(targets.y, y)


@pytest.mark.parametrize(("sampling", "index"), [("shortcut", 2), ("flow", 7), ("live_reflow", 7)])
def test_pairs_ask_a_teacher_for_the_step_index_that_it_knows(
    teacher: DiT, tmp_path: Path, sampling: str, index: int
) -> None:
    model = DiT(replace(teacher.config, sampling=sampling, step_conditioned=True))
    torch.nn.init.normal_(model.final_layer.out.weight)
    torch.nn.init.normal_(model.step_embed.linear_out.weight)
    source = pairs(model, tmp_path / "pairs", 3, denoise_timesteps=4)
    images, labels = source.read_many(np.arange(3))
    x = torch.from_numpy(images[:, :1])
    with torch.no_grad():
        for i in range(4):
            x = x + model(x, i / 4, index, torch.from_numpy(labels)) / 4
    assert relative_error(torch.from_numpy(images[:, 1:]), x) < 1e-5


def test_unfinished_pairs_never_stand_under_the_name_of_the_folder(
    teacher: DiT, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    calls = 0

    def dies(*inputs: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise Interrupted
        return DiT.forward(teacher, *inputs, **options)

    stub = DiT(teacher.config)
    stub.forward = dies  # the real network, interrupted in the second batch
    with pytest.raises(Interrupted):
        pairs(stub, tmp_path / "pairs", 8, denoise_timesteps=4, train_batch_size=4)
    assert not (tmp_path / "pairs").exists()
    assert len(pairs(teacher, tmp_path / "pairs", 8, denoise_timesteps=4, train_batch_size=4)) == 8
    assert not (tmp_path / "pairs.partial").exists()
    with pytest.raises(ValueError, match="exists"):
        pairs(teacher, tmp_path / "pairs", 8)


def test_killed_pairs_go_on_if_they_are_to_be_the_same(teacher: DiT, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    calls, model = [0], DiT(teacher.config)
    model.load_state_dict(teacher.state_dict())

    def counted(*inputs: object, **options: object) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise Killed
        return DiT.forward(model, *inputs, **options)

    model.forward = counted  # the real network, killed in the third of four batches
    options = {"denoise_timesteps": 2, "train_batch_size": 4}
    whole = pairs(teacher, tmp_path / "whole", 16, **options).read_many(np.arange(16))
    for seeds, calls_after in (((0, 0), 5 + 2 * 2), ((0, 1), 5 + 4 * 2)):
        calls[0], folder = 0, tmp_path / f"{seeds}"
        with pytest.raises(Killed):
            pairs(model, folder, 16, seed=seeds[0], **options)
        found = pairs(model, folder, 16, seed=seeds[1], **options).read_many(np.arange(16))
        assert calls[0] == calls_after
        assert np.array_equal(found[0], whole[0]) == (seeds[1] == 0)
        assert {path.name for path in folder.iterdir()} == {
            *("noise.npy", "data.npy", "labels.npy", "pairs.json")
        }


@pytest.mark.parametrize("processes", [2, 3])
def test_pairs_of_several_processes_are_those_of_one(
    teacher: DiT, tmp_path: Path, processes: int
) -> None:
    """Threads stand for the processes: each makes every n-th batch, and the folder appears when all
    are finished."""
    options = {"denoise_timesteps": 2, "seed": 2, "train_batch_size": 2}
    alone = pairs(teacher, tmp_path / "alone", 11, **options)
    barrier = threading.Barrier(processes)
    made: list[PairSource] = []

    def work(process: int) -> None:
        state = SimpleNamespace(
            process_index=process, num_processes=processes, wait_for_everyone=barrier.wait
        )
        made.append(pairs(teacher, tmp_path / "together", 11, state, **options))

    threads = [threading.Thread(target=work, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == processes
    for source in made:
        for a, b in zip(alone.read_many(np.arange(11)), source.read_many(np.arange(11))):
            assert np.array_equal(a, b)


def damage_shape(folder: Path) -> None:
    np.save(folder / "data.npy", np.zeros((3, 1, 8, 8), np.float32))


def damage_truncated(folder: Path) -> None:
    (folder / "noise.npy").write_bytes((folder / "noise.npy").read_bytes()[:300])


def damage_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.full(4, 11))


def damage_pickled(folder: Path) -> None:
    np.save(folder / "labels.npy", np.array([{}] * 4), allow_pickle=True)


def damage_manifest(folder: Path) -> None:
    (folder / "pairs.json").write_text(json.dumps({"count": 4}))


def damage_missing(folder: Path) -> None:
    (folder / "data.npy").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_shape,
        damage_truncated,
        damage_labels,
        damage_pickled,
        damage_manifest,
        damage_missing,
    ],
)
def test_damaged_pairs_are_refused_in_one_line(
    teacher: DiT, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "pairs"
    pairs(teacher, folder, 4, denoise_timesteps=2)
    damage(folder)
    with pytest.raises(ValueError, match="pairs") as mistake:
        PairSource(folder)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("name", list(SAMPLING))
def test_every_objective_trains_and_says_how_it_is_sampled(
    name: str, teacher: DiT, tmp_path: Path
) -> None:
    start = save_model(teacher, tmp_path / "teacher")
    guided = name not in ("flow", "consistency", "diffusion")
    config = TrainConfig(
        model=SMALL,
        objective=name,
        init_from=str(start),
        pairs=tmp_path / "pairs",
        num_pairs=24,
        denoise_timesteps=4,
        steps=4,
        warmup_steps=0,
        train_batch_size=16,
        guidance_scale=1.5 if guided else None,
        teacher_depth="student",
        output_dir=tmp_path / "run",
    )
    trainer = Trainer(config)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    for _ in range(4):
        assert torch.isfinite(trainer.step()).all()
    assert any(
        not torch.equal(before[key], value) for key, value in trainer.model.state_dict().items()
    )
    save_model(trainer.ema, tmp_path / "trained")
    trained = load_model(tmp_path / "trained").config
    assert (trained.sampling, trained.step_conditioned) == (SAMPLING[name], name in WITH_TIME_ROWS)


def test_pairs_that_are_there_are_not_made_in_another_number(teacher: DiT, tmp_path: Path) -> None:
    start = str(save_model(teacher, tmp_path / "teacher"))
    config = small_run(
        tmp_path / "run",
        objective="reflow",
        init_from=start,
        pairs=tmp_path / "pairs",
        num_pairs=24,
        denoise_timesteps=2,
    )
    assert len(Trainer(config).loader.source) == 24
    with pytest.raises(ValueError, match=r"num_pairs 25 has no effect: .* holds 24 already"):
        Trainer(replace(config, num_pairs=25))
    unsaid = replace(config, num_pairs=TrainConfig.num_pairs)
    assert len(Trainer(unsaid).loader.source) == 24


def test_progressive_teacher_is_replaced_at_the_end_of_a_stage_and_comes_back_on_resume(
    teacher: DiT, tmp_path: Path
) -> None:
    start = save_model(teacher, tmp_path / "teacher")
    config = small_run(
        tmp_path / "run",
        objective="progressive",
        init_from=str(start),
        denoise_timesteps=4,
        steps=6,
        warmup_steps=0,
    )
    first = Trainer(config)
    for _ in range(2):
        first.step()
    assert torch.equal(first.teacher.final_layer.out.weight, teacher.final_layer.out.weight)
    first.step()  # stages are three steps long
    assert torch.equal(first.teacher.final_layer.out.weight, first.ema.final_layer.out.weight)
    first.step()
    first.save()
    again = Trainer(config)
    assert again.resume("latest")
    assert not torch.equal(again.teacher.final_layer.out.weight, teacher.final_layer.out.weight)
    assert torch.equal(first.step(), again.step())


def test_conventional_weights_start_with_an_empty_length_table(teacher: DiT) -> None:
    source = DiT(replace(SMALL, length_conditioned=False))
    model = DiT(SMALL)
    assert "starts at zero" in (start_from(model, source) or "")
    assert not model.length_embed.weight.any()
    assert torch.equal(model.blocks[0].qkv.weight, source.blocks[0].qkv.weight)
    assert start_from(model, teacher) is None
    assert torch.equal(model.length_embed.weight, teacher.length_embed.weight)
    with pytest.raises(ValueError, match=r"length.conditioned"):
        start_from(source, teacher)
    with pytest.raises(ValueError, match=r"hidden_size 32.*--model.hidden-size"):
        start_from(model, DiT(replace(SMALL, hidden_size=32)))


def test_other_classes_start_with_a_new_label_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From ten classes to three, in one line; what else was learnt is kept, and the run trains."""
    source = DiT(replace(SMALL, length_conditioned=False))
    with torch.no_grad():
        source.final_layer.out.weight.normal_()
    save_model(source, tmp_path / "ten")
    data = tmp_path / "data"
    for label, grey in enumerate((0, 128, 255)):
        (data / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((8, 8), grey + (i if grey < 255 else -i), np.uint8)
            Image.fromarray(pixels).save(data / str(label) / f"{i}.png")
    config = small_run(
        tmp_path / "run",
        model=replace(SMALL, num_classes=3),
        init_from=str(tmp_path / "ten"),
        data=str(data),
        steps=2,
    )
    trainer = Trainer(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "init_from" in line]
    assert len(said) == 1
    assert "has 10 classes, this run's 3: the label table starts anew" in said[0]
    assert "length table starts at zero" in said[0]
    table = trainer.model.label_embed.weight
    assert table.shape == (4, 16)
    assert float(table.std()) == pytest.approx(0.02, rel=0.3)
    assert not torch.equal(table, source.label_embed.weight[:4])
    assert torch.equal(trainer.model.final_layer.out.weight, source.final_layer.out.weight)
    assert torch.equal(trainer.ema.label_embed.weight, table)
    assert torch.isfinite(trainer.step()).all()
    with pytest.raises(ValueError, match=r"teacher has num_classes 10.*--model.num-classes 10"):
        Trainer(replace(config, objective="progressive", denoise_timesteps=2))


def test_data_without_classes_train_the_null_label() -> None:
    config = TrainConfig(
        model=replace(SMALL, num_classes=1), train_batch_size=16, label_dropout=0.0
    )
    labels, images = torch.zeros(16, dtype=torch.int64), torch.zeros(16, 1, 8, 8)
    model = DiT(config.model_config())
    batch = StepBatch(images, labels, StepDraws(0, 0, np.arange(16)), 0)
    targets = build_objective(config)(Networks(model, model), batch)
    assert (targets.y == 1).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "flow", "guidance_scale": 1.5}, "no teacher to guide"),
        ({"guidance_scale": 1.5, "model": replace(SMALL, num_classes=1)}, "num_classes is 1"),
        ({"guidance_scale": 1.5, "label_dropout": 0.0}, "--label-dropout"),
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"guidance_scale": 1.5, "train_batch_size": 8}, "train_batch_size"),
        ({"objective": "progressive"}, "--init-from"),
        ({"objective": "consistency-distillation"}, "--init-from"),
        ({"objective": "reflow"}, "--pairs"),
        ({"path": "trigonometric"}, "--objective flow"),
        ({"path_sigma": 2.0}, "path_sigma must be"),
        ({"times": "continuous"}, "--times discrete"),
        ({"objective": "diffusion", "compat": "reference"}, "--compat"),
        ({"objective": "consistency", "steps": 6}, "steps must be"),
        (
            {"objective": "flow", "model": replace(SMALL, sampling="consistency")},
            "--model.sampling",
        ),
        ({"model": replace(SMALL, step_conditioned=False)}, "--model.step-conditioned"),
        ({"num_pairs": 0}, "num_pairs must be"),
        ({"objective": "live-reflow", "train_batch_size": 20}, "time_consistency_every"),
    ],
)
def test_impossible_combination_says_what_to_change(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as mistake:
        TrainConfig(**({"model": SMALL} | options))
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("change", "objective", "says"),
    [
        ({"sampling": "diffusion"}, "consistency-distillation", "diffusion"),
        ({"step_conditioned": True}, "progressive", "--objective flow"),
        ({"length_conditioned": False}, "progressive", "length-conditioned"),
        ({"num_classes": 3}, "consistency-distillation", "--model.num-classes"),
        ({"depth_min": 4}, "consistency-distillation", "--teacher-depth full"),
    ],
)
def test_teacher_that_cannot_teach_is_refused(
    change: dict, objective: str, says: str, teacher: DiT, tmp_path: Path
) -> None:
    start = save_model(DiT(replace(teacher.config, **change)), tmp_path / "teacher")
    config = TrainConfig(
        model=SMALL,
        objective=objective,
        init_from=str(start),
        teacher_depth="student",
        output_dir=tmp_path / "run",
    )
    with pytest.raises(ValueError, match=says):
        Trainer(config)
