"""What the tests of planning stand on: a cache of their own, a random model with a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from odelt_fast.evaluation.evaluator import Evaluator
from tests.stress.kill_evaluate import evaluation, random_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Profiles of a test are its own; commands run in an empty folder."""
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
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
