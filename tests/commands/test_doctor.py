"""`odelt-fast doctor`: every way is tried, and the report tells nothing of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.cli import main
from odelt_fast.commands import doctor
from odelt_fast.config import PRESETS
from odelt_fast.engine import availability
from odelt_fast.engine.plans import PLANS
from odelt_fast.engine.selfcheck import Verdict
from odelt_fast.engine.trial import Way
from tests.helpers.small_model import random_model

TINY = {"image_size": 4, "depth": 2, "depth_min": 1, "depth_group": 1}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    ways = doctor.ways  # but for those that would be compiled for half a minute each
    monkeypatch.setattr(
        doctor,
        "ways",
        lambda *asked: (each for each in ways(*asked) if each[0].backend != "compile"),
    )
    folder = tmp_path / "secret-name"
    save_model(random_model(**TINY), folder)
    return folder


def test_a_cpu_is_diagnosed(
    model: Path, native_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--device", "cpu", "--dtypes", "float32", "bfloat16"]
    assert main(["doctor", *arguments, "--report", "report.json"]) == 0
    said = capsys.readouterr()
    rows = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| the model")]
    assert [(row[1], row[3]) for row in rows] == [
        (backend, dtype)
        for dtype in ("float32", "bfloat16")
        for backend in ("eager", "native", "fused")
    ]
    for row in rows:
        if row[1] == "fused":
            assert row[5] == "not here: it needs an NVIDIA GPU"
        else:
            assert row[5].startswith("right, off by ")
            assert row[6].endswith("s")
            assert row[7].endswith("s")
        assert row[8].startswith("yes") == (row[1] == "native")
    assert "the model, float32: auto takes native (not fused: it needs an NVIDIA GPU" in said.out
    assert said.err.splitlines()[0] == "the model: eager float32"

    text = Path("report.json").read_text()
    report = json.loads(text)
    assert report["format"] == doctor.FORMAT
    assert {"machine", "driver", "clocks", "kernels", "triton"} <= report.keys()
    results = {(each["backend"], each["dtype"]): each for each in report["results"]}
    native = results["native", "float32"]
    assert native["taken"]
    assert native["state"] == "right"
    assert native["config"] == random_model(**TINY).config.to_dict()
    assert native["microseconds"].keys() == {"1", "2"}
    assert results["fused", "bfloat16"]["state"] == "not here"
    for secret in (str(model.parent), model.name, str(native_cache), str(Path.home())):
        assert secret not in text


def test_what_is_wrong_stands_in_the_table() -> None:
    way = Way(PRESETS["digits"], "cuda", "bfloat16", attention="triton")
    wrong = Verdict("wrong", "found wrong pictures (depth 4, guided: off by 0.3, allowed: 0.03)")
    crashed = Verdict("crashed", "crashed (SIGSEGV, at: /home/jo/thing.py)")
    rows = doctor.table([doctor.Row("digits", way, wrong), doctor.Row("digits", way, crashed)])
    assert rows.splitlines()[2:] == [
        "| digits | fused | triton | bfloat16 | seven | wrong: found wrong pictures (depth 4,"
        " guided: off by 0.3, allowed: 0.03) |  |  |  |",
        "| digits | fused | triton | bfloat16 | seven | crashed: crashed (SIGSEGV, at: thing.py) |"
        "  |  |  |",
    ]


@pytest.mark.parametrize(
    ("capability", "reasons"),
    [
        ((8, 0), ["with 256 tokens of width 1152 in", "it needs compute capability 8.9", ""]),
        ((9, 0), ["", "it has no form for precision 'fp8'", ""]),
    ],
)
def test_every_plan_is_a_way_or_says_why_it_is_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reasons: list[str]
) -> None:
    monkeypatch.setattr(availability, "device_unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ways = [*doctor.ways(PRESETS["DiT-XL/2"], "cuda", ("bfloat16", "float32"))]
    for precision in (None, "fp8"):
        assert {way.plan for way, _ in ways if way.precision == precision} == set(PLANS)
    found = [reason for way, reason in ways if way.plan == "whole"]
    for reason, expected in zip(found, reasons, strict=True):
        assert reason.startswith(expected)
        assert bool(reason) == bool(expected)


def test_presets_are_known_by_name() -> None:
    assert doctor.shapes(None, "cuda") == PRESETS
    assert doctor.shapes(None, "cpu") == {"digits": PRESETS["digits"]}
    assert doctor.shapes("DiT-B/2", "cpu") == {"DiT-B/2": PRESETS["DiT-B/2"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "report.txt"], "--report report.txt: the name must end in .json"),
        (["--report", "none/report.json"], "there is no folder"),
        (["--model", "nowhere/at-all/x"], "nowhere/at-all/x"),
        (["--dtypes"], "--dtypes must have at least one value"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "diagnose", None)
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err
