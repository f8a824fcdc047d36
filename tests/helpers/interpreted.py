"""Random cases of kernels in Triton's interpreter: it must be asked for before Triton is imported,
and the rest of the suite runs without it, so that they run in a child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def child(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program's text in the repository."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )


def printed_by(registries: tuple[str, ...], *arguments: str) -> str:
    """What `kernel_cases` prints, with these registries alone, so that a fault elsewhere does not
    hide here; a newline before it."""
    chosen = tuple(f"tests.helpers.{name}" for name in registries)
    run = child(
        f"import sys; from tests.stress import kernel_cases; kernel_cases.REGISTRIES = {chosen};"
        " sys.exit(kernel_cases.main())",
        "--interpret",
        *arguments,
    )
    return "\n" + run.stdout + run.stderr
