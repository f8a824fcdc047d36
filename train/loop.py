"""The training loop: batches, targets, update, EMA, checkpoints. accelerate does devices, processes, precision and trackers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odelt_fast.checkpoint import save_model
from odelt_fast.images import open_source
from odelt_fast.model import DiT
from odelt_fast.train.checkpoints import STATE_NAME, checkpoints, finish_writing, recover, start_writing, unfinished, written_whole
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.data import Loader
from odelt_fast.train.draws import StepDraws, global_rows
from odelt_fast.train.objectives.build import build_objective
from odelt_fast.train.objectives.progressive import stage
from odelt_fast.train.objectives.targets import Model, Networks, Targets
from odelt_fast.train.objectives.teacher import load_start, open_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over every parameter. Gradients start at zero, not None: as in the reference, a parameter that no row used is still decayed."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True)


def row_losses(model: Model, targets: Targets) -> Tensor:
    """Squared error of each row (B,), float32: its mean over all rows is the loss (equation 5)."""
    velocity = model(targets.x_t, targets.t, targets.log2_steps, targets.y, depth=targets.depth)
    return (velocity.float() - targets.velocity.float()).square().flatten(1).mean(1)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """ema <- decay*ema + (1 - decay)*model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Trainer:
    """State of a run: live and EMA network, optimizer and the number of finished steps. `step()` does one update."""

    def __init__(self, config: TrainConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self.config = config
        self.source = open_pairs(config) if config.objective == "reflow" else open_source(config.data)
        _check_source(self.source, config)
        trackers: Any = list(config.log_with)
        # Rows of a batch may all be shorter than the network, and some blocks (l = 12 of XL: 8 run) are never used.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator: Accelerator = Accelerator(
            kwargs_handlers=[unused],
            mixed_precision=config.mixed_precision,
            log_with=trackers,
            project_dir=str(config.output_dir),
            step_scheduler_with_optimizer=False,
        )
        self.parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        self.loader = Loader(self.source, config.seed, config.train_batch_size * self.parts)
        torch.manual_seed(config.seed)
        model = DiT(config.model_config())
        self.teacher, remark = load_start(config, model)
        if remark:
            self.accelerator.print(remark)
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
        if self.teacher is not None and config.objective == "progressive":
            self.accelerator.register_for_checkpointing(self.teacher)
        self.ema = copy.deepcopy(model).requires_grad_(False).eval().to(self.accelerator.device)
        if config.compile:
            for block in [*model.blocks, *self.ema.blocks]:
                block.compile(dynamic=True)
        self.live, self.optimizer = self.accelerator.prepare(model, build_optimizer(model.to(self.accelerator.device), config))
        self.model: DiT = self.accelerator.unwrap_model(self.live)
        self.objective = build_objective(config)
        self.finished_steps = 0
        self.skipped_steps = torch.zeros((), device=self.accelerator.device)
        self.skipped_in_a_row = torch.zeros((), device=self.accelerator.device)

    def step(self) -> Tensor:
        """One optimizer step; returns the losses of this process's rows (B,), on the device."""
        config, step, device = self.config, self.finished_steps, self.accelerator.device
        sizes = list(config.row_sizes().values())
        networks = Networks(live=self.model, ema=self.ema, teacher=self.teacher)
        losses = []
        for part in range(config.gradient_accumulation_steps):
            part_index = self.accelerator.process_index * config.gradient_accumulation_steps + part
            rows = global_rows(sizes, part_index, self.parts)
            images, labels = (tensor.to(device, non_blocking=True) for tensor in self.loader.batch(step, rows))
            torch.manual_seed(_mix(config.seed, step, part_index))  # dropout
            last = part == config.gradient_accumulation_steps - 1
            with self.accelerator.autocast():
                targets = self.objective(networks, images, labels, StepDraws(config.seed, step, rows), step)
            with _synchronise_if(last, self.accelerator, self.live):
                with self.accelerator.autocast():
                    loss_rows = row_losses(self.live, targets)
                self.accelerator.backward(loss_rows.mean() / config.gradient_accumulation_steps)
            losses.append(loss_rows.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self._skip_if_not_finite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        update_ema(self.ema, self.model, config.ema_decay_at(step))
        self.finished_steps += 1
        if config.objective == "progressive" and self.teacher is not None:
            before, after = (stage(done, config.steps, config.log2_steps) for done in (step, step + 1))
            if after > before:
                self.teacher.load_state_dict(self.ema.state_dict())
        return torch.cat(losses)

    def _skip_if_not_finite(self) -> None:
        """Has the optimizer leave out a step whose gradient is not finite, decided on the device, and counts such steps."""
        if self.accelerator.scaler is not None:  # fp16: the loss scaler does it
            return
        norms = torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        bad = (~torch.isfinite(torch.stack(norms)).all()).float()
        if self.accelerator.num_processes > 1:  # shards of one gradient may lie in several processes
            bad = self.accelerator.reduce(bad).clamp(max=1)
        self.optimizer.optimizer.found_inf = bad
        self.skipped_steps += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad

    def check_skipped(self) -> int:
        """Number of steps left out so far. Raises ValueError after `max_skipped_steps` in a row; the weights are those before them."""
        row, limit = int(self.skipped_in_a_row), self.config.max_skipped_steps
        if row >= limit:
            kept = checkpoints(self.config.output_dir)
            rest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            problem = f"the loss was not finite in the last {row} steps, to step {self.finished_steps}"
            raise ValueError(f"{problem}: lower the learning rate or check the data; {rest}")
        return int(self.skipped_steps)

    def save(self) -> Path:
        """Writes checkpoint-N of the finished steps and deletes the ones beyond the limit. Raises ValueError when the disk refuses."""
        folder = self.config.output_dir / f"checkpoint-{self.finished_steps}"
        main = self.accelerator.is_main_process
        with written_whole(folder) if main else contextlib.nullcontext():
            if main:
                start_writing(folder)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(unfinished(folder)), safe_serialization=True)
            if main:
                save_model(self.ema, unfinished(folder) / "ema", metadata=self.metadata())
                (unfinished(folder) / STATE_NAME).write_text(json.dumps({"finished_steps": self.finished_steps}))
                finish_writing(folder, self.config.checkpoints_total_limit)
            self.accelerator.wait_for_everyone()
        return folder

    def resume(self, name: str) -> bool:
        """Continues from a checkpoint-N folder, or from the newest one for `latest`; False when `latest` finds none."""
        if name == "latest":
            if self.accelerator.is_main_process:
                recover(self.config.output_dir)
            self.accelerator.wait_for_everyone()
            found = checkpoints(self.config.output_dir)
            if not found:
                return False
            folder = found[-1]
        else:
            folder = Path(name)
            if not (folder / STATE_NAME).is_file():
                raise ValueError(f"{folder} is not a checkpoint folder: give one named checkpoint-N, or latest")
        from safetensors.torch import load_file

        self.accelerator.load_state(str(folder))
        self.ema.load_state_dict(load_file(folder / "ema" / "model.safetensors"))
        self.finished_steps = int(json.loads((folder / STATE_NAME).read_text())["finished_steps"])
        return True

    def metadata(self) -> dict[str, str]:
        return {"weights": "ema", "ema_decay": str(self.config.ema_decay), "step": str(self.finished_steps), "recipe": self.config.recipe}


def train(config: TrainConfig) -> Path:
    """Runs `config` to its last step; returns the folder with config.json and model.safetensors of the EMA weights."""
    from tqdm import tqdm

    trainer = Trainer(config)
    accelerator = trainer.accelerator
    if config.resume_from_checkpoint and not trainer.resume(config.resume_from_checkpoint):
        accelerator.print(f"no checkpoint in {config.output_dir}: starting from step 0")
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("odelt-fast", config=_flat(config))
    kinds = [kind for kind, size in config.row_sizes().items() for _ in range(size)] * config.gradient_accumulation_steps
    bar = tqdm(total=config.steps, initial=trainer.finished_steps, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    while trainer.finished_steps < config.steps:
        losses = trainer.step()
        bar.update()
        done = trainer.finished_steps
        if done % config.logging_steps == 0 or done == config.steps:
            values = _loss_by_kind(accelerator.gather(losses).tolist(), kinds) | {"skipped_steps": trainer.check_skipped()}
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            accelerator.log(values | {"learning_rate": config.learning_rate_at(done - 1)}, step=done)
        if config.sampling_steps and done % config.sampling_steps == 0 and accelerator.is_main_process:
            _log_grid(trainer)
        if done % config.checkpointing_steps == 0 or done == config.steps:
            trainer.save()
    bar.close()
    if accelerator.is_main_process:
        save_model(trainer.ema, config.output_dir, metadata=trainer.metadata())
    accelerator.end_training()
    return config.output_dir


def _check_source(source: Any, config: TrainConfig) -> None:
    for name in ("image_size", "channels", "num_classes"):
        has, wants = getattr(source, name), getattr(config.model, name)
        if has != wants:
            raise ValueError(
                f"the images of {config.data!r} have {name} {has}, the model {wants}: set --model.{name.replace('_', '-')} {has}"
            )


def _loss_by_kind(losses: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    values = {"loss": sum(losses) / len(losses)}
    every = list(kinds) * (len(losses) // len(kinds))
    for kind in dict.fromkeys(kinds):
        chosen = [loss for loss, of in zip(losses, every) if of == kind]
        values[f"loss_{kind}"] = sum(chosen) / len(chosen)
    return values


def _log_grid(trainer: Trainer) -> None:
    """The paper's Figure 1 of the EMA network: rows l (longest first), columns T = 128, 4, 1, same noise."""
    import numpy as np

    from odelt_fast.evaluation import sample_depths_by_steps
    from odelt_fast.plots import depth_steps_picture

    depths, steps = trainer.config.model.depths[::-1], (128, 4, 1)
    cells = sample_depths_by_steps(trainer.ema, depths, steps, num_images=10)
    picture = np.asarray(depth_steps_picture(cells, depths, steps))
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", picture, trainer.finished_steps, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [picture]}, step=trainer.finished_steps)


def _flat(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    model = values.pop("model")
    plain = values | {f"model.{name}": value for name, value in model.items()}
    return {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in plain.items()}


def _synchronise_if(last: bool, accelerator: Accelerator, model: torch.nn.Module) -> Any:
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def _mix(seed: int, step: int, part: int) -> int:
    """One 64-bit seed from three numbers (SplitMix64's finaliser over their combination)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part * 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return z ^ (z >> 31)
