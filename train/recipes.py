"""Presets of training runs. Loads no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from odelt_fast.config import PRESETS, DiTConfig

from .config import DEFAULT, TrainConfig
from .mean_velocity import MeanVelocityOptions
from .methods import RecipeName

# What the small sets share: short runs at a high learning rate, whose teacher must start to move
# early.
_SMALL = replace(
    DEFAULT,
    time_consistency_every=4,
    learning_rate=1e-3,
    warmup_steps=300,
    decay_fraction=0.4,
    weight_decay=0.01,
    ema_warmup=True,
    sampling_steps=1000,
)
# The models in the package: mean velocities in place of shortcuts, in fewer steps, as one takes
# 1.2 times as long, guided 1.55 times (docs/models.md).
_ONE_STEP: dict[str, Any] = {
    "objective": "mean-flow",
    "target_network": "live",
    "loss_weight_power": 0.5,
    "loss_weight_eps": 1.0,
}
# Table 7 of the paper: 100K steps at 1e-4 and 100K at 1e-5, each with 5000 of warm-up and the last
# 10 % a cosine; AdamW (0.9, 0.999) with weight decay 0.1; EMA 0.999. What is not named here is a
# default. train_batch_size is the table's batch on one process: divide it by the number of
# processes.
_TABLE_7 = replace(
    DEFAULT,
    steps=200_000,
    later_learning_rates=(1e-5,),
    mixed_precision="bf16",
    sampling_steps=10_000,
    checkpointing_steps=5000,
)
# Not run here. MeanFlow's (arXiv 2505.13447: batch 256, 240 epochs at a constant 1e-4, Adam (0.9,
# 0.95), EMA 0.9999, p = 1, eps = 0.01, times from logit-normal(-0.4, 1)), with the tangent and the
# guidance of its improvement (2512.02012: the network's own velocity; scales from 1 to 8 of density
# 1/w, which the network is told; half of the rows at d = 0), under the length dial.
_MEAN_FLOW = replace(
    DEFAULT,
    objective="mean-flow",
    target_network="live",
    loss_weight_power=1.0,
    loss_weight_eps=0.01,
    mean_velocity=MeanVelocityOptions(
        tangent="network", derivative="jvp", times="logit-normal", grid_share=0.0, time_share=0.5
    ),
    data="latents/imagenet256",
    train_batch_size=256,
    steps=1_200_000,
    warmup_steps=0,
    decay_fraction=0.0,
    weight_decay=0.0,
    adam_beta2=0.95,
    ema_decay=0.9999,
    mixed_precision="bf16",
    sampling_steps=10_000,
    checkpointing_steps=5000,
)


def _recipe(base: TrainConfig, name: RecipeName, model: DiTConfig, **changes: Any) -> TrainConfig:
    return replace(base, recipe=name, model=model, output_dir=Path("runs", name), **changes)


_IMAGENET: dict[str, Any] = {
    "train_batch_size": 256,
    "guidance_scale": 1.5,
    "data": "latents/imagenet256",
}
_DIGITS = replace(_SMALL, steps=18_000, train_batch_size=96)
_MNIST = _recipe(
    _SMALL,
    "mnist",
    PRESETS["mnist"],
    data="ylecun/mnist",
    random_flip=False,
    steps=22_000,
    train_batch_size=64,
)
RECIPES: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "digits-meanflow": _recipe(
        _DIGITS, "digits-meanflow", _DIGITS.model, steps=14_400, decay_fraction=0.25, **_ONE_STEP
    ),
    "mnist": _MNIST,
    "mnist-meanflow": _recipe(
        _MNIST,
        "mnist-meanflow",
        _MNIST.model,
        steps=14_300,
        decay_fraction=0.25,
        guidance_scale=1.4,
        mean_velocity=MeanVelocityOptions(grid_share=0.0),
        **_ONE_STEP,
    ),
    # Sized for 10 to 15 minutes of one H200. 240 rows: the three depths and both kinds of
    # consistency rows divide them evenly.
    "cifar10": _recipe(
        _SMALL,
        "cifar10",
        PRESETS["cifar10"],
        data="uoft-cs/cifar10",
        steps=20_000,
        train_batch_size=240,
        warmup_steps=500,
        depth_sampling="stratified",
        mixed_precision="bf16",
        sampling_steps=5000,
    ),
    # Sized for two to three hours of one CPU core.
    "cifar10-meanflow": _recipe(
        _SMALL,
        "cifar10-meanflow",
        PRESETS["cifar10-small"],
        data="uoft-cs/cifar10",
        steps=12_000,
        train_batch_size=64,
        warmup_steps=500,
        decay_fraction=0.25,
        guidance_scale=1.5,
        mean_velocity=MeanVelocityOptions(grid_share=0.0),
        mixed_precision="bf16",
        **_ONE_STEP,
    ),
    "celebahq256-b": _recipe(
        _TABLE_7,
        "celebahq256-b",
        replace(PRESETS["DiT-B/2"], num_classes=1),
        data="latents/celebahq256",
        train_batch_size=128,
    ),
    # The table starts both from the shortcut-models checkpoint: convert it and name it with
    # --init-from and --model.inner-step unit, which changes no weights.
    "imagenet256-b": _recipe(_TABLE_7, "imagenet256-b", PRESETS["DiT-B/2"], **_IMAGENET),
    "imagenet256-xl": _recipe(_TABLE_7, "imagenet256-xl", PRESETS["DiT-XL/2"], **_IMAGENET),
    "imagenet256-b-meanflow": _recipe(
        _MEAN_FLOW, "imagenet256-b-meanflow", replace(PRESETS["DiT-B/2"], guidance_max=8.0)
    ),
    "imagenet256-xl-meanflow": _recipe(
        _MEAN_FLOW, "imagenet256-xl-meanflow", replace(PRESETS["DiT-XL/2"], guidance_max=8.0)
    ),
}
