"""Trains in one process and in two, by gradient accumulation and with sharded weights: `python -m
tests.stress.compare_processes`. All must agree; the sharded run computes its blocks again in the
backward pass, too.

Draws belong to rows of the global batch, so only the order of sums differs: losses agree to 1e-6,
weights to 1e-5. The sharded run (FSDP2) is also continued from its checkpoint, which must repeat it
bitwise.
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
from tests.stress.kill_training import MODEL, Witness, equal, start, wait

ROWS, WIDTH = 32, 0.1
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
        for name in (
            "model.safetensors",
            f"checkpoint-{config.steps}/power-{WIDTH}/model.safetensors",
        ):
            assert equal(load_file(whole / name), load_file(folder / kind / name)), (
                f"{name} of the continued run differs"
            )
    found = witness.all_losses()  # has compared the repeated losses
    per_rank = [
        [float.fromhex(found[rank, step]) for rank in {rank for rank, _ in found}]
        for step in range(config.steps)
    ]
    assert all(len(set(ranks)) == processes for ranks in per_rank), "the ranks draw the same rows"
    files = {
        "ema": "model.safetensors",
        "power": f"checkpoint-{config.steps}/power-{WIDTH}/model.safetensors",
    }
    averages = {
        f"{kind_of}.{name}": tensor
        for kind_of, file in files.items()
        for name, tensor in load_file(folder / kind / file).items()
    }
    return [sum(ranks) / ROWS for ranks in per_rank], averages


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
        # Of all weights together: AdamW enlarges what rounding leaves of gradients that are zero
        # (biases of keys) to whole steps.
        a, b = (
            torch.cat([tensor.flatten() for _, tensor in sorted(averages.items())])
            for averages in (ours, theirs)
        )
        apart = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
        print(
            f"{objective}, {kind} against {first}: losses within {worst:.1e}, averages within"
            f" {apart:.1e}"
        )
        assert worst < 1e-6
        assert apart < 1e-5
    print(f"{objective}: the sharded run continued from its checkpoint is bitwise the same")


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
