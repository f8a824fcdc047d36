"""Profiles and tables of quality of anyone's making: read as written, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from odelt_fast.checkpoints.folder import read_config
from odelt_fast.cli import main
from odelt_fast.evaluation.machine import model_hash, this_machine
from odelt_fast.evaluation.operation_fields import operation_fields, read_operation
from odelt_fast.operation import parse_schedule, show_schedule
from odelt_fast.planning.evidence import find_evidence, find_quality
from odelt_fast.planning.profile import (
    Profile,
    default_path,
    read_profile,
    write_profile,
)
from odelt_fast.planning.quality import read_quality
from tests.helpers.planning_cases import (
    at_tolerance,
    cost,
    profile_of,
    scheduled,
    steps_of,
)
from tests.stress.kill_evaluate import MODEL, random_model


def test_schedules_are_read_as_they_are_shown() -> None:
    for text in ("0:4,0.5:12", "0:4", "0:4,0.3333333333333333:8,0.75:4"):
        assert show_schedule(parse_schedule(text)) == text
    for text in ("", "0:4,0.5", "0:x"):
        with pytest.raises(ValueError, match="must be times and depths such as"):
            parse_schedule(text)
    for text in ("0.1:4", "0:4,0:8", "0:4,nan:8", "0:4,1.5:8", "0:0"):
        with pytest.raises(
            ValueError, match=r"must have times rising from 0|time must be|depth must be"
        ):
            parse_schedule(text)


def test_operations_are_read_as_they_are_written() -> None:
    for operation in (steps_of(4, 2), at_tolerance(2, "dopri5", 0.1), scheduled(2)):
        for scale in (None, 0.0, 1.5):
            guided = replace(operation, guidance_scale=scale)
            assert read_operation(json.loads(json.dumps(operation_fields(guided)))) == guided
    assert read_operation(operation_fields(replace(steps_of(4, 2), guidance_scale=1.0))) == (
        steps_of(4, 2)
    )  # the labels alone, by another name
    plain = {"depth": 4, "solver": "euler"}
    for wrong, words in (
        ({}, "either steps or a tolerance"),
        ({"steps": 2, "tolerance": 1e-2}, "either steps or a tolerance"),
        ({"steps": 2, "schedule": [[0, 4], [0.5, 12]]}, "not the largest"),
        ({"steps": 2, "solver": "dopri5"}, "dopri5 takes a tolerance"),
        ({"tolerance": 0.1}, "euler takes steps"),
    ):
        with pytest.raises(ValueError, match=words):
            read_operation(plain | wrong)


def some_profile() -> Profile:
    operations = (
        steps_of(4, 2),
        at_tolerance(2, "dopri5", 0.1),
        scheduled(2),
    )
    return profile_of(*(cost(operation, 1, 1e-3) for operation in operations))


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_profile(some_profile(), tmp_path / "new" / "profile.json")
    assert read_profile(tmp_path / "new" / "profile.json") == some_profile()


def test_a_measurement_replaces_an_older_one_of_the_same() -> None:
    first = some_profile().measurements[0]
    added = some_profile().adding([replace(first, latency=5.0, high=5.0)])
    assert len(added.measurements) == 3
    assert added.measurements[0].latency == 5.0


def test_a_profile_of_another_machine_or_model_is_refused() -> None:
    profile, path = some_profile(), Path("profile.json")
    profile.check(profile.machine, MODEL, path)
    for change, words in (
        ({"device": "b"}, "device 'a machine', here it is 'b'"),
        ({"threads": 2}, "threads 1"),
        ({"versions": "1"}, "versions"),
    ):
        other = replace(profile.machine, **change)
        assert default_path(other, MODEL) != default_path(profile.machine, MODEL)
        with pytest.raises(ValueError, match=words):
            profile.check(other, MODEL, path)
    with pytest.raises(ValueError, match="of another model"):
        profile.check(profile.machine, replace(MODEL, depth=6), path)


def refused(read: Callable[[Path], object], path: Path) -> bool:
    """Whether a file is refused, in one printable line that names it; anything else than that or an
    object is an error."""
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    else:
        return False
    assert str(path) in said
    assert said.isprintable()
    assert len(said) < 400 + len(str(path))
    return True


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "x",
    "\ud800",
    "a\nb",
    [],
    {},
    [[0, 0]],
    "9" * 400,
    0.5,
)


@pytest.mark.parametrize("kind", ["profile", "quality"])
def test_every_changed_value_is_refused_or_harmless(kind: str, tmp_path: Path, model: str) -> None:
    """Every value of the file, one at a time, becomes each of VALUES, and is left out."""
    source, path = tmp_path / "profile.json", tmp_path / "changed.json"
    write_profile(some_profile(), source)
    source = source if kind == "profile" else Path(model) / "quality.json"
    read: Callable[[Path], object] = read_profile if kind == "profile" else read_quality
    assert not refused(read, source)
    counts = {True: 0, False: 0}

    def places(value: Any) -> list[tuple[Any, Any]]:
        inside = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        return [(value, key) for key, _ in inside] + [
            place for _, inner in inside for place in places(inner)
        ]

    count = len(places(json.loads(source.read_text())))
    for index in range(count):
        for new in (*VALUES, "left out"):
            whole = json.loads(source.read_text())
            holder, key = places(whole)[index]
            if new == "left out":
                del holder[key]
            else:
                holder[key] = new
            path.write_text(json.dumps(whole))
            counts[refused(read, path)] += 1
    assert counts[True] > count * (
        8 if kind == "profile" else 2
    )  # much of an evaluation is for people


WRONG: tuple[tuple[str, str, Any, str], ...] = (
    ("profile", "format", "odelt-fast profile 2", "its format is"),
    ("profile", "machine.threads", -1, "threads must be a whole number from 0"),
    ("profile", "machine.device", "a\x1b[2Jb", "device must be printable text"),
    ("profile", "config.depth", 10**9, "depth"),
    ("profile", "measurements.0.latency", 0.5, "is not between low"),
    ("profile", "measurements.0.low", True, "low must be a number"),
    ("profile", "measurements.0.batch", 0, "batch must be a whole number from 1"),
    ("profile", "measurements.0.precision", "int4", "precision must be one of"),
    ("profile", "measurements.0.peak_memory", -5, "peak_memory must be"),
    ("profile", "measurements.0.steps", 10**7, "steps must be a whole number"),
    ("profile", "measurements.0.tolerance", 0.1, "either steps or a tolerance"),
    ("profile", "measurements.0.extra", 1, "a measurement must have"),
    ("profile", "measurements.0.evaluations", 0, "evaluations must be a number"),
    ("profile", "measurements.1.weights", None, "weights go with a tolerance"),
    ("profile", "measurements.1.weights", "../x", "weights must be a SHA-256"),
    ("profile", "measurements.2.schedule", [[0, 2], [0, 4]], "times rising from 0"),
    ("profile", "measurements.2.schedule", [], "a measurement occurs twice"),
    ("quality", "format", 2, "its format is 2"),
    ("quality", "rows", [], "rows must be a list that is not empty"),
    ("quality", "rows.0.metrics", {}, "a row must have metrics"),
    ("quality", "rows.0.metrics", {"kid": {"mean": 1}}, "different metrics"),
    ("quality", "rows.0.depth", "4", "depth must be a whole number"),
    ("quality", "rows.0.guidance_scale", "2", "guidance_scale must be a number"),
    ("quality", "model.num_heads", 0, "num_heads"),
    ("quality", "settings", None, "settings must be an object"),
)


@pytest.mark.parametrize(("kind", "place", "new", "words"), WRONG)
def test_what_is_wrong_with_a_file_is_said(
    kind: str, place: str, new: Any, words: str, tmp_path: Path, model: str
) -> None:
    source, path = tmp_path / "profile.json", tmp_path / "changed.json"
    write_profile(some_profile(), source)
    whole = json.loads((source if kind == "profile" else Path(model) / "quality.json").read_text())
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    holder = whole
    for step in way:
        holder = holder[step]
    holder[last] = new
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=words):
        read_profile(path) if kind == "profile" else read_quality(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": "odelt-fast profile 1", "machine": [], "config": {}, "measurements": []}',
        b"\x80\x04\x95.",
        b" " * (16 << 20) + b"{}",
    ],
)
def test_other_files_are_refused_in_one_line(
    data: bytes, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.json"
    path.write_bytes(data)
    assert refused(read_profile, path)
    assert refused(read_quality, path)
    assert main(["sample", "--model", model, "--max-latency", "1s", "--profile", str(path)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    assert "hostile.json is no profile of odelt-fast" in said.err
    assert main(["profile", "--model", model, "--profile", str(path)]) == 2
    assert path.read_bytes() == data
    assert not list(Path.cwd().iterdir())


def test_a_table_of_other_weights_is_refused(tmp_path: Path, model: str) -> None:
    other = random_model(tmp_path / "other", replace(MODEL, hidden_size=32))
    assert find_quality(other, read_config(other), model_hash(other)) is None
    with pytest.raises(ValueError, match="the quality of another model"):
        find_quality(other, read_config(other), model_hash(other), Path(model) / "quality.json")
    values = json.loads((Path(model) / "quality.json").read_text()) | {"model_sha256": "b" * 64}
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="the quality of another model"):
        find_quality(model, read_config(model), model_hash(model), tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "digits", "mnist"])
def test_bundled_models_have_the_quality_of_their_own_weights(name: str) -> None:
    quality = find_quality(name, read_config(name), model_hash(name))
    assert quality is not None
    assert quality.weights == model_hash(name)
    assert quality.seeds >= 2
    assert {operation.depth for operation in quality.operations()} == {4, 8, 12}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 3}, "depth 3 is not allowed"),
        ({"solver": "eular"}, "eular"),
        ({"solver": "dopri5"}, "dopri5 takes a tolerance"),
        ({"schedule": [[0, 3], [0.5, 4]]}, "depth 3 is not allowed"),
        ({"steps": None, "tolerance": 0.1}, "euler takes steps"),
    ],
)
def test_operations_that_the_model_cannot_run_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path, model: str
) -> None:
    path = tmp_path / "results.json"
    whole = json.loads((Path(model) / "quality.json").read_text())
    row = next(row for row in whole["rows"] if (row["solver"], row["depth"]) == ("euler", 4))
    row |= change
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"results.json .*: .*{words}"):
        find_quality(model, read_config(model), model_hash(model), path)
    profile = Profile(this_machine("cpu"), MODEL, model)
    write_profile(profile.adding([cost(steps_of(3, 1), 1, 1e-3)]), tmp_path / "profile.json")
    with pytest.raises(ValueError, match=r"profile\.json cannot be used: depth 3 is not allowed"):
        find_evidence(model, profile=tmp_path / "profile.json")
