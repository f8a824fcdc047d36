"""Correctness first: what a measurement depends on, run as child processes; a red group refuses the
measurements that need it.

The kernels' random cases need no pytest; the other groups are pytest files, the tests for a GPU
among them. A result holds for the sources it was found with (`Group.digest`): after a change the
groups run again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.measure import ROOT, SOURCES, source_digest

TESTS = ROOT / "tests"
NETWORK = ("test_model.py",)
ENGINE = ("engine/test_engine.py", "engine/test_graphs.py")
SOLVERS = ("engine/test_while_graph.py", "engine/test_adaptive.py")
SOLVER_KERNELS = ("combine_stages", "adaptive_step", "adaptive_solve")
TRAINING = ("train/test_parity.py", "train/test_objectives_recorded.py")
NEEDS = {
    "kernels": ("kernels",),
    "latency": ("network", "engine"),
    "throughput": ("network", "engine"),
    "xl": ("network", "engine"),
    "peers": ("network", "engine"),
    "solvers": ("solvers",),
    "training": ("training",),
}


@dataclass(frozen=True)
class Group:
    """name; test files for pytest, or names of kernels for their random cases; what must be
    importable; the sources it speaks for."""

    name: str
    group: str
    files: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    sources: tuple[str, ...] = (
        "kernels/*.py",
        "tests/helpers/kernel_*.py",
        "tests/stress/kernel_*.py",
    )

    @property
    def digest(self) -> str:
        return source_digest(*self.sources, *(f"tests/{name}" for name in self.files))


def groups(cuda: bool) -> Iterator[Group]:
    """All groups. On a GPU each kernel is one of its own, so that a run can stop and go on between
    them."""
    if importlib.util.find_spec("triton"):
        names = kernel_names(cuda)
        for kernels in ((name,) for name in names) if cuda else [tuple(names)]:
            yield Group(
                f"kernels: {', '.join(kernels) if cuda else 'all, interpreted'}",
                "kernels",
                (),
                kernels,
                (),
            )
        yield Group("kernels of solvers", "solvers", (), SOLVER_KERNELS, ())
    for name, wanted, modules in (
        ("network", NETWORK, ()),
        ("engine", ENGINE, ()),
        ("solvers", SOLVERS, ()),
        ("training", TRAINING, ("tyro", "accelerate")),
    ):
        found = tuple(file for file in wanted if (TESTS / file).exists())
        sources = (*SOURCES, "tests/data/**/*", *(("train/**/*.py",) if name == "training" else ()))
        if found:
            yield Group(name, name, found, (), ("pytest", *modules), sources)


def kernel_names(cuda: bool) -> list[str]:
    """The names of tests/stress/kernel_cases.py's kernels."""
    code = "from tests.stress import kernel_cases; print(*[name for name, _ in kernel_cases.collect()], sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(not cuda),
        cwd=ROOT,
    )
    if run.returncode:
        raise RuntimeError(
            f"the kernels' cases cannot be listed: {run.stderr.strip().splitlines()[-1]}"
        )
    return run.stdout.split()


def environment(interpret: bool) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if interpret else {})


def run_group(group: Group, cuda: bool, cases: int, timeout: float) -> dict[str, Any]:
    """{"green", "passed", "failed", "skipped", "seconds", "sources", "command", "tail"}, or
    {"reason"} where it could not be run."""
    missing = [module for module in group.modules if importlib.util.find_spec(module) is None]
    if missing:
        return {
            "green": False,
            "reason": (
                f"{', '.join(missing)} missing: carry the wheels in a folder and pass --wheels"
                " FOLDER"
            ),
        }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if group.kernels:
            chosen = [word for kernel in group.kernels for word in ("--kernel", kernel)]
            command = [
                sys.executable,
                "-m",
                "tests.stress.kernel_cases",
                "--cases",
                str(cases),
                *chosen,
            ]
        else:
            files = [str(Path("tests") / name) for name in group.files]
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                *files,
            ]
        start = time.perf_counter()
        try:
            run = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                cwd=ROOT,
                env=environment(False),
            )
        except subprocess.TimeoutExpired:
            return {"green": False, "reason": f"not finished in {timeout:.0f} s: run again"}
        counts = count_cases(run.stdout) if group.kernels else count_tests(report)
    # A group whose every test was skipped has shown nothing.
    green = run.returncode == 0 and counts["passed"] > 0 and not counts["failed"]
    shown = " ".join(["python", *command[1:]]).replace(str(report), "report.xml")
    found = {
        "green": green,
        **counts,
        "seconds": time.perf_counter() - start,
        "sources": group.digest,
        "command": shown,
    }
    return found | {"tail": run.stdout.splitlines()[-40:]}


def count_cases(output: str) -> dict[str, int]:
    """From kernel_cases.py's lines "NAME: a of b cases right"."""
    pairs = [
        (int(right), int(total))
        for right, total in re.findall(r"^\S+: (\d+) of (\d+) cases right", output, re.MULTILINE)
    ]
    passed = sum(right for right, _ in pairs)
    return {"passed": passed, "failed": sum(total for _, total in pairs) - passed, "skipped": 0}


def count_tests(report: Path) -> dict[str, int]:
    """From pytest's JUnit report; nothing passed where there is none."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
