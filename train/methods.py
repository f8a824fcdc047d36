"""The training methods by name, and what follows from a name. Loads no torch."""

from __future__ import annotations

from typing import Literal

from odelt_fast.checks import number
from odelt_fast.config import DiTConfig

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
    "cifar10-meanflow",
    "celebahq256-b",
    "imagenet256-b",
    "imagenet256-xl",
    "imagenet256-b-meanflow",
    "imagenet256-xl-meanflow",
]


def check_guidance(
    name: ObjectiveName, scale: float | None, model: DiTConfig, label_dropout: float
) -> None:
    """ValueError for guidance that the objective cannot put into its targets; scale: None, or w
    of all rows."""
    told = model.guidance_max is not None
    if told and name not in MEAN_VELOCITY:
        raise ValueError(
            f"objective {name} tells the network no guidance scale: leave --model.guidance-max"
            f" to {' and '.join(MEAN_VELOCITY)}"
        )
    if told and scale is not None:
        raise ValueError(
            f"guidance_scale {scale:g}: the network is told scales from 1 to"
            f" {model.guidance_max:g}, drawn for each row; leave it or --model.guidance-max out"
        )
    if scale is not None:
        number("guidance_scale", scale, 0)
        if name in ("flow", "consistency", "diffusion"):
            raise ValueError(
                f"objective {name} has no teacher to guide: leave guidance_scale out, and guide"
                " when sampling"
            )
        if model.num_classes == 1:
            raise ValueError(
                "guidance needs labels: model.num_classes is 1, leave guidance_scale out"
            )
    mixed = scale not in (None, 1) and name not in DISTILLATIONS
    if label_dropout == 0 and (told or mixed):
        raise ValueError(
            "guidance needs the null label, which label_dropout 0 never trains: set"
            " --label-dropout 0.1"
        )
