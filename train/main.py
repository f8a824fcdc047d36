"""`accelerate launch train/main.py [options]` and `odelt-fast train [options]`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import tyro

from odelt_fast.checks import unknown_option
from odelt_fast.config import DiTConfig
from odelt_fast.files import plain_warnings, print_anything
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.dial import shaped_as, usual_teacher
from odelt_fast.train.effects import check_effects
from odelt_fast.train.launcher import Launcher
from odelt_fast.train.recipes import RECIPES

STOPPED = 75  # exit code: a temporary failure, of sysexits.h; the same command with latest goes on


def parse(arguments: Sequence[str], prog: str | None = None) -> TrainConfig:
    """Options over the recipe that `--recipe` names, and over the shapes of the model that
    `--init-from` names. A value of the wrong type ends the process
    with one message on stderr and exit code 2; an unknown option or an impossible combination
    raises ValueError."""
    named = {"--recipe": "digits", "--init-from": ""}
    given = set()
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        given.add(name)
        if name in named:
            named[name] = value if equals else "".join(arguments[i + 1 : i + 2])
    # An unknown name is refused below, with the allowed ones.
    default, launcher = RECIPES.get(named["--recipe"], RECIPES["digits"]), Launcher.of()
    if launcher.mixed_precision:
        default = dataclasses.replace(default, mixed_precision=None)
    has = None
    if named["--init-from"] not in ("", "None") and not given & {"-h", "--help"}:
        default, has = started_from(default, named["--init-from"], given)
    config, unknown = tyro.cli(
        TrainConfig,
        args=list(arguments),
        default=default,
        prog=prog,
        description=TrainConfig.__doc__,
        return_unknown_args=True,
    )
    if unknown:
        options = [field.name for field in dataclasses.fields(TrainConfig)]
        options += [f"model.{field.name}" for field in dataclasses.fields(DiTConfig)]
        raise unknown_option(prog or "train", unknown[0], options)
    if has and "--length-teacher" not in given:
        teacher = usual_teacher(has, config.model, config.objective, given)
        config = dataclasses.replace(config, length_teacher=teacher)
    launcher.check_named(given)
    check_effects(launcher.applied(config), default)
    return config


def started_from(
    config: TrainConfig, init_from: str, given: set[str]
) -> tuple[TrainConfig, DiTConfig]:
    """The options with the shapes of the model that `init_from` names; its own.

    Args:
        given: names of the options that will replace its.

    Raises:
        ValueError: no such model, or lengths that do not go with it.
    """
    from odelt_fast.checkpoints.folder import read_config

    has = read_config(init_from)
    model, wiring = shaped_as(has, config.model, given)
    return dataclasses.replace(config, model=model, init_from=init_from, wiring=wiring), has


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code: 0; 2 after a mistake in the options or the data, which is
    printed in one line; STOPPED where a signal ended the run after a checkpoint, or other processes
    of the run are gone."""
    print_anything()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, prog)
        from odelt_fast.train.processes import ProcessLost
        from odelt_fast.train.run import RunStopped, train

        try:
            with plain_warnings():
                train(config)
        except (RunStopped, ProcessLost) as stopped:
            print(f"{stopped}; go on with --resume-from-checkpoint latest", file=sys.stderr)
            return STOPPED
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
