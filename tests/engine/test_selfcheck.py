"""The engine is compared with the model before it is trusted: what is wrong, crashes or hangs never
draws a picture, and costs this process nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from odelt_fast.engine import availability, engine, fused, selfcheck, trial
from odelt_fast.engine.selfcheck import Verdict
from odelt_fast.engine.trial import Way
from odelt_fast.operation import Operation
from odelt_fast.sampling.sampler import Sampler
from tests.helpers import forked
from tests.helpers.broken.sitecustomize import break_operators
from tests.helpers.engine_cases import ROOT, random_model, run_python
from tests.helpers.small_model import SMALL

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BROKEN = Path(__file__).parents[1] / "helpers" / "broken"
TINY = {"image_size": 4, "depth": 2, "depth_min": 1, "depth_group": 1}


def way(**changes: object) -> Way:
    return Way(random_model(**TINY).config, "cpu", "float32", kind="reference", **changes)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No verdict is known, here or in the cache folder."""
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "cache"))
    selfcheck.known.cache_clear()
    yield
    selfcheck.known.cache_clear()


def broken_children(monkeypatch: pytest.MonkeyPatch, fault: str, operator: str) -> None:
    """From here on children have the fault."""
    monkeypatch.setenv("ODELT_FAST_BREAK", f"{fault}:{operator}")
    monkeypatch.syspath_prepend(BROKEN)


def engines_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the fused backend runs on CPU models, as on a GPU, with the plain operators; and
    is checked."""
    monkeypatch.setattr(availability, "fused_unavailable", lambda model: None)
    monkeypatch.setattr(fused, "KIND", "reference")
    monkeypatch.setattr(
        fused, "GraphCache", lambda device: None
    )  # there are no CUDA graphs on a CPU
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "always")


@pytest.mark.parametrize(
    "changes",
    [{}, {"adaptive": True}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "precision": "fp8"}],
    ids=str,
)
def test_an_engine_that_is_right_is_found_right(changes: dict) -> None:
    found = selfcheck.run(replace(way(), **changes))
    assert found.right, (found.reason, found.output)
    errors = [each for each in found.comparisons if "error" in each]
    assert [each["what"] for each in errors] == [
        "depth 1, guided", "depth 1, unguided", "depth 2, guided", "depth 2, unguided"
    ]  # fmt: skip
    assert all(0 < each["error"] < each["bound"] for each in errors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guided_channels": 1},
        {"inner_step": "residual"},
        {"inner_step": "inverse_depth", "depth": 3, "depth_min": 2, "depth_group": 1},
        {"length_conditioned": False},
        {"step_conditioned": False, "num_classes": 1},
        {"time_scale": 1000.0, "sampling": "diffusion"},
        {"guidance_max": 8.0, "sampling": "mean_flow"},
    ],
    ids=str,
)
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_kind_of_network_is_compared_with_itself(changes: dict, adaptive: bool) -> None:
    """The steps of the trial are the Sampler's, and no kind is found wrong that is right."""
    model = random_model(**TINY | changes)
    each = Way.of(model.config, "cpu", model.dtype, adaptive=adaptive, kind="reference")
    model = trial.random_model(each)
    with torch.no_grad():
        found = [*trial.compare(each)]
        x, y = trial.noise_and_labels(each, 3)
        for _, operation in trial.operations(each):
            expected = Sampler.of(model, operation, backend="eager")(noise=x, labels=y)
            assert torch.equal(trial.on_host(model, model.config, operation, x, y), expected)
    assert all(each["error"] < each["bound"] for each in found if "error" in each)
    assert all(each.get("equal", True) for each in found)


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        ("wrong:gated_residual", "wrong", "found wrong pictures (depth 1, guided: off by 0.0"),
        ("nan:last_group_end", "wrong", "found wrong pictures (depth 1, guided: not finite"),
        ("changing:linear", "wrong", "found other bits (depth 1, guided, once more)"),
        ("SIGSEGV:attention", "crashed", "crashed (SIGSEGV, at: depth 1, guided)"),
        ("SIGABRT:attention", "crashed", "crashed (SIGABRT, at: depth 1, guided)"),
        ("raises:final_euler", "failed", "failed (CUDA error: invalid device function; at:"),
        ("memory:linear", "undecided", "failed (CUDA out of memory"),
        ("SIGKILL:linear", "undecided", "crashed (SIGKILL"),
        ("prints:linear", "right", ""),
    ],
)
def test_every_fault_is_found_out(
    monkeypatch: pytest.MonkeyPatch, fault: str, state: str, reason: str
) -> None:
    broken_children(monkeypatch, *fault.split(":"))
    found = selfcheck.verdict(way())
    assert (found.state, found.reason.startswith(reason)) == (state, True), found
    # What is nobody's fault is tried again by the next process.
    assert (found.path is None) == (state == "undecided")
    if found.path:
        monkeypatch.setattr(selfcheck, "run", None)
        assert selfcheck.verdict(way()) == found


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_children(monkeypatch, "hang", "linear")
    start = time.monotonic()
    found = selfcheck.run(way(), seconds=12.0)
    assert found.state in ("hung", "undecided")  # on a busy machine it had not begun
    assert found.reason.startswith("did not end in 12 s (at: ")
    assert time.monotonic() - start < 60


def test_a_child_ends_by_itself_where_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"way": way().to_dict(), "timed": False, "seconds": 3}
    path = os.pathsep.join([str(BROKEN), str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", "odelt_fast.engine.trial"], input=json.dumps(asked).encode(),
        env=os.environ | {"PYTHONPATH": path, "ODELT_FAST_BREAK": "hang:linear"}, timeout=120,
        capture_output=True,
    )  # fmt: skip
    assert child.returncode == -signal.SIGALRM


def test_auto_draws_the_models_pictures_where_the_engine_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(**TINY)
    expected = Sampler(model, backend="eager")(3)
    engines_on_the_cpu(monkeypatch)
    monkeypatch.setattr(engine, "load_operators", engine.load_operators)  # until the end
    broken_children(monkeypatch, "wrong", "gated_residual")
    break_operators("wrong", "gated_residual")
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "off")
    assert not torch.allclose(Sampler(model)(3), expected, atol=1e-4)  # wrong it is
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "always")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = Sampler(model)
        pictures = [sampler(3), sampler(3)]
    assert all(torch.equal(each, expected) for each in pictures)
    (message,) = [str(warning.message) for warning in caught]
    assert "its self-check on this device found wrong pictures (depth 1" in message
    report = Path(message.split("report: ")[1].split(";")[0])
    kept = json.loads(report.read_text())
    assert kept["state"] == "wrong"
    assert kept["reason"] in message
    assert sampler.explain()["backend"] == "eager"
    assert sampler.explain()["not_taken"]["fused"] in message
    with pytest.raises(
        ValueError, match=r"backend 'fused' cannot run here: its self-check .*wrong"
    ):
        Sampler(model, backend="fused")
    with pytest.raises(ValueError, match="attention 'triton' is for the fused backend"):
        Sampler(model, attention="triton")


def test_auto_takes_an_engine_that_is_right_and_explains_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines_on_the_cpu(monkeypatch)
    model = random_model(**TINY)
    told = Sampler(model).explain()
    assert told["backend"] == "fused"
    assert told["self_check"].startswith("right, off by ")
    (kept,) = selfcheck.cache_folder().glob("selfcheck/*.json")
    monkeypatch.setattr(selfcheck, "run", lambda *_: Verdict("hung", "did not end in 300 s"))
    assert Sampler(model).explain()["backend"] == "fused"  # once in a process
    with pytest.warns(RuntimeWarning, match="self-check on this device did not end in 300 s"):
        adaptive = Sampler(model, solver="dopri5")  # which is checked apart
    assert adaptive.explain()["backend"] == "eager"
    for setting, expected in (("off", "off"), ("on", "on GPUs only")):
        monkeypatch.setenv("ODELT_FAST_SELFCHECK", setting)
        assert Sampler(model, solver="bosh3").explain()["self_check"] == expected
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "yes")
    with pytest.raises(ValueError, match="ODELT_FAST_SELFCHECK must be one of on, off, always"):
        Sampler(model)
    assert kept.is_file()


INTERPRETED = """
from tests.helpers.engine_cases import random_model
from tests.helpers.broken.sitecustomize import break_operators
import torch
from odelt_fast.engine import availability, fused
from odelt_fast.sampling.sampler import Sampler
break_operators("wrong", "norm_modulate")
availability.fused_unavailable = lambda model: None
fused.GraphCache = lambda device: None
model = random_model(image_size=4, hidden_size=24, depth=2, depth_min=1, depth_group=1, channels=1)
expected = Sampler(model, backend="eager")(1)
print(torch.equal(Sampler(model)(1), expected))
try:
    Sampler(model, backend="fused")
except ValueError as error:
    print(error)
"""


def test_a_wrong_kernel_is_found_out_in_tritons_interpreter(tmp_path: Path) -> None:
    path = os.pathsep.join([str(BROKEN), os.environ.get("PYTHONPATH", "")])
    same, error = run_python(
        INTERPRETED, PYTHONPATH=path, TRITON_INTERPRET="1", ODELT_FAST_SELFCHECK="always",
        ODELT_FAST_BREAK="wrong:norm_modulate", ODELT_FAST_CACHE=str(tmp_path),
        PYTHONWARNINGS="ignore",
    ).splitlines()  # fmt: skip
    assert same == "True"
    assert "found wrong pictures" in error


def test_of_eight_processes_that_start_together_one_checks(tmp_path: Path) -> None:
    asked, ran = way(), tmp_path / "ran"
    run = selfcheck.run

    def work() -> None:
        def counted(*arguments: object) -> Verdict:
            with ran.open("a") as file:
                file.write("x")
            time.sleep(1)
            return run(*arguments)

        selfcheck.run = counted  # in this process alone
        assert selfcheck.verdict(asked, again=True).right

    log = tmp_path / "log"
    assert forked.wait(forked.start(work, 8, log), time.monotonic() + 300, log)
    assert ran.read_text() == "x"


RIGHT = Verdict(
    "right", comparisons=({"what": "depth 1", "error": 0.5, "bound": 1.0},), seconds=1.0
)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: text.replace("0.5", "NaN"),
        lambda text: text.replace("0.5", "2.5"),  # "right", with an error beyond the bound
        lambda text: text.replace("0.5", "null"),
        lambda text: text.replace('"what"', '"that"'),
        lambda text: text.replace('"right"', '"perfect"'),
        lambda text: text.replace('"right"', "[]"),
        lambda text: text.replace("self-check 1", "self-check 0"),
        lambda text: text.replace('"triton"', '"tritium"'),
        lambda text: text.replace('"seconds"', '"hours"'),
        lambda text: text.replace('"comparisons": [', '"comparisons": [7,'),
        lambda text: "[" * 100_000,
        lambda text: text + " " * (1 << 21),
    ],
)
def test_a_verdict_that_cannot_be_believed_is_found_out_anew(
    monkeypatch: pytest.MonkeyPatch, spoil: object
) -> None:
    ran = []
    monkeypatch.setattr(selfcheck, "run", lambda *_: ran.append(1) or RIGHT)
    path = selfcheck.verdict(way()).path
    assert selfcheck.verdict(way()) == replace(RIGHT, path=path)
    assert len(ran) == 1
    whole = path.read_text()
    spoilt = spoil(whole)  # type: ignore[operator]
    assert spoilt != whole
    path.write_text(spoilt)
    assert selfcheck.verdict(way()).right
    assert len(ran) == 2
    assert path.read_text() == whole


def test_what_a_verdict_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "run", lambda *_: RIGHT)
    others = [
        way(), way(attention="sdpa"), way(precision="fp8"), way(adaptive=True), way(plan="one"),
        replace(way(), dtype="float16"), replace(way(), config=random_model().config),
    ]  # fmt: skip
    assert len({selfcheck.verdict(each).path for each in others}) == len(others)
    for name in ("sources_digest", "triton_version"):
        monkeypatch.setattr(selfcheck, name, lambda *_: "another")
        selfcheck.verdict(way())
    assert len([*selfcheck.cache_folder().glob("selfcheck/*.json")]) == len(others) + 2


def test_kinds_of_sampling_and_truncated_models_share_a_verdict() -> None:
    options = (Operation(), "auto", None, "kernels")
    plain = selfcheck.way_of(random_model(), *options)
    assert selfcheck.way_of(random_model(sampling="diffusion", dropout=0.1), *options) == plain
    assert selfcheck.way_of(random_model().truncate(4), *options) == plain
    assert selfcheck.way_of(random_model().bfloat16(), *options) != plain


def test_where_nothing_can_be_kept_the_verdict_still_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(selfcheck, "run", lambda *_: RIGHT)
    assert selfcheck.verdict(way()) == RIGHT
    monkeypatch.undo()
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    found = selfcheck.run(way())
    assert (found.state, found.reason[:19]) == ("undecided", "could not start: [E")


@pytest.mark.parametrize(("failures", "lost"), [(0, False), (1, False), (2, True)])
def test_in_a_dead_context_nothing_falls_back(
    monkeypatch: pytest.MonkeyPatch, failures: int, lost: bool
) -> None:
    """A GPU tells an illegal access again at every call, any other error once."""
    left = [failures]

    def synchronize() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engines_on_the_cpu(monkeypatch)
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "off")
    check, stream = availability.check_context, SimpleNamespace(synchronize=synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(
        availability, "check_context", lambda device, error: check(torch.device("cuda"), error)
    )
    model = random_model(**SMALL)
    expected = Sampler(model, backend="eager")(2)

    def illegal(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    samplers = [Sampler(model), Sampler(model, backend="fused")]
    for sampler in samplers[: 1 + lost]:
        left[0] = failures
        sampler.fused.engine.ops.gated_residual = illegal
        if lost:
            with pytest.raises(
                RuntimeError, match=r"was encountered\): restart; backend='eager' avoids it$"
            ):
                sampler(2)
            assert sampler.fused
        else:
            with pytest.warns(RuntimeWarning, match="the fused backend failed"):
                assert torch.equal(sampler(2), expected)


LOST = """
import torch
from odelt_fast.engine.availability import ContextLostError
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.engine_cases import random_model
model = random_model().to("cuda")
sampler = Sampler(model)
def illegal(*arguments):
    table = torch.zeros(3, device="cuda")
    return table[torch.full((1,), 10**6, device="cuda")].item()
sampler.fused.engine.ops.gated_residual = illegal
for _ in range(2):
    try:
        sampler(2)
    except ContextLostError as error:
        print(str(error)[-34:])
"""


@NEEDS_CUDA
def test_cuda_in_a_dead_context_nothing_falls_back() -> None:
    assert run_python(LOST).splitlines() == 2 * ["restart; backend='eager' avoids it"]


@NEEDS_CUDA
@pytest.mark.parametrize("changes", [{}, {"adaptive": True}, {"precision": "fp8"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_the_engine_is_right(dtype: str, changes: dict) -> None:
    found = selfcheck.run(Way(random_model().config, "cuda", dtype, **changes), timed=True)
    assert found.right, (found.reason, found.output)
    # Launched twice, replayed twice.
    assert [each["equal"] for each in found.comparisons if "equal" in each] == 12 * [True]


def test_reports_hold_no_paths() -> None:
    text = "no file '/home/jo/x y/run.py': C:\\Users\\jo\\model.bin, ~/keys/id 4/5 a/b"
    assert selfcheck.without_paths(text) == "no file 'x y/run.py': model.bin, id 4/5 a/b"


def test_auto_takes_plans_that_are_measured_faster_and_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = [{"seven": 2.0, "five": 1.0}, {"seven": 2.0, "gated": 1.0}, {"seven": 1.0, "five": 2.0}]
    table = [{"operator": "plan", "microseconds": each} for each in times]
    monkeypatch.setattr(selfcheck, "read_tuning", lambda device: table)
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "always")
    wrong = {"gated"}

    def verdict(way: Way, again: bool) -> Verdict:
        return Verdict("wrong", "found wrong pictures") if way.plan in wrong else Verdict("right")

    monkeypatch.setattr(selfcheck, "verdict", verdict)
    assert selfcheck.trusted_plans(way(), "auto") == ("seven", "five")
    assert selfcheck.trusted_plans(way(), "five") == ("five",)
    with pytest.raises(selfcheck.NotTrustedError):
        selfcheck.trusted_plans(way(), "gated")
    assert selfcheck.trusted_plans(way(), "whole") == ("whole",)
    wrong.add("seven")
    selfcheck.known.cache_clear()
    with pytest.raises(selfcheck.NotTrustedError):
        selfcheck.trusted_plans(way(), "auto")
    assert selfcheck.trusted_plans(way(), "five") == ("five",)
    with pytest.raises(selfcheck.NotTrustedError):  # which seven stands in for at large batches
        selfcheck.trusted_plans(way(), "whole")
    wrong ^= {"seven", "whole"}
    selfcheck.known.cache_clear()
    with pytest.raises(selfcheck.NotTrustedError):
        selfcheck.trusted_plans(way(), "whole")


def test_plans_that_cannot_run_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [{"operator": "plan", "microseconds": {"seven": 2.0, "whole": 1.0}}]
    monkeypatch.setattr(selfcheck, "read_tuning", lambda device: table)
    monkeypatch.setenv("ODELT_FAST_SELFCHECK", "always")
    checked = []
    monkeypatch.setattr(
        selfcheck, "verdict", lambda way, again: checked.append(way.plan) or Verdict("right")
    )
    assert selfcheck.trusted_plans(way(precision="fp8"), "auto") == ("seven",)
    with pytest.raises(ValueError, match="plan 'whole' cannot run here: it has no form for prec"):
        selfcheck.trusted_plans(way(precision="fp8"), "whole")
    assert checked == ["seven"]
    assert selfcheck.trusted_plans(way(), "auto") == ("seven", "whole")
    assert checked == ["seven", "seven", "whole"]
