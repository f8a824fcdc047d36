"""Training throughput with dead blocks never computed, against the masked computation: `python -m
benchmarks.training_speed`.

One trainer takes every step twice with the same draws: as it is, rows of a batch sorted by depth
and run as shrinking prefixes, and with every block computed for every row and the additions masked
by (i < l), as the reference does it. Both must give the same gradients before anything is measured.
Depths are stratified, so that every step does the arithmetic of the mean.

The bound is the ratio of the matrix products' arithmetic (a backward pass counts as two forward
ones). Memory is the peak of a step's allocations over what lies between steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import device_record, host_timer, peak_memory, write_json
from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.images.shards import LatentWriter
from odelt_fast.model import DiT
from odelt_fast.train.config import DEFAULT, TrainConfig
from odelt_fast.train.loop import Trainer, row_losses

METHODS = {
    "RFM + LC": {"objective": "flow"},
    "shortcuts + LC": {"objective": "shortcut", "time_consistency_every": 8},
}
TARGETS = {"RFM + LC": 1.40, "shortcuts + LC": 1.35}
GRADIENT_BOUND = 1e-5  # relative, float32: sums of rows in another order


class MaskedDiT(DiT):
    """DiT that computes every block for every row; rows past their depth keep their state."""

    def inner_ode(self, tokens: Tensor, condition: Tensor, lengths: Sequence[int]) -> Tensor:
        """As `DiT.inner_ode`, at full depth for every row."""
        group = self.config.depth_group
        live = torch.tensor(
            [self.config.live_blocks(length) for length in lengths], device=tokens.device
        )[:, None, None]
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


def forward_flops(config: DiTConfig, blocks: float) -> float:
    """Arithmetic of the matrix products of one evaluation of one image through `blocks` blocks
    (multiplication and addition are two)."""
    size, tokens, pixels = (
        config.hidden_size,
        (config.image_size // config.patch_size) ** 2,
        config.patch_size**2 * config.channels,
    )
    block = (
        tokens * (2 * size * (4 * size + 2 * config.mlp_size) + 4 * tokens * size) + 12 * size**2
    )
    return blocks * block + 4 * tokens * pixels * size


def step_flops(config: TrainConfig, masked: bool) -> float:
    """The same for a training step of one process: forward and backward of all rows, forward passes
    of the teachers."""
    rows, model = config.row_sizes(), config.model
    mean = statistics.mean(model.live_blocks(depth) for depth in model.depths)
    full = model.live_blocks()
    student = forward_flops(model, full if masked else mean)
    teachers = 2 * rows["time"] * forward_flops(model, full) + rows["length"] * student
    return 3 * config.train_batch_size * student + teachers


def make_trainer(
    method: str, batch: int, precision: str, folder: Path, model: DiTConfig
) -> Trainer:
    """A trainer on random latents: speed does not depend on what they show."""
    latents = folder / "latents"
    if not latents.exists():
        writer = LatentWriter(
            latents, model.channels, model.image_size, [str(i) for i in range(model.num_classes)]
        )
        rng = np.random.default_rng(0)
        moments = rng.standard_normal(
            (256, 2, 2, model.channels, model.image_size, model.image_size), dtype=np.float32
        )
        writer.append(moments, rng.integers(model.num_classes, size=256))
        writer.finish()
    config = replace(
        DEFAULT,
        model=model,
        data=str(latents),
        train_batch_size=batch,
        depth_sampling="stratified",
        mixed_precision=precision,
    )
    return Trainer(replace(config, output_dir=folder / "run", log_with=(), **METHODS[method]))  # type: ignore[arg-type]


def use(trainer: Trainer, kind: type[DiT]) -> None:
    """Has the live and the EMA network compute as `kind` does; their state stays where it is."""
    trainer.model.__class__ = trainer.ema.__class__ = kind


def gradient_difference(trainer: Trainer) -> float:
    """Relative difference of the gradients of one loss, computed both ways."""
    from odelt_fast.train.draws import StepDraws, global_rows
    from odelt_fast.train.objectives.targets import Networks, StepBatch

    with torch.no_grad():  # a final layer of zeros would hide every gradient behind it
        for parameter in trainer.model.final_layer.parameters():
            parameter.normal_(0, 0.02, generator=torch.Generator(parameter.device).manual_seed(0))
    rows = global_rows(list(trainer.config.row_sizes().values()), 0, 1)
    images, labels = (
        tensor.to(trainer.accelerator.device) for tensor in trainer.loader.batch(0, rows)
    )
    found = []
    for kind in (DiT, MaskedDiT):
        use(trainer, kind)
        networks = Networks(live=trainer.model, ema=trainer.ema, teacher=None)
        batch = StepBatch(images, labels, StepDraws(0, 0, rows), 0)
        targets = trainer.objective(networks, batch)
        gradients = torch.autograd.grad(
            row_losses(trainer.model, targets).mean(),
            list(trainer.model.parameters()),
            allow_unused=True,
        )
        found.append(
            [torch.zeros(()) if gradient is None else gradient.double() for gradient in gradients]
        )
    apart = sum((a - b).square().sum().item() for a, b in zip(*found))
    return (apart / sum(b.square().sum().item() for b in found[1])) ** 0.5


def seconds_of(trainer: Trainer, kind: type[DiT], step: int) -> float:
    """Time of training step `step`."""
    use(trainer, kind)
    trainer.finished_steps = step
    return host_timer(trainer.step, trainer.accelerator.device)()


def peak_of(trainer: Trainer, kind: type[DiT], step: int) -> int:
    """Bytes that training step `step` holds at its peak, above what lies there between steps."""
    use(trainer, kind)
    trainer.finished_steps = step
    found = peak_memory(trainer.step, trainer.accelerator.device)
    if found is not None:
        return found
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        trainer.step()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]  # type: ignore[union-attr]
    return max(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )


def measure(
    device: str, limit_s: float, *, batch: int | None = None, rounds: int = 5, precision: str = "no"
) -> list[dict[str, Any]]:
    """One row a method: images per second both ways, their ratio, its share of the bound, peak
    memory, arithmetic per second.

    device: "cpu" or "cuda" (accelerate takes the GPU where there is one). limit_s: no further round
    starts after it. batch: a multiple of 24, which the depths and the consistency rows divide
    evenly. Raises RuntimeError if the gradients differ.
    """
    model, results, begin = PRESETS["DiT-B/2"], [], time.perf_counter()
    batch = batch or (240 if device == "cuda" else 24)
    for number, method in enumerate(METHODS, 1):
        with tempfile.TemporaryDirectory() as folder:
            difference = gradient_difference(make_trainer(method, 24, "no", Path(folder), model))
            if not difference < GRADIENT_BOUND:
                raise RuntimeError(
                    f"{method}: gradients differ by {difference:.1e} from the masked computation's:"
                    " not measured"
                )
            trainer = make_trainer(method, batch, precision, Path(folder), model)
            seconds: dict[type[DiT], list[float]] = {DiT: [], MaskedDiT: []}
            memory = {kind: peak_of(trainer, kind, 0) for kind in seconds}  # also the warm-up
            for step in range(1, rounds + 1):
                for kind in list(seconds)[:: 1 if step % 2 else -1]:
                    seconds[kind].append(seconds_of(trainer, kind, step))
                if step >= 2 and time.perf_counter() - begin > limit_s * number / len(METHODS):
                    break
        ratio = statistics.median(
            slow / fast for fast, slow in zip(seconds[DiT], seconds[MaskedDiT])
        )
        flops = {masked: step_flops(trainer.config, masked) for masked in (False, True)}
        results.append(
            {
                "method": method,
                "batch": batch,
                "precision": precision,
                "images_per_second": batch / statistics.median(seconds[DiT]),
                "masked_images_per_second": batch / statistics.median(seconds[MaskedDiT]),
                "ratio": ratio,
                "target": TARGETS[method],
                "bound": flops[True] / flops[False],
                "tflops_per_second": flops[False] / statistics.median(seconds[DiT]) / 1e12,
                "peak_bytes": memory[DiT],
                "masked_peak_bytes": memory[MaskedDiT],
                "gradient_difference": difference,
                "seconds": seconds[DiT],
                "masked_seconds": seconds[MaskedDiT],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="images of a step, a multiple of 24 (default: 24 on a CPU, 240 on a GPU)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each kind")
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="no", help="accelerate's mixed_precision"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = measure(
        device, 3600, batch=options.batch, rounds=options.rounds, precision=options.precision
    )
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
