"""The comparison of ways to give a flow lengths: its commands, its table and picture."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce.dial import _NETWORK, _RUN, WAYS, Options, document, draw, run
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.files import write_json
from odelt_fast.model import DiT
from odelt_fast.train.main import parse


def test_ways_differ_in_wiring_and_teacher_alone(tmp_path: Path) -> None:
    flow = parse(shlex.split(f"{_RUN} {_NETWORK}"))
    assert flow.model.depths == (12,)
    folder = str(save_model(DiT(flow.model_config()), tmp_path / "flow"))
    found = {
        name: parse(shlex.split(f"{_RUN} --init-from {folder} --depths 4 8 12 {how}"))
        for name, how in WAYS.items()
    }
    said = [(each.model.inner_step, each.wiring, each.length_teacher) for each in found.values()]
    assert said == [
        ("unit", None, "ema"),
        ("unit", "paper", "ema"),
        ("residual", "residual", "ema"),
        ("residual", "residual", "init"),
    ]  # fmt: skip
    first = found["paper"]
    for each in found.values():
        same = replace(each, wiring=None, length_teacher="ema")
        assert replace(same, model=first.model) == first
        assert each.model.depths == (4, 8, 12)


def test_table_and_picture_have_every_way_and_length(tmp_path: Path) -> None:
    options = Options(out=tmp_path, depths=(4, 8, 12))
    ways = {name: {4: [i + 0.5, i + 1.5], 8: [i + 0.25] * 2, 12: [i + 0.125] * 2}
            for i, name in enumerate(WAYS)}  # fmt: skip
    results: dict[str, Any] = {"steps": 32, "seeds": [0, 1], "before": 0.1, "ways": ways}
    text = document(results, options)
    assert "| paper | 0.125 ± 0.000 | 0.250 ± 0.000 | 1.000 ± 0.707 |" in text
    assert text.count("\n| residual") == 2
    draw(results, options, tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 5000


def test_other_budgets_need_another_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "options.json", {"steps": 1})
    with pytest.raises(ValueError, match="name another --out"):
        run(Options(out=tmp_path))
