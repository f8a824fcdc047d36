"""The package's imports go only downwards, and what must start fast loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "odelt_fast"
# Lowest first; a module may import from its own layer and those before it.
LAYERS = (
    (
        "config",
        "model_card",
        "hub",
        "tableau",
        "step_control",
        "native",
        "kernels",
        "outputs",
        "probability_flow",
        "pickle_records",
        "evaluation_settings",
        "results",
        "paper",
        "json_files",
        "quantities",
        "profiles",
        "quality",
    ),
    ("model", "noise", "velocity", "solution"),
    (
        "checkpoint",
        "adaptive",
        "torchdiffeq_adapter",
        "solvers",
        "decoder",
        "images",
        "metrics",
        "plots",
        "features",
        "inception",
        "batch_files",
        "measuring",
        "comparison",
        "figures",
    ),
    (
        "conversion",
        "backends",
        "prepared",
        "engine",
        "graphs",
        "trajectory",
        "fused",
        "while_loop",
        "adaptive_trajectory",
        "cpu_network",
        "sampler_settings",
        "batch_solver",
    ),
    ("sampler",),
    ("evaluation", "evaluation_cells", "flow_map", "likelihood", "planner", "evidence", "profiling", "schedules", "pipeline"),
    ("train", "demo_settings", "demo_studio", "demo", "demo_app", "batching", "http_limits", "service", "server"),
    ("commands",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Modules of the package, by their first name, that a file imports anywhere but for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "odelt_fast":
            names = node.module.split(".")[1:] or [alias.name for alias in node.names]
            found.add(names[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("odelt_fast.")}
    return found


def modules() -> list[Path]:
    folders = [PACKAGE, *(PACKAGE / name for name in ("commands", "images", "train", "train/objectives", "kernels"))]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_only_downwards(path: Path) -> None:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name == "__init__":
        return  # lends names from every layer, each loaded when it is asked for
    assert name in LEVEL, f"{name} has no place in the layers"
    upwards = {other for other in imported(path) if other in LEVEL and LEVEL[other] > LEVEL[name]}
    assert not upwards, f"{name} imports {', '.join(sorted(upwards))} from above"


def test_mapped_folders_are_one_package() -> None:
    """kernels/ and train/ are odelt_fast.kernels and odelt_fast.train, without an __init__.py, which would make packages of them."""
    for name in ("kernels", "train", "csrc"):
        assert (PACKAGE / name).is_symlink()
        assert not (PACKAGE.parent / name / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    ["odelt_fast", "odelt_fast.config", "odelt_fast.cli", "odelt_fast.planner", "odelt_fast.train.config", "odelt_fast.train.main"],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
