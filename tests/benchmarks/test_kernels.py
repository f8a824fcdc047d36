"""The kernel table and the tuning table: every case can be checked and timed, and a fault costs one
variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, solver_speed, tune
from benchmarks.sampling import CONFIGS, Workload, true_samples
from odelt_fast.operation import Operation

CPU = torch.device("cpu")
# In Triton's interpreter, whose bfloat16 arithmetic is wrong: of that dtype the float8 cases alone.
PROGRAM = """
import torch
from benchmarks import kernel_speed
from benchmarks.kernel_table import cases
from benchmarks.sampling import CONFIGS
from tests.helpers.kernel_cases_gemm import exact_float8_cast

kernel_speed.COLD_BYTES["cpu"] = 1
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for case in cases(CONFIGS["tiny"], 2, dtype, True):
        if dtype == torch.bfloat16 and "float8" not in case.name and "quantize" not in case.name:
            continue
        with exact_float8_cast():
            prepared = kernel_speed.Prepared(case, dtype, torch.device("cpu"))
            for name in prepared.variants:
                try:
                    error, timer = prepared.variant(name)
                    timer()
                    print(case.name, dtype, name, "right")
                except Exception as fault:
                    print(case.name, dtype, name, type(fault).__name__, fault)
"""
# PyTorch has no such attention on a CPU, and there _addmm_activation has another GELU.
NOT_ON_A_CPU = ("cudnn RuntimeError No viable backend", "efficient RuntimeError No viable backend",
                "addmm_activation ValueError")  # fmt: skip


def test_every_kernel_of_the_table_is_prepared_checked_and_timed() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, env=environment, cwd=measure.ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    wrong = [line for line in lines if not line.endswith("right")]
    assert not [line for line in wrong if not any(text in line for text in NOT_ON_A_CPU)]
    right = {line.split()[0] for line in lines if line.endswith("triton right")}
    assert {"quantize_rows", "linear_gelu_float8", "attention_tangent", "final_euler"} <= right
    assert len(right) == 19


class CompilationError(Exception):
    """As Triton's: no RuntimeError."""


def tiny_tuner(refused: dict[str, str]) -> tune.Tuner:
    return tune.make_tuner(CPU, refused)


def test_a_variant_that_cannot_be_compiled_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def graph_timer(
        call: Callable[[int], object], sets: int, device: torch.device
    ) -> measure.Timer:
        call(0)  # as on a GPU, before the capture
        return measure.graph_timer(call, sets, device)

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise CompilationError("out of resource: shared memory")

    monkeypatch.setattr(tune, "graph_timer", graph_timer)
    tuner = tiny_tuner({"attention triton": "refused"})
    tuner.ops.linear = broken
    entries, times = zip(*((e, make()) for e, make in tuner.shapes(CONFIGS["tiny"], (1,))))
    for entry, found in zip(entries, times):
        assert "triton" not in found
        if entry["dtype"] == "float32" and entry.get("activation") != "gated":  # ours alone
            assert found, entry
    assert "linear triton cannot run: CompilationError: out of resource" in capsys.readouterr().err


def test_tuning_is_written_entry_by_entry_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    config = CONFIGS["tiny"]
    stopped = tune.tune(tiny_tuner({}), config, out, (1, 2, 4))
    first = [next(stopped), next(stopped)]
    stopped.close()
    assert json.loads(out.read_text())["entries"] == first
    rest = list(tune.tune(tiny_tuner({}), config, out, (1, 2, 4)))
    entries = json.loads(out.read_text())["entries"]
    assert entries == [*first, *rest]
    shapes = [{**entry, "microseconds": 0} for entry in entries]
    assert all(shapes.count(shape) == 1 for shape in shapes)
    assert [entry["amount"] for entry in entries if entry["operator"] == "attention"] == [1, 4, 2]
    assert not list(tune.tune(tiny_tuner({}), config, out, (1, 2, 4)))
    content = json.loads(out.read_text())
    content["device"]["device"] = "another card"
    out.write_text(json.dumps(content))
    assert next(tune.tune(tiny_tuner({}), config, out, (1,)))["amount"] == 1


def test_exact_samples_are_made_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of cuDNN are TF32's by default, and the patch embedding is one."""
    seen: list[tuple[bool, bool, str]] = []
    forward = torch.nn.Conv2d.forward

    def noting(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        cudnn = torch.backends.cudnn
        seen.append((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noting)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # the default
    load = Workload("tiny", Operation(depth=4, steps=1), 1, torch.float32, ("eager",))
    true_samples(load.model(CPU), load, load.inputs(CPU))
    assert seen[0] == (True, False, "highest")
    assert seen[-1][1]  # what is measured runs as it always does
    monkeypatch.setattr(solver_speed, "Racers", lambda *_: SimpleNamespace(all=lambda *_: iter(())))
    seen.clear()
    solver_speed.measure_race(load, CPU, 0.0, False)
    assert {each[1] for each in seen} == {False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_card_float8_products_are_held_to_pytorchs_in_bfloat16(dtype: torch.dtype) -> None:
    """Hopper adds them with too few bits for float16's rounding to hide."""
    from tests.helpers.kernel_cases_gemm import float8_result

    assert float8_result("cuda", dtype) == torch.bfloat16
    assert float8_result("cpu", dtype) == dtype
