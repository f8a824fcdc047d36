"""The native operators at every level of instructions: those that this processor has are tested in
processes of their own, what it lacks is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from odelt_fast.cli import main
from odelt_fast.engine.native import build, cpu_ops
from odelt_fast.engine.native.build import LEVELS
from tests.helpers.engine_cases import ROOT, run_python

SWITCH, PYTORCHS_SWITCH = "ODELT_FAST_CPU_LEVEL", "ATEN_CPU_CAPABILITY"
# What PyTorch computes at the same level is what ours is held to.
CAPABILITIES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}
BITS = {"baseline": 128, "avx2": 256, "avx512": 512, "amx": 512}
TESTS = ("engine/native/test_rows.py", "engine/native/test_products.py", "engine/test_cpu.py")
LEVEL = """
import torch
from odelt_fast.engine.native import build, cpu_ops
assert build.load("cpu", build_it=False) is None
print(cpu_ops.level(), torch.backends.cpu.get_cpu_capability(), cpu_ops.describe())
"""


@pytest.fixture(scope="module")
def processor(native_cache: Path) -> Iterator[list[str]]:
    """The processor's level and PyTorch's, in processes that nothing holds to a lower one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (SWITCH, PYTORCHS_SWITCH):
            patch.delenv(name, raising=False)
        yield run_python(LEVEL).split()[:2]


def skip_what_it_lacks(level: str, processor: list[str]) -> None:
    if LEVELS.index(level) > LEVELS.index(processor[0]):
        pytest.skip(f"this processor has no {level}")


@pytest.mark.parametrize("level", LEVELS)
def test_the_operators_hold_at_every_level(
    level: str, processor: list[str], native_cache: Path
) -> None:
    skip_what_it_lacks(level, processor)
    if level == cpu_ops.level():
        pytest.skip(f"{level} is what the tests of this session run at")
    environment = {SWITCH: level, PYTORCHS_SWITCH: CAPABILITIES[level]}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(f"tests/{name}" for name in TESTS)],
        cwd=ROOT,
        env=os.environ | environment | {"ODELT_FAST_CACHE": str(native_cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_the_highest_level_is_chosen_and_named(processor: list[str], native_cache: Path) -> None:
    level, capability = processor
    assert level in {"AVX512": ("avx512", "amx"), "AVX2": ("avx2",)}.get(capability, LEVELS)
    used = cpu_ops.level()
    line = f"native cpu operators: {used}, vectors of {BITS[used]} bits, {native_cache}"
    assert cpu_ops.describe().startswith(line)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_pytorchs_own_switch_holds_them_too(level: str, processor: list[str]) -> None:
    skip_what_it_lacks(level, processor)
    line = run_python(LEVEL, **{PYTORCHS_SWITCH: CAPABILITIES[level]})
    assert line.startswith(level)
    assert f"operators: {level}, vectors of {BITS[level]} bits" in line


def test_an_unknown_level_and_one_that_is_not_there_are_errors(
    native_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH, "sse")
    message = f"{SWITCH} must be one of baseline, avx2, avx512, amx, not 'sse'"
    with pytest.raises(ValueError, match=message):
        build.load("cpu", build_it=False)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    if cpu_ops.level() == LEVELS[-1]:
        pytest.skip("no level is higher than this processor's")
    monkeypatch.setenv(SWITCH, LEVELS[-1])
    with pytest.raises(ValueError, match=f"{SWITCH} is amx, and .* has {cpu_ops.level()} at most"):
        build.load("cpu", build_it=False)
