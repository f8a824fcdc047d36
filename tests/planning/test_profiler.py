"""Profiling: what operations cost, kept as it becomes known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.planning.profile import (
    read_profile,
)
from odelt_fast.planning.profiler import Profiler
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.planning_cases import (
    at_tolerance,
    steps_of,
)


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
    operations = [
        replace(operation, guidance_scale=2.0)
        for operation in (steps_of(2, 1), steps_of(4, 3), at_tolerance(4, "bosh3", 0.5))
    ]
    found = Profiler(model, device, path, seconds=0).run(operations, (1, 2))
    assert read_profile(path) == found
    assert {(m.operation, m.batch) for m in found.measurements} == {
        (operation, batch) for operation in operations for batch in (1, 2)
    }
    for m in found.measurements:
        assert m.rounds == 5
        assert m.low <= m.latency <= m.high
        assert m.peak_memory is None or 0 <= m.peak_memory < 1e9
        assert (m.weights is None) == (m.operation.steps is not None)
        if m.operation.steps is not None:
            assert m.evaluations == 2 * m.operation.steps  # guided
        else:
            sampler = Sampler.of(load_model(model), m.operation, batch_size=m.batch)
            counted = []
            for seed in range(5):
                sampler(m.batch, seed=seed)
                counted.append(sampler.stats["evaluations_per_image"])
            assert m.evaluations == pytest.approx(np.mean(counted))
    profiler, said = Profiler(model, device, path, seconds=0), list[str]()
    assert profiler.run(operations, (1, 2), report=said.append) == found
    assert not said
    more = [*operations, steps_of(2, 2)]
    assert profiler.missing(more, "float32", 1) == [steps_of(2, 2)]
    grown = profiler.run(more, (1, 2))
    assert {m.key for m in grown.measurements} > {m.key for m in found.measurements}


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Profiler, "_memory", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        Profiler(model, torch.device("cpu"), tmp_path / "file" / "profile.json").run(
            [steps_of(2, 1)], (1,)
        )
