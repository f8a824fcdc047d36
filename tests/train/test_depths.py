"""Stratified depths: fixed counts in every kind of row, the same rows in any number of parts,
shapes that a compiler sees once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.draws import StepDraws, global_rows, stratified
from odelt_fast.train.loop import Trainer, row_losses
from odelt_fast.train.objectives.targets import Networks, StepBatch
from tests.helpers.training import SMALL, small_run

MODEL = replace(SMALL, depth=3, depth_min=1, depth_group=1)


def config(folder: Path, **changes: object) -> TrainConfig:
    values = {"model": MODEL, "train_batch_size": 24, "depth_sampling": "stratified"}
    values |= {"time_consistency_every": 8, "warmup_steps": 0}
    return small_run(folder, **(values | changes))


@pytest.mark.parametrize("kinds", [(6, 36, 6), (4, 25, 3), (16, 96, 16), (2, 11, 1), (3, 90, 18)])
def test_every_kind_of_row_has_every_depth_equally_often(kinds: tuple[int, ...]) -> None:
    """To within one row in a step; over high^2 steps, every pair of the student's and the teacher's
    depth exactly as often as any other."""
    high, ends = 3, np.cumsum(kinds)
    pairs, every = Counter(), np.arange(sum(kinds))
    for step in range(high**2):
        student, teacher = (
            stratified(kinds, every, high, step, second=second) for second in (False, True)
        )
        for start, end in zip(ends - kinds, ends):
            for drawn in (student, teacher):
                counts = np.bincount(drawn[start:end], minlength=high)
                assert counts.max() - counts.min() <= 1
        pairs.update(zip(student[-kinds[-1] :].tolist(), teacher[-kinds[-1] :].tolist()))
    assert len(pairs) == high**2
    assert set(pairs.values()) == {kinds[-1]}


def test_over_steps_every_depth_is_as_frequent_in_every_row_that_takes_turns() -> None:
    kinds = (2, 11, 1)
    seen = np.array([stratified(kinds, np.arange(14), 3, step, second=False) for step in range(9)])
    for row in range(14):
        assert np.bincount(seen[:, row], minlength=3).tolist() == [3, 3, 3]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_rows_have_the_same_depths_in_any_number_of_parts(parts: int) -> None:
    sizes, step = (3, 18, 3), 5
    kinds = [12 * size // 3 for size in sizes]  # 12 rows of the first kind in the global batch
    every = slice(0, sum(kinds))
    whole = StepDraws(0, step, np.arange(sum(kinds)), kinds)
    for part in range(parts):
        rows = global_rows([size // parts for size in kinds], part, parts)
        mine = StepDraws(0, step, rows, kinds)
        for name in ("depth", "teacher_depth"):
            assert torch.equal(
                mine.integers(name, slice(0, len(rows)), 3), whole.integers(name, every, 3)[rows]
            )


class Masked(DiT):
    """Computes every block for every row and masks the additions by (i < l), as the reference
    does."""

    def inner_ode(self, tokens: Tensor, condition: Tensor, lengths: Sequence[int]) -> Tensor:
        live = torch.tensor(lengths, device=tokens.device)[:, None, None]
        xr, vr = tokens, torch.zeros_like(tokens)
        for i, block in enumerate(self.blocks):
            increment = block(xr, condition) * (i < live)
            xr, vr = xr + increment, vr + increment
        return vr


def test_gradients_of_stratified_rows_are_those_of_the_masked_computation(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path / "run"))
    for network in (trainer.model, trainer.ema):
        network.double()
        torch.nn.init.normal_(network.final_layer.out.weight, std=0.1)
    rows = np.arange(24)
    device = trainer.accelerator.device
    images, labels = (each.to(device) for each in trainer.loader.batch(0, rows))
    found = []
    for kind in (DiT, Masked):
        trainer.model.__class__ = trainer.ema.__class__ = kind
        draws = StepDraws(0, 0, rows, list(trainer.config.row_sizes().values()))
        batch = StepBatch(images, labels, draws, 0)
        targets = trainer.objective(Networks(trainer.model, trainer.ema), batch)
        assert Counter(targets.depth) == {1: 8, 2: 8, 3: 8}
        velocity = trainer.model(
            targets.x_t, targets.t, targets.log2_steps, targets.y, depth=targets.depth
        )
        loss = (velocity - targets.velocity).square().mean()
        found.append(torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True))
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    assert row_losses(trainer.model, targets).shape == (24,)


@pytest.mark.parametrize(("sampling", "batch"), [("stratified", 24), ("independent", 24)])
def test_compiled_blocks_are_not_compiled_again(
    sampling: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stratified depths give shapes that recur from the first step on. (Independent ones, of any
    size, need a dynamic batch.)"""
    compilations = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiler, dynamic = torch.compile, []

    def compile_with(function: Any, **options: Any) -> Any:
        dynamic.append(options["dynamic"])
        return compiler(function, **(options | {"backend": counting}))

    monkeypatch.setattr(torch, "compile", compile_with)
    torch._dynamo.reset()
    trainer = Trainer(
        config(tmp_path / "run", train_batch_size=batch, depth_sampling=sampling, compile=True)
    )
    assert set(dynamic) == {None if sampling == "stratified" else True}
    for _ in range(3):
        trainer.step()
    after_three = compilations
    for _ in range(9):
        trainer.step()
    assert 0 < compilations == after_three
    torch._dynamo.reset()


def test_network_that_calls_every_block_computes_the_same(tmp_path: Path) -> None:
    """Sharded weights: processes whose rows are shorter call the other blocks too, without effect,
    and have gradients of zero there."""
    torch.manual_seed(0)
    model = DiT(MODEL)
    torch.nn.init.normal_(model.final_layer.out.weight)
    x, y = torch.randn(4, 1, 8, 8), torch.randint(11, (4,))
    expected = model(x, 0.5, 3, y, depth=[1, 2, 1, 2])
    model.calls_every_block = True
    called = [0, 0, 0]
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: called.__setitem__(i, called[i] + 1))
    found = model(x, 0.5, 3, y, depth=[1, 2, 1, 2])
    assert called == [1, 1, 1]
    assert torch.equal(found, expected)
    found.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.blocks[2].parameters())
    assert any(p.grad.any() for p in model.blocks[1].parameters())
