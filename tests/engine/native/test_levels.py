"""The native operators at every level of instructions: those that this processor has are tested in
processes of their own, what it lacks is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from odelt_fast.cli import main
from odelt_fast.engine.native import build, cpu_ops
from odelt_fast.engine.native.build import LEVELS
from tests.helpers.engine_cases import ROOT, run_python

SWITCH = "ODELT_FAST_CPU_LEVEL"
# PyTorch's names of the levels: what it computes at the same level is what ours is held to.
CAPABILITIES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}
TESTS = ("engine/native/test_rows.py", "engine/native/test_products.py", "engine/test_cpu.py")
LEVEL = """
from odelt_fast.engine.native import cpu_ops, build
assert build.load("cpu", build_it=False) is None
print(cpu_ops.level(), cpu_ops.describe())
"""


def level_in_a_process(cache: Path, **environment: str) -> str:
    return run_python(LEVEL, ODELT_FAST_CACHE=str(cache), **environment)


@pytest.fixture(scope="module")
def highest(native_cache: Path) -> str:
    """The processor's level, whatever these tests are held to."""
    return level_in_a_process(
        native_cache, ODELT_FAST_CPU_LEVEL="", ATEN_CPU_CAPABILITY="avx512"
    ).split()[0]


@pytest.mark.parametrize("level", LEVELS)
def test_the_operators_hold_at_every_level(level: str, highest: str, native_cache: Path) -> None:
    if LEVELS.index(level) > LEVELS.index(highest):
        pytest.skip(f"this processor has no {level}")
    if level == cpu_ops.level():
        pytest.skip(f"{level} is what the tests of this session run at")
    environment = {SWITCH: level, "ATEN_CPU_CAPABILITY": CAPABILITIES[level]}
    environment["ODELT_FAST_CACHE"] = str(native_cache)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(f"tests/{name}" for name in TESTS)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_the_highest_level_is_chosen_and_named(highest: str, native_cache: Path) -> None:
    widths = {"AVX512": ("avx512", "amx"), "AVX2": ("avx2",)}
    assert highest in widths.get(torch.backends.cpu.get_cpu_capability(), LEVELS)
    bits = {"baseline": 128, "avx2": 256, "avx512": 512, "amx": 512}[cpu_ops.level()]
    assert (
        f"operators: {cpu_ops.level()}, vectors of {bits} bits, {native_cache}"
        in cpu_ops.describe()
    )


@pytest.mark.parametrize(("capability", "level"), [("default", "baseline"), ("avx2", "avx2")])
def test_pytorchs_own_switch_holds_them_too(
    capability: str, level: str, highest: str, native_cache: Path
) -> None:
    if LEVELS.index(level) > LEVELS.index(highest):
        pytest.skip(f"this processor has no {level}")
    told = level_in_a_process(native_cache, ODELT_FAST_CPU_LEVEL="", ATEN_CPU_CAPABILITY=capability)
    assert told.startswith(f"{level} native cpu operators: {level}, vectors of")


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
