"""The training methods by name, and what follows from a name. Loads no torch."""

from __future__ import annotations

from typing import Literal

from .mean_velocity import MEAN_VELOCITY

ObjectiveName = Literal[
    "shortcut",
    "shortcut-models",
    "flow",
    "mean-flow",
    "alpha-flow",
    "live-reflow",
    "reflow",
    "consistency",
    "consistency-distillation",
    "progressive",
    "diffusion",
]
PathName = Literal[
    "rectified",
    "flow-matching",
    "independent",
    "trigonometric",
    "variance-preserving",
    "variance-exploding",
]
# How a network that an objective trained is to be sampled (DiTConfig.sampling).
SAMPLING = {
    "shortcut": "shortcut",
    "shortcut-models": "shortcut",
    "flow": "flow",
    "mean-flow": "mean_flow",
    "alpha-flow": "mean_flow",
    "live-reflow": "live_reflow",
    "reflow": "flow",
    "consistency": "consistency",
    "consistency-distillation": "consistency",
    "progressive": "flow",
    "diffusion": "diffusion",
}
# Time-consistency or Reflow rows; their networks, and no others, are given the step size.
WITH_TIME_ROWS = ("shortcut", "shortcut-models", "live-reflow", *MEAN_VELOCITY)
DISTILLATIONS = ("reflow", "progressive", "consistency-distillation")
Precision = Literal["no", "bf16", "fp16"]
RecipeName = Literal[
    "digits",
    "mnist",
    "cifar10",
    "digits-meanflow",
    "mnist-meanflow",
    "celebahq256-b",
    "imagenet256-b",
    "imagenet256-xl",
    "imagenet256-b-meanflow",
    "imagenet256-xl-meanflow",
]
