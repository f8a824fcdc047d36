"""What the tests of the engine share: random models, and Samplers that run the fused backend with
plain PyTorch operators on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odelt_fast.engine import availability, fused
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.graphs import GraphCache
from odelt_fast.engine.native.while_graph import while_graph_unavailable
from odelt_fast.engine.plans import DEFAULT
from odelt_fast.model import DiT
from tests.helpers import small_model

ROOT = Path(__file__).parents[2]


def run_python(program: str, **environment: str) -> str:
    """What a program prints in a process of its own, which must succeed, without the last line
    break."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def needs_while_nodes() -> None:
    """Skips a test where this GPU cannot have while nodes; where they cannot be built or loaded
    though the compiler is there, it fails."""
    reason = while_graph_unavailable()
    if reason and ("no nvcc" in reason or reason.startswith("the driver supports")):
        pytest.skip(reason)
    assert reason is None, reason


def random_model(**changes: object) -> DiT:
    """The small model with two channels and three groups of blocks."""
    return small_model.random_model(**{"channels": 2, "depth": 6, **changes})


def run_fused_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, graphs: Callable[[], GraphCache | None] = lambda: None
) -> None:
    """From here on the Sampler's fused backend runs on CPU models, with the reference operators;
    without graphs unless some are given."""

    def reference(
        model: DiT,
        attention: str = "auto",
        precision: str | None = None,
        plans: tuple[str, ...] = (DEFAULT,),
    ) -> tuple[Engine, Any]:
        return Engine(model, attention, precision, "reference", plans), graphs()

    monkeypatch.setattr(availability, "fused_unavailable", lambda model: None)
    monkeypatch.setattr(fused, "shared_engine", reference)
