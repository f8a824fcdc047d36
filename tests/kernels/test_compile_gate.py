"""The compile gate: what the kernels compile to for Hopper, and what the gate refuses.

It runs in a process of its own, without the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from odelt_fast.kernels.attention import compile_cases

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    """A module from its file: the root is not on the path of every way to start pytest."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


compile_gate = load(ROOT / "benchmarks" / "compile_gate.py")


def gate(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    } | variables
    command = [sys.executable, "-m", "benchmarks.compile_gate", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_one_configuration_of_every_kernel_compiles_well_for_hopper() -> None:
    run = gate("--arch", "90", "--one")
    assert run.returncode == 0, run.stdout + run.stderr
    for operator in (
        "linear/",
        "attention/",
        "attention_tangent/",
        "quantize/",
        "norm_modulate/",
        "gated_residual/",
        "adaptive/",
        "solver_update/",
    ):
        assert f"\n{operator}" in run.stdout


def test_register_growth_over_the_baseline_fails(tmp_path: Path) -> None:
    case, stored = "quantize/768/bf16", tmp_path / "baseline.json"
    run = gate("--arch", "90", "--case", case, "--baseline", str(stored), "--update-baseline")
    assert run.returncode == 0, run.stdout + run.stderr
    tables = json.loads(stored.read_text())
    (table,) = tables.values()
    assert list(table) == [f"{case} sm_90"]
    assert gate("--arch", "90", "--case", case, "--baseline", str(stored)).returncode == 0
    table[f"{case} sm_90"]["registers"] -= 1
    stored.write_text(json.dumps(tables))
    run = gate("--arch", "90", "--case", case, "--baseline", str(stored))
    assert run.returncode == 1
    assert "registers grew" in run.stdout


def test_baseline_holds_every_configuration_on_every_card_under_both_tritons_and_no_other() -> None:
    wanted = {
        f"{case.name} sm_{arch}"
        for case in compile_gate.collect(["*"], one=False)
        for arch in case.arches
    }
    tables = json.loads(compile_gate.BASELINE.read_text())
    assert set(tables) == {"triton 3.6.0", "triton 3.8.0"}
    for version, table in tables.items():
        assert set(table) == wanted, f"{version}: {sorted(wanted ^ set(table))[:5]}"


@pytest.mark.parametrize("name", ["attention/24/bf16", "attention/72/bf16"])
def test_no_two_dots_share_an_accumulator(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton pipelines such dots wrongly on Blackwell, and makes them of a sum of dots, too."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (case,) = compile_gate.collect([name], one=False)
    kernel = compile_gate.compiled(case, 100)
    dots = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%\S+)", kernel.asm["ttir"])
    assert dots
    assert not {result for result, _ in dots} & {added for _, added in dots}, dots


def test_loads_and_epilogues_of_large_products_have_warps_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Hopper in Gluon: from what is enough on Blackwell Triton makes no such warps there. Where
    this fails for its last line linear_hopper.py may be needless."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ["linear/ping_pong/bf16/gated", "linear/overlapped/bf16/gated"]
    hopper, blackwell = sorted(compile_gate.collect(names, one=False), key=lambda case: case.arches)
    ptx = compile_gate.compiled(hopper, 90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert {"24", "240"} <= set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))
    kernel = compile_gate.compiled(blackwell, 100)
    assert "setmaxnreg" in kernel.asm["ptx"]
    # A tile is multiplied while the epilogue of another is under way.
    assert "memdesc<2x128x128xf32, #tmem" in kernel.asm["ttgir"]
    assert "setmaxnreg" not in compile_gate.compiled(blackwell, 90).asm["ptx"]


def test_a_seeded_sample_of_all_configurations_compiles_as_in_the_baseline() -> None:
    run = gate("--sample", "12", "--seed", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 of 12 passed" in run.stdout


def test_an_interrupted_update_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stored = tmp_path / "baseline.json"
    update = ("--arch", "90", "--baseline", str(stored), "--update-baseline", "--missing", "--case")
    assert "1 of 1 passed" in gate(*update, "quantize/768/bf16").stdout
    assert "1 of 1 passed" in gate(*update, "quantize/768/bf16", "quantize/768/fp16").stdout
    (table,) = json.loads(stored.read_text()).values()
    assert sorted(table) == ["quantize/768/bf16 sm_90", "quantize/768/fp16 sm_90"]


def test_interpreter_is_refused_with_one_line() -> None:
    run = gate(TRITON_INTERPRET="1")
    assert run.returncode == 1
    assert (
        run.stderr
        == "compile_gate: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled:"
        " unset it\n"
    )


def test_pattern_without_a_case_fails() -> None:
    run = gate("--case", "no_such_kernel/*")
    assert run.returncode == 1
    assert run.stderr == "no case matches\n"


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (compile_gate.Resources(64, 1024, 0, 16), None),
        (compile_gate.Resources(64, 1024, 8, 16), "spills"),
        (compile_gate.Resources(64, 232_449, 0, 16), "shared memory"),
        (compile_gate.Resources(64, 1024, 0, 4), "scalar loads"),
        (compile_gate.Resources(65, 1024, 0, 16), "registers grew from 64 to 65"),
    ],
)
def test_each_fault_is_named(found: Any, fault: str | None) -> None:
    faults = compile_gate.judge(next(compile_cases()), 90, found, {"registers": 64})
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


@pytest.mark.parametrize(
    ("ptx", "width"),
    [
        ("", 0),
        ("ld.global.b16 {%rs1}, [%rd1];", 2),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", 16),
        ("ld.global.L1::evict_first.v2.b64 { %rd2, %rd3 }, [%rd1 + 0];", 16),
        ("@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;", 4),
        (
            (
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1],"
                " [%rd1, {%r2, %r3}], [%r4];"
            ),
            128,
        ),
        (
            "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [%r1];",
            0,
        ),  # a store
        ("st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};", 0),
    ],
)
def test_width_of_loads_is_read_from_the_ptx(ptx: str, width: int) -> None:
    assert compile_gate.widest_load(ptx) == width


def test_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compile_gate.main(["--arch", "70"])
    assert "invalid choice: 70" in capsys.readouterr().err
