"""benchmarks.card: a step harms no other, nothing found is lost, what is wrong is not measured."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import card as command
from benchmarks import correctness, kernel_table, plan, report, targets
from benchmarks.measure import ROOT
from benchmarks.sampling import CONFIGS
from benchmarks.steps import Log, MissingError, Runner, Step, elsewhere, read_log
from tests.stress.kill_card import quick, torture

Found = Iterator[dict[str, Any]]
Refused = Mapping[str, str]
RUN = {"device": "here", "sources": "these"}


def run(
    path: Path, steps: list[Step], workers: int = 4, seconds: float = 30, **changes: str
) -> Log:
    """Runs steps with the machinery of the command; the log as it then is."""
    log = Log(path, RUN | changes)
    until = time.monotonic() + seconds
    with Runner(log, print) as runner:
        runner.phase(steps, workers, until, until)
    log.file.close()
    return log


def good(_: Refused) -> Found:
    yield {"a": {"x": 1}}
    yield {"a": {"y": 2}, "b": 3}


def raising(_: Refused) -> Found:
    yield {"a": 1}
    raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def hanging(_: Refused) -> Found:
    yield {"a": 1}
    subprocess.run(["sleep", "100"], env=os.environ | {"HANGS": "1"})


def killed_by(number: signal.Signals) -> Callable[[Refused], Found]:
    def work(_: Refused) -> Found:
        yield {"a": 1}
        print("before")
        os.kill(os.getpid(), number)

    return work


def leaving(_: Refused) -> Found:
    yield {"a": 1}
    os._exit(7)


def absent(_: Refused) -> Found:
    import no_such_module  # noqa: F401

    yield {}


def test_a_step_that_raises_hangs_or_kills_its_process_costs_only_itself(tmp_path: Path) -> None:
    bad = {
        "raises": Step("t: raises", raising),
        "hangs": Step("t: hangs", hanging, limit_s=0.5),
        "crashes": Step("t: crashes", killed_by(signal.SIGSEGV)),
        "aborts": Step("t: aborts", killed_by(signal.SIGABRT)),
        "leaves": Step("t: leaves", leaving),
    }
    others = [Step(f"t: good {number}", good) for number in range(len(bad) + 1)]
    steps = [*chain(*zip(others, bad.values())), others[-1], Step("t: absent", absent)]
    log = run(tmp_path / "log", steps)
    assert {log.state(step.key) for step in others} == {"done"}
    assert log.result("t: good 0") == {"a": {"x": 1, "y": 2}, "b": 3}
    assert {log.state(step.key) for step in bad.values()} == {"failed"}
    for step in bad.values():
        assert log.found[step.key]["result"] == {"a": 1}  # what it found before
    reasons = {name: log.found[step.key]["reason"] for name, step in bad.items()}
    assert reasons["raises"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "Traceback" in log.found["t: raises"]["output"]
    assert reasons["hangs"].startswith("hung after ")
    assert reasons["crashes"] == "its process died of SIGSEGV"
    assert reasons["aborts"] == "its process died of SIGABRT"
    assert reasons["leaves"] == "its process ended with code 7"
    assert log.state("t: absent") == "missing"
    assert "no_such_module" in log.found["t: absent"]["reason"]
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if marked(path)]
    assert not left, "what a step has started outlives it"
    assert read_log(tmp_path / "log")[1] == log.found


def marked(environ: Path) -> bool:
    try:
        return b"HANGS=1" in environ.read_bytes().split(b"\0")
    except OSError:
        return False


def test_a_second_call_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.steps.LEAST_S", 0.1)
    path, begun = tmp_path / "log", tmp_path / "begun"

    def noted(name: str, work: Callable[[Refused], Found]) -> Callable[[Refused], Found]:
        def noting(refused: Refused) -> Found:
            with begun.open("a") as file:
                file.write(name + " ")
            yield from work(refused)

        return noting

    def names() -> set[str]:
        found = set(begun.read_text().split()) if begun.exists() else set()
        begun.write_text("")
        return found

    def steps(digest: str = "1") -> list[Step]:
        works = {"done": good, "failed": raising, "missing": absent, "cut": hanging}
        return [Step(f"t: {name}", noted(name, work), 60, digest) for name, work in works.items()]

    log = run(path, steps(), seconds=1.5)
    assert names() == {"done", "failed", "missing", "cut"}
    assert log.state("t: cut") == "unfinished"
    run(path, steps(), seconds=1.5)
    assert names() == {"missing", "cut"}
    run(path, steps(), seconds=1.5, sources="others")
    assert names() == {"failed", "missing", "cut"}
    run(path, steps("2"), seconds=1.5, sources="others")
    assert names() == {"done", "failed", "missing", "cut"}
    assert run(path, steps(), seconds=0).state("t: cut") == "unfinished"
    assert not names()  # there was no time


def test_a_file_torn_at_any_byte_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run(path, [Step(f"t: {number}", good) for number in range(3)], workers=1)
    whole = path.read_bytes()
    keys = {f"t: {number}" for number in range(3)}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = {key for key, each in read_log(path)[1].items() if each["state"] == "done"}
        log = Log(path, RUN)
        assert log.found.keys() == kept
        for key in sorted(keys - kept):
            log.add(
                {"step": key, "state": "done", "digest": "", "seconds": 1, "result": {"n": size}}
            )
        log.file.close()
        assert read_log(path)[1].keys() == keys


def test_a_file_of_another_device_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "card.jsonl"
    run(path, [Step("t: good", good)])
    with pytest.raises(ValueError, match="holds results of here, this is there"):
        Log(path, {"device": "there"})
    first = Log(path, RUN)
    with pytest.raises(ValueError, match="another process writes it"):
        Log(path, RUN)
    first.file.close()
    for text in ("[1]", '{"part": "latency"}', "hello\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not hold the results"):
            Log(path, RUN)
    with pytest.raises(ValueError, match=r"holds no results: make them with python -m"):
        report.load(tmp_path / "nothing")


def test_what_has_failed_refuses_only_what_stands_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.steps.LEAST_S", 0.1)

    def variants(refused: Refused) -> Found:
        yield {"variants": {name: refused.get(name, "") for name in ("eager", "fused", "fp8")}}

    on = {"fused": ["c: right", "c: wrong"], "fp8": ["c: right", "c: slow"], "eager": ["c: right"]}
    checks = [Step("c: right", good), Step("c: wrong", raising), Step("c: slow", hanging)]
    cell, whole = Step("m: cell", variants, stands_on=on), {"": ["c: wrong"]}
    path = tmp_path / "log"
    run(path, checks, seconds=1)
    log = run(path, [cell, Step("m: proof", good, stands_on=whole), Step("m: else", good)])
    assert [log.state(f"m: {name}") for name in ("cell", "proof", "else")] == [
        "refused", "refused", "done",
    ]  # fmt: skip
    assert log.found["m: cell"]["result"]["variants"] == {
        "eager": "", "fused": "what it stands on has failed: c: wrong", "fp8": "",
    }  # fmt: skip
    log = run(path, [Step("c: wrong", good), Step("c: slow", hanging)], seconds=1, sources="new")
    log = run(path, [cell], sources="new")
    assert log.state("m: cell") == "done"
    assert set(log.result("m: cell")["variants"].values()) == {""}
    assert log.found["m: cell"]["unproven"] == {"fp8": ["c: slow"]}


def test_a_step_waits_for_the_one_it_comes_after(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def noting(name: str, seconds: float) -> Callable[[Refused], Found]:
        def work(_: Refused) -> Found:
            time.sleep(seconds)
            with order.open("a") as file:
                file.write(name)
            yield {}

        return work

    steps = [
        Step("t: slow", noting("a", 0.3), background=True),
        Step("t: late", noting("b", 0), after="t: slow"),
        Step("t: free", noting("c", 0)),
    ]
    run(tmp_path / "log", steps, workers=1)
    assert order.read_text() == "cab"


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    """A sample of `python -m tests.stress.kill_card`."""
    assert torture(quick, kills=3, longest_s=0.4, seed=1, folder=tmp_path) >= 1


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("green", "def test_a(): pass\ndef test_b(): pytest.skip('no GPU')", ""),
        ("red", "def test_a(): pass\ndef test_b(): assert 0", "1 passed, 1 failed, 0 skipped"),
        ("skipped", "def test_a(): pytest.skip('no GPU')", "0 passed, 0 failed, 1 skipped"),
        ("broken", "import no_such_module", "0 passed, 1 failed, 0 skipped"),
    ],
)
def test_a_check_is_done_only_if_something_passed_and_nothing_failed(
    tmp_path: Path, name: str, body: str, reason: str
) -> None:
    tests = tmp_path / f"test_{name}.py"
    tests.write_text(f"import pytest\n{body}\n")
    check = correctness.Tests((str(tests),))
    step = Step("t: check", lambda refused: correctness.run_tests(check, "", refused))
    log = run(tmp_path / "log", [step])
    record = log.found["t: check"]
    assert record["state"] == ("failed" if reason else "done"), record
    assert record.get("reason", "").removeprefix("ValueError: ") == reason


def test_a_missing_package_is_named_with_the_way_to_bring_it() -> None:
    with pytest.raises(
        MissingError, match=r"^no_such_module missing: carry the wheels in a folder"
    ):
        correctness.need("pytest", "no_such_module")


@pytest.fixture(scope="module")
def card_plan(tmp_path_factory: pytest.TempPathFactory) -> plan.Plan:
    """The full grid's, as a card would get it."""
    log = Log(tmp_path_factory.mktemp("plan") / "card.jsonl", RUN)
    return plan.make_plan("full", "cuda", log, (Path("reference"), "python"))


def test_nine_minutes_hold_the_questions_in_their_order(card_plan: plan.Plan) -> None:
    phases = card_plan.phases(["*"])
    assert [phase.until_s for phase in phases] == [25, 165, 300, 450, 510, 540, 540]
    look, checks, cells, compiled, tuned, solved, everything = (
        [step.key for step in phase.steps] for phase in phases
    )
    assert look == [
        "look: libraries", "look: attention", "look: ceilings", "correctness: while graph",
    ]  # fmt: skip
    assert {correctness.key(f"kernel {name}") for name in correctness.KERNELS} <= set(checks)
    assert sum(key.startswith("look: warm") for key in checks) == len(compiled) == 10
    base = "DiT-B/2 bfloat16 batch"
    assert cells[:5] == [
        f"latency: {base} 1 l=12 T=4 fused", f"latency: {base} 1 l=4 T=4 fused",
        f"throughput: {base} 128 l=12 T=4 fused", f"peers: {base} 128 l=12 T=4 fused-fp8",
        f"peers: {base} 1 l=12 T=4 fused-fp8",
    ]  # fmt: skip
    assert compiled[0] == f"peers: {base} 1 l=12 T=4 reduce-overhead"
    assert tuned[-2:] == ["tuning: DiT-B/2", "tuning: DiT-XL/2"]
    assert solved[-1] == f"solvers: proof {base} 1 l=12 dopri5 0.01"
    assert set(everything) == {*look, *checks, *cells, *compiled, *tuned, *solved, *everything}
    assert len(everything) == len(set(everything))
    for part, count in ("latency", 9 * 2 + 3), ("xl", 6 * 2 + 3), ("kernels", 50):
        assert sum(key.startswith(f"{part}: ") for key in everything) >= count


def test_a_choice_of_steps_brings_what_they_stand_on(card_plan: plan.Plan) -> None:
    chosen = {step.key for step in card_plan.phases(["kernels: * batch 1 attention*"])[-1].steps}
    base = "kernels: DiT-B/2 batch 1"
    assert chosen == {
        f"{base} attention 1x12x256", f"{base} attention_tangent 1x12x256",
        "correctness: kernel attention", "correctness: kernel attention_tangent", "look: ceilings",
    }  # fmt: skip
    assert not card_plan.phases(["no such step"])[-1].steps


def test_everything_stands_on_checks_that_exist(card_plan: plan.Plan) -> None:
    steps = card_plan.phases(["*"])[-1].steps
    keys = {step.key for step in steps}
    for step in steps:
        assert {*chain(*step.stands_on.values())} <= keys
        measured = step.key.partition(": ")[0] not in ("look", "correctness")
        assert bool(step.stands_on) == measured, step.key
    by_key = {step.key: step.stands_on for step in steps}
    float8 = correctness.kernel_keys("linear_float8")[0]
    cell = by_key["latency: DiT-B/2 bfloat16 batch 1 l=12 T=4 fused"]
    assert cell["eager"] == ("correctness: network",)
    assert float8 not in cell["fused"]
    assert correctness.kernel_keys("attention")[0] in cell["fused"]
    fp8 = by_key["peers: DiT-B/2 bfloat16 batch 1 l=12 T=4 fused-fp8"]
    assert float8 in fp8["fused-fp8"]
    kernel = by_key["kernels: DiT-B/2 batch 1 linear_qkv_float8 256x768x2304"]
    assert kernel == {"triton": (float8,)}


def interpreted_kernels() -> list[str]:
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.stress import kernel_cases

    return [name for name, _ in kernel_cases.collect()]


def test_every_kernel_has_its_check(card_plan: plan.Plan) -> None:
    assert sorted(elsewhere(interpreted_kernels)) == sorted(correctness.KERNELS)
    for tests in correctness.TESTS.values():
        for file in tests.files:
            assert (ROOT / "tests" / file).is_file(), file


PROGRAM = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {absent}: raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from benchmarks import card
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
{before}
code = card.main(sys.argv[1:])
import torch
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
sys.exit(code)
"""
BARE = "tyro", "diffusers", "accelerate", "datasets", "matplotlib", "platformdirs", "torchdiffeq"


def card(
    out: Path, *arguments: str, absent: tuple[str, ...] = (), before: str = ""
) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(absent=absent, before=before)
    given = "--out", str(out), "--grid", "tiny", *arguments
    return subprocess.run(
        [sys.executable, "-c", program, *given], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, native_cache: Path) -> Path:
    """A run of the tiny grid, all of it."""
    folder = tmp_path_factory.mktemp("card")
    finished = card(folder, "--minutes", "15")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_the_tiny_grid_runs_every_step_on_a_cpu(whole: Path) -> None:
    runs, found = read_log(whole / "card.jsonl")
    steps = plan.make_plan("tiny", "cpu", Log(whole / "other", RUN), None).phases(["*"])[-1].steps
    assert found.keys() == {step.key for step in steps}
    assert {record["state"] for record in found.values()} == {"done"}
    assert {"device", "torch", "commit", "sources", "threads", "command"} <= runs[0].keys()
    assert found["look: ceilings"]["result"]["ceilings"]["float32"] > 0
    seen = found["look: attention"]["result"]["dispatch"]["float32 batch 1"]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen["operators"]
    cell = found["latency: tiny float32 batch 1 l=4 T=2 auto"]["result"]
    eager = cell["variants"]["eager"]
    assert len(eager["samples_s"]) >= 7
    assert eager["per_evaluation_s"] == pytest.approx(eager["median_s"] / 2)
    assert any(row["name"] == "aten::addmm" for row in cell["profiles"]["eager"])
    compiled = found["peers: tiny float32 batch 2 l=4 T=2 reduce-overhead"]["result"]["variants"]
    assert compiled["reduce-overhead"]["relative_error"] < 1e-5
    table = json.loads((whole / "tuning.json").read_text())
    assert found["tuning: tiny"]["result"]["entries"] == len(table["entries"])


def test_the_solvers_are_raced_and_proven(whole: Path) -> None:
    found = read_log(whole / "card.jsonl")[1]
    for batch in (1, 2):
        load = f"tiny float32 batch {batch} l=12 dopri5 0.01"
        race = found[f"solvers: race {load}"]["result"]["race"]
        assert len(race) == 7
        assert [name for name, row in race.items() if "median_s" not in row] == []
        name = "steps on the device, eager network"
        ours, host = race[name], race["host loop, eager network"]
        assert ours["evaluations"] == host["evaluations"]
        theirs, equal = (
            race[name] for name in ("torchdiffeq, eager network", f"{name}, at torchdiffeq's error")
        )
        assert equal["relative_error"] <= theirs["relative_error"]
        assert equal["evaluations"] <= theirs["evaluations"]
        assert ours["relative_error"] == pytest.approx(host["relative_error"], rel=1e-2)
        proof = found[f"solvers: proof {load}"]["result"]["proof"]
        assert proof == {"reason": "there is no GPU, on which alone a solve is one launch"}


def test_the_report_shows_what_was_found(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(whole), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| tiny float32 batch 1 l=4 T=2 auto | eager |" in text
    assert "Weights of tiny in float32: " in text
    assert "NOT in proportion" not in text
    assert "What went wrong" not in text
    assert "| 12 | dopri5 | 0.01 | " in text
    assert "| 1 | 0.01 | host loop, eager network |" in text
    assert f"| kernel all, interpreted | done | {len(correctness.KERNELS)} | 0 |" in text
    goal = "| batch 1, l = 12, evaluation in a trajectory (T = 128) | at most 180 us | not measured"
    assert goal in text
    assert (tmp_path / "report.md").read_text() in text
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_measured_twice_and_time_is_kept(whole: Path) -> None:
    before = (whole / "card.jsonl").read_bytes()
    again = card(whole)
    assert again.returncode == 0, again.stderr
    assert (whole / "card.jsonl").read_bytes() == before
    late = card(whole / "late", "--minutes", "0.01")
    assert late.returncode == 3
    assert "steps are left: run the same command again" in late.stdout


RED = """
from benchmarks import correctness
correctness.TESTS["engine"] = correctness.Tests(({path!r},))
"""


WITHOUT = """
import os, sys
for name in {absent!r}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "-o", "addopts=", "--import-mode=importlib", *sys.argv[1:]]))
"""


def test_checks_need_no_more_than_they_say() -> None:
    """What a selection needs beyond pytest is named, so that it is missing there and not red: one
    red selection would refuse every measurement of the engine."""
    chosen = [each for each in correctness.TESTS.values() if set(each.modules) <= {"safetensors"}]
    files = sorted({f"tests/{file}" for each in chosen for file in each.files})
    assert len(files) == 7
    program = WITHOUT.format(absent=(*BARE, "PIL", "huggingface_hub", "scipy"))
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", program, "-k", "torchdiffeq", *files],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"^\d+ skipped, \d+ deselected", found.stdout.splitlines()[-1])


def test_a_bare_machine_measures_and_what_is_red_is_refused(tmp_path: Path) -> None:
    """torch, numpy, tqdm and pytest are enough; eager is measured whatever the engine does."""
    red = tmp_path / "test_red.py"
    red.write_text("def test_a(): assert 0, 'wrong'\n")
    chosen = "--only", "latency: * batch 1 l=4 T=1 auto", "training: *"
    before = RED.format(path=str(red))
    found = card(tmp_path / "out", *chosen, absent=BARE, before=before)
    assert found.returncode == 1, found.stdout + found.stderr
    key = "latency: tiny float32 batch 1 l=4 T=1 auto"
    steps = read_log(tmp_path / "out" / "card.jsonl")[1]
    assert steps["correctness: engine"]["state"] == "failed"
    variants = steps[key]["result"]["variants"]
    assert "median_s" in variants["eager"]
    assert variants["auto"]["reason"].endswith("has failed: correctness: engine")
    assert steps["training: DiT-B/2"]["state"] == "missing"
    assert f"| {key} | refused |" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive, not 0"),
        (["--wheels", "."], "there are no wheels in it"),
        (["--reference-dir", "."], "there is no model.py"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        sys.exit(command.main(["--out", str(tmp_path), *arguments]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    found = card(tmp_path, "--only", "nothing: *")
    assert found.returncode == 2
    assert found.stderr == "card: --only nothing: *: there are no such steps\n"


def test_targets_see_nine_minutes_of_a_card() -> None:
    """The cells of the plan are those that the goals are read from."""
    cell = {"network": "DiT-B/2", "batch": 1, "depth": 12, "steps": 4, "solver": "euler"}
    row = {"fused": {"median_s": 1e-3, "tflops": 1.0}, "reduce-overhead": {"median_s": 2e-3}}
    content = {"runs": [], "configurations": {"x": {"cell": cell, "variants": row}}}
    found = {what: value for what, _, value, _ in targets.targets({"peers": content})}
    assert found["batch 1, l = 12, over the better torch.compile mode"] == "2.00x"


def test_the_kernel_table_can_be_listed_without_a_card() -> None:
    shapes = (("DiT-B/2", 1),)
    (names,) = elsewhere(plan.kernel_names, shapes, torch.bfloat16, True)
    cases = kernel_table.cases(CONFIGS["DiT-B/2"], 1, torch.bfloat16, True)
    assert names == [case.name for case in cases]
    for name in names:
        assert set(correctness.of_kernel(name)) <= set(
            correctness.kernel_keys(*correctness.KERNELS)
        )
