"""The page's settings and drawings, without a server: what is refused, what is drawn, what it is
said to cost."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odelt_fast import DiT, DiTConfig, Sampler, load_model
from odelt_fast.checkpoints.lookup import find_folder
from odelt_fast.cli import main
from odelt_fast.config import PRESETS
from odelt_fast.demo.settings import STEPS, Dials, Setting, check_setting, solvers
from odelt_fast.demo.studio import GRID_STEPS, Studio, measured_operations
from odelt_fast.evaluation.depth_steps import sample_depths_by_steps
from odelt_fast.operation import Operation
from odelt_fast.planning.quality import FILE_NAME, Value, read_quality
from odelt_fast.sampling.pictures import to_uint8

DIGITS = PRESETS["digits"]
GOOD = Dials(8, 2)
# What JSON can hold, and no dial of the page allows.
HOSTILE = (
    None,
    True,
    "x",
    "1; rm",
    "<script>",
    [],
    [[[[[[[[[]]]]]]]]],
    {"a": 1},
    -1,
    1e300,
    -1e300,
    10**40,
    math.nan,
    math.inf,
    0.3,
    "9" * 10_000,
)


def setting(*dials: Any, **named: Any) -> Setting:
    return check_setting(DIGITS, 10, Dials(*dials, **named))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(load_model("digits"))


@pytest.mark.parametrize("name", Dials._fields)
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_a_value_that_no_dial_allows_is_refused_in_one_line(name: str, value: Any) -> None:
    if (name, value) == ("labels", None):
        return  # an empty text
    with pytest.raises(ValueError, match=r"must be|not allowed") as refused:
        check_setting(DIGITS, 10, GOOD._replace(**{name: value}))
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 5}, "depth l must be one of 4, 8, 12, not 5"),
        ({"exponent": 8}, "T must be a power of two from 1 to 128, so its exponent 0 to 7, not 8"),
        (
            {"solver": "dopri"},
            "solver must be one of euler, midpoint, heun2, rk4, dopri5, tsit5, not 'dopri'",
        ),
        ({"tolerance": 1e-5}, "tolerance must be one of 0.1, 0.01, 0.001, 0.0001, not 1e-05"),
        ({"guidance": 8.25}, "guidance must be from 0 to 8 in steps of 0.25, not 8.25"),
        ({"seed": None}, "seed must be a whole number from 0 to 9007199254740991, not nothing"),
        (
            {"seed": 2**53},
            "seed must be a whole number from 0 to 9007199254740991, not 9007199254740992",
        ),
        (
            {"labels": "3 11"},
            "label '11' is not allowed: labels go from 0 to 9, 10 is the null label",
        ),
        ({"labels": "1 " * 11}, "11 labels for 10 images: give at most one for each"),
        ({"labels": "٣"}, "label '٣' is not allowed"),
    ],
)
def test_a_refusal_says_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_setting(DIGITS, 10, GOOD._replace(**values))


def test_the_dials_mean_what_they_say() -> None:
    drawn = setting(4.0, 7, "dopri5", 1e-3, 2.5, 5, " 3, 10 ")
    operation = Operation(depth=4, solver="dopri5", rtol=1e-3, atol=1e-3, guidance_scale=2.5)
    assert drawn == Setting(operation, 5, (3, 10))
    # Guidance 1 is none, and Euler's steps know no tolerance.
    assert setting(12, 0, tolerance=1e-3) == Setting(Operation(depth=12, steps=1))


def test_a_consistency_model_is_offered_its_own_solver_only() -> None:
    config = DiTConfig(sampling="consistency")
    assert solvers(config) == ("euler",)
    with pytest.raises(ValueError, match="solver must be one of euler, not 'rk4'"):
        check_setting(config, 10, Dials(4, 2, "rk4"))


@pytest.mark.parametrize("solver", solvers(DIGITS))
def test_a_drawing_is_what_the_sampler_draws(studio: Studio, solver: str) -> None:
    drawing = studio.draw(setting(4, 1, solver, 1e-1, 2.0, 7, "3 1"))
    sampler = Sampler(studio.model, 4, 2, solver, guidance_scale=2.0, rtol=1e-1, atol=1e-1)
    assert np.array_equal(drawing.images, to_uint8(sampler(10, [3, 1] * 5, seed=7)))
    assert drawing.evaluations == sampler.stats["evaluations_per_image"]
    assert drawing.seconds > 0


def test_the_grid_is_the_one_of_the_command_line(studio: Studio) -> None:
    cells = list(studio.grid(setting(8, 5, "tsit5", seed=3)))
    expected = sample_depths_by_steps(studio.model, (12, 8, 4), GRID_STEPS, 10, seed=3)
    assert [cell[:2] for cell in cells] == [
        (row, column) for row in range(3) for column in range(3)
    ]
    assert all(
        np.array_equal(drawing.images, expected[row][column]) for row, column, drawing in cells
    )
    evaluations = [drawing.evaluations for _, _, drawing in cells]
    assert evaluations == [128, 4, 1] * 3


def test_many_depths_give_three_rows() -> None:
    config = DiTConfig(
        image_size=4,
        channels=1,
        hidden_size=8,
        depth=8,
        depth_min=1,
        depth_group=1,
        num_heads=1,
        num_classes=1,
    )
    studio = Studio(DiT(config).eval(), num_images=2)
    assert studio.grid_depths == (8, 4, 1)
    assert studio.draw(check_setting(config, 2, Dials(3, 0))).images.shape == (
        2,
        4,
        4,
        1,
    )  # a model without classes


def test_points_are_what_was_drawn_here(studio: Studio) -> None:
    euler, other = setting(12, 2), setting(4, 0, guidance=0.5)
    fresh = Studio(studio.model)
    assert fresh.points() == {}
    seconds = [fresh.draw(euler).seconds for _ in range(3)]
    fresh.draw(other)
    first, second = fresh.points().values()
    assert (first.latency, first.value, first.depth) == (sorted(seconds)[1], 4, 12)
    assert (second.value, second.depth) == (2, 4)  # guided: two evaluations
    assert (first.label, second.label) == ("T=4", "T=1")
    quality = {
        Operation(depth=12): Value(0.5, 0.1),
        Operation(depth=8): Value(0.6, None),
    }
    [(operation, point)] = fresh.points(quality).items()
    assert operation == euler.operation
    assert (point.value, point.std) == (0.5, 0.1)


def test_a_drawing_that_takes_too_long_is_given_up_and_the_next_one_is_drawn(
    studio: Studio,
) -> None:
    hurried = Studio(studio.model)
    hurried.max_seconds = 0.0
    with pytest.raises(ValueError, match="stopped after 0 s: fewer steps"):
        hurried.draw(setting(12, 7))
    hurried.max_seconds = math.inf
    assert hurried.draw(setting(4, 0)).images.shape == (10, 8, 8, 1)


def test_memory_that_is_not_there_is_said(studio: Studio) -> None:
    def decoder(latents: torch.Tensor) -> torch.Tensor:
        if decoding:
            raise MemoryError
        return latents

    decoding = False
    small = Studio(studio.model, decoder=decoder)
    decoding = True
    with pytest.raises(ValueError, match="not enough memory for 10 images at l = 4"):
        small.draw(setting(4, 0))


def test_what_is_kept_is_limited(studio: Studio) -> None:
    many = Studio(studio.model, num_images=1)
    for guidance in np.arange(0, 8.25, 0.25).tolist():
        many.draw(check_setting(DIGITS, 1, Dials(4, 0, guidance=guidance)))
    assert len(many.points()) == 33
    assert many._sampler.cache_info().currsize == 16


def test_the_quality_of_the_bundled_model_is_known_before_anybody_asks(studio: Studio) -> None:
    folder = find_folder("digits")
    rows = json.loads((folder / FILE_NAME).read_text())["rows"]
    table = read_quality(folder / FILE_NAME)
    known = measured_operations(DIGITS, table, table.metric())
    right = {
        (row["solver"], row["depth"], row["steps"], row["tolerance"]): row["metrics"][
            table.metric()
        ]["mean"]
        for row in rows
    }
    offered = [key for key in right if key[2] in (1, 2, 4, 8, 16) or key[3] in (0.1, 0.01, 0.001)]
    assert len(known) == len(offered) > 20
    for operation, value in known.items():
        steps, rtol, of = operation.steps, operation.tolerance, (operation.solver, operation.depth)
        assert right[*of, steps, rtol] == value.mean
        dial = Dials(operation.depth, 0 if rtol else STEPS.index(steps), operation.solver)
        assert setting(*dial._replace(tolerance=rtol or 0.1)).operation == operation
    fresh = Studio(studio.model)
    fresh.measure(list(known)[:5], 600)
    assert len(fresh.points(known)) == 5
    fresh.measure(known, 0)
    assert len(fresh.points(known)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "65"], "--num-images must be from 1 to 64, not 65"),
        (["--waiting", "0"], "--waiting must be from 1 to 1000, not 0"),
        (["--max-seconds", "nan"], "--max-seconds must be above 0 and at most 3600, not nan"),
        (["--port", "65536"], "--port must be from 0 to 65535, not 65536"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1, port 7860"),
        (["--port", "0", "--quality", "nowhere"], "there is no table of quality nowhere"),
        (
            ["--port", "0", "--metric", "fid"],
            "metric must be one of digits-features Frechet distance",
        ),
        (["--port", "0", "--model", "nowhere"], "'nowhere'"),
    ],
)
def test_a_mistake_ends_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    assert main(["demo", *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_port_in_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "--port 0 takes a free one" in capsys.readouterr().err


def test_latents_without_a_decoder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    DiT(
        DiTConfig(image_size=4, hidden_size=8, depth=1, depth_min=1, depth_group=1, num_heads=1)
    ).save_pretrained(tmp_path / "latents")
    assert main(["demo", "--port", "0", "--model", str(tmp_path / "latents")]) == 2
    assert "makes latents of 4 channels: give the --decoder of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gradio", "matplotlib"])
def test_a_missing_package_is_answered_with_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--port", "0"]) == 2
    assert (
        capsys.readouterr().err == f"error: the page needs {name}: pip install 'odelt-fast[demo]'\n"
    )
