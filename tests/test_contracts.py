"""The import contracts of pyproject.toml hold, and fail when they should."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
_INSERTED = {
    "an upward import": (
        "odelt_fast/solvers/tableau.py",
        "from odelt_fast.sampling import sampler",
        "house",
    ),
    "an upward import inside a function": (
        "odelt_fast/config.py",
        "def f():\n    from odelt_fast.model import DiT",
        "house",
    ),
    "a sideways import": (
        "odelt_fast/serving/batching.py",
        "import odelt_fast.train.config",
        "house",
    ),
    "an import through a linked folder": (
        "kernels/device.py",
        "from odelt_fast.checkpoints import folder",
        "house",
    ),
    "a module in no layer": ("odelt_fast/utils.py", "", "house"),
    "a circle in a room": (
        "odelt_fast/evaluation/metrics.py",
        "from odelt_fast.evaluation import evaluator",
        "no circles",
    ),
    "a circle of objectives": (
        "train/objectives/targets.py",
        "from odelt_fast.train.objectives import shortcut",
        "no circles",
    ),
    "a command that imports another": (
        "odelt_fast/commands/env.py",
        "from odelt_fast.commands import sample",
        "commands",
    ),
    "the front door used from inside": (
        "odelt_fast/images/encode.py",
        "from odelt_fast import load_model",
        "front door",
    ),
    "the package leaning on benchmarks": (
        "odelt_fast/cli.py",
        "from benchmarks import measure",
        "benchmarks",
    ),
}


def _broken_contracts(root: Path) -> set[str]:
    """Names of the contracts that `lint-imports` finds broken in `root`, up to their colon."""
    done = subprocess.run(
        [sys.executable, "-c", _LINT, "--no-cache", "--no-logo"],
        cwd=root,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "PATH": "", "COLUMNS": "200", "NO_COLOR": "1"},
    )
    kept_or_broken = re.findall(r"^(\S.*) (KEPT|BROKEN)$", done.stdout, re.MULTILINE)
    assert kept_or_broken, done.stdout + done.stderr
    broken = {name.split(":")[0] for name, verdict in kept_or_broken if verdict == "BROKEN"}
    assert bool(broken) == bool(done.returncode)
    return broken


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code that the contracts speak of."""
    only_python = lambda folder, names: {  # noqa: E731
        name for name in names if not (Path(folder) / name).is_dir() and not name.endswith(".py")
    }
    for folder in ("odelt_fast", "kernels", "train", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=only_python)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(tree: Path) -> None:
    assert _broken_contracts(tree) == set()


@pytest.mark.parametrize(("module", "code", "contract"), _INSERTED.values(), ids=_INSERTED)
def test_a_broken_rule_is_seen(tree: Path, module: str, code: str, contract: str) -> None:
    with (tree / module).open("a") as file:
        file.write(f"\n{code}\n")
    assert any(name.startswith(contract) for name in _broken_contracts(tree))
