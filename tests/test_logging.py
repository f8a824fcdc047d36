"""What `auto` swallows is told to those who listen, and to nobody else."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from odelt_fast import Sampler
from tests.helpers.engine_cases import run_fused_on_the_cpu
from tests.helpers.small_model import random_model


def broken(*arguments: object) -> object:
    raise RuntimeError("a kernel that this card does not compile")


@pytest.mark.filterwarnings("ignore:the fused backend failed")
def test_a_swallowed_error_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(random_model())
    monkeypatch.setattr(sampler.fused.engine.ops, "gated_residual", broken)
    with caplog.at_level(logging.INFO, "odelt_fast"):
        sampler(2)
    (record,) = (each for each in caplog.records if each.levelno == logging.WARNING)
    assert "does not compile" in (record.exc_text or logging.Formatter().format(record))
    assert sampler.explain()["backend"] == "eager"


def test_a_fault_of_our_own_is_not_swallowed_in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    run_fused_on_the_cpu(monkeypatch)
    sampler = Sampler(random_model())
    monkeypatch.setattr(sampler.fused.engine.ops, "gated_residual", lambda: None)
    with pytest.raises(TypeError):
        sampler(2)


def test_without_a_handler_nothing_is_written() -> None:
    code = "import logging, odelt_fast.engine; logging.getLogger('odelt_fast.x').warning('heard')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
