"""Correctness first: what a measurement stands on.

The kernels' random cases need no pytest; the other checks are selections of the tests. A kernel or
a backend is not measured where what it stands on has failed; the others are. A result holds for the
sources it was found with: after a change the check runs again.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from odelt_fast.files import cache_folder

from .measure import ROOT, SOURCES, Record, source_digest
from .steps import MissingError, Step

WHEELS_HINT = "carry the wheels in a folder and pass --wheels FOLDER"
PART = "correctness"
# Names of tests/stress/kernel_cases.py, by the operators of the kernel table that stand on them.
LINEAR = ("linear", "linear_tiles", "linear_split")
FLOAT8 = ("linear_float8", "quantize", "row_float8")
SPECIALIZED = ("linear_specialized", "linear_unheeded")  # of what tuning alone may choose
SOLVERS = ("combine_stages", "adaptive_step", "adaptive_solve")
ENDS = ("patch_embed", "final_layer")
ROWS = ("norm_modulate", "gated_residual", "group_end", "modulation")
NETWORK = ("row_kernels_as_network", "faults")
BLOCKS = ("block_products", "block_float8", "patch_moments", "plans")
WHOLE = ("whole", "whole_at_once", "plan_whole")
# What no backend of the Sampler takes by itself.
APART = ("attention_tangent",)
KERNELS = (
    *LINEAR, *BLOCKS, *WHOLE, "attention", *ROWS, *ENDS, *FLOAT8, *SPECIALIZED, *SOLVERS, *NETWORK,
    *APART,
)  # fmt: skip
OF_CASE = {  # beginning of a case's name in the kernel table -> kernels
    "linear": LINEAR,
    "final_euler": ("final_layer",),
    "last_group_end": ("group_end",),
    "quantize_rows": ("quantize",),
}


@dataclass(frozen=True)
class Tests:
    """A selection of the tests.

    Args:
        files: in tests/.
        select: pytest's -k on a GPU, where only what needs one must run.
        quick: the same of the tiny grid; "" of either: all.
        modules: what must be importable beside pytest.
        cuda: whether it is there on a GPU only.
    """

    files: tuple[str, ...]
    select: str = ""
    quick: str = ""
    modules: tuple[str, ...] = ()
    cuda: bool = False


GRAPHS = "engine/test_graphs.py"
FILES = ("safetensors",)  # what reads the recordings needs
TESTS = {
    "network": Tests(("test_model.py",), quick="recorded", modules=FILES),
    "engine": Tests(("engine/test_engine.py",), quick="recorded_velocity", modules=FILES),
    "graphs": Tests((GRAPHS,), "cuda and not broken and not ten_thousand", "replay", FILES),
    "broken captures": Tests(
        (GRAPHS, "engine/test_captures.py"), "cuda and (broken or captures)", "", FILES, True
    ),
    "adaptive": Tests(
        ("engine/test_adaptive.py", "engine/test_device_adaptive.py"), quick="kind", modules=FILES
    ),
    "while graph": Tests(("engine/native/test_while_graph.py",), "counts", cuda=True),
    "training": Tests(
        ("train/test_parity.py", "train/test_objectives_recorded.py"),
        quick="targets",
        modules=("tyro", "accelerate"),
    ),
}
_KERNEL_SOURCES = ("kernels/*.py", "tests/helpers/kernel_*.py", "tests/stress/kernel_*.py")


def key(name: str) -> str:
    """Of a check's step: "correctness: ..."; `name` is one of TESTS or "kernel NAME"."""
    return f"{PART}: {name}"


def kernel_keys(*names: str) -> tuple[str, ...]:
    return tuple(key(f"kernel {name}") for name in names)


def of_variant(variant: str, adaptive: bool, cuda: bool) -> tuple[str, ...]:
    """Keys of the checks that a backend of the Sampler stands on."""
    keys, kernels = [key("network")], [*LINEAR, "attention", *ROWS, *ENDS, *NETWORK]
    if variant.partition("-")[0] not in ("fused", "auto"):
        return tuple(keys)
    keys += [key("engine"), key("graphs")]
    if variant.endswith("-fp8"):
        kernels += FLOAT8
    if adaptive:
        keys.append(key("adaptive"))
        kernels += SOLVERS
    return (*keys, *kernel_keys(*kernels)) if cuda else tuple(keys)


def of_kernel(case: str) -> tuple[str, ...]:
    """Keys of the checks that Triton's form of a case of the kernel table stands on."""
    name = case.split()[0]
    if name.endswith("_float8"):
        return kernel_keys("linear_float8")
    begins = (kernels for begin, kernels in OF_CASE.items() if name.startswith(begin))
    return kernel_keys(*next(begins, (name,)))


def checks(cuda: bool, cases: int, quick: bool) -> Iterator[Step]:
    """Those of the tests first: they take longest. A kernel's has `cases` random cases.

    On a GPU each kernel has its own; in the interpreter all share one.
    """
    for name, tests in TESTS.items():
        if tests.cuda <= cuda:
            select = tests.select if cuda else tests.quick if quick else ""
            sources = (*SOURCES, "tests/data/**/*", *(f"tests/{file}" for file in tests.files))
            if name == "training":
                sources += ("train/**/*.py",)
            digest = source_digest(*sources)
            run = partial(run_tests, tests, select)
            yield Step(key(name), run, 300, digest, env={"ODELT_FAST_CACHE": str(cache_folder())})
    digest = source_digest(*_KERNEL_SOURCES)
    for name in KERNELS if cuda else ("all, interpreted",):
        kernels = (name,) if cuda else KERNELS
        env = {} if cuda else {"TRITON_INTERPRET": "1"}
        run = partial(run_cases, kernels, cases, "cuda" if cuda else "cpu")
        yield Step(key(f"kernel {name}"), run, 300, f"{digest} {cases}", env=env)


def need(*modules: str) -> None:
    """Raises MissingError unless all of them can be imported."""
    if gone := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise MissingError(f"{', '.join(gone)} missing: {WHEELS_HINT}")


def run_cases(
    kernels: Sequence[str], cases: int, device: str, _: Mapping[str, str]
) -> Iterator[Record]:
    """{"passed", "failed", "failures"}; ValueError if a case is wrong."""
    need("triton")
    kernel_cases = importlib.import_module("tests.stress.kernel_cases")
    random.seed(0)
    known, wrong = dict(kernel_cases.collect()), []
    for name in kernels:
        wrong += kernel_cases.run(name, known[name], cases, 0, 0, torch.device(device))
    total = cases * len(kernels)
    yield {"passed": total - len(wrong), "failed": len(wrong), "failures": wrong}
    if wrong:
        raise ValueError(f"{len(wrong)} of {total} cases are wrong: {wrong[0]}")


class Outcomes:
    """A plugin of pytest that counts what became of the tests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._count(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._count(report)

    def _count(self, report: Any) -> None:
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures.append(report.nodeid)


def run_tests(tests: Tests, select: str, _: Mapping[str, str]) -> Iterator[Record]:
    """{"passed", "failed", "skipped", "failures"}.

    Raises:
        ValueError: a test failed, or all were skipped: then nothing has been shown.
    """
    need("pytest", *tests.modules)
    import pytest

    os.chdir(ROOT)
    found = Outcomes()
    paths = [file if os.path.isabs(file) else f"tests/{file}" for file in tests.files]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options += ["--import-mode=importlib", *(["-k", select] if select else [])]
    code = pytest.main([*options, *paths], [found])
    counts = {name: found.counts[name] for name in ("passed", "failed", "skipped")}
    yield {**counts, "failures": found.failures}
    if code or not counts["passed"]:
        raise ValueError(", ".join(f"{count} {name}" for name, count in counts.items()))
