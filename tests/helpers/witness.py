"""What the processes of a run under test report; their weights sharded on a CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch

from odelt_fast.train.loop import Trainer


class Witness:
    """What a child process reports: the step of each save that returned, and every loss."""

    def __init__(self, folder: Path) -> None:
        self.saves, self.losses, self.log = folder / "saves", folder / "losses", folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    def watch(self) -> None:
        save, step = Trainer.save, Trainer.step

        def watched_save(trainer: Trainer) -> Path:
            folder = save(trainer)
            if trainer.accelerator.is_main_process:
                with self.saves.open("a") as file:
                    print(trainer.finished_steps, file=file, flush=True)
            return folder

        def watched_step(trainer: Trainer) -> torch.Tensor:
            at, losses = trainer.finished_steps, step(trainer)
            with self.losses.with_suffix(f".{trainer.accelerator.process_index}").open("a") as file:
                print(at, losses.double().sum().item().hex(), file=file, flush=True)
            return losses

        Trainer.save, Trainer.step = watched_save, watched_step  # type: ignore[method-assign]

    def last_save(self) -> int:
        return int(self.saves.read_text().split()[-1]) if self.saves.exists() else 0

    def all_losses(self) -> dict[tuple[str, int], str]:
        """The loss of each rank and step. A repeated step must repeat its loss."""
        found: dict[tuple[str, int], str] = {}
        for path in self.losses.parent.glob("losses.*"):
            for line in path.read_text().splitlines():
                at, value = line.split()
                assert found.setdefault((path.suffix, int(at)), value) == value, (
                    f"step {at} has another loss when it is repeated"
                )
        return found


def shard(timeout: float = 600) -> None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` sets, on a CPU: accelerate shards on
    GPUs only, torch wherever gloo runs. One process alone shards nothing."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP"
    )
    os.environ.update(
        FSDP_TRANSFORMER_CLS_TO_WRAP="Block",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        FSDP_RESHARD_AFTER_FORWARD="true",
    )
    state = PartialState(cpu=True, timeout=timedelta(seconds=timeout))
    if state.num_processes > 1:
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type]
    return a == b
