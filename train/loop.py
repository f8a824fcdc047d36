"""The state of a run and its step: batches, targets, update, averages, checkpoints. accelerate does
devices, processes and precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from odelt_fast.config import TrainedOn, describe_classes
from odelt_fast.images import ImageSource
from odelt_fast.model import DiT

from .batch import batch_state, kept
from .card import origin_of
from .checkpoints import checkpoints, newest_state, step_of
from .config import TrainConfig
from .data import Loader, open_images
from .draws import mixed_seed
from .effects import check_trackers
from .ema import PowerAverages, update_average, whole_model
from .feed import Feed, with_workers
from .launcher import Launcher, runs_in
from .memory import checkpoint_blocks, device_memory, out_of_memory
from .objectives.build import build_objective
from .objectives.progressive import stage
from .objectives.targets import Model, Networks, StepBatch, Targets
from .objectives.teacher import check_same, load_start, open_pairs
from .processes import waits
from .saving import Contents, Saver
from .sharding import gather, is_sharded, local, refresh, shard
from .timing import StepTimes

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over every parameter."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Gradients start at zero, not None: as in the reference, unused parameters still decay."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def row_losses(model: Model, targets: Targets) -> Tensor:
    """Squared error of each row (B,), float32: its mean over all rows is the loss (equation 5)."""
    inputs = targets.x_t, targets.t, targets.log2_steps, targets.y
    velocity = model(*inputs, depth=targets.depth, **targets.told())
    return (velocity.float() - targets.velocity.float()).square().flatten(1).mean(1)


def weighted(errors: Tensor, targets: Targets, config: TrainConfig) -> Tensor:
    """The rows' losses (B,): their errors times the objective's weights and the adaptive ones,
    (D/(D error + eps))^p, which carry no gradient."""
    if config.weight_power:
        size = targets.velocity[0].numel()
        adaptive = size / (size * errors.detach() + config.loss_weight_eps)
        errors = errors * adaptive**config.weight_power
    return errors if targets.weight is None else errors * targets.weight


class Trainer:
    """State of a run: live network, its averages, optimizer and the number of finished steps.
    `step()` does one update."""

    def __init__(self, config: TrainConfig) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
        except ImportError:
            raise ValueError("training needs accelerate: pip install 'odelt-fast[train]'") from None

        launcher = Launcher.of()
        config = launcher.applied(config)
        trackers: Any = list(config.log_with)
        check_trackers(trackers)
        # Rows of a batch may all be shorter than the network, and some blocks (l = 12 of XL: 8 run)
        # are never used.
        # Its buffers are constants: nobody waits for the others in a forward pass.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        self.accelerator: Accelerator = Accelerator(
            kwargs_handlers=[unused, waits(config.collective_timeout)],
            mixed_precision=config.mixed_precision,
            # Both are done here: accelerate would divide the loss, and compile, once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            log_with=trackers,
            project_dir=str(config.output_dir),
            step_scheduler_with_optimizer=False,
        )
        self.sharded, device = is_sharded(self.accelerator), self.accelerator.device
        asked = config = with_workers(config, device)
        before = newest_state(config.output_dir, config.resume_from_checkpoint).get("batch")
        if isinstance(before, dict):
            config = kept(config, before, self.accelerator.num_processes)
        self.config, self.accumulation = config, config.gradient_accumulation_steps or 1
        self.accelerator.print(runs_in(config, launcher, self.accelerator, self.sharded))
        if config.objective == "reflow":
            source: ImageSource = open_pairs(config, self.accelerator.state)
        else:
            source = open_images(config)
        if source.remark:
            self.accelerator.print(source.remark)
        self.accelerator.print(f"{source.name}: {describe_classes(source.class_names)}")
        what = f"the images of {config.data!r} have"
        check_same(what, source, config.model, "image_size", "channels", "num_classes")
        trained_on = TrainedOn(source.class_names, source.latents)
        self.parts = self.accelerator.num_processes * self.accumulation
        batch = config.train_batch_size * self.parts
        self.loader = Loader(source, config.seed, batch, config.random_flip)
        self.feed = Feed.of(config, self.loader, self.accelerator)
        torch.manual_seed(config.seed)
        model = DiT(config.model_config())
        model.trained_on = trained_on
        extras: list[DiT] = []
        self.teacher, remark = load_start(config, model)
        self.origin = origin_of(config)
        if remark:
            self.accelerator.print(remark)
        if self.teacher is not None:
            self.teacher.to(device)
            if config.objective == "progressive":
                self.accelerator.register_for_checkpointing(self.teacher)
                extras.append(self.teacher)
        self.ema = copy.deepcopy(model).requires_grad_(False).eval().to(device)
        self.fast: DiT | None = None
        if config.taught_by == "fast-ema":
            if self.sharded:
                raise ValueError("target_network fast-ema cannot be sharded: use ema or live")
            self.fast = copy.deepcopy(self.ema)
            self.accelerator.register_for_checkpointing(self.fast)
            extras.append(self.fast)
        if config.gradient_checkpointing:
            checkpoint_blocks(model)
        if config.compile:
            # Independent depths make blocks of any number of rows; stratified ones of a few.
            for block in [*model.blocks, *self.ema.blocks]:
                block.compile(dynamic=True if config.depth_sampling == "independent" else None)
        # Constants, which DDP would send in every forward pass: nobody waits for the others there.
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        self.live, self.optimizer = self.accelerator.prepare(
            model, build_optimizer(model.to(device), config)
        )
        self.model: DiT = self.accelerator.unwrap_model(self.live)
        if self.sharded:
            self.ema = shard(self.accelerator, self.ema)
            self.model.calls_every_block = self.ema.calls_every_block = True
        # Kept, and not looked up again: a sharded network has other, whole parameters while they
        # are gathered.
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        self.ema_weights: dict[str, Tensor] = dict(self.ema.named_parameters())
        zero_gradients(self.weights.values())
        self.power = PowerAverages(config.ema_widths, self.weights, self.model.config, trained_on)
        contents = Contents(
            self.model, self.ema, self.weights, self.ema_weights, self.optimizer, self.power, extras
        )
        self.saver = Saver(
            self.accelerator, config, contents, batch_state(asked, batch), self.sharded
        )
        self.times = StepTimes(device, self.sharded)
        self.objective = build_objective(config)
        self.finished_steps = 0
        self.skipped_steps = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)

    def step(self) -> Tensor:
        """One optimizer step; returns the losses of this process's rows (B,), on the device.
        ValueError where its memory is too small."""
        fixed, _, _ = device_memory(self.accelerator.device)
        try:
            return self._step()
        except torch.OutOfMemoryError as error:
            _, peak, capacity = device_memory(self.accelerator.device)
            raise ValueError(out_of_memory(self.config, fixed, peak, capacity)) from error

    def _step(self) -> Tensor:
        config, step = self.config, self.finished_steps
        parts = self.times.waited(self.feed.parts(step))
        losses = [self._accumulate(n, batch) for n, batch in enumerate(parts)]
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        moved = 1 - self._skip_if_not_finite()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.finished_steps += 1
        # A skipped step moves no average either: the state stays that of the last good step.
        live = local(self.weights.values())
        share = (1 - config.ema_decay_at(step)) * moved
        update_average(local(self.ema_weights.values()), live, share)
        refresh(self.ema)
        if self.fast is not None:
            share = (1 - min(config.fast_ema_decay, (1 + step) / (10 + step))) * moved
            update_average(list(self.fast.parameters()), live, share)
        self.power.update(live, self.finished_steps - self.skipped_steps, moved)
        if config.objective == "progressive" and self.teacher is not None:
            stages = {stage(n, config.steps, config.log2_steps) for n in (step, step + 1)}
            if len(stages) > 1:
                self.teacher.load_state_dict(gather(self.ema_weights, keep=True))
        return torch.cat(losses)

    def _accumulate(self, part: int, batch: StepBatch) -> Tensor:
        """Adds the gradient of one part of this process's batch; returns the losses of its rows."""
        config, part_index = self.config, self.feed.share.first + part
        batch = batch.to(self.accelerator.device)
        torch.manual_seed(mixed_seed(config.seed, batch.step, part_index))  # dropout
        chosen = {"live": self.model, "fast-ema": self.fast}.get(config.taught_by)
        networks = Networks(self.model, self.ema, self.teacher, chosen=chosen)
        with self.times.own(), self.accelerator.autocast():
            targets = self.objective(networks, batch)
        last = part == self.accumulation - 1
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.live):
            with self.times.own(), self.accelerator.autocast():
                losses = row_losses(self.live, targets)
                loss = weighted(losses, targets, config).mean()
            self.accelerator.backward(loss / self.accumulation)
        return losses.detach()

    def _skip_if_not_finite(self) -> Tensor:
        """Has the optimizer leave out a step whose gradient is not finite, and counts such steps. 1
        if so, else 0, on the device."""
        gradients = local(p.grad for p in self.weights.values() if p.grad is not None)
        norms = torch._foreach_norm(gradients)
        bad = (~torch.isfinite(torch.stack(norms)).all()).float()
        if self.accelerator.num_processes > 1:
            # shards of one gradient may lie in several processes
            bad = self.accelerator.reduce(bad).clamp(max=1)
        if self.accelerator.scaler is None:
            # in fp16 the loss scaler finds the same, and hands it to the optimizer
            self.optimizer.optimizer.found_inf = bad
        self.skipped_steps += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        return bad

    def check_skipped(self) -> int:
        """Number of steps left out so far. After `max_skipped_steps` in a row: returns to the last
        good step, whose weights, averages and optimizer are still there, saves it unless a
        checkpoint holds it, and raises ValueError. Every process must call it."""
        row, reached = int(self.skipped_in_a_row), self.finished_steps
        if row < self.config.max_skipped_steps:
            return int(self.skipped_steps)
        self.finished_steps -= row
        self.skipped_steps -= row
        self.skipped_in_a_row.zero_()
        kept = checkpoints(self.config.output_dir)
        if self.finished_steps and (not kept or step_of(kept[-1]) < self.finished_steps):
            kept = [self.save()]
        self.saver.wait()
        rest = "there is no checkpoint, since no step was good"
        if kept:
            rest = f"the newest checkpoint is {kept[-1]}"
        raise ValueError(
            f"the loss was not finite in the last {row} steps, to step {reached}: lower the"
            " learning rate or check the data; went back to step"
            f" {self.finished_steps}, {rest}"
        )

    def ema_model(self) -> DiT | None:
        """The EMA network, whole, in the main process; None in others. Every process must call
        it."""
        if not self.sharded:
            return self.ema if self.accelerator.is_main_process else None
        whole = gather(self.ema_weights, self.accelerator.is_main_process)
        if not whole:
            return None
        model = whole_model(self.model.config, whole, self.model.trained_on)
        return model.to(self.accelerator.device)

    def save(self) -> Path:
        """`Saver.save` of the finished steps."""
        with self.times.outside():
            skipped = int(self.skipped_steps)
            return self.saver.save(self.finished_steps, skipped, self.metadata())

    def resume(self, name: str) -> bool:
        """`Saver.resume`, whether it found a checkpoint."""
        state = self.saver.resume(name)
        if state:
            self.finished_steps = int(state["finished_steps"])
            self.skipped_steps.fill_(int(state.get("skipped_steps", 0)))
        return bool(state)

    def metadata(self) -> dict[str, str]:
        return {
            "weights": "ema",
            "ema_decay": str(self.config.ema_decay),
            "step": str(self.finished_steps),
            "recipe": self.config.recipe,
        } | self.origin
