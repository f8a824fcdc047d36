"""The study: equal budgets, nothing that is finished is done again, and every number lands in its
cell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study import costs as study_costs
from benchmarks.study import latency as study_latency
from benchmarks.study.__main__ import run
from benchmarks.study.campaign import Options, Study
from benchmarks.study.real import measure_real
from benchmarks.study.report import read_published, write_tables
from benchmarks.study.runs import BY_NAME, DATA_SETS, RUNS
from benchmarks.study.tables import CHANGES, METHODS, tables
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.cells import Cell
from odelt_fast.evaluation.paper import STEPS
from odelt_fast.evaluation.results import number
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.model import DiT
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.main import parse

SMALL = DiTConfig(
    image_size=8,
    channels=1,
    patch_size=4,
    hidden_size=16,
    depth=12,
    depth_min=4,
    depth_group=4,
    num_heads=2,
    num_classes=10,
)


RANDOM = ("odelt", "shortcut", "flow")


def options(folder: Path, **changes: Any) -> Options:
    """A study in the folder, of as few images as the 64 features allow."""
    document = folder / "results.md"
    chosen = {"out": folder / "study", "num_images": 70, "seeds": 1, "seconds": 0.0, "steps": 16}
    return Options(results=folder / "json", documents=(document,), **{**chosen, **changes})


def configs_of(study: Study) -> dict[str, TrainConfig]:
    """What each training is told; those of two phases read their teacher's shapes."""
    teacher = parse(study.training(BY_NAME["teacher"]))
    save_model(DiT(teacher.model_config()), study.out / "teacher")
    return {each.name: parse(study.training(each)) for each in RUNS}


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_every_run_of_a_set_learns_from_equally_many_images_with_the_same_network_and_optimizer(
    name: str, tmp_path: Path
) -> None:
    study = Study(options(tmp_path, set=name, steps=None))
    configs = configs_of(study)
    images = {each: config.steps * config.train_batch_size for each, config in configs.items()}
    whole = {
        each.name: images[each.name] + images.get(each.teacher or "", 0)
        for each in RUNS
        if each.depths
    }
    assert len(whole) == 38
    cheaper = {each for each in whole if BY_NAME[each].cheaper}
    assert cheaper == {"mean-flow-time"}
    assert all(whole[each] < images["odelt"] for each in cheaper)
    assert {whole[each] for each in whole.keys() - cheaper} == {images["odelt"]}
    for config in configs.values():
        main = configs["odelt"]
        assert replace(config.model, length_conditioned=True, depth_group=4) == main.model
        shared = (
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "decay_fraction",
            "ema_decay",
            "ema_warmup",
            "train_batch_size",
            "data",
        )
        assert [getattr(config, field) for field in shared] == [
            getattr(main, field) for field in shared
        ]


def test_runs_are_what_the_papers_tables_compare(tmp_path: Path) -> None:
    study = Study(options(tmp_path))
    configs = configs_of(study)
    assert [configs[each].length_consistency_every for each in ("k0", "odelt", "k4")] == [0, 8, 4]
    assert [configs[each].model.depth_group for each in ("g1", "g2", "odelt")] == [1, 2, 4]
    assert [configs[each].objective for each in METHODS] == [
        *("diffusion", "flow", "progressive", "reflow", "consistency", "live-reflow", "shortcut")
    ]
    assert not any(configs[each].model.length_conditioned for each in METHODS)
    assert (configs["odelt-flow"].times, configs["odelt-flow"].length_consistency_every) == (
        "continuous",
        8,
    )
    repeats = [each for each in RUNS if each.repeats]
    assert {configs[each.name].seed for each in repeats} == {1, 2}
    for each in repeats:
        first, again = configs[each.repeats or ""], configs[each.name]
        assert replace(again, seed=first.seed, output_dir=first.output_dir) == first
    for name, of in CHANGES.items():  # p = 0 leaves out eps, too
        assert configs[of].objective == of
        changed = {
            field.name
            for field in fields(configs[of])
            if getattr(configs[name], field.name) != getattr(configs[of], field.name)
        } - {"output_dir"}
        assert len(changed - {"loss_weight_eps"}) == 1, changed
    guided = study.evaluations(BY_NAME["odelt"])["odelt-guided"]
    assert guided.paper_guidance
    assert guided.steps == (128,)
    assert guided.guidance_scale == 1.5


def test_a_chosen_run_brings_its_teacher_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    study = Study(options(tmp_path, only=("reflow", "k0")))
    assert [each.name for each in study.chosen()] == ["k0", "teacher", "reflow"]
    with pytest.raises(ValueError, match="there is no run 'k8'"):
        Study(options(tmp_path, only=("k8",)))


def test_a_folder_holds_one_budget(tmp_path: Path) -> None:
    Study(options(tmp_path)).bind()
    Study(options(tmp_path, num_images=80)).bind()  # evaluations are bound in folders of their own
    with pytest.raises(ValueError, match="steps 16, not 24"):
        Study(options(tmp_path, steps=24)).bind()


def test_a_killed_study_goes_on_where_it_stood(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.study",
        "--out",
        str(tmp_path),
        "--only",
        "flow",
        "--stages",
        "train",
        "evaluate",
    ]
    command += ["--steps", "3", "--num-images", "70", "--seeds", "1"]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    model, cells = (
        tmp_path / "flow" / "model.safetensors",
        tmp_path / "evaluations" / "flow" / "cells",
    )
    until = time.monotonic() + 900  # bounds a hang
    while not list(cells.glob("*.json")) and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "real.json").exists()  # the kill came before the end
    kept = {path: path.stat().st_mtime_ns for path in (model, *cells.glob("*.json"))}
    assert len(kept) >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((cells.parent / "results.json").read_text())["complete"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose runs are random small networks, evaluated and timed."""
    folder = tmp_path_factory.mktemp("study")
    for index, name in enumerate(RANDOM):
        torch.manual_seed(index)
        model = DiT(replace(SMALL, length_conditioned=not BY_NAME[name].conventional))
        for key, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if "final_layer.out" in key else 0.1)
        save_model(model, folder / "study" / name)
    study = Study(options(folder))
    study.bind()
    for name in RANDOM:
        for each, settings in study.evaluations(BY_NAME[name]).items():
            few = tuple(steps for steps in settings.steps if steps in STEPS)
            study.evaluate(each, replace(settings, steps=few, batch_size=35))
    study.measure_real()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_COUNTED_STEPS", "_STEP_ROUNDS", "_STEPS_A_ROUND"):
            patch.setattr(study_costs, name, 2)
        places = "".join(
            f"<!-- table digits {name} -->\n<!-- end -->\n"
            for name in ("methods", "main", "guided", "odelt", "training")
        )
        (folder / "results.md").write_text(f"# Results\n{places}")
        run(options(folder, latency_only=True, only=RANDOM))
    return folder


def test_fewer_real_images_lie_farther_from_the_others() -> None:
    settings = Evaluation("digits", "digits")
    few, half = (measure_real(settings, num_images=count) for count in (200, None))
    assert few["images"] == half["images"] == 1797
    assert few["recognised"] == half["recognised"] > 0.99
    name = "digits-features Frechet distance"
    assert few[name] > 1.5 * half[name] > 0
    with pytest.raises(ValueError, match="from 2 to 1795, not 1796"):
        measure_real(settings, num_images=1796)


def test_latencies_alone_are_measured_again(small: Path) -> None:
    found = json.loads((small / "study" / "latency.json").read_text())
    timed = found["latency"]
    assert {name: len(rows) for name, rows in timed.items()} == {
        "odelt": 15,
        "odelt-guided": 3,
        "shortcut": 5,
    }
    published = read_published(small / "json" / "study-digits")
    (row,) = [row for row in published["flow"]["rows"] if row["steps"] == 4]
    assert row["latency"] == timed["shortcut"]["l=12 euler T=4"]["median_s"]
    (row,) = [
        row for row in published["odelt"]["rows"] if (row["depth"], row["tolerance"]) == (8, 1e-4)
    ]
    assert row["latency"] == timed["odelt"]["l=8 dopri5 tol=0.0001"]["median_s"]
    assert published["flow"]["settings"]["model"] == "flow"  # not the folder of this machine


def test_a_latency_is_that_of_the_rows_own_depth_and_steps(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    original = Cell.sampler

    def sampler(cell: Cell, model: DiT, settings: Evaluation) -> Sampler:
        made = original(cell, model, settings)
        operation = made.operation
        timed.append((len(model.blocks), operation.depth, operation.steps, operation.tolerance))
        return made

    monkeypatch.setattr(Cell, "sampler", sampler)
    study = Study(options(small))
    results = study.results()["odelt"]
    for row in results["rows"]:
        study_latency._sampling_timer(study, "odelt", results["settings"], row)
    assert timed == [
        (row["depth"], row["depth"], row["steps"], row["tolerance"]) for row in results["rows"]
    ]


def test_passes_of_a_training_step_are_counted(small: Path) -> None:
    costs = json.loads((small / "study" / "costs.json").read_text())["training"]
    assert {name: cost["batch"] for name, cost in costs.items()} == dict.fromkeys(RANDOM, 64)
    assert (costs["flow"]["learnt"], costs["flow"]["targets"]) == (1, 0)
    assert (costs["shortcut"]["learnt"], costs["shortcut"]["targets"]) == (
        1,
        0.5,
    )  # a quarter of the rows, two passes of the EMA
    assert 1 / 3 < costs["odelt"]["learnt"] < 1  # depths of 4, 8 and 12 of 12 blocks
    assert (
        0.5 < costs["odelt"]["targets"] <= 0.5 + 1 / 8
    )  # and an eighth, at a depth of the teacher's own


def test_costs_of_one_run_join_those_of_before(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    before = read_published(folder / "json" / "study-digits")["study"]["training"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_COUNTED_STEPS", "_STEP_ROUNDS", "_STEPS_A_ROUND"):
            patch.setattr(study_costs, name, 2)
        run(options(folder, only=("flow",), stages=("costs", "report")))
    after = read_published(folder / "json" / "study-digits")["study"]["training"]
    assert after["shortcut"] == before["shortcut"]
    assert after["flow"]["odelt_seconds"] == after["odelt"]["seconds"]
    assert after["flow"] != before["flow"]


def test_what_is_not_measured_again_stays_as_published(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    before = read_published(folder / "json" / "study-digits")
    for name in ("latency", "costs", "real"):
        (folder / "study" / f"{name}.json").unlink()
    picture = folder / "study-digits-methods.png"
    picture.write_bytes(b"of all methods")
    run(options(folder, stages=("report",)))
    assert read_published(folder / "json" / "study-digits") == before
    assert before["study"]["training"].keys() == set(RANDOM)
    assert picture.read_bytes() == b"of all methods"  # not of the few that are trained here


def test_the_document_gets_its_tables_and_nothing_else_changes(small: Path) -> None:
    text = (small / "results.md").read_text()
    assert text.startswith(
        "# Results\n<!-- table digits methods -->\n\n| digits-features Frechet distance |"
    )
    assert text.count("<!-- end -->") == 5
    published = read_published(small / "json" / "study-digits")
    rows = {
        (row["depth"], row["solver"], row["steps"], row["tolerance"]): row
        for row in published["odelt"]["rows"]
    }
    value, other = (
        rows[depth, "euler", 4, None]["metrics"]["digits-features Frechet distance"]
        for depth in (8, 12)
    )
    assert number(value) != number(other)  # so that a wrong depth would be seen
    (line,) = [line for line in text.splitlines() if line.startswith("| ODE_t(ODE_l), l = 8 | 1 |")]
    assert line.split(" | ")[3] == f"{value['mean']:.{1 if value['mean'] >= 100 else 2}f}"
    assert line.endswith("| 7.9, 19.4, 24.3 |")
    assert (small / "study-digits-grid.png").stat().st_size > 1000
    assert (small / "study-digits-methods.png").stat().st_size > 1000
    assert (small / "study-digits-pareto.png").stat().st_size > 1000
    write_tables([small / "results.md"], small / "json" / "study-digits")
    assert (small / "results.md").read_text() == text


def test_a_place_without_a_table_is_refused(small: Path) -> None:
    document = small / "other.md"
    document.write_text("<!-- table digits metods -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="a place for the table 'metods'"):
        write_tables([document], small / "json" / "study-digits")
    document.write_text("<!-- table digits methods -->\n")
    with pytest.raises(ValueError, match="end with <!-- end -->"):
        write_tables([document], small / "json" / "study-digits")
    assert document.read_text() == "<!-- table digits methods -->\n"


def evaluated(base: float, depths: Sequence[int], *at: int) -> dict[str, Any]:
    """Results whose distance is base + l/1000 + T, whose shares base/10 and base/20."""
    means = {"recognised": base / 10, "recall": base / 20}
    rows = [
        {
            "depth": depth,
            "solver": "euler",
            "steps": steps,
            "tolerance": None,
            "latency": None,
            "evaluations": steps,
            "metrics": {
                "distance": {"mean": base + depth / 1000 + steps, "std": 0.5},
                **{name: {"mean": mean, "std": 0.0} for name, mean in means.items()},
            },
        }
        for depth in depths
        for steps in at
    ]
    return {"rows": rows}


def cost(seconds: float, mebibytes: int, odelt_seconds: float = 2) -> dict[str, float]:
    made = {"batch": 64, "learnt": 1, "targets": 0, "peak_bytes": mebibytes * 2**20}
    return made | {"seconds": seconds, "odelt_seconds": odelt_seconds}


NO_TIMES: dict[str, Any] = {"real": {}, "parameters": {}, "training": {}, "machine": {}}


def test_ablations_show_every_training_seed() -> None:
    found = {
        "k0": evaluated(1, (8, 4), 128, 4, 1),
        "odelt": evaluated(2, (8, 4), 128, 4, 1),
        "k4": evaluated(3, (8, 4), 128, 4, 1),
        "k4-again": evaluated(5, (8, 4), 128, 4, 1),
        "study": NO_TIMES,
    }
    made = tables(found)
    assert set(made) == {"lengths", "odelt"}
    lines = made["lengths"].splitlines()
    assert (
        lines[2]
        == "| l = 8, K = 0 | 129.0 ± 0.5 | 5.01 ± 0.50 | 2.01 ± 0.50 | 10.0 %, 10.0 %, 10.0 % |"
        " 7.6, 19.5, 24.4 |"
    )
    assert lines[7].startswith(
        "| l = 4, K = 1/4 | 132.004 (131.004, 133.004) | 8.004 (7.004, 9.004) |"
    )
    assert lines[7].endswith("| 40.0 %, 40.0 %, 40.0 % | 14, 19.5, 30.1 |")


def test_few_steps_show_every_method_with_the_length_dial_and_its_training_seeds() -> None:
    training = {"odelt": cost(2, 1), "mean-flow": cost(6, 2, odelt_seconds=4)}
    found = {
        "odelt": evaluated(1, (12, 8, 4), 128, 4, 2, 1),
        "odelt-again": evaluated(2, (12, 8, 4), 128, 4, 1),
        "mean-flow": evaluated(3, (12, 8, 4), 128, 4, 2, 1),
        "mf-p1": evaluated(4, (12, 8, 4), 128, 4, 2, 1),
        "af-low": evaluated(5, (12, 8, 4), 128, 4, 2, 1),
        "study": NO_TIMES | {"training": training, "budget": {"steps": 8}},
    }
    lines = tables(found)["few-steps"].splitlines()
    assert len(lines) == 2 + 4 * 3
    assert lines[3] == (
        "| ODE_t(ODE_l) | 8 | 129.508 (129.008, 130.008) | 5.508 (5.008, 6.008) | 3.01 ± 0.50 |"
        " 2.508 (2.008, 3.008) | 15.0 %, 0.08 | 1.00x, 1 MiB |"
    )
    assert lines[7].startswith("| mean-flow | 4 | 131.0 ± 0.5 |")
    assert lines[7].endswith("| 1.50x, 2 MiB |")
    assert lines[8].startswith("| mean-flow, p = 1 | 12 | 132.0 ± 0.5 |")
    assert lines[13].startswith("| alpha-flow, down to 0.0125 | 4 | 133.0 ± 0.5 |")
