"""Memory of a training step: blocks that are computed again, and the batch size that would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.training_speed import peak_of
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.train import loop
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import Trainer
from odelt_fast.train.memory import allowed_batch_sizes, fitting_batch_size, out_of_memory
from odelt_fast.train.recipes import RECIPES
from tests.helpers.training import SMALLER, small_run

GIB = 2**30


@pytest.mark.parametrize(
    ("batch", "fixed", "peak", "capacity", "allowed", "fits"),
    [
        (128, 10, 80, 80, (64, 32, 16), 64),  # at least 0.55 a row: 64 rows take 45
        (
            128,
            10,
            150,
            80,
            (64, 32, 16),
            32,
        ),  # 1.1 a row, measured in an earlier step: 64 rows take 80, 32 take 45
        (128, 70, 80, 80, (64, 32, 16), 32),  # 3.6 are left, 0.08 a row
        (128, 76, 80, 80, (64, 32, 16), None),  # the weights alone take what can be used
        (128, 10, 80, 80, (), None),
    ],
)
def test_fitting_batch_size(
    batch: int, fixed: int, peak: int, capacity: int, allowed: tuple[int, ...], fits: int | None
) -> None:
    assert fitting_batch_size(batch, fixed * GIB, peak * GIB, capacity * GIB, allowed) == fits


def test_smaller_batches_keep_the_global_batch_and_its_kinds_of_rows() -> None:
    config = replace(
        RECIPES["imagenet256-b"], gradient_accumulation_steps=2
    )  # 256 rows: every 8th of each consistency, half of one guided
    sizes = allowed_batch_sizes(config)
    assert set(sizes) == {128, 64, 32, 16}
    for size, smaller in sizes.items():
        assert smaller.train_batch_size == size
        assert size * smaller.gradient_accumulation_steps == 512


def config(folder: Path) -> TrainConfig:
    return small_run(folder, model=SMALLER, train_batch_size=48, gradient_accumulation_steps=2)


def test_step_without_memory_names_the_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(tmp_path / "run"))
    trainer.step()

    def forward(*inputs: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    memory = iter(
        [(10 * GIB, 60 * GIB, 80 * GIB), (75 * GIB, 80 * GIB, 80 * GIB)]
    )  # between steps, and when it failed
    monkeypatch.setattr(loop, "device_memory", lambda device: next(memory))
    monkeypatch.setattr(DiT, "forward", forward)
    with pytest.raises(ValueError, match="out of GPU memory at train_batch_size 48") as mistake:
        trainer.step()
    assert "--train-batch-size 32 --gradient-accumulation-steps 3" in str(mistake.value)
    assert "10.0 of 80.0 GiB" in str(mistake.value)
    assert "\n" not in str(mistake.value)
    assert isinstance(mistake.value.__cause__, torch.OutOfMemoryError)


def test_model_that_is_too_large_for_any_batch_is_said_to_be(tmp_path: Path) -> None:
    message = out_of_memory(config(tmp_path), 79 * GIB, 80 * GIB, 80 * GIB)
    assert "no smaller batch would fit" in message
    assert "--use_fsdp" in message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"depth_sampling": "stratified", "train_batch_size": 48},
        {"objective": "flow", "mixed_precision": "bf16"},
    ],
    ids=lambda changes: " ".join(changes) or "as it is",
)
def test_blocks_computed_again_give_the_same_gradients(
    tmp_path: Path, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Bit for bit, with dropout: losses and weights of three whole steps."""
    model = replace(SMALLER, dropout=0.2)
    request.addfinalizer(AcceleratorState._reset_state)  # precisions differ
    AcceleratorState._reset_state()
    plain, again = (
        Trainer(small_run(tmp_path, model=model, gradient_checkpointing=on, **changes))
        for on in (False, True)
    )
    for _ in range(3):
        assert torch.equal(plain.step(), again.step())
    assert all(torch.equal(weight, again.weights[name]) for name, weight in plain.weights.items())
    assert all(torch.equal(w, again.ema_weights[name]) for name, w in plain.ema_weights.items())


def test_blocks_computed_again_keep_their_inputs_alone(tmp_path: Path) -> None:
    """At least two thirds of a step's memory are activations inside the blocks; the profiler counts
    bytes, not time."""
    deep = DiTConfig(
        image_size=8, channels=1, hidden_size=32, depth=12, num_heads=2, num_classes=10
    )
    peaks = [
        peak_of(Trainer(small_run(tmp_path, model=deep, gradient_checkpointing=on)), DiT)
        for on in (False, True)
    ]
    assert peaks[1] < 0.4 * peaks[0]


def test_advice_names_what_is_not_in_use(tmp_path: Path) -> None:
    for on in (False, True):
        with_it = replace(config(tmp_path), gradient_checkpointing=on)
        message = out_of_memory(with_it, 79 * GIB, 80 * GIB, 80 * GIB)
        assert ("--gradient-checkpointing" in message) != on
