"""Measurements: they are of what they say, refuse what is wrong, and are reported as found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cpu_rate, measure, report, solver_speed, training_speed
from benchmarks.ceilings import evaluation_bytes, evaluation_flops, floor_seconds
from benchmarks.jax_peer import JaxPeer
from benchmarks.kernel_speed import measure_kernel
from benchmarks.kernel_table import KernelCase
from benchmarks.measure import summary, take_turns, write_json
from benchmarks.sampling import CONFIGS, Workload, check, measure_memory, random_model
from benchmarks.steps import MissingError
from odelt_fast.config import DiTConfig
from odelt_fast.operation import Operation
from tests.helpers.small_model import SMALL

CPU = torch.device("cpu")


def one_step(depth: int) -> Operation:
    return Operation(depth=depth, steps=1)


CEILINGS = {"float32": 1e11, "bfloat16": 2e11, "bandwidth": 1e10}


def test_variants_take_turns_and_none_always_follows_the_same_one() -> None:
    order: list[str] = []

    def timer(name: str) -> measure.Timer:
        def timed() -> float:
            order.append(name)
            return float(len(order))

        return timed

    samples = take_turns({name: timer(name) for name in "abc"}, seconds=0, least=3, warm_seconds=0)
    assert "".join(order[:6]) == "abcabc"  # warm-up
    assert "".join(order[6:]) == "abc" + "bca" + "cab"
    assert samples == {"a": [7, 12, 14], "b": [8, 10, 15], "c": [9, 11, 13]}


def test_sampling_stops_at_the_time_or_at_the_most_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(take_turns({"a": lambda: 0.0}, seconds=60, most=7, warm_seconds=0)["a"]) == 7
    now = itertools.count()  # a clock that moves when it is read
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    taken = take_turns({"a": lambda: 0.0}, seconds=9, least=3, most=1000, warm_seconds=0)["a"]
    assert 3 < len(taken) < 15
    assert take_turns({}, seconds=60) == {}


def test_the_host_timer_reads_the_clock_around_the_call() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    assert measure.host_timer(lambda: events.append("call"), CPU, clock)() == 2
    assert events == ["clock", "call", "clock"]


def test_summary_is_the_median_with_its_spread() -> None:
    assert summary([float(n) for n in range(11)]) == {"median_s": 5, "low_s": 1, "high_s": 9}
    assert summary([3.0]) == {"median_s": 3, "low_s": 3, "high_s": 3}


def test_a_result_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": torch.zeros(1)})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_commit_comes_from_the_environment_where_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setenv("COMMIT", "abc123")
    assert measure.commit() == "abc123"
    monkeypatch.delenv("COMMIT")
    assert measure.commit() == "unknown"


@pytest.mark.parametrize(("depth", "batch"), [(4, 1), (8, 3), (12, 2)])
def test_flops_and_bytes_are_those_of_the_network(depth: int, batch: int) -> None:
    config = CONFIGS["tiny"]
    model = random_model(config, depth, torch.float32, CPU)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(
            torch.randn(batch, 4, 8, 8),
            torch.rand(batch),
            torch.zeros(batch),
            torch.zeros(batch, dtype=torch.int64),
            depth=depth,
        )
    # The model embeds time and step for each row; the count here has them once.
    embeddings = (batch - 1) * 2 * 2 * (256 * 32 + 32 * 32)
    assert counter.get_total_flops() == evaluation_flops(config, depth, batch) + embeddings
    state = 2 * 4 * batch * 4 * 8 * 8
    weights = {name: value for name, value in model.blocks.named_parameters() if value.dim() == 2}
    everything = sum(4 * value.numel() for value in weights.values())
    modulation = sum(4 * value.numel() for name, value in weights.items() if "modulation" in name)
    assert evaluation_bytes(config, depth, batch, torch.float32) == everything - modulation + state


def test_the_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert floor_seconds(2e11, 1e9, torch.bfloat16, CEILINGS) == 1
    assert floor_seconds(2e9, 1e10, torch.bfloat16, CEILINGS) == 1


def test_wrong_samples_are_not_timed() -> None:
    exact = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    noise = torch.randn_like(exact)
    noise *= torch.linalg.vector_norm(exact) / torch.linalg.vector_norm(noise)
    eager = exact + 0.01 * noise

    def checked(variant: str, got: torch.Tensor) -> float:
        return check(variant, torch.bfloat16, got, eager, exact)

    assert checked("fused", exact - 0.019 * noise) == pytest.approx(0.019)
    with pytest.raises(ValueError, match=r"relative error 2.10e-02 to float32, at most 2.00e-02"):
        checked("fused", exact - 0.021 * noise)
    assert checked("fused-fp8", exact - 0.039 * noise) == pytest.approx(0.039)
    with pytest.raises(ValueError, match=r"at most 4.00e-02"):
        checked("fused-fp8", exact - 0.041 * noise)
    with pytest.raises(ValueError, match="nan"):
        checked("fused", exact * torch.nan)


def test_a_wrong_kernel_is_not_timed_and_says_so() -> None:
    case = KernelCase(
        "add 16", 192.0, 0.0, lambda draw: (draw(16), draw(16)), torch.add,
        {
            "in_place": lambda x, y: x.add_(y), "right": lambda x, y: y + x,
            "wrong": lambda x, y: x + 1.01 * y, "broken": lambda x, y: x @ y[:3],
        },
        rate=torch.float32,
    )  # fmt: skip
    found = measure_kernel(case, torch.float32, CPU, CEILINGS, 0.01, inductor=False, refused={})
    rows = found["variants"]
    assert len(rows["right"]["samples_s"]) == len(rows["pytorch"]["samples_s"]) >= 5
    assert rows["right"]["share_of_floor"] == pytest.approx(192 / 1e10 / rows["right"]["median_s"])
    assert "its result is wrong" in rows["wrong"]["reason"]
    assert "samples_s" not in rows["wrong"]
    assert rows["broken"]["reason"].startswith("RuntimeError")
    assert "samples_s" in rows["in_place"]


def test_the_papers_figures_stand_beside_ours_and_the_gain_is_judged() -> None:
    cell = {
        "network": "DiT-B/2",
        "depth": 8,
        "steps": 1,
        "batch": 128,
        "dtype": "bfloat16",
        "solver": "dopri5",
        "tolerance": 1e-2,
    }
    row = {
        "median_s": 0.5,
        "low_s": 0.4,
        "high_s": 0.6,
        "evaluations": 26.0,
        "per_evaluation_s": 0.5 / 26,
        "peak_bytes": 2**20,
    }
    ours, theirs = (
        row | {"relative_error": 1e-3, "setup_s": 1.0},
        row | {"median_s": 0.57, "relative_error": 1e-3, "setup_s": 1.0},
    )
    race = {
        "torchdiffeq, compiled network": theirs,
        "one launch, compiled network": ours,
        "one launch, fused network": {"reason": "why"},
    }
    sizes = {"weights": {"blocks": 2**21, "ends": 2**20, "live_blocks": 8}}
    found = {
        "a": {"cell": cell, "variants": {"fused": row}},
        "memory a": {"cell": cell, "variants": {"fused": sizes}},
        "race a": {"cell": cell, "race": race},
        "proof a": {"cell": cell, "proof": {"reason": "no GPU"}},
    }
    text = report.part_table({"part": "solvers", "configurations": found})
    assert (
        "| 500 ms (400 ms to 600 ms) | 26 | 19.2 ms | 1.0 MiB | 3.0 MiB | 2.25 s | 33 | 0.67x |"
        in text
    )
    assert "| 1.14x | at least 1.15x: missed |" in text
    assert "one launch, fused network | did not run: why" in text


def test_what_a_solve_asks_of_cuda_is_counted_inside_its_time() -> None:
    events = [
        ("cudaGraphLaunch", 1.0, 2.0),
        ("cudaGraphLaunch", 11.0, 12.0),
        ("cudaStreamSynchronize", 13.0, 14.0),
        ("aten::add", 12.0, 13.0),
    ]
    assert solver_speed.count_calls(events, 10.0, 13.0) == ({"cudaGraphLaunch": 1}, {})
    assert solver_speed.count_calls(events, 0.0, 20.0) == (
        {"cudaGraphLaunch": 2},
        {"cudaStreamSynchronize": 1},
    )
    with pytest.raises(MissingError, match="sees no calls of CUDA"):
        solver_speed.count_calls(events[-1:], 0.0, 20.0)


def test_weights_are_in_proportion_to_live_blocks() -> None:
    found = [
        measure_memory(Workload("tiny", one_step(depth), 1, torch.float32, ("eager",)), CPU, {})
        for depth in (4, 8, 12)
    ]
    sizes = [one["variants"]["eager"]["weights"] for one in found]
    assert [size["live_blocks"] for size in sizes] == [4, 8, 12]
    assert len({size["blocks"] // size["live_blocks"] for size in sizes}) == 1
    part = {
        "part": "latency",
        "runs": [],
        "configurations": dict(zip(("memory 4", "memory 8", "memory 12"), found)),
    }
    assert "bytes a live block at every l" in report.weights_in_proportion({"latency": part})[0]
    sizes[1]["blocks"] += 4
    assert "NOT in proportion" in report.weights_in_proportion({"latency": part})[0]


def made_up(part: str, *rows: tuple[str, int, int, int, dict[str, float]]) -> dict[str, Any]:
    """A part's content: (network, batch, depth, steps, seconds by variant)."""
    configurations = {}
    for network, batch, depth, steps, times in rows:
        cell = {
            "network": network,
            "batch": batch,
            "depth": depth,
            "steps": steps,
            "solver": "euler",
            "dtype": "bfloat16",
        }
        variants = {name: {"median_s": value, "tflops": 600.0} for name, value in times.items()}
        configurations[f"{network} {batch} {depth} {steps}"] = {
            "run": 0,
            "cell": cell,
            "variants": variants,
        }
    return {
        "part": part,
        "runs": [{"ceilings": {"bfloat16": 790e12}}],
        "configurations": configurations,
    }


def test_targets_are_met_or_missed_by_the_measured_values() -> None:
    base = "DiT-B/2"
    parts = {
        "latency": made_up(
            "latency",
            (base, 1, 12, 128, {"fused": 128 * 170e-6}),
            (base, 1, 4, 128, {"fused": 128 * 80e-6}),
        ),
        "throughput": made_up(
            "throughput",
            (base, 128, 4, 4, {"fused": 0.014}),
            (base, 128, 8, 4, {"fused": 0.030}),
            (base, 128, 12, 4, {"fused": 0.04}),
        ),
        "peers": made_up(
            "peers",
            (
                base,
                1,
                12,
                4,
                {"fused": 1e-3, "max-autotune": 1.7e-3, "reduce-overhead": 1.5e-3, "jax": 9e-3},
            ),
        ),
    }
    lines = {what: (value, verdict) for what, _, value, verdict in report.targets(parts)}
    assert lines["batch 1, l = 12, evaluation in a trajectory (T = 128)"] == ("170 us", "met")
    assert lines["batch 1, l = 4, evaluation in a trajectory (T = 128)"] == ("80 us", "missed")
    assert lines["batch 1, l = 12, over the better torch.compile mode"] == ("1.50x", "missed")
    assert lines["batch 128, l = 12, of the matrix-product rate"] == ("75.9%", "met")
    assert lines["batch 128, latency at l = 4 over l = 12"] == ("0.350", "met")
    assert lines["batch 128, latency at l = 8 over l = 12"] == ("0.750", "missed")
    assert lines["batch 128, l = 12, over the JAX reference"] == ("not measured", "")


def test_a_reference_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no model.py"):
        JaxPeer(tmp_path)
    (tmp_path / "model.py").write_text("")
    peer = JaxPeer(tmp_path)
    try:
        with pytest.raises(
            ValueError, match=r"the JAX reference: (ModuleNotFoundError|ImportError): "
        ):
            peer.build(CONFIGS["tiny"], 4, 1, 1, torch.float32)
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(ValueError, match="the JAX reference stopped"):
            peer.timed()
    finally:
        peer.close()


def test_cpu_rate_compares_the_evaluation_with_the_product() -> None:
    found = cpu_rate.measure(
        Workload("tiny", one_step(4), 2, torch.float32, ("eager", "auto")), 0.01
    )
    pairs = zip(found["variants"]["model"]["samples_s"], found["variants"]["product"]["samples_s"])
    shares = sorted(
        (found["flops"] / mine) / (found["product_flops"] / other) for mine, other in pairs
    )
    assert found["product_flops"] == 2 * 2048 * 768 * 3072
    assert shares[0] <= found["share"]["model"]["median_s"] <= shares[-1]
    assert set(found["variants"]) == {"product", "model", "eager", "auto"}


def test_cpu_rate_divides_an_evaluation_between_operators(native_cache: Path) -> None:
    load = Workload("tiny", one_step(4), 2, torch.float32, ("auto",))
    rows = cpu_rate.operators(load, evaluations=2, least=0)
    times = [float(row[2]) for row in rows]
    assert any(row[0].startswith("odelt_native::gated_residual 2x") for row in rows)
    assert rows[-1][0] == "all else"
    assert times[:-1] == sorted(times[:-1], reverse=True)


def test_steps_of_objectives_are_compared_with_those_of_shortcuts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("shortcuts, live teacher", "mean-flow, forward mode")
    some = {names[1]: training_speed.OBJECTIVES[names[1]]}
    monkeypatch.setattr(training_speed, "OBJECTIVES", some)
    options = training_speed.Options(batch=24, rounds=1)
    rows = training_speed.compare_objectives(options, "cpu", DiTConfig(**SMALL))
    assert [row["objective"] for row in rows] == list(names)
    assert [row["time_rows"] for row in rows] == [3, 9]
    for row in rows:
        (mine,), (base,) = row["seconds"], row["shortcut_seconds"]
        assert row["ratio"] == mine / base
        assert min(row["peak_bytes"], row["shortcut_peak_bytes"]) > 0
    assert "9 of 24 rows are time rows" in capsys.readouterr().out
