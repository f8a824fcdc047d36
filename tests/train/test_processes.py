"""Small runs of the scripts that kill training, compare numbers of processes (sharded weights too)
and poison losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "script",
    [
        "kill_training --kills 2 --seed 1 --workers 1",
        "compare_processes --steps 4 --objectives live-reflow mean-flow dial",
        "poison_training --injected 10 --processes 2",
    ],
)
def test_script(script: str) -> None:
    """They fork: each has a process of its own."""
    name, *options = script.split()
    command = [sys.executable, "-m", f"tests.stress.{name}", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
