"""The model that a run starts from: initial weights, the frozen teacher of distillation, the maker
of Reflow's pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from odelt_fast.train.config import DISTILLATIONS, TrainConfig

from .pairs import PairSource, generate_pairs

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState


def check_same(what: str, has: Any, wanted: DiTConfig, *names: str) -> None:
    """ValueError naming the first of these attributes that the run's model has otherwise."""
    for name in names:
        if getattr(has, name) != getattr(wanted, name):
            option = "mlp_ratio" if name == "mlp_size" else name
            raise ValueError(
                f"{what} {name} {getattr(has, name)}, this run's model {getattr(wanted, name)}: set"
                f" --model.{option.replace('_', '-')} {getattr(has, option)}"
            )


def start_from(model: DiT, source: DiT) -> str | None:
    """Copies the weights of `source` into `model`.

    The shapes and num_heads must agree; how the network is run (depth_min, depth_group, sampling,
    step_conditioned, dropout) may differ. Weights of a conventional DiT have no length table: it
    starts at zero. With another number of classes the label table stays as `model` has it, new.

    Returns:
        A remark, if there is something to say about it.

    Raises:
        ValueError: the networks do not fit.
    """
    names = ("channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_size")
    has, wanted = source.config, model.config
    check_same("the model of init_from has", has, wanted, *names)
    if has.length_conditioned and not wanted.length_conditioned:
        raise ValueError("the model of init_from has an inner ODE: set --model.length-conditioned")
    conventional = wanted.length_conditioned and not has.length_conditioned
    state, remarks = {**model.state_dict(), **source.state_dict()}, list[str]()
    if has.num_classes != wanted.num_classes:
        state["label_embed.weight"] = model.label_embed.weight
        remarks.append(
            f"the model of init_from has {has.num_classes} classes, this run's"
            f" {wanted.num_classes}: the label table starts anew"
        )
    if conventional:
        state["length_embed.weight"] = torch.zeros_like(model.length_embed.weight)
        remarks.append(
            "init_from is a conventional DiT: its blocks become the steps of the inner ODE, whose"
            " length table starts at zero"
        )
    model.load_state_dict(state)
    return "; ".join(remarks) or None


def check_teacher(source: DiT, config: TrainConfig) -> None:
    """ValueError if the model that `init_from` names cannot teach what `config` trains."""
    wanted, has = config.model_config(), source.config
    check_same("the teacher has", has, wanted, "channels", "image_size", "num_classes")
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
    """Loads `init_from` into the model.

    Returns:
        The frozen teacher, for the objectives that have one; a remark to print, if any.
    """
    if config.init_from is None:
        return None, None
    source = load_model(config.init_from)
    conflict = source.trained_on.conflict(model.trained_on)
    if config.objective in DISTILLATIONS:
        check_teacher(source, config)
        if conflict:
            raise ValueError(f"the teacher was trained on {conflict}: distil it on its own data")
    table = model.label_embed.weight.detach().clone()
    remark = start_from(model, source)
    if conflict:
        found = f"init_from was trained on {conflict}{_rows_by_name(model, source, table)}"
        remark = found if remark is None else f"{remark}; {found}"
    teaches = config.objective in ("progressive", "consistency-distillation")
    return source.requires_grad_(False) if teaches else None, remark


@torch.no_grad()
def _rows_by_name(model: DiT, source: DiT, table: torch.Tensor) -> str:
    """Gives the classes of a model their rows in the label table of `source`, by name, and those
    that it does not have their rows in `table`; what was done, in words."""
    ours, theirs = model.trained_on.class_names, source.trained_on.class_names
    if ours == theirs or len(ours) != len(theirs):
        return ""
    rows = [source.trained_on.find(name) for name in ours]
    for label, row in enumerate(rows):
        known = len(row) == 1
        model.label_embed.weight[label] = (
            source.label_embed.weight[row[0]] if known else table[label]
        )
    new = sum(len(row) != 1 for row in rows)
    return f": labels are taken by name, {new} of them anew"


def open_pairs(config: TrainConfig, state: AcceleratorState) -> PairSource:
    """The pairs of a Reflow run. All processes make them, with the model of init_from, if the
    folder is not there."""
    assert config.pairs is not None
    if not config.pairs.exists():
        if config.init_from is None:
            raise ValueError(
                f"there are no pairs in {config.pairs}: --init-from FOLDER names the model that"
                " makes them"
            )
        teacher = load_model(config.init_from, device=state.device)
        check_teacher(teacher, config)
        generate_pairs(teacher, config, state)
    return PairSource(config.pairs)
