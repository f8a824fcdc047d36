"""A run from its first step to its last: logging, sample grids, checkpoints, snapshots, and the
model that it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.model import DiT

from .card import write_card
from .config import TrainConfig
from .hub import find_repository, upload
from .loop import Trainer
from .processes import is_elastic, loss_in, lost
from .run_lock import held

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they kill
_AGREE_EVERY = 10  # steps between which several processes tell each other of a signal


class RunStopped(Exception):
    """A signal ended a run early, after a checkpoint; the message says where to go on."""


def train(config: TrainConfig) -> Path:
    """Runs `config` to its last step; returns the folder with config.json and model.safetensors of
    the EMA weights.

    Raises:
        ValueError: a mistake in the options, the data or the folder, which another run may have.
        RunStopped: SIGTERM or SIGUSR1 came: the step was finished and a checkpoint saved.
        ProcessLost: another process of the run is gone, or out of reach.
    """
    trainer: Trainer | None = None
    try:
        trainer = Trainer(config)
        with contextlib.ExitStack() as stack:
            stack.callback(trainer.feed.close)
            came = stack.enter_context(_stop_asked())
            _by_main(trainer, lambda: _hold(trainer, stack))
            return _train(trainer, came)
    except (RuntimeError, ValueError) as error:
        if (loss := loss_in(error)) is None:
            raise
        step = trainer.finished_steps if trainer else 0
        raise lost(loss, step, config.output_dir) from error


def _by_main(trainer: Trainer, action: Callable[[], object]) -> None:
    """Has the main process do it; its ValueError is every process's."""
    from accelerate.utils import broadcast_object_list

    said: list[str | None] = [None]
    if trainer.accelerator.is_main_process:
        try:
            action()
        except ValueError as error:
            said = [str(error)]
    broadcast_object_list(said)
    if said[0] is not None:
        raise ValueError(said[0])


def _hold(trainer: Trainer, stack: contextlib.ExitStack) -> None:
    """Takes the output folder, which a new run must not find in use."""
    config = trainer.config
    # The others wait for this one meanwhile.
    patience = 0.8 * config.collective_timeout if is_elastic() else 0.0
    left = stack.enter_context(held(config.output_dir, patience))
    if left:
        trainer.accelerator.print(left)
    if not config.resume_from_checkpoint:
        trainer.saver.make_room()


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """Gives the list of the signals that came, empty until then."""
    came: list[int] = []
    before = {}
    with contextlib.suppress(ValueError):  # signals are the main thread's
        for each in _SIGNALS:
            before[each] = signal.signal(each, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _stops(trainer: Trainer, came: Sequence[int]) -> bool:
    """Whether all processes stop after this step, because a signal came to one."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return bool(came)
    if trainer.finished_steps % _AGREE_EVERY:
        return False
    flag = torch.tensor(float(bool(came)), device=accelerator.device)
    return bool(accelerator.reduce(flag) > 0)


def _train(trainer: Trainer, came: Sequence[int]) -> Path:
    from tqdm import tqdm

    config, accelerator = trainer.config, trainer.accelerator
    main = accelerator.is_main_process
    repository = find_repository(config) if config.push_to_hub and main else None
    if config.resume_from_checkpoint and not trainer.resume(config.resume_from_checkpoint):
        accelerator.print(f"no checkpoint in {config.output_dir}: starting from step 0")
    if trainer.finished_steps > config.steps:
        accelerator.print(
            f"the run has {trainer.finished_steps} steps already, more than --steps {config.steps}"
        )
    accelerator.init_trackers("odelt-fast", config=_flat(config))
    kinds = [kind for kind, size in config.row_sizes().items() for _ in range(size)]
    with tqdm(
        total=config.steps,
        initial=trainer.finished_steps,
        disable=not main,
        unit="step",
        dynamic_ncols=True,
    ) as bar:
        while trainer.finished_steps < config.steps:
            losses = trainer.step()
            bar.update()
            done = trainer.finished_steps
            last = done == config.steps
            if last or done % config.logging_steps == 0:
                values = _loss_by_kind(accelerator.gather(losses).tolist(), kinds)
                times, slow = trainer.times.report(accelerator)
                bar.set_postfix(loss=f"{values['loss']:.4f}", data=f"{times['data_seconds']:.2g}s")
                for line in slow:
                    accelerator.print(line)
                values |= times | {"checkpoint_seconds": trainer.saver.seconds}
                values["skipped_steps"] = trainer.check_skipped()
                values["learning_rate"] = config.learning_rate_at(done - 1)
                accelerator.log(values, step=done)
            if config.sampling_steps and done % config.sampling_steps == 0:
                with trainer.times.outside():
                    _log_grid(trainer)
            if config.ema_widths and (last or done % config.ema_snapshot_steps == 0):
                updates = done - int(trainer.skipped_steps)
                trainer.power.write_snapshots(config.output_dir, done, updates, main)
            stopped = not last and _stops(trainer, came)
            if last or stopped or done % config.checkpointing_steps == 0:
                folder = trainer.save()
            if stopped:
                trainer.saver.wait()
                accelerator.end_training()
                raise RunStopped(f"stopped by a signal after step {done}: {folder}")
    trainer.saver.wait()
    ema = trainer.ema_model()
    if ema is not None:
        made = trainer.metadata()
        save_model(ema, config.output_dir, metadata=made)
        write_card(config.output_dir, ema.config, made)
    accelerator.end_training()
    accelerator.print(f"EMA weights of {trainer.finished_steps} steps in {config.output_dir}")
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
