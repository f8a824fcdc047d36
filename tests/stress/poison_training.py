"""Injects losses and gradients that are not finite: `python -m tests.stress.poison_training
--injected 100 --seed 0 [--processes 2]`.

Half of the steps of a run are poisoned, each in one process: a row's target, or the gradient of one
weight, becomes NaN or infinite. In such a step nothing may change (weights, averages, optimizer, in
every process), in others something must; all of them must be counted.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from odelt_fast.train.config import TrainConfig
from odelt_fast.train.loop import Trainer
from odelt_fast.train.objectives.targets import Networks, Objective, StepBatch, Targets
from odelt_fast.train.recipes import RECIPES
from tests.helpers.witness import Witness
from tests.stress.kill_training import MODEL, start, wait

BAD = (math.nan, math.inf, -math.inf)


@dataclass
class Poison:
    """Wraps an objective: the target of one row is `value` while it is set; so is a gradient, by
    `on_gradient`."""

    objective: Objective
    value: float | None = None
    gradient: float | None = None

    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        targets = self.objective(networks, batch)
        if self.value is None:
            return targets
        row = torch.tensor(batch.step % len(batch))
        return replace(targets, velocity=targets.velocity.index_fill(0, row, self.value))

    def on_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.gradient is None else gradient + self.gradient


def state(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of everything that a step may change."""
    tensors = [*trainer.weights.values(), *trainer.ema_weights.values()]
    tensors += [
        tensor for average in trainer.power.averages.values() for tensor in average.values()
    ]
    tensors += [
        moment for moments in trainer.optimizer.state.values() for moment in moments.values()
    ]
    return [tensor.clone() for tensor in tensors]


def poison(config: TrainConfig, injected: int, seed: int) -> None:
    """One process of a run: checks every step."""
    trainer = Trainer(config)
    trainer.objective = bad = Poison(trainer.objective)
    trainer.model.blocks[0].qkv.weight.register_hook(bad.on_gradient)
    chance, mine = (
        random.Random(seed),
        trainer.accelerator.process_index,
    )  # every process draws the same
    steps = set(chance.sample(range(1, 2 * injected + 1), injected))
    trainer.step()  # gives the optimizer its state
    for step in range(1, 2 * injected + 1):
        value, where, of_gradient = (
            chance.choice(BAD),
            chance.randrange(trainer.accelerator.num_processes),
            chance.random() < 0.5,
        )
        here = step in steps and where == mine
        bad.value, bad.gradient = (
            (value if here and not of_gradient else None),
            (value if here and of_gradient else None),
        )
        before = state(trainer)
        trainer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, state(trainer))]
        assert any(changed) == (step not in steps), f"step {step}: {sum(changed)} tensors changed"
    assert all(tensor.isfinite().all() for tensor in state(trainer))
    assert int(trainer.skipped_steps) == injected, (
        f"{int(trainer.skipped_steps)} of {injected} steps were counted"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--injected", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = replace(
            RECIPES["digits"],
            model=MODEL,
            steps=4 * options.injected,
            train_batch_size=16,
            warmup_steps=0,
            log_with=(),
        )
        config, witness = (
            replace(config, output_dir=Path(name) / "run", ema_widths=(0.1,)),
            Witness(Path(name) / "witness"),
        )
        children = start(
            config,
            witness,
            options.processes,
            work=lambda config: poison(config, options.injected, options.seed),
        )
        assert wait(children, time.monotonic() + 600, witness.log), "training takes too long"
    print(
        f"{options.injected} steps that are not finite, {options.processes} processes: nothing"
        " changed in any of them, all counted"
    )


if __name__ == "__main__":
    main()
