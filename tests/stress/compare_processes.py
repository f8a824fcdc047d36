"""Trains in one process and in two, by gradient accumulation and with sharded weights: `python -m
tests.stress.compare_processes`. All must agree; the sharded run computes its blocks again in the
backward pass, too.

Draws belong to rows of the global batch, so only the order of sums differs: losses agree to 1e-6,
weights to 1e-5. The sharded run (FSDP2) is also continued from its checkpoint, which must repeat it
bitwise; and one process goes on from that of the sharded run, and two, sharded, from that of one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # once, before the forks
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors.torch import load_file

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.mean_velocity import MeanVelocityOptions
from odelt_fast.train.recipes import RECIPES
from odelt_fast.train.shards import read_shards
from tests.helpers.witness import Witness, equal
from tests.stress.kill_training import MODEL, start, wait

ROWS, WIDTH = 32, 0.1
SHARDS = [f"shard-{number:05}-model-00001-of-00001.safetensors" for number in (1, 2)]
KINDS = {  # processes, accumulated parts, sharded
    "1 process": (1, 1, False),
    "2 processes": (2, 1, False),
    "1 process, 2 parts": (1, 2, False),
    "2 processes, sharded": (2, 1, True),
}
MEAN_FLOW: dict[str, Any] = {
    "objective": "mean-flow",
    "target_network": "live",
    "guidance_scale": 1.5,
    "loss_weight_power": 1.0,
    "mean_velocity": MeanVelocityOptions(derivative="jvp", times="logit-normal"),
}


def run(
    config: TrainConfig, kind: str, folder: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and the final averages: of ema_decay and of the tracked width."""
    processes, accumulation, sharded = KINDS[kind]
    witness = Witness(folder / "witness" / kind)
    batch = ROWS // (processes * accumulation)
    parts = replace(
        config,
        output_dir=folder / kind,
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=sharded,
    )
    parts = replace(parts, checkpointing_steps=config.steps // 2, checkpoints_total_limit=None)
    assert wait(start(parts, witness, processes, sharded), time.monotonic() + 600, witness.log), (
        "training takes too long"
    )
    if sharded:
        whole = folder / f"{kind}, whole"
        shutil.copytree(folder / kind, whole)
        shutil.rmtree(folder / kind / f"checkpoint-{config.steps}")
        again = replace(parts, resume_from_checkpoint="latest")
        assert wait(
            start(again, witness, processes, sharded), time.monotonic() + 600, witness.log
        ), "training takes too long"
        names = [f"checkpoint-{config.steps}/shards/{file}" for file in SHARDS]
        for name in ("model.safetensors", *names):
            assert equal(load_file(whole / name), load_file(folder / kind / name)), (
                f"{name} of the continued run differs"
            )
    found = witness.all_losses()  # has compared the repeated losses
    per_rank = [
        [float.fromhex(found[rank, step]) for rank in {rank for rank, _ in found}]
        for step in range(config.steps)
    ]
    assert all(len(set(ranks)) == processes for ranks in per_rank), "the ranks draw the same rows"
    return [sum(ranks) / ROWS for ranks in per_rank], averages(folder / kind, config.steps)


def averages(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """The final averages of a run: of ema_decay, and of the tracked width."""
    found = {f"ema.{name}": each for name, each in load_file(run / "model.safetensors").items()}
    checkpoint, power = run / f"checkpoint-{steps}", f"power-{WIDTH}"
    if (checkpoint / "shards").is_dir():
        values = {f"{power}.{name[4:]}": torch.zeros_like(each) for name, each in found.items()}
        read_shards(checkpoint / "shards", values)
    else:
        stored = load_file(checkpoint / power / "model.safetensors")
        values = {f"{power}.{name}": each for name, each in stored.items()}
    return found | values


def continued(config: TrainConfig, kind: str, others: str, folder: Path) -> dict[str, torch.Tensor]:
    """The averages of a run of `kind` that goes on from the checkpoint that a run of `others` has
    left half-way: whole, or in the shards of another number of processes."""
    processes, _, sharded = KINDS[kind]
    run, half = folder / f"{others}, then {kind}", f"checkpoint-{config.steps // 2}"
    shutil.copytree(folder / others / half, run / half)
    asked, parts, _ = KINDS[others]  # its options: another number keeps its batch
    again = replace(
        config,
        output_dir=run,
        train_batch_size=ROWS // (asked * parts),
        gradient_accumulation_steps=parts,
        resume_from_checkpoint="latest",
    )
    witness = Witness(folder / "witness" / run.name)
    assert wait(start(again, witness, processes, sharded), time.monotonic() + 600, witness.log), (
        "training takes too long"
    )
    return averages(run, config.steps)


def fine_tuning(folder: Path) -> dict[str, Any]:
    """Options that give a flow of one length, made in `folder`, lengths and step sizes."""
    changes = {"dropout": 0.0, "length_conditioned": False, "step_conditioned": False}
    torch.manual_seed(0)
    model = DiT(replace(MODEL, sampling="flow", **changes))
    torch.nn.init.normal_(model.final_layer.out.weight, std=0.1)
    start = str(save_model(model, folder / "start"))
    return {
        "objective": "shortcut",
        "init_from": start,
        "depths": MODEL.depths,
        "wiring": "residual",
        "length_teacher": "init",
    }


def compare(objective: str, steps: int, folder: Path) -> None:
    # No dropout: its masks belong to a process's batch, not to rows. Independent depths need not
    # have the same maximum in both processes.
    config = replace(
        RECIPES["digits"],
        model=replace(MODEL, dropout=0.0),
        steps=steps,
        warmup_steps=2,
        sampling_steps=0,
        log_with=(),
    )
    sampling = "stratified" if objective == "shortcut" else "independent"
    config = replace(config, depth_sampling=sampling, ema_widths=(WIDTH,))
    if objective == "dial":
        config = replace(config, **fine_tuning(folder))
    elif objective == "mean-flow":
        config = replace(config, **MEAN_FLOW)
    else:
        config = replace(config, objective=objective)
    (first, (expected, theirs)), *others = ((kind, run(config, kind, folder)) for kind in KINDS)
    for kind, (values, ours) in others:
        worst = max(abs(a - b) / b for a, b in zip(values, expected))
        print(f"{objective}, {kind} against {first}: losses within {worst:.1e}")
        assert worst < 1e-6
        compare_averages(f"{objective}, {kind} against {first}", ours, theirs)
    sharded = "2 processes, sharded"
    print(f"{objective}: the sharded run continued from its checkpoint is bitwise the same")
    for kind, other in ((first, sharded), (sharded, first)):
        name = f"{objective}, {other}, continued by {kind}"
        compare_averages(name, continued(config, kind, other, folder), theirs)


def compare_averages(
    name: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> None:
    """Of all weights together: AdamW enlarges what rounding leaves of gradients that are zero
    (biases of keys) to whole steps."""
    a, b = (
        torch.cat([tensor.flatten() for _, tensor in sorted(averages.items())])
        for averages in (ours, theirs)
    )
    apart = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
    print(f"{name}: averages within {apart:.1e}")
    assert apart < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    # live-reflow evaluates the network that is being trained outside of the loss, which sharding
    # must allow; dial: a flow of one length gets lengths, taught by itself
    parser.add_argument(
        "--objectives", nargs="+", default=["shortcut", "live-reflow", "mean-flow", "dial"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for objective in options.objectives:
        with tempfile.TemporaryDirectory() as name:
            compare(objective, options.steps, Path(name))


if __name__ == "__main__":
    main()
