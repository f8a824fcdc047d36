"""A run from its first step to its last: logging, sample grids, checkpoints, snapshots, and the
model that it leaves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.model import DiT

from .config import TrainConfig
from .hub import find_repository, upload
from .loop import Trainer


def train(config: TrainConfig) -> Path:
    """Runs `config` to its last step; returns the folder with config.json and model.safetensors of
    the EMA weights."""
    from tqdm import tqdm

    trainer = Trainer(config)
    accelerator = trainer.accelerator
    main = accelerator.is_main_process
    repository = find_repository(config) if config.push_to_hub and main else None
    if config.resume_from_checkpoint and not trainer.resume(config.resume_from_checkpoint):
        accelerator.print(f"no checkpoint in {config.output_dir}: starting from step 0")
    if main:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        if config.ema_widths:
            trainer.power.forget_snapshots(config.output_dir, trainer.finished_steps)
    accelerator.init_trackers("odelt-fast", config=_flat(config))
    kinds = [kind for kind, size in config.row_sizes().items() for _ in range(size)]
    bar = tqdm(
        total=config.steps,
        initial=trainer.finished_steps,
        disable=not main,
        unit="step",
        dynamic_ncols=True,
    )
    while trainer.finished_steps < config.steps:
        losses = trainer.step()
        bar.update()
        done = trainer.finished_steps
        last = done == config.steps
        if last or done % config.logging_steps == 0:
            values = _loss_by_kind(accelerator.gather(losses).tolist(), kinds)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            values["skipped_steps"] = trainer.check_skipped()
            values["learning_rate"] = config.learning_rate_at(done - 1)
            accelerator.log(values, step=done)
        if config.sampling_steps and done % config.sampling_steps == 0:
            _log_grid(trainer)
        if config.ema_widths and (last or done % config.ema_snapshot_steps == 0):
            updates = done - int(trainer.skipped_steps)
            trainer.power.write_snapshots(config.output_dir, done, updates, main)
        if last or done % config.checkpointing_steps == 0:
            trainer.save()
    bar.close()
    ema = trainer.ema_model()
    if ema is not None:
        save_model(ema, config.output_dir, metadata=trainer.metadata())
    accelerator.end_training()
    if repository is not None:
        upload(config.output_dir, repository)
    return config.output_dir


def _loss_by_kind(losses: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Mean loss of all rows, and of those of each kind; kinds: of the rows of one part, which the
    parts of the global batch repeat."""
    of_kind: dict[str, list[float]] = {}
    for loss, kind in zip(losses, itertools.cycle(kinds)):
        of_kind.setdefault(f"loss_{kind}", []).append(loss)
    return {name: sum(rows) / len(rows) for name, rows in ({"loss": losses} | of_kind).items()}


def _log_grid(trainer: Trainer) -> None:
    """The paper's Figure 1 of the EMA network: rows l (longest first), columns T = 128, 4, 1, same
    noise."""
    from odelt_fast.evaluation.depth_steps import sample_depths_by_steps
    from odelt_fast.sampling.pictures import depth_steps_picture

    ema: DiT | None = trainer.ema_model()
    if ema is None:
        return
    depths, steps = trainer.config.model.depths[::-1], (128, 4, 1)
    cells = sample_depths_by_steps(ema, depths, steps, num_images=10)
    picture = np.asarray(depth_steps_picture(cells, depths, steps))
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", picture, trainer.finished_steps, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [picture]}, step=trainer.finished_steps)


def _flat(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    values |= {f"model.{name}": value for name, value in values.pop("model").items()}
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in values.items()
    }
