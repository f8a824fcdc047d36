"""The model that a run starts from: initial weights, the frozen teacher of distillation, the maker
of Reflow's pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.config import NUM_STEP_INDICES, DiTConfig
from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.dial import Wiring
from odelt_fast.train.methods import DISTILLATIONS

from .pairs import PairSource, generate_pairs

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState


def check_same(what: str, has: Any, wanted: DiTConfig, *names: str) -> None:
    """ValueError naming the first of these attributes that the run's model has otherwise."""
    for name in names:
        if getattr(has, name) != getattr(wanted, name):
            option = "mlp_ratio" if name == "mlp_size" else name
            value = getattr(has, option)
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(
                f"{what} {name} {getattr(has, name)}, this run's model {getattr(wanted, name)}: set"
                f" --model.{option.replace('_', '-')} {value}"
            )


def start_from(model: DiT, source: DiT, wiring: Wiring | None = None) -> str | None:
    """Copies the weights of `source` into `model`.

    The shapes and num_heads must agree; how the network is run (depth_min, depth_group, sampling,
    step_conditioned, dropout) may differ. Weights of a conventional DiT have no length table: it
    starts at zero; wiring "paper" rescales their gates. With another number of classes the label
    table stays as `model` has it, new. Where only one of the networks is told step sizes, the step
    embedder starts silent: it adds what the source was trained with, always.

    Returns:
        A remark, if there is something to say about it.

    Raises:
        ValueError: the networks do not fit.
    """
    names = ("channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_size")
    has, wanted = source.config, model.config
    what = "the model of init_from has"
    check_same(what, has, wanted, *names, "time_scale", "time_period")
    if has.length_conditioned and not wanted.length_conditioned:
        raise ValueError("the model of init_from has an inner ODE: set --model.length-conditioned")
    if has.length_conditioned and wiring is not None:
        raise ValueError(
            f"wiring {wiring} is for a conventional model: that of init_from has lengths"
            f" {', '.join(map(str, has.depths))} already; leave --wiring out"
        )
    if has.length_conditioned and has.has_inner_ode != wanted.has_inner_ode:
        check_same(what, has, wanted, "inner_step")
    if has.guidance_max is not None:  # a network that is told scales anew starts silent
        check_same(what, has, wanted, "guidance_max")
    conventional = wanted.length_conditioned and not has.length_conditioned
    state, remarks = {**model.state_dict(), **source.state_dict()}, list[str]()
    if has.num_classes != wanted.num_classes:
        state["label_embed.weight"] = model.label_embed.weight
        remarks.append(
            f"the model of init_from has {has.num_classes} classes, this run's"
            f" {wanted.num_classes}: the label table starts anew"
        )
    if has.step_conditioned != wanted.step_conditioned:
        state |= _silent_steps(model, source)
    if conventional:
        state["length_embed.weight"] = torch.zeros_like(model.length_embed.weight)
        remarks.append(_wired(wanted, wiring))
    if (has.sampling == "diffusion") != (wanted.sampling == "diffusion"):
        remarks.append(
            f"the model of init_from was trained for sampling {has.sampling!r}, not for"
            f" {wanted.sampling!r}: what it predicts is learnt anew"
        )
    model.load_state_dict(state)
    if conventional and wiring == "paper":
        fold_gates(model)
    return "; ".join(remarks) or None


def _silent_steps(model: DiT, source: DiT) -> dict[str, Tensor]:
    """A step embedder that adds, whatever the step size, what the source's adds at the index that
    it knows a velocity by; its first layer is new, so that it can learn."""
    index = NUM_STEP_INDICES - 1 if source.config.step_conditioned else 0
    with torch.no_grad():
        constant = source.step_embed(torch.tensor([float(index)]))[0]
    new = {
        f"step_embed.{name}": value.clone() for name, value in model.step_embed.state_dict().items()
    }
    new["step_embed.linear_out.weight"].zero_()
    return {**new, "step_embed.linear_out.bias": constant}


def _wired(config: DiTConfig, wiring: Wiring | None) -> str:
    """What to say of a conventional DiT that gets lengths."""
    depths = ", ".join(map(str, config.depths))
    start = f"init_from is a conventional DiT, which gets the lengths {depths}"
    if not config.has_inner_ode:
        return f"{start} in residual wiring: at l = {config.depth} it starts as exactly what it was"
    idle = config.depth - config.live_blocks()
    unused = f"; its last {idle} blocks, less than a group, are never used" if idle else ""
    gates = "its gates are rescaled, so that at full depth it starts near" if (
        wiring == "paper"
    ) else "its weights are unchanged, so that even at full depth it starts far from"  # fmt: skip
    return (
        f"{start}: its blocks become the steps of the inner ODE, whose length table starts at"
        f" zero; {gates} what it was (--wiring residual starts exactly there){unused}"
    )


@torch.no_grad()
def fold_gates(model: DiT) -> None:
    """Rescales, in place, a conventional network's gates for the paper's wiring.

    A group that ends adds its last block's output, which holds the stream, to the stream: in front
    of group g (from 0) that is 2^g times what the network was trained with. Blocks normalise what
    they read, so that with gates times 2^g, and 2^(g+1) in the block that ends the group, they read
    at full depth what they have read: a digits flow of 12 blocks in groups of 4 is 15 % off before
    the first step, and 53 % with its own gates.

    What stays inexact: the MLP of a block that ends a group reads its attention twice; and the
    velocity is read from the sum of the groups' ends, not from the stream. Of G groups, the tokens
    count 2^G - 1 times in it, blocks that end a group 2^G, and others 2^G - 2^g: of the first group
    as it should be, of the last about half. The very last block, which nothing else reads, gets
    2^G - 1 times its gates, so that a network of one group is exact.
    """
    config, state = model.config, model.state_dict()
    live = config.live_blocks()
    for block in range(live):
        factor = 2 ** (block // config.depth_group + config.ends_group(block))
        if block == live - 1:
            factor -= 1
        for leaf in ("weight", "bias"):
            parts = state[f"blocks.{block}.modulation.{leaf}"].unflatten(0, (6, -1))
            parts[2] *= factor  # the gate of attention, after its shift and scale
            parts[5] *= factor  # of the MLP


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
        The frozen teacher, where there is one; a remark to print, if any.
    """
    if config.init_from is None:
        return None, None
    source = load_model(config.init_from)
    conflict = source.trained_on.conflict(model.trained_on)
    if config.objective in DISTILLATIONS:
        check_teacher(source, config)
    frozen = config.length_teacher == "init"
    if frozen:
        check_same("the frozen teacher has", source.config, model.config, "num_classes")
        if (source.config.sampling == "diffusion") != (config.objective == "diffusion"):
            raise ValueError(
                "length_teacher init: the model of init_from is sampled as"
                f" {source.config.sampling!r}, and cannot teach objective {config.objective}"
            )
    if conflict and (frozen or config.objective in DISTILLATIONS):
        other = ", or take --length-teacher ema" if frozen else ""
        raise ValueError(f"the teacher was trained on {conflict}: distil it on its own data{other}")
    table = model.label_embed.weight.detach().clone()
    remark = start_from(model, source, config.wiring)
    if conflict:
        found = f"init_from was trained on {conflict}{_rows_by_name(model, source, table)}"
        remark = found if remark is None else f"{remark}; {found}"
    teaches = frozen or config.objective in ("progressive", "consistency-distillation")
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
    folder is not there. ValueError where it is and holds another number of them."""
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
    source = PairSource(config.pairs)
    if config.num_pairs not in (len(source), TrainConfig.num_pairs):
        raise ValueError(
            f"num_pairs {config.num_pairs} has no effect: {config.pairs} holds {len(source)}"
            " already; leave it out, or name another folder"
        )
    return source
