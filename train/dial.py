"""The lengths that a network gets, and the shapes of the model that a run starts from. Loads no
torch."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from odelt_fast.config import DiTConfig

# Objectives whose flow rows a frozen model knows.
TAUGHT_BY_INIT = ("flow", "shortcut", "diffusion")
Wiring = Literal["residual", "paper"]
# What another run of a network may have otherwise; the rest are its shapes.
_HOW_IT_IS_RUN = ("sampling", "step_conditioned", "dropout")
_DIAL = ("length_conditioned", "depth_min", "depth_group", "inner_step")


@dataclass(frozen=True)
class DialOptions:
    """What a run's network starts from, how it gets its lengths, and who teaches them."""

    init_from: str | None = None
    """Model to start from and to distil: a folder, a bundled name or a Hub id. Shapes that are not
    given are its own."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """Lengths l at which the network may run, such as 12 20 28: evenly spaced, up to its number of
    blocks. Sets depth_min and depth_group of --model; empty: those."""
    wiring: Wiring | None = None
    """How a conventional model of --init-from gets its lengths. residual (the command's default):
    the velocity is read after l blocks; full depth is exactly the model that it was. paper: groups
    of blocks are steps of the inner ODE; gates are rescaled, and full depth starts near it. None:
    as --model.inner-step says, weights unchanged."""
    length_teacher: Literal["ema", "init"] = "ema"
    """Who teaches the rows that learn other lengths. ema: the EMA network, at another depth. init:
    the frozen model of --init-from, at full depth, in flow rows too (objectives flow, shortcut,
    diffusion); the command's default for a conventional model in residual wiring."""
    teacher_depth: Literal["full", "student"] = "full"
    """Depth at which EMA and teacher make targets: all blocks (as the reference), or the student's
    l of each row (Algorithm 1)."""

    def with_dial(self, model: DiTConfig) -> DiTConfig:
        """The network with these lengths (empty: its own), in this wiring (None: its own).

        Raises:
            ValueError: depths that are no grid up to the number of blocks; a wiring without a model
                that could get it, or without lengths.
        """
        depths, wiring = self.depths, self.wiring
        if depths:
            group = depths[1] - depths[0] if len(depths) > 1 else model.depth
            grid = range(depths[0], depths[-1] + 1, group) if group > 0 and depths[0] > 0 else ()
            if tuple(grid) != tuple(depths) or depths[-1] != model.depth:
                raise ValueError(
                    "depths must rise evenly from 1 or more and end at the model's"
                    f" {model.depth} blocks, as {_example(model.depth)} do, not"
                    f" {' '.join(map(str, depths))}"
                )
            model = replace(model, length_conditioned=True, depth_min=depths[0], depth_group=group)
        if wiring is None:
            return model
        if self.init_from is None:
            raise ValueError(
                f"wiring {wiring} is for a conventional model that --init-from names: without one"
                " use --model.inner-step"
            )
        if not model.length_conditioned:
            raise ValueError(f"wiring {wiring} needs a network of several lengths: set --depths")
        if wiring == "residual":
            return replace(model, inner_step="residual")
        if model.depth_min < model.depth_group:
            raise ValueError(
                f"wiring paper: the shortest length {model.depth_min} is less than a group of"
                f" {model.depth_group} blocks: use other --depths, or --wiring residual"
            )
        return replace(model, inner_step="unit")

    def check_teacher(self, objective: str, length_conditioned: bool) -> None:
        """ValueError where the frozen model is to teach what it cannot."""
        if self.length_teacher == "ema":
            return
        if self.init_from is None:
            raise ValueError("length_teacher init: name the model with --init-from FOLDER")
        if not length_conditioned or objective not in TAUGHT_BY_INIT:
            raise ValueError(
                "length_teacher init is for networks of several lengths (--depths) and the"
                f" objectives {', '.join(TAUGHT_BY_INIT)}: use ema"
            )


def usual_teacher(
    has: DiTConfig, model: DiTConfig, objective: str, given: AbstractSet[str]
) -> Literal["ema", "init"]:
    """Who teaches a run that starts from a conventional model of shape `has`, where nothing else is
    said: the model itself, if it can. On digits and MNIST it was the better teacher at every length
    (docs/pretrained.md)."""
    others = {"--length-consistency-every", "--teacher-depth"}
    knows = objective in TAUGHT_BY_INIT and has.num_classes == model.num_classes
    knows &= (has.sampling == "diffusion") == (objective == "diffusion")
    new = model.length_conditioned and not has.length_conditioned
    new &= model.inner_step == "residual"
    return "init" if new and knows and not given & others else "ema"


def _example(depth: int) -> str:
    group = max(1, depth // 3)
    return " ".join(str(length) for length in range(depth % group or group, depth + 1, group))


def shaped_as(
    has: DiTConfig, model: DiTConfig, given: AbstractSet[str]
) -> tuple[DiTConfig, Wiring | None]:
    """The network of a run that starts from a model of shape `has`, and its wiring.

    Args:
        model: of the recipe: how the network is run, and the lengths of what has none.
        given: options that the user gives (--depths, --model.depth-min, ..) and that will replace
            what is returned.

    Raises:
        ValueError: lengths that are given twice; a conventional model whose blocks the recipe's
            lengths do not fit.
    """
    dial = {f"--model.{name.replace('_', '-')}" for name in _DIAL}
    for option, *others in (
        ("--depths", "--model.depth-min", "--model.depth-group", "--model.no-length-conditioned"),
        ("--wiring", "--model.inner-step", "--model.no-length-conditioned"),
    ):
        for other in others:
            if {option, other} <= given:
                raise ValueError(f"{option} and {other} are both about the same: leave one out")
    kept = _HOW_IT_IS_RUN if has.length_conditioned else (*_HOW_IT_IS_RUN, *_DIAL)
    shape = {field.name: getattr(has, field.name) for field in fields(has)
             if field.name not in kept}  # fmt: skip
    conventional = "--model.no-length-conditioned" in given
    if not has.length_conditioned:
        start, group = model.depth_min, model.depth_group
        if start > has.depth or (has.depth - start) % group:
            if not given & {"--depths", "--model.no-length-conditioned", *dial}:
                raise ValueError(
                    f"the model of init_from has {has.depth} blocks and one length: name those to"
                    f" train with --depths {_example(has.depth)}, or set"
                    " --model.no-length-conditioned"
                )
            shape["depth_min"] = has.depth
    wired = not (has.length_conditioned or conventional or "--model.inner-step" in given)
    return replace(model, **shape), "residual" if wired else None
