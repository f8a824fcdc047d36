"""Training throughput with dead blocks never computed, against the masked computation.

    python -m benchmarks.training_speed [--objectives]

--objectives: instead, what a step of each mean-velocity objective costs beside one of shortcuts,
taken in turn: ratio of the times, and peak memory. With --preset digits --batch 96 --every 4 as the
models in the package were trained.

One trainer takes every step twice with the same draws: as it is, rows of a batch sorted by depth
and run as shrinking prefixes, and with every block computed for every row and the additions masked
by (i < l), as the reference does it. Both must give the same gradients before anything is measured.
Depths are stratified, so that every step does the arithmetic of the mean.

The bound is the ratio of the matrix products' arithmetic (a backward pass counts as two forward
ones). Memory is the peak of a step's allocations over what lies between steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.images.shards import LatentWriter
from odelt_fast.model import DiT
from odelt_fast.train.config import DEFAULT, TrainConfig
from odelt_fast.train.loop import Trainer, row_losses
from odelt_fast.train.mean_velocity import MeanVelocityOptions

from .ceilings import evaluation_flops
from .measure import (
    Record,
    device_record,
    host_timer,
    peak_memory,
    relative_error,
    write_json,
)

METHODS: dict[str, Record] = {
    "RFM + LC": {"objective": "flow"},
    "shortcuts + LC": {"objective": "shortcut", "time_consistency_every": 8},
}
# Each with its own share of time rows; alpha-flow after alpha's fall (BEYOND).
OBJECTIVES: dict[str, Record] = {
    "alpha-flow": {"objective": "alpha-flow", "target_network": "live"},
    "mean-flow, difference": {"objective": "mean-flow", "target_network": "live"},
    "mean-flow, difference, guided": {
        "objective": "mean-flow",
        "target_network": "live",
        "guidance_scale": 1.4,
    },
    "mean-flow, forward mode": {
        "objective": "mean-flow",
        "target_network": "live",
        "mean_velocity": MeanVelocityOptions(derivative="jvp"),
    },
}
BEYOND = 0.8  # share of a run
Precision = Literal["no", "bf16"]
TARGETS = {"RFM + LC": 1.40, "shortcuts + LC": 1.35}
GRADIENT_BOUND = 1e-5  # relative, float32: sums of rows in another order


class MaskedDiT(DiT):
    """DiT that computes every block for every row; rows past their depth keep their state."""

    def inner_ode(self, tokens: Tensor, condition: Tensor, lengths: Sequence[int]) -> Tensor:
        """As `DiT.inner_ode`, at full depth for every row."""
        group = self.config.depth_group
        blocks = [self.config.live_blocks(length) for length in lengths]
        live = torch.tensor(blocks, device=tokens.device)[:, None, None]
        xr, vr = tokens, torch.zeros_like(tokens)
        for start in range(0, self.config.live_blocks(), group):
            *inner, last = self.blocks[start : start + group]
            x = xr
            for block in inner:
                x = block(x, condition)
            increment = last(x, condition) * (start < live)
            # A row past its depth computes on, as in the reference: nothing of it reaches vr.
            xr, vr = x + increment, vr + increment
        return vr


def step_flops(config: TrainConfig, masked: bool) -> float:
    """Operations of a training step of one process.

    Forward and backward (twice forward) of all rows, forward passes of the teachers.
    """
    rows, model = config.row_sizes(), config.model
    full = evaluation_flops(model, model.depth, 1)
    mean = statistics.mean(evaluation_flops(model, depth, 1) for depth in model.depths)
    student = full if masked else mean
    return (3 * config.train_batch_size + rows["length"]) * student + 2 * rows["time"] * full


def random_latents(folder: Path, model: DiTConfig, count: int = 256) -> str:
    """A folder of latents for the model, made in `folder` where it is not there."""
    latents = folder / "latents"
    if not latents.exists():
        names = [str(label) for label in range(model.num_classes)]
        writer, rng = LatentWriter(latents, *model.image_shape[:2], names), np.random.default_rng(0)
        for _ in range(0, count, 256):
            shape = (256, 2, 2, *model.image_shape)
            moments = rng.standard_normal(shape, dtype=np.float32)
            writer.append(moments, rng.integers(model.num_classes, size=256))
        writer.finish()
    return str(latents)


def make_trainer(
    method: Record,
    batch: int,
    precision: Precision,
    folder: Path,
    model: DiTConfig,
    checkpointing: bool = False,
) -> Trainer:
    """A trainer on random latents: speed does not depend on what they show."""
    folder.mkdir(exist_ok=True)
    config = replace(
        DEFAULT,
        model=model,
        data=random_latents(folder, model),
        output_dir=folder / "run",
        log_with=(),
        train_batch_size=batch,
        depth_sampling="stratified",
        mixed_precision=precision,
        gradient_checkpointing=checkpointing,
        dataloader_num_workers=0,  # steps are taken twice, and not in order
        **method,
    )
    return Trainer(config)


def use(trainer: Trainer, kind: type[DiT], step: int = 0) -> None:
    """Has the live and the EMA network compute as `kind` does, before training step `step`.

    Their state stays where it is.
    """
    trainer.model.__class__ = trainer.ema.__class__ = kind
    trainer.finished_steps = step


def gradient_difference(trainer: Trainer) -> float:
    """Relative difference of the gradients of one loss, computed both ways."""
    from odelt_fast.train.draws import StepDraws, global_rows
    from odelt_fast.train.objectives.targets import Networks, StepBatch

    with torch.no_grad():  # a final layer of zeros would hide every gradient behind it
        for parameter in trainer.model.final_layer.parameters():
            parameter.normal_(0, 0.02, generator=torch.Generator(parameter.device).manual_seed(0))
    rows = global_rows(list(trainer.config.row_sizes().values()), 0, 1)
    device, parameters = trainer.accelerator.device, list(trainer.model.parameters())
    images, labels = (tensor.to(device) for tensor in trainer.loader.batch(0, rows))
    found = []
    for kind in (DiT, MaskedDiT):
        use(trainer, kind)
        networks = Networks(live=trainer.model, ema=trainer.ema, teacher=None)
        batch = StepBatch(images, labels, StepDraws(0, 0, rows), 0)
        targets = trainer.objective(networks, batch)
        loss = row_losses(trainer.model, targets).mean()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        found.append(torch.cat([gradient.double().flatten() for gradient in gradients]))
    return relative_error(*found)


def seconds_of(trainer: Trainer, kind: type[DiT], step: int) -> float:
    """Time of training step `step`."""
    use(trainer, kind, step)
    return host_timer(trainer.step, trainer.accelerator.device)()


def peak_of(trainer: Trainer, kind: type[DiT], step: int = 0) -> int:
    """Bytes that a step holds at its peak, above what lies there between steps."""
    use(trainer, kind, step)
    if (peak := peak_memory(trainer.step, trainer.accelerator.device)) is not None:
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer.step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@dataclass(frozen=True)
class Options:
    batch: int | None = None
    """Images of a step, a multiple of 24, which the depths and the consistency rows divide evenly;
    24 on a CPU, 240 on a GPU by default."""
    rounds: int = 5
    """Measured steps of each kind."""
    precision: Precision = "no"
    """accelerate's mixed_precision."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass, both ways."""
    objectives: bool = False
    """Compare the steps of objectives."""
    preset: str = "DiT-B/2"
    """Network."""
    every: int = 8
    """Of --objectives: one row in this many is a time-consistency row of shortcuts."""
    out: Path | None = None
    """JSON file for the results."""


def measure(
    options: Options, device: str, limit_s: float, model: DiTConfig = PRESETS["DiT-B/2"]
) -> list[Record]:
    """One row a method: images per second both ways, ratio and its bound, peak memory, arithmetic.

    Args:
        device: "cpu" or "cuda" (accelerate takes the GPU where there is one).
        limit_s: no further round starts after it.

    Raises:
        RuntimeError: if the gradients differ.
    """
    results, begin = [], time.perf_counter()
    batch = options.batch or (240 if device == "cuda" else 24)
    precision = options.precision
    for number, method in enumerate(METHODS, 1):
        with tempfile.TemporaryDirectory() as folder:
            difference = gradient_difference(
                make_trainer(METHODS[method], 24, "no", Path(folder), model)
            )
            if not difference < GRADIENT_BOUND:
                raise RuntimeError(
                    f"{method}: gradients differ by {difference:.1e} from the masked computation's:"
                    " not measured"
                )
            again = options.gradient_checkpointing
            trainer = make_trainer(METHODS[method], batch, precision, Path(folder), model, again)
            seconds: dict[type[DiT], list[float]] = {DiT: [], MaskedDiT: []}
            memory = [peak_of(trainer, kind) for kind in seconds]  # also the warm-up
            for step in range(1, options.rounds + 1):
                for kind in list(seconds)[:: 1 if step % 2 else -1]:
                    seconds[kind].append(seconds_of(trainer, kind, step))
                if step >= 2 and time.perf_counter() - begin > limit_s * number / len(METHODS):
                    break
        ours, masked = seconds.values()
        median = statistics.median(ours)
        flops, masked_flops = (step_flops(trainer.config, masked) for masked in (False, True))
        results.append(
            {
                "method": method,
                "batch": batch,
                "precision": precision,
                "gradient_checkpointing": again,
                "images_per_second": batch / median,
                "masked_images_per_second": batch / statistics.median(masked),
                "ratio": statistics.median(slow / fast for fast, slow in zip(ours, masked)),
                "target": TARGETS[method],
                "bound": masked_flops / flops,
                "tflops_per_second": flops / median / 1e12,
                "peak_bytes": memory[0],
                "masked_peak_bytes": memory[1],
                "gradient_difference": difference,
                "seconds": ours,
                "masked_seconds": masked,
            }
        )
    return results


def compare_objectives(options: Options, device: str, model: DiTConfig) -> list[Record]:
    """One row an objective: time of a step over that of a step of shortcuts (taken in turn, median
    of the rounds), seconds of both, peak memory, rows that learn mean velocities."""
    results, batch = [], options.batch or (240 if device == "cuda" else 24)
    shortcuts: Record = {"objective": "shortcut", "time_consistency_every": options.every}
    live: Record = {"target_network": "live"}
    compared = {"shortcuts, live teacher": shortcuts | live} | OBJECTIVES
    for name in compared:
        with tempfile.TemporaryDirectory() as folder:
            base, trainer = (
                make_trainer(
                    method, batch, options.precision, Path(folder, part), model,
                    options.gradient_checkpointing,
                )
                for method, part in ((shortcuts, "base"), (compared[name], "compared"))
            )  # fmt: skip
            first = round(BEYOND * trainer.config.steps)
            seconds: dict[Trainer, list[float]] = {base: [], trainer: []}
            peaks = [peak_of(each, DiT, first) for each in seconds]  # also the warm-up
            for step in range(1, options.rounds + 1):
                for each in list(seconds)[:: 1 if step % 2 else -1]:
                    seconds[each].append(seconds_of(each, DiT, first + step))
        theirs, ours = seconds.values()
        results.append(
            {
                "objective": name,
                "batch": batch,
                "precision": options.precision,
                "gradient_checkpointing": options.gradient_checkpointing,
                "time_rows": trainer.config.row_sizes()["time"],
                "ratio": statistics.median(mine / base for mine, base in zip(ours, theirs)),
                "seconds": ours,
                "shortcut_seconds": theirs,
                "peak_bytes": peaks[1],
                "shortcut_peak_bytes": peaks[0],
            }
        )
        print(
            f"{name}: {results[-1]['time_rows']} of {batch} rows are time rows; a step takes"
            f" {statistics.median(ours):.3g} s, {results[-1]['ratio']:.2f} times one of shortcuts,"
            f" and {peaks[1] / 2**30:.2f} GiB (shortcuts {peaks[0] / 2**30:.2f})",
            flush=True,
        )
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.preset not in PRESETS:
        raise SystemExit(f"error: --preset is one of {', '.join(PRESETS)}, not {options.preset}")
    if options.objectives:
        rows = compare_objectives(options, device, PRESETS[options.preset])
        if options.out:
            write_json(options.out, {"device": device_record(), "results": rows})
        return
    results = measure(options, device, 3600, PRESETS[options.preset])
    for row in results:
        print(
            f"{row['method']}: {row['images_per_second']:.2f} images/s, masked"
            f" {row['masked_images_per_second']:.2f}; ratio {row['ratio']:.3f} (target"
            f" {row['target']}, bound {row['bound']:.3f}: {row['ratio'] / row['bound']:.1%} of it);"
            f" {row['tflops_per_second']:.3g} TFLOP/s; peak {row['peak_bytes'] / 2**30:.2f} GiB,"
            f" masked {row['masked_peak_bytes'] / 2**30:.2f} GiB; gradients within"
            f" {row['gradient_difference']:.1e}"
        )
    if options.out:
        write_json(options.out, {"device": device_record(), "results": results})
    else:
        print(json.dumps(device_record()))


if __name__ == "__main__":
    main()
