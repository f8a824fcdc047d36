"""Budgets: the best of what was measured and never more, profiles and tables of anyone's making,
the commands, schedules of depth."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odelt_fast import deadline_planner
from odelt_fast.checkpoints.folder import load_model, read_config
from odelt_fast.checks import parse_memory, parse_seconds, show_memory, show_seconds
from odelt_fast.cli import main
from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.measuring import model_hash
from odelt_fast.planning.evidence import find_evidence, find_quality, this_machine
from odelt_fast.planning.planner import BudgetError, Point, best, candidates, frontier
from odelt_fast.planning.profile import (
    Machine,
    Measurement,
    Operation,
    Profile,
    default_path,
    parse_schedule,
    read_profile,
    show_schedule,
    write_profile,
)
from odelt_fast.planning.profiler import Grid, Profiler, operations_of
from odelt_fast.planning.quality import Quality, Value, read_quality
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from tests.stress.kill_evaluate import MODEL, evaluation, random_model

WEIGHTS = "a" * 64
SOLVERS = ("euler", "heun2", "dopri5")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Profiles of a test are its own; commands run in an empty folder."""
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def cost(
    operation: Operation, batch: int, latency: float, peak: int | None = 1, **changes: Any
) -> Measurement:
    weights = WEIGHTS if operation.steps is None else None
    found = Measurement(
        operation,
        batch,
        "float32",
        None,
        latency,
        latency,
        latency,
        5,
        float(operation.steps or 20),
        peak,
        weights,
    )
    return replace(found, **changes)


def profile_of(*measurements: Measurement) -> Profile:
    return Profile(Machine("a machine", 1, "odelt-fast 0", "eager"), MODEL, "digits", measurements)


def table(
    values: dict[Operation, float], metric: str = "a Frechet distance", scale: float | None = None
) -> Quality:
    rows = {(operation, scale): {metric: Value(value, None)} for operation, value in values.items()}
    return Quality(rows, (metric,), 100, 1, MODEL, WEIGHTS, "float32", Path("quality.json"))


def random_evidence(draw: random.Random) -> tuple[Profile, Quality]:
    """A profile and a table that share some operations, with many equal values."""
    operations = operations_of((2, 4), SOLVERS, (1, 2, 4, 8), (1e-1, 1e-2))
    measured = [op for op in operations if draw.random() < 0.8]
    ms = [
        cost(op, batch, draw.choice((1, 2, 3, 5, 8, 13)) * 1e-3, draw.choice((None, 1, 2, 3)))
        for op in measured
        for batch in (1, 4)
    ]
    valued = {
        op: draw.choice((0.1, 0.2, 0.3, 0.5, 0.9)) for op in operations if draw.random() < 0.8
    }
    return profile_of(*ms), table(valued, draw.choice(("recognised", "a Frechet distance")))


# The choice


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_within_the_budget(seed: int) -> None:
    """Against a loop over all measurements; of equal quality the fastest."""
    draw = random.Random(seed)
    profile, quality = random_evidence(draw)
    metric, wanted = quality.metrics[0], 0
    points = candidates(profile, quality, batch=4, weights=WEIGHTS)
    sign = 1 if metric == "recognised" else -1
    for _ in range(50):
        latency, peak = draw.uniform(0.5e-3, 15e-3), draw.choice((None, 1, 2, 3))
        found: list[tuple[float, float]] = []
        for m in profile.measurements:
            fits = m.latency <= latency and (
                peak is None or (m.peak_memory is not None and m.peak_memory <= peak)
            )
            if m.batch == 4 and fits and (m.operation, None) in quality.rows:
                found.append((sign * quality.rows[m.operation, None][metric].mean, -m.latency))
        if not found:
            with pytest.raises(BudgetError):
                best(points, latency, peak)
            continue
        chosen = best(points, latency, peak).point
        assert (chosen.score, -chosen.latency) == max(found)
        wanted += 1
    assert wanted > 10


def test_an_impossible_budget_is_answered_with_the_nearest_possible_one() -> None:
    """Nearest: the larger of the two factors is the smallest."""
    fast, small, between = Operation(2, steps=1), Operation(2, steps=2), Operation(4, steps=1)
    profile = profile_of(
        cost(fast, 1, 0.010, 4000), cost(small, 1, 0.080, 1000), cost(between, 1, 0.015, 1500)
    )
    points = candidates(profile, table({fast: 1, small: 2, between: 3}))
    for latency, peak, nearest in (
        (0.005, None, fast),
        (None, 900, small),
        (0.009, 1000, between),
        (0.079, 900, small),
    ):
        with pytest.raises(BudgetError) as told:
            best(points, latency, peak)
        assert told.value.nearest.operation == nearest
        assert f"the nearest is {nearest}: " in str(told.value)
        assert best(
            points, told.value.nearest.latency, told.value.nearest.memory
        ).operation  # it really is possible


@pytest.mark.parametrize(
    "limits", [(0, None), (-1.0, None), (math.nan, None), (math.inf, None), (None, 0)]
)
def test_limits_are_above_0(limits: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        best(candidates(profile_of(cost(Operation(2, steps=1), 1, 1e-3))), *limits)


def test_unknown_memory_is_never_within_a_limit() -> None:
    unknown = candidates(
        profile_of(
            cost(Operation(4, steps=4), 1, 1e-3, None), cost(Operation(2, steps=1), 1, 1e-3, 5)
        )
    )
    assert best(unknown).operation == Operation(4, steps=4)
    assert best(unknown, None, 5).operation == Operation(2, steps=1)
    with pytest.raises(ValueError, match="says nothing of memory"):
        best(unknown[:1], None, 5)


def test_quality_is_never_guessed() -> None:
    """Not between steps, not for other weights, guidance scales, or in fp8; a batch is bounded from
    above only by a larger one."""
    known, unknown = Operation(2, steps=2), Operation(4, steps=4)
    profile = profile_of(
        cost(known, 4, 2e-3),
        cost(unknown, 4, 1e-3),
        cost(known, 1, 1e-3),
        cost(known, 4, 2e-3, precision="fp8"),
    )
    assert [point.operation for point in candidates(profile, table({known: 0.3}))] == [known]
    assert candidates(profile, table({known: 0.3}), batch=3)[0].measured_batch == 4
    assert "at most 2 ms" in best(candidates(profile, table({known: 0.3}), batch=3)).why
    for asked, words in (
        ({"precision": "fp8"}, "it is never guessed"),
        (
            {"guidance_scale": 2.0},
            (
                "not float32 with guidance scale 2: measure it with odelt-fast profile --dtypes"
                " float32 --guidance-scale 2$"
            ),
        ),
        (
            {"batch": 5},
            "nor a larger one, only 1, 4: odelt-fast profile --dtypes float32 --batches 5$",
        ),
        ({"metric": "kid"}, "metric must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            candidates(profile, table({known: 0.3}), **asked)
    guided = profile_of(cost(known, 1, 1e-3, guidance_scale=1.5))
    assert candidates(
        guided, table({known: 0.3}, scale=4.0), guidance_scale=4
    )  # which costs what 1.5 costs
    with pytest.raises(ValueError, match="never guessed"):
        candidates(guided, table({known: 0.3}, scale=4.0), guidance_scale=1.5)


def test_adaptive_costs_belong_to_their_weights() -> None:
    adaptive = Operation(2, "dopri5", tolerance=1e-2)
    profile = profile_of(cost(adaptive, 1, 1e-3))
    assert candidates(profile, table({adaptive: 0.3}), weights=WEIGHTS)
    with pytest.raises(ValueError, match="measure it with odelt-fast profile"):
        candidates(profile, table({adaptive: 0.3}), weights="b" * 64)


def test_without_a_table_the_order_is_that_of_the_arithmetic_and_said_so() -> None:
    ops = (
        *operations_of((2, 4), SOLVERS, (1, 4), (1e-2,)),
        Operation(4, steps=4, schedule=((0.0, 2), (0.5, 4))),
    )
    points = candidates(profile_of(*(cost(op, 1, 1e-3) for op in ops)), weights=WEIGHTS)
    assert [(point.operation.depth, point.operation.steps) for point in points] == [
        (4, 4),
        (2, 4),
        (4, 1),
        (2, 1),
    ]
    assert {point.operation.solver for point in points} == {"euler"}
    assert "quality was not measured" in best(points).why


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_nothing_beats(seed: int, with_memory: bool) -> None:
    profile, quality = random_evidence(random.Random(seed))
    points = candidates(profile, quality, batch=1, weights=WEIGHTS)

    def as_good(a: Point, b: Point) -> bool:
        small = (
            math.inf if a.memory is None else a.memory,
            math.inf if b.memory is None else b.memory,
        )
        return (
            a.score >= b.score
            and a.latency <= b.latency
            and (not with_memory or small[0] <= small[1])
        )

    kept = frontier(points, with_memory=with_memory)
    for point in points:
        beaten = any(as_good(other, point) and not as_good(point, other) for other in points)
        assert (not beaten) == any(
            as_good(other, point) and as_good(point, other) for other in kept
        )
    assert len({id(point) for point in kept}) == len(kept)
    assert all(a.latency <= b.latency for a, b in itertools.pairwise(kept))


# Quantities, operations


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20ms", 0.02),
        ("1.5 s", 1.5),
        ("250us", 2.5e-4),
        (" 2min", 120),
        (".5s", 0.5),
        ("1e-2s", 0.01),
        ("3µs", 3e-6),
    ],
)
def test_times_are_read(text: str, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("100kb", 10**5), ("7 B", 7)],
)
def test_amounts_of_memory_are_read(text: str, value: int) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "20",
        "ms",
        "-1ms",
        "0ms",
        "nan s",
        "inf s",
        "1 ms 2",
        "1e999s",
        "٣ furlongs",
        "9" * 30 + "s",
        "1,5s",
        "1\x00s",
    ],
)
def test_other_texts_are_no_quantities(text: str) -> None:
    for read in (parse_seconds, parse_memory):
        with pytest.raises(ValueError, match="must be") as told:
            read(text)
        assert str(told.value).isprintable()


def test_quantities_are_shown_with_the_unit_that_suits() -> None:
    assert [show_seconds(value) for value in (2.5e-6, 0.00099951, 0.0204, 0.9996, 75, 12345)] == [
        "2.5 us",
        "1 ms",
        "20.4 ms",
        "1 s",
        "75 s",
        "12345 s",
    ]
    assert [show_memory(value) for value in (12, 1999, 999_960, 2.5e9, None)] == [
        "12 B",
        "2 KB",
        "1 MB",
        "2.5 GB",
        "unknown",
    ]


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
    with pytest.raises(ValueError, match="not the largest"):
        Operation(4, steps=2, schedule=((0.0, 4), (0.5, 12)))
    for wrong in ({}, {"steps": 2, "tolerance": 1e-2}):
        with pytest.raises(ValueError, match="either steps or a tolerance"):
            Operation(4, **wrong)  # type: ignore[arg-type]


# Files


def some_profile() -> Profile:
    operations = (
        Operation(4, steps=2),
        Operation(2, "dopri5", tolerance=0.1),
        Operation(4, steps=2, schedule=((0.0, 2), (0.5, 4))),
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose folder has the table of its quality."""
    name = random_model(tmp_path_factory.mktemp("model"))
    out = tmp_path_factory.mktemp("evaluated")
    settings = evaluation(
        name,
        solvers=("euler", "bosh3"),
        tolerances=(0.5,),
        seeds=1,
        npz=False,
        metrics=("frechet", "recognised"),
    )
    Evaluator(settings, out, device="cpu", show=False).run()
    (Path(name) / "quality.json").write_bytes((out / "results.json").read_bytes())
    return name


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


@pytest.mark.parametrize("name", ["digits", "mnist"])
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
        ({"steps": None, "tolerance": 0.1}, "euler takes a number of steps"),
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
    with pytest.raises(ValueError, match=f"results.json cannot be used: .*{words}"):
        find_quality(model, read_config(model), model_hash(model), path)
    profile = Profile(this_machine("cpu"), MODEL, model)
    write_profile(profile.adding([cost(Operation(3, steps=1), 1, 1e-3)]), tmp_path / "profile.json")
    with pytest.raises(ValueError, match=r"profile\.json cannot be used: depth 3 is not allowed"):
        find_evidence(model, profile=tmp_path / "profile.json")


# Profiling


def test_a_profile_tells_what_operations_cost_and_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Profiler,
        "_groups",
        lambda self, operations: (
            [operations[:2], operations[2:]] if operations[2:] else [operations]
        ),
    )
    device, path = torch.device("cpu"), tmp_path / "profile.json"
    grid = Grid(
        (Operation(2, steps=1), Operation(4, steps=3), Operation(4, "bosh3", tolerance=0.5)),
        (1, 2),
        ("float32",),
        2.0,
    )
    found = Profiler(model, device, path, seconds=0).run(grid)
    assert read_profile(path) == found
    assert {(m.operation, m.batch) for m in found.measurements} == {
        (op, batch) for op in grid.operations for batch in grid.batches
    }
    for m in found.measurements:
        assert m.rounds == 5
        assert m.low <= m.latency <= m.high
        assert m.peak_memory is None or 0 <= m.peak_memory < 1e9
        assert (m.weights is None) == (m.operation.steps is not None)
        if m.operation.steps is not None:
            assert m.evaluations == 2 * m.operation.steps  # guided
        else:
            sampler = Sampler(
                load_model(model),
                **m.operation.sampler_arguments(),
                guidance_scale=2.0,
                batch_size=m.batch,
            )
            counted = []
            for seed in range(5):
                sampler(m.batch, seed=seed)
                counted.append(sampler.stats["evaluations_per_image"])
            assert m.evaluations == pytest.approx(np.mean(counted))
    profiler, said = Profiler(model, device, path, seconds=0), list[str]()
    assert profiler.run(grid, said.append) == found
    assert not said
    more = replace(grid, operations=(*grid.operations, Operation(2, steps=2)))
    assert profiler.missing(more, "float32", 1) == [Operation(2, steps=2)]
    assert {m.key for m in profiler.run(more).measurements} > {m.key for m in found.measurements}


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Profiler, "_memory", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        Profiler(model, torch.device("cpu"), tmp_path / "file" / "profile.json").run(
            Grid((Operation(2, steps=1),))
        )


# Commands


def profiled(model: str, *options: str) -> Path:
    arguments = [
        "--model",
        model,
        "--dtypes",
        "float32",
        "--batches",
        "1",
        "3",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--json",
        *options,
    ]
    assert main(["profile", *arguments]) == 0
    return default_path(this_machine("cpu"), read_config(model))


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
    assert [point["latency"] for point in plan["frontier"]] == sorted(
        point["latency"] for point in plan["frontier"]
    )
    for point in plan["frontier"]:  # each is the choice of its own latency
        budget = [*common, "--max-latency", f"{point['latency'] * 1.000001:.9f}s"]
        assert (
            main(
                ["sample", *budget, "--num-images", "3", "--seed", "5", "--npz", "a.npz", "--json"]
            )
            == 0
        )
        drawn = json.loads(capsys.readouterr().out)
        named = {name: value for name, value in point.items() if name != "why"}
        assert named.items() <= drawn["choice"].items()
        operation = Operation(point["depth"], point["solver"], point["steps"], point["tolerance"])
        images = to_uint8(
            Sampler(load_model(model, depth=point["depth"]), **operation.sampler_arguments())(
                3, seed=5
            )
        )
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


# Deadlines


def test_a_deadline_becomes_depth_steps_and_solver(model: str) -> None:
    path = profiled(model, "--quality", model + "/quality.json")
    plan = deadline_planner(model, "cpu")
    points = find_evidence(model).points(batch=3)
    equal = [point for point in points if point.operation.steps is not None]
    assert plan(3, None, 60.0) == equal[0].operation
    assert plan(2, None, 60.0) == equal[0].operation  # bounded by three
    fastest = min(equal, key=lambda point: point.latency)
    assert plan(3, None, fastest.latency) == fastest.operation
    with pytest.raises(BudgetError) as told:
        plan(3, None, fastest.latency / 2)
    assert told.value.nearest == fastest
    for images, scale, wait, words in (
        (4, None, 1.0, "nor a larger one"),
        (1, 3.0, 1.0, "guidance scale 3"),
        (1, None, 0.0, "above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(images, scale, wait)
    path.unlink()
    with pytest.raises(ValueError, match="has no profile"):
        deadline_planner(model, "cpu")


# Schedules


def test_the_quality_of_a_schedule_is_that_of_its_images(model: str, tmp_path: Path) -> None:
    settings = evaluation(model, depths=(4,), depth_schedules=("0:2,0.5:4",), steps=(2,), seeds=1)
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
    assert operations == [
        Operation(4, steps=2),
        Operation(4, steps=2, schedule=((0.0, 2), (0.5, 4))),
    ]


def test_searched_schedules_are_measured_reported_and_chosen(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--search-schedule --steps 3 --data digits --num-images 120 --seeds 2 --batch 2 --device"
        " cpu --dtype float32 --out found"
    )
    assert main(["plan", "--model", model, *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(point["depth"], point["steps"]) for point in found["constant"]} == {
        (depth, steps) for depth in (2, 4) for steps in (1, 3, 6)
    }
    third, two_thirds = 1 / 3, 2 / 3
    tried = [point["depth_schedule"] for point in found["schedules"]]
    assert sorted(tried) == sorted(
        [[0.0, a], [switch, b]] for switch in (third, two_thirds) for a, b in ((2, 4), (4, 2))
    )
    table = {operation: row for (operation, _), row in read_quality("found").rows.items()}
    assert len(table) == 6 + 4
    metric = found["schedules"][0]["metric"]
    for point in found["schedules"]:
        operation = Operation(
            4, steps=3, schedule=tuple((time, depth) for time, depth in point["depth_schedule"])
        )
        assert point["quality"]["mean"] == table[operation][metric].mean
        matched = any(
            other["quality"]["mean"] <= point["quality"]["mean"]
            and other["latency"] <= point["latency"]
            for other in found["constant"]
        )
        assert (point in found["beating"]) != matched
    assert main(["plan", "--model", model, *options.split()]) == 0  # from what it measured
    assert (
        "of 4 schedules of 3 steps: no constant depth is as good and as fast"
        in capsys.readouterr().out
    )
    # A schedule is chosen by a budget like any other operation.
    evidence = find_evidence(model, "cpu", quality="found")
    only = tuple(m for m in evidence.profile.measurements if m.operation.schedule)
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
