"""The comparison of ways to give a flow lengths: its commands, its table and picture."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce.dial import BUDGETS, WAYS, Options, document, draw, run
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.files import write_json
from odelt_fast.model import DiT
from odelt_fast.train.main import parse


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_ways_differ_in_wiring_teacher_and_weight_alone(tmp_path: Path, name: str) -> None:
    options = Options(set=name)  # type: ignore[arg-type]
    flow = parse(shlex.split(options.start()))
    assert flow.model.depths == (12,)
    folder = save_model(DiT(flow.model_config()), tmp_path / "flow")
    found = {name: parse(shlex.split(options.tuning(folder, how, 0))) for name, how in WAYS.items()}
    said = [
        (each.model.inner_step, each.wiring, each.length_teacher, each.loss_weight_power or 0)
        for each in found.values()
    ]
    assert said == [
        ("unit", None, "ema", 0),
        ("unit", "paper", "ema", 0),
        ("residual", "residual", "ema", 0),
        ("residual", "residual", "init", 0),
        ("residual", "residual", "init", 0.7),
    ]  # fmt: skip
    first = found["paper"]
    assert first.train_batch_size == flow.train_batch_size
    for each in found.values():
        same = replace(each, wiring=None, length_teacher="ema", loss_weight_power=None)
        assert replace(same, model=first.model) == first
        assert each.model.depths == (4, 8, 12)


def test_table_and_picture_have_every_way_and_length(tmp_path: Path) -> None:
    options = Options(out=tmp_path, depths=(4, 8, 12))
    ways = {name: {4: [i + 0.5, i + 1.5], 8: [i + 0.25] * 2, 12: [i + 0.125] * 2}
            for i, name in enumerate(WAYS)}  # fmt: skip
    results: dict[str, Any] = {"steps": 32, "seeds": [0, 1], "before": 0.1, "ways": ways}
    text = document(results, options)
    assert "| paper | 0.125 ± 0.000 | 0.250 ± 0.000 | 1.000 ± 0.707 |" in text
    assert text.count("\n| residual") == 3
    draw(results, options, tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 5000


def test_other_budgets_need_another_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "options.json", {"steps": 1})
    with pytest.raises(ValueError, match="name another --out"):
        run(Options(out=tmp_path))
