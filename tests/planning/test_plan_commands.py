"""The commands profile, plan and sample with a budget; schedules of depth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.checks import show_seconds
from odelt_fast.cli import main
from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.operation_fields import read_operation
from odelt_fast.planning.evidence import find_evidence
from odelt_fast.planning.profile import (
    write_profile,
)
from odelt_fast.planning.quality import read_quality
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.planning_cases import (
    profiled,
    scheduled,
    steps_of,
)
from tests.stress.kill_evaluate import evaluation


def test_profile_plan_and_sample_agree(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = profiled(model)
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path)
    assert len(told["measurements"]) == 2 * 6  # what the table of quality has
    common = ["--model", model, "--device", "cpu", "--dtype", "float32"]
    assert main(["plan", *common, "--batch", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["candidates"]) == 6
    assert plan["choice"] is None
    assert [each["latency"] for each in plan["frontier"]] == sorted(
        each["latency"] for each in plan["frontier"]
    )
    for each in plan["frontier"]:  # each is the choice of its own latency
        budget = [*common, "--max-latency", f"{each['latency'] * 1.000001:.9f}s"]
        assert (
            main(
                ["sample", *budget, "--num-images", "3", "--seed", "5", "--npz", "a.npz", "--json"]
            )
            == 0
        )
        drawn = json.loads(capsys.readouterr().out)
        named = {name: value for name, value in each.items() if name != "why"}
        assert named.items() <= drawn["choice"].items()
        sampler = Sampler.of(load_model(model, depth=each["depth"]), read_operation(each))
        images = to_uint8(sampler(3, seed=5))
        assert (np.load("a.npz")["arr_0"] == images).all()
    assert main(["plan", *common, "--batch", "3", "--all", "--max-latency", "1min"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n| depth ") == 6
    assert f"of 6 measured ways within {show_seconds(60)}" in said
    assert (
        main(
            [
                "sample",
                *common,
                "--num-images",
                "3",
                "--max-latency",
                "1min",
                "--max-memory",
                "100GB",
                "--out",
                "a.png",
            ]
        )
        == 0
    )
    assert re.search(
        r"depth \d, .*: the best digits-features Frechet distance \(.*\) of 6 measured ways within",
        capsys.readouterr().out,
    )


def test_an_impossible_budget_draws_nothing_and_names_the_nearest(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    profiled(model)
    common = ["--model", model, "--device", "cpu", "--dtype", "float32", "--max-latency", "1us"]
    for arguments in (["sample", *common, "--num-images", "3"], ["plan", *common, "--batch", "3"]):
        capsys.readouterr()
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert not said.out
        assert said.err.count("\n") == 1
        assert (
            "nothing that was measured is within 1 us; the nearest is depth 2, 1 step of euler"
            in said.err
        )
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sample --max-latency 20", "--max-latency must be a number and a unit"),
        ("sample --max-memory 2ms", "--max-memory must be a number and a unit"),
        ("sample --max-latency 1s --steps 2", "--steps is what a budget chooses"),
        ("sample --max-latency 1s --depth 2", "--depth is what a budget chooses"),
        ("sample --max-latency 1s --solver euler", "--solver is what a budget chooses"),
        ("sample --max-latency 1s --time-shift 2", "--time-shift has no measured cost or quality"),
        ("sample --max-latency 1s --trajectory 0 1", "--trajectory has no measured"),
        ("sample --max-latency 1s --init-image a.png --mask b.png", "--init-image has no measured"),
        ("sample --metric kid", "--metric goes with a budget"),
        ("sample --max-latency 1s", "has no profile on"),
        ("plan", "has no profile on"),
        ("plan --batch 0", "--batch must be at least 1"),
        ("plan --profile none.json", "has no profile on"),
        ("plan --search-schedule", "give --data"),
        ("plan --search-schedule --data digits --max-latency 1s", "has no budget"),
        ("plan --search-schedule --data digits --steps 1", "needs at least two steps"),
        ("profile --batches 0", "--batches must be at least 1"),
        ("profile --steps 0", "--steps must be at least 1"),
        ("profile --depths 3", "depth 3 is not allowed"),
        ("profile --solvers eular", "eular"),
        ("profile --tolerances 0", "--tolerances must be above 0"),
        ("profile --seconds nan", "--seconds must be from 0"),
        ("profile --profile .", "is a folder"),
        ("profile --quality none", "there is no table of quality"),
    ],
)
def test_mistakes_are_one_line(
    options: str, words: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = options.split()
    assert main([name, "--model", model, "--device", "cpu", *rest]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_the_quality_of_a_schedule_is_that_of_its_images(model: str, tmp_path: Path) -> None:
    settings = evaluation(
        model, depths=(4,), depth_schedules=(((0.0, 2), (0.5, 4)),), steps=(2,), seeds=1
    )
    rows = Evaluator(settings, tmp_path, device="cpu", show=False).run()["rows"]
    assert [
        (row["depth"], "schedule" in row, row["live_blocks"], row["evaluations"]) for row in rows
    ] == [
        (4, False, 4, 2),
        (4, True, 3, 2),
    ]
    with np.load(tmp_path / "samples" / "l0_2,0.5_4-euler-T2-seed0.npz") as file:
        assert (
            file["arr_0"]
            == to_uint8(Sampler(load_model(model), depth_schedule=[(0, 2), (0.5, 4)], steps=2)(120))
        ).all()
    operations = read_quality(tmp_path).operations()
    assert operations == (steps_of(4, 2), scheduled(2))


def test_searched_schedules_are_measured_reported_and_chosen(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--search-schedule --steps 3 --data digits --num-images 120 --seeds 2 --batch 2 --device"
        " cpu --dtype float32 --out found"
    )
    assert main(["plan", "--model", model, *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(each["depth"], each["steps"]) for each in found["constant"]} == {
        (depth, steps) for depth in (2, 4) for steps in (1, 3, 6)
    }
    third, two_thirds = 1 / 3, 2 / 3
    tried = [each["depth_schedule"] for each in found["schedules"]]
    assert sorted(tried) == sorted(
        [[0.0, a], [switch, b]] for switch in (third, two_thirds) for a, b in ((2, 4), (4, 2))
    )
    table = read_quality("found").rows
    assert len(table) == 6 + 4
    metric = found["schedules"][0]["metric"]
    for each in found["schedules"]:
        operation = scheduled(3, tuple((time, depth) for time, depth in each["depth_schedule"]))
        assert each["quality"]["mean"] == table[operation][metric].mean
        matched = any(
            other["quality"]["mean"] <= each["quality"]["mean"]
            and other["latency"] <= each["latency"]
            for other in found["constant"]
        )
        assert (each in found["beating"]) != matched
    assert main(["plan", "--model", model, *options.split()]) == 0  # from what it measured
    assert (
        "of 4 schedules of 3 steps: no constant depth is as good and as fast"
        in capsys.readouterr().out
    )
    # A schedule is chosen by a budget like any other operation.
    evidence = find_evidence(model, "cpu", quality="found")
    only = tuple(m for m in evidence.profile.measurements if m.operation.depth is None)
    write_profile(replace(evidence.profile, measurements=only), Path("schedules.json"))
    common = [
        "--model",
        model,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--quality",
        "found",
        "--profile",
        "schedules.json",
    ]
    assert (
        main(
            [
                "sample",
                *common,
                "--num-images",
                "2",
                "--max-latency",
                "1min",
                "--json",
                "--npz",
                "a.npz",
            ]
        )
        == 0
    )
    choice = json.loads(capsys.readouterr().out)["choice"]
    assert choice["depth_schedule"] in tried
    schedule = [(time, depth) for time, depth in choice["depth_schedule"]]
    assert (
        np.load("a.npz")["arr_0"]
        == to_uint8(Sampler(load_model(model), depth_schedule=schedule, steps=3)(2))
    ).all()
