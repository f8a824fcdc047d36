"""What a launcher asks for is what runs where no option says otherwise; a contradiction is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from odelt_fast.train.launcher import Launcher
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import main, parse
from tests.helpers.training import small_run

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    AcceleratorState._reset_state()  # precisions differ
    yield
    AcceleratorState._reset_state()


def first_gradient(folder: Path, **changes: object) -> torch.Tensor:
    """Of every weight after the first part of a step, one after another."""
    trainer = Trainer(small_run(folder, **changes))
    trainer._accumulate(0, next(iter(trainer.feed.parts(0))))
    return torch.cat([weight.grad.flatten() for weight in trainer.weights.values()])


@pytest.mark.parametrize("given", [None, 4])
def test_accumulation_of_the_launcher_divides_the_loss_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None
) -> None:
    wanted = first_gradient(tmp_path, gradient_accumulation_steps=4)
    monkeypatch.setenv(ACCUMULATION, "4")
    assert torch.equal(first_gradient(tmp_path, gradient_accumulation_steps=given), wanted)
    assert wanted.any()


def test_precision_of_the_launcher_is_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = first_gradient(tmp_path)
    assert "runs on cpu in float32, batch 16" in capsys.readouterr().out
    AcceleratorState._reset_state()
    wanted = first_gradient(tmp_path, mixed_precision="bf16")
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert torch.equal(first_gradient(tmp_path), wanted)
    assert not torch.equal(plain, wanted)
    said = capsys.readouterr().out
    assert "runs on cpu in bf16 mixed precision" in said
    assert "the launcher asks for mixed precision" in said


def test_blocks_are_compiled_once_as_the_launcher_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    trainer = Trainer(small_run(tmp_path))
    assert "blocks compiled; the launcher asks for compile" in capsys.readouterr().out
    assert all(block._compiled_call_impl is not None for block in trainer.model.blocks)
    assert not isinstance(trainer.live, torch._dynamo.OptimizedModule)


def test_recipes_of_a_precision_take_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs is no option that the user gave."""
    assert parse(["--recipe", "cifar10"]).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    config = parse(["--recipe", "cifar10"])
    assert Launcher.of().applied(config).mixed_precision == "fp16"


def test_launchers_that_were_told_nothing_ask_for_nothing() -> None:
    silent = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    silent |= {ACCUMULATION: "1", "ACCELERATE_DYNAMO_MODE": "default"}
    assert Launcher.of(silent) == Launcher()
    sharding = {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    assert Launcher.of(sharding) == Launcher(gradient_checkpointing=True, sharding=True)


@pytest.mark.parametrize(
    ("environment", "options", "says"),
    [
        ("ACCELERATE_MIXED_PRECISION=bf16", "--mixed-precision no", "--mixed-precision no contra"),
        ("ACCELERATE_MIXED_PRECISION=bf16", "--mixed-precision fp16", "which asks for bf16"),
        ("ACCELERATE_MIXED_PRECISION=fp8", "", "ACCELERATE_MIXED_PRECISION to 'fp8'"),
        (f"{ACCUMULATION}=4", "--gradient-accumulation-steps 2", "asks for 4: leave one out"),
        (f"{ACCUMULATION}=auto", "", "a whole number of at least 1"),
        ("ACCELERATE_DYNAMO_BACKEND=inductor", "--no-compile", "--no-compile contradicts"),
        ("ACCELERATE_DYNAMO_BACKEND=CUDAGRAPHS", "", "compiled by inductor, or not at all"),
        (
            "ACCELERATE_DYNAMO_BACKEND=inductor ACCELERATE_DYNAMO_MODE=max-autotune",
            "",
            "compiled in the default mode",
        ),
        (
            "ACCELERATE_USE_FSDP=true FSDP_ACTIVATION_CHECKPOINTING=true",
            "--no-gradient-checkpointing",
            "--no-gradient-checkpointing contradicts",
        ),
        ("ACCELERATE_USE_FSDP=true FSDP_OFFLOAD_PARAMS=true", "", "FSDP_OFFLOAD_PARAMS to 'true'"),
        ("ACCELERATE_USE_DEEPSPEED=true", "", "training does not run under DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM=true", "", "training does not run under Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "", "does not run under tensor"),
    ],
)
def test_wishes_that_cannot_be_met_and_contradictions_are_one_line(
    environment: str,
    options: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    assert main([*options.split(), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
