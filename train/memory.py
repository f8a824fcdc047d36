"""Memory of a training step: activations computed again in place of being kept, and what to say
when the device's runs out: the batch that would fit."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from odelt_fast.model import DiT

from .batch import divisions, rows_of
from .config import TrainConfig

_USABLE = 0.92  # of the device's memory: the rest is the driver's, other libraries' and fragments


def checkpoint_blocks(model: DiT) -> None:
    """Has every block keep its inputs alone for the backward pass, which computes the rest again:
    the same gradients, with dropout too, for a forward pass more.

    Within the block's own call, so that what wraps it (sharding, compilation) stays outside.
    """
    random = model.config.dropout > 0
    for block in model.blocks:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random
        )


def fitting_batch_size(
    batch: int, fixed: int, peak: int, capacity: int, allowed: Iterable[int]
) -> int | None:
    """The largest allowed batch size below `batch` whose step fits, None if none does.

    fixed: bytes that lie on the device between steps (weights, gradients, optimizer, averages).
    peak: most bytes seen in a step of `batch` rows; every row takes (peak - fixed)/batch. A step
    that failed did not reach its peak, which is then at least the capacity.
    """
    row = (max(peak, capacity) - fixed) / batch
    room = _USABLE * capacity - fixed
    return max((size for size in allowed if size < batch and size * row <= room), default=None)


def allowed_batch_sizes(config: TrainConfig) -> dict[int, TrainConfig]:
    """Smaller batch sizes of one process, and the configuration with each: accumulation keeps the
    global batch and its kinds of rows."""
    kinds = rows_of(config, config.gradient_accumulation_steps or 1)
    found = {each.train_batch_size: each for each in divisions(config, kinds, 1)}
    found.pop(config.train_batch_size, None)
    return found


def out_of_memory(config: TrainConfig, fixed: int, peak: int, capacity: int) -> str:
    """The message, in one line."""
    allowed = allowed_batch_sizes(config)
    size = fitting_batch_size(config.train_batch_size, fixed, peak, capacity, allowed)
    problem = f"out of GPU memory at train_batch_size {config.train_batch_size}"
    if capacity:
        problem += f" ({fixed / 2**30:.1f} of {capacity / 2**30:.1f} GiB are taken between steps)"
    if size is None:
        again = "" if config.gradient_checkpointing else "--gradient-checkpointing, "
        return (
            f"{problem}: no smaller batch would fit; use {again}--mixed-precision bf16, a smaller"
            " model, or accelerate launch --use_fsdp"
        )
    accumulation = allowed[size].gradient_accumulation_steps
    return (
        f"{problem}: --train-batch-size {size} --gradient-accumulation-steps {accumulation} should"
        " fit, and keeps the global batch"
    )


def device_memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes allocated now, most bytes allocated so far, and bytes of the device; zeros where there
    is no GPU."""
    if device.type != "cuda":
        return 0, 0, 0
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), total
