"""From the options of a run to its objective."""

from __future__ import annotations

from odelt_fast.train.config import TrainConfig
from odelt_fast.train.length_consistency import LengthConsistency
from odelt_fast.train.objectives.consistency import Consistency
from odelt_fast.train.objectives.consistency_distillation import ConsistencyDistillation
from odelt_fast.train.objectives.diffusion import Diffusion
from odelt_fast.train.objectives.flow_matching import FlowMatching
from odelt_fast.train.objectives.live_reflow import LiveReflow
from odelt_fast.train.objectives.progressive import Progressive
from odelt_fast.train.objectives.reflow import Reflow
from odelt_fast.train.objectives.shortcut import Shortcut
from odelt_fast.train.objectives.shortcut_models import ShortcutModels
from odelt_fast.train.objectives.targets import Objective, WithoutLabels
from odelt_fast.train.paths import training_path


def build_objective(config: TrainConfig) -> Objective:
    """The method that `config` names; in length consistency unless the network has one length,
    without labels if there is one class."""
    objective = _method(config)
    if config.model.num_classes == 1:
        objective = WithoutLabels(objective, null_label=1)
    if config.model.length_conditioned:
        sizes = config.row_sizes()
        objective = LengthConsistency(
            objective, config.model.depths, sizes["length"], config.teacher_depth
        )
    return objective


def _method(config: TrainConfig) -> Objective:
    classes, log2_steps, drop = config.model.num_classes, config.log2_steps, config.label_dropout
    compat, scale, total = config.compat == "reference", config.guidance_scale, config.steps
    sizes = config.row_sizes()
    rows = sizes["time"] + sizes.get("guided", 0)
    match config.objective:
        case "shortcut":
            return Shortcut(classes, rows, log2_steps, drop, scale, compat)
        case "shortcut-models":
            return ShortcutModels(classes, rows, log2_steps, drop, scale, compat=compat)
        case "flow":
            return FlowMatching(
                training_path(config.path, config.path_sigma),
                classes,
                log2_steps,
                drop,
                config.times,
                compat,
            )
        case "live-reflow":
            return LiveReflow(classes, rows, log2_steps, drop, scale, compat=compat)
        case "reflow":
            return Reflow(log2_steps, config.times)
        case "consistency":
            return Consistency(classes, total, log2_steps, drop, compat)
        case "consistency-distillation":
            return ConsistencyDistillation(classes, log2_steps, drop, scale, compat=compat)
        case "progressive":
            return Progressive(classes, total, log2_steps, drop, scale, compat=compat)
        case "diffusion":
            return Diffusion(classes, log2_steps, drop, config.times)
