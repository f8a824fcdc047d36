"""Correctness first: what a measurement depends on, run as child processes.

A red group refuses the measurements that need it.

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

from .measure import ROOT, SOURCES, Record, source_digest

TESTS = ROOT / "tests"
WHEELS_HINT = "carry the wheels in a folder and pass --wheels FOLDER"
SOLVER_KERNELS = ("combine_stages", "adaptive_step", "adaptive_solve")
# Group -> its test files, and the packages that they need beside pytest.
FILES = {
    "network": (("test_model.py",), ()),
    "engine": (("engine/test_engine.py", "engine/test_graphs.py"), ()),
    "solvers": (("engine/test_device_adaptive.py", "engine/test_adaptive.py"), ()),
    "training": (
        ("train/test_parity.py", "train/test_objectives_recorded.py"),
        ("tyro", "accelerate"),
    ),
}
_SAMPLING = ("network", "engine")
NEEDS = {
    "kernels": ("kernels",),
    **dict.fromkeys(("latency", "throughput", "xl", "peers"), _SAMPLING),
    "solvers": ("solvers",),
    "training": ("training",),
}
_KERNEL_SOURCES = ("kernels/*.py", "tests/helpers/kernel_*.py", "tests/stress/kernel_*.py")


@dataclass(frozen=True)
class Group:
    """What is run, and what it speaks for.

    files: for pytest; kernels: in their place, names of kernels for their random cases. modules:
    what must be importable. sources: patterns of the files that the result holds for.

    Raises:
        ValueError: if a test file does not exist.
    """

    name: str
    group: str
    files: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    sources: tuple[str, ...] = _KERNEL_SOURCES

    def __post_init__(self) -> None:
        missing = [str(path) for path in map(TESTS.joinpath, self.files) if not path.is_file()]
        if missing:
            raise ValueError(f"correctness: there is no {', '.join(missing)}")

    @property
    def digest(self) -> str:
        return source_digest(*self.sources, *(f"tests/{name}" for name in self.files))


def groups(cuda: bool) -> Iterator[Group]:
    """All groups. On a GPU each kernel is one, so that a run can stop and go on between them."""
    if importlib.util.find_spec("triton"):
        names = kernel_names(cuda)
        if cuda:
            for name in names:
                yield Group(f"kernels: {name}", "kernels", kernels=(name,))
        else:
            yield Group("kernels: all, interpreted", "kernels", kernels=tuple(names))
        yield Group("kernels of solvers", "solvers", kernels=SOLVER_KERNELS)
    for name, (files, modules) in FILES.items():
        sources = (*SOURCES, "tests/data/**/*", *(("train/**/*.py",) if name == "training" else ()))
        yield Group(name, name, files, (), ("pytest", *modules), sources)


def kernel_names(cuda: bool) -> list[str]:
    """The names of the kernels that tests/stress/kernel_cases.py has cases of."""
    code = (
        "from tests.stress.kernel_cases import collect\n"
        "print(*[name for name, _ in collect()], sep='\\n')"
    )
    run = run_python(["-c", code], not cuda, stderr=subprocess.PIPE)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1]
        raise RuntimeError(f"the kernels' cases cannot be listed: {reason}")
    return run.stdout.split()


def run_python(
    arguments: list[str], interpret: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs this Python in the checkout, its output caught."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, **options)


def run_group(group: Group, cases: int, timeout: float) -> Record:
    """{"green", "passed", "failed", "skipped", "seconds", "sources", "command", "tail"}.

    {"green": False, "reason"} where it could not be run.
    """
    missing = [module for module in group.modules if importlib.util.find_spec(module) is None]
    if missing:
        return {"green": False, "reason": f"{', '.join(missing)} missing: {WHEELS_HINT}"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if group.kernels:
            chosen = [word for kernel in group.kernels for word in ("--kernel", kernel)]
            arguments = ["-m", "tests.stress.kernel_cases", "--cases", str(cases), *chosen]
        else:
            pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            arguments = [*pytest, *(str(Path("tests") / name) for name in group.files)]
        start = time.perf_counter()
        try:
            run = run_python(arguments, stderr=subprocess.STDOUT, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"green": False, "reason": f"not finished in {timeout:.0f} s: run again"}
        counts = count_cases(run.stdout) if group.kernels else count_tests(report)
    return {
        # A group whose every test was skipped has shown nothing.
        "green": run.returncode == 0 and counts["passed"] > 0 and not counts["failed"],
        **counts,
        "seconds": time.perf_counter() - start,
        "sources": group.digest,
        "command": " ".join(["python", *arguments]).replace(str(report), "report.xml"),
        "tail": run.stdout.splitlines()[-40:],
    }


def count_cases(output: str) -> dict[str, int]:
    """From the lines "NAME: a of b cases right" of tests/stress/kernel_cases.py."""
    pairs = re.findall(r"^\S+: (\d+) of (\d+) cases right", output, re.MULTILINE)
    passed, total = (sum(int(pair[which]) for pair in pairs) for which in (0, 1))
    return {"passed": passed, "failed": total - passed, "skipped": 0}


def count_tests(report: Path) -> dict[str, int]:
    """From pytest's JUnit report; nothing passed where there is none."""
    suites = list(ElementTree.parse(report).iter("testsuite")) if report.exists() else []
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
