"""What a training step of each run costs, all runs in turn.

Counted in images that pass through the network, measured in processor seconds of one thread and in
bytes. Nothing needs to be trained before, but a run's teacher, and a run that makes pairs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import device_record, take_turns, write_json

from .campaign import Study
from .runs import BY_NAME, Run

if TYPE_CHECKING:
    from odelt_fast.train.loop import Trainer

_STEP_ROUNDS, _STEPS_A_ROUND = 8, 4
_COUNTED_STEPS = 32  # of one batch, whose random depths and times make the count a mean


def measure_costs(study: Study) -> None:
    """Writes OUT/costs.json: {"machine", "training": {run: costs}} of the chosen runs and `odelt`;
    other seeds cost the same.

    "batch": its images; "seconds": processor time of a step (median), "odelt_seconds": of one of
    `odelt` beside it; "peak_bytes": of a step, above what lies there between steps; and how often a
    step sends an image of its batch through all blocks: "learnt", forward and backward, and
    "targets", forward alone.
    """
    from benchmarks.training_speed import peak_of
    from odelt_fast.model import DiT

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timers, costs = {}, {}
    try:
        for run in dict.fromkeys((BY_NAME["odelt"], *study.chosen())):
            needed = [BY_NAME[name] for name in (run.teacher,) if name] + [run] * run.needs_pairs
            if run.repeats is None and all(map(study.trained, needed)):
                trainer = _trainer(study, run)
                costs[run.name] = {"batch": trainer.config.train_batch_size, **_passes(trainer)}
                costs[run.name]["peak_bytes"] = peak_of(trainer, DiT)
                timers[run.name] = partial(_step_seconds, trainer)
        for name, values in take_turns(timers, 0, least=_STEP_ROUNDS).items():
            costs[name]["seconds"] = statistics.median(values)
        for cost in costs.values():
            cost["odelt_seconds"] = costs["odelt"]["seconds"]
    finally:
        torch.set_num_threads(threads)
    write_json(study.out / "costs.json", {"machine": device_record(), "training": costs})


def _step_seconds(trainer: Trainer) -> float:
    start = time.process_time()
    for _ in range(_STEPS_A_ROUND):
        trainer.step()
    return (time.process_time() - start) / _STEPS_A_ROUND


def _trainer(study: Study, run: Run) -> Trainer:
    from odelt_fast.train.loop import Trainer
    from odelt_fast.train.main import parse

    with warnings.catch_warnings():
        # accelerate's, that no tracker is installed: none is wanted
        warnings.simplefilter("ignore")
        return Trainer(replace(parse(study.training(run)), log_with=()))


def _passes(trainer: Trainer) -> dict[str, float]:
    networks = filter(None, (trainer.model, trainer.ema, trainer.teacher))
    with _counted(block for network in networks for block in network.blocks) as rows:
        for _ in range(_COUNTED_STEPS):
            trainer.step()
    whole = _COUNTED_STEPS * trainer.config.train_batch_size * trainer.config.model.depth
    return {name: count / whole for name, count in rows.items()}


@contextmanager
def _counted(blocks: Iterable[torch.nn.Module]) -> Iterator[dict[str, int]]:
    """Counts the images that pass through blocks, those that gradients will pass back for apart."""
    rows = {"learnt": 0, "targets": 0}

    def count(block: torch.nn.Module, arguments: tuple[Any, ...], result: object) -> None:
        rows["learnt" if torch.is_grad_enabled() else "targets"] += len(arguments[0])

    handles = [block.register_forward_hook(count) for block in dict.fromkeys(blocks)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
