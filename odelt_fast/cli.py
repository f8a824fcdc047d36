"""The command `odelt-fast`: finds the command, parses its options, runs it, says what went wrong.

A command NAME is the module `commands.NAME`: a dataclass `Command` of its options and
`run(options)`; only that module is loaded, and torch only by what needs it. A mistake ends in one
message on stderr and exit code 2. Outputs are tried out before work starts, and appear whole or not
at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from odelt_fast import __version__
from odelt_fast.checks import unknown_option
from odelt_fast.files import one_line, plain_warnings, print_anything

COMMANDS = (
    "sample", "generate", "convert", "evaluate", "stats", "profile", "plan", "likelihood", "plot",
    "train", "ema", "encode", "demo", "serve", "env", "doctor", "build-ops",
)  # fmt: skip
SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 after a mistake that stderr explains, 130 after Ctrl-C.
    """
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # what tyro asks before it colours; it knows no NO_COLOR
    print_anything()
    try:
        try:
            with plain_warnings():
                code = run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as mistake:
        if is_out_of_memory(mistake):
            message = "not enough memory: draw fewer images, or lower --batch-size"
        elif isinstance(mistake, (ValueError, OSError)):
            message = one_line(mistake, limit=600)
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's memory, or a device's, was too small. Torch is not loaded to tell."""
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError)


def run(arguments: list[str]) -> int:
    """Parses and runs; mistakes are raised."""
    if arguments == ["--version"]:
        print(f"odelt-fast {__version__}")
        return 0
    if arguments[:1] == ["train"]:
        from odelt_fast.train.main import main as train

        return train(arguments[1:], prog="odelt-fast train")
    if not arguments or arguments[0] in ("-h", "--help"):
        description = (
            "Train, sample and measure ODE_t(ODE_l) diffusion and flow transformers. --version"
            " shows the version, --print-completion SHELL what completes commands and options in"
            " bash, zsh or fish."
        )
        tyro.cli(all_commands(), args=arguments, prog="odelt-fast", description=description)
    if arguments[0] == "--print-completion":
        if len(arguments) != 2 or arguments[1] not in SHELLS:
            raise ValueError(
                f"--print-completion must be followed by one of {', '.join(SHELLS)}, not"
                f" {' '.join(arguments[1:]) or 'nothing'}"
            )
        print(completion(arguments[1]))
        return 0
    if arguments[0] not in COMMANDS:
        raise ValueError(
            f"odelt-fast begins with a command, {', '.join(COMMANDS)}, not {arguments[0]!r}:"
            " odelt-fast --help"
        )
    module, prog = command(arguments[0]), f"odelt-fast {arguments[0]}"
    plain = (tyro.conf.FlagCreatePairsOff,)
    options, unknown = tyro.cli(
        module.Command, args=arguments[1:], prog=prog, config=plain, return_unknown_args=True
    )
    if unknown:
        names = [field.name for field in dataclasses.fields(module.Command)]
        raise unknown_option(prog, unknown[0], names)
    module.run(options)
    return 0


def completion(shell: str) -> str:
    """Script for the shell that completes commands and options."""
    script = io.StringIO()
    try:
        with contextlib.redirect_stdout(script):
            arguments = ["--tyro-write-completion", shell, "-"]
            tyro.cli(all_commands(), args=arguments, prog="odelt-fast")
    except SystemExit as stop:
        if stop.code:
            raise
    # Descriptions become one line each: of longer ones tyro would offer every further line as a
    # word to type.
    return "\n".join(
        re.sub(r"\\+n", " ", line) if line.startswith("COMPLETION_SPEC = ") else line
        for line in script.getvalue().splitlines()
    )


def all_commands() -> Any:
    """A type that tyro parses as any of the commands, with all their options."""
    from odelt_fast.train.config import TrainConfig
    from odelt_fast.train.recipes import RECIPES

    train = tyro.conf.subcommand(
        "train", default=RECIPES["digits"], description=command("train").Command.__doc__
    )
    kinds: list[Any] = [
        Annotated[command(name).Command, tyro.conf.subcommand(name)]
        for name in COMMANDS
        if name != "train"
    ]
    return Union[(*kinds, Annotated[TrainConfig, train])]


def command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"odelt_fast.commands.{name.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
