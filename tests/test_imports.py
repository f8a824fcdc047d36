"""What must start fast loads no torch, and the linked folders are part of one package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_linked_folders_are_one_package() -> None:
    """An __init__.py would make packages of their own of kernels/, train/ and csrc/."""
    for name in ("kernels", "train", "csrc"):
        assert (ROOT / "odelt_fast" / name).is_symlink()
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "odelt_fast",
        "odelt_fast.config",
        "odelt_fast.cli",
        "odelt_fast.operation",
        "odelt_fast.planning.planner",
        "odelt_fast.train.config",
        "odelt_fast.train.main",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
