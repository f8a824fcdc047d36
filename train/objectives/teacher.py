"""The model that a run starts from: initial weights, the frozen teacher of distillation, the maker
of Reflow's pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.images import ImageSource
from odelt_fast.model import DiT
from odelt_fast.train.config import DISTILLATIONS, TrainConfig

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState


def start_from(model: DiT, source: DiT) -> str | None:
    """Copies the weights of `source` into `model`; returns a remark if there is something to say
    about it.

    The shapes and num_heads must agree; how the network is run (depth_min, depth_group, sampling,
    step_conditioned, dropout) may differ. Weights of a conventional DiT have no length table: it
    starts at zero. Raises ValueError otherwise.
    """
    for name in (
        "channels",
        "patch_size",
        "hidden_size",
        "depth",
        "num_heads",
        "mlp_size",
        "num_classes",
    ):
        has, wants = getattr(source.config, name), getattr(model.config, name)
        if has != wants:
            option = "mlp-ratio" if name == "mlp_size" else name.replace("_", "-")
            raise ValueError(
                f"the model of init_from has {name} {has}, this run's {wants}: change"
                f" --model.{option}"
            )
    if source.config.length_conditioned and not model.config.length_conditioned:
        raise ValueError("the model of init_from has an inner ODE: set --model.length-conditioned")
    model.load_state_dict(
        source.state_dict(),
        strict=source.config.length_conditioned or not model.config.length_conditioned,
    )
    if model.config.length_conditioned and not source.config.length_conditioned:
        torch.nn.init.zeros_(model.length_embed.weight)
        return (
            "init_from is a conventional DiT: its blocks become the steps of the inner ODE, whose"
            " length table starts at zero"
        )
    return None


def check_teacher(source: DiT, config: TrainConfig) -> None:
    """ValueError if the model that `init_from` names cannot teach what `config` trains."""
    wanted, has = config.model_config(), source.config
    for name in ("channels", "image_size", "num_classes"):
        if getattr(has, name) != getattr(wanted, name):
            problem = (
                f"the teacher has {name} {getattr(has, name)}, this run's model"
                f" {getattr(wanted, name)}"
            )
            raise ValueError(f"{problem}: change --model.{name.replace('_', '-')}")
    if has.sampling not in ("flow", "shortcut", "live_reflow"):
        raise ValueError(
            f"the teacher is sampled as {has.sampling!r}: objective {config.objective} needs one of"
            " flow or shortcut"
        )
    if config.objective == "progressive":
        if has.step_conditioned:
            raise ValueError(
                "progressive distillation needs a teacher without step sizes: one trained with"
                " --objective flow"
            )
        if has.length_conditioned != wanted.length_conditioned:
            raise ValueError(
                "progressive distillation: teacher and student need an inner ODE, or neither"
                " (--model.length-conditioned)"
            )
    if config.teacher_depth == "student" and has.depths != wanted.depths:
        raise ValueError(
            f"the teacher runs at depth {has.depths}, the student at {wanted.depths}: use"
            " --teacher-depth full"
        )


def load_start(config: TrainConfig, model: DiT) -> tuple[DiT | None, str | None]:
    """Loads `init_from` into the model. Returns the frozen teacher, for the objectives that have
    one, and a remark to print, if any."""
    if config.init_from is None:
        return None, None
    source = load_model(config.init_from)
    if config.objective in DISTILLATIONS:
        check_teacher(source, config)
    remark = start_from(model, source)
    return (
        source.requires_grad_(False)
        if config.objective in ("progressive", "consistency-distillation")
        else None
    ), remark


def open_pairs(config: TrainConfig, state: AcceleratorState) -> ImageSource:
    """The pairs of a Reflow run. All processes make them, with the model of init_from, if the
    folder is not there."""
    from odelt_fast.train.objectives.reflow import PairSource, generate_pairs

    assert config.pairs is not None
    if not config.pairs.exists():
        if config.init_from is None:
            raise ValueError(
                f"there are no pairs in {config.pairs}: --init-from FOLDER names the model that"
                " makes them"
            )
        teacher = load_model(config.init_from, device=state.device)
        check_teacher(teacher, config)
        generate_pairs(
            teacher,
            config.pairs,
            config.num_pairs,
            log2_steps=config.log2_steps,
            guidance_scale=config.guidance_scale,
            label_dropout=config.label_dropout,
            seed=config.seed,
            batch_size=config.train_batch_size,
            process=state.process_index,
            processes=state.num_processes,
            wait_for_everyone=state.wait_for_everyone,
        )
    return PairSource(config.pairs)
