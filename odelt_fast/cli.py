"""The command `odelt-fast`: finds the command, parses its options, runs it, says what went wrong.

A command NAME is the module `commands.NAME`: a dataclass `Command` of its options and `run(options)`; only that module is loaded, and torch
only by what needs it. A mistake ends in one message on stderr and exit code 2. Outputs are tried out before work starts, and appear whole
or not at all.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from odelt_fast import __version__

COMMANDS = ("sample", "convert", "plot", "train", "env")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 after a mistake that stderr explains, 130 after Ctrl-C."""
    try:
        try:
            code = run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        message = "not enough memory: draw fewer images, or lower --batch-size"
    except (ValueError, OSError) as mistake:
        message = " ".join(str(mistake).split())
    print(f"error: {message if len(message) <= 600 else message[:597] + '...'}", file=sys.stderr)
    return 2


def run(arguments: list[str]) -> int:
    """Parses and runs; mistakes are raised."""
    if arguments == ["--version"]:
        print(f"odelt-fast {__version__}")
        return 0
    if arguments[:1] == ["train"]:
        from odelt_fast.train.main import main as train

        return train(arguments[1:], prog="odelt-fast train")
    if not arguments or arguments[0] in ("-h", "--help"):
        description = "Train, sample and measure ODE_t(ODE_l) diffusion and flow transformers. --version shows the version."
        kinds: Any = Union[tuple(Annotated[command(name).Command, tyro.conf.subcommand(name)] for name in COMMANDS)]  # noqa: UP007
        tyro.cli(kinds, args=arguments, prog="odelt-fast", description=description)
    if arguments[0] not in COMMANDS:
        raise ValueError(f"odelt-fast begins with a command, {', '.join(COMMANDS)}, not {arguments[0]!r}: odelt-fast --help")
    module, prog = command(arguments[0]), f"odelt-fast {arguments[0]}"
    plain = (tyro.conf.FlagCreatePairsOff,)
    options, unknown = tyro.cli(module.Command, args=arguments[1:], prog=prog, config=plain, return_unknown_args=True)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Command)])
        raise ValueError(f"{prog} has no {name!r}{', perhaps ' + ' or '.join(near) if near else ''}: see {prog} --help")
    module.run(options)
    return 0


def command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"odelt_fast.commands.{name}")


if __name__ == "__main__":
    sys.exit(main())
