"""From the options of a run to its objective."""

from __future__ import annotations

from typing import Any

from odelt_fast.train.config import TrainConfig
from odelt_fast.train.paths import training_path

from .consistency import Consistency, ConsistencyDistillation
from .flow_matching import Diffusion, FlowMatching, Reflow
from .length_consistency import LengthConsistency
from .live_reflow import LiveReflow
from .mean_flow import AlphaFlow, MeanFlow
from .progressive import Progressive
from .shortcut import Shortcut
from .shortcut_models import ShortcutModels
from .targets import Objective, WithoutLabels


def build_objective(config: TrainConfig) -> Objective:
    """The method that `config` names; in length consistency unless the network has one length,
    without labels if there is one class."""
    objective = _method(config)
    if config.model.num_classes == 1:
        objective = WithoutLabels(objective, null_label=1)
    if config.model.length_conditioned:
        sizes, frozen = config.row_sizes(), config.length_teacher == "init"
        rows = sizes["length"] + frozen * sizes["flow"]
        objective = LengthConsistency(
            objective, config.model.depths, rows, config.teacher_depth, frozen
        )
    return objective


def _method(config: TrainConfig) -> Objective:
    sizes = config.row_sizes()
    rows = sizes["time"] + sizes.get("guided", 0)
    common: dict[str, Any] = {
        "num_classes": config.model.num_classes,
        "log2_steps": config.log2_steps,
        "label_dropout": config.label_dropout,
        "guidance_scale": config.guidance_scale,
        "guided_channels": config.model.guided_channels,
        "compat": config.compat == "reference",
    }
    velocities: dict[str, Any] = {
        "time_rows": rows,
        "options": config.mean_velocity,
        "guidance_max": config.model.guidance_max,
    }
    match config.objective:
        case "shortcut":
            return Shortcut(time_rows=rows, **common)
        case "shortcut-models":
            return ShortcutModels(time_rows=rows, **common)
        case "mean-flow":
            return MeanFlow(**velocities, **common)
        case "alpha-flow":
            power = config.weight_power
            return AlphaFlow(total_steps=config.steps, weight_power=power, **velocities, **common)
        case "live-reflow":
            return LiveReflow(reflow_rows=rows, **common)
        case "flow":
            path = training_path(config.path, config.path_sigma)
            return FlowMatching(path=path, times=config.times, **common)
        case "reflow":
            return Reflow(times=config.times, **common)
        case "diffusion":
            return Diffusion(times=config.times, **common)
        case "consistency":
            return Consistency(total_steps=config.steps, **common)
        case "consistency-distillation":
            return ConsistencyDistillation(**common)
        case "progressive":
            return Progressive(total_steps=config.steps, **common)
