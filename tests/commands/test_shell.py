"""Habits that a shell and its scripts rely on: no colours when asked, completion, JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from odelt_fast.cli import COMMANDS, SHELLS, command, completion, main

ROOT = Path(__file__).resolve().parents[2]


def on_terminal(*arguments: str, **environment: str) -> str:
    """What the command writes to a terminal."""
    reading, terminal = pty.openpty()
    known = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "PYTHON_TYRO_ANSI_CODES")
    }
    settings = {**known, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    started = subprocess.Popen(
        [sys.executable, "-m", "odelt_fast.cli", *arguments],
        stdout=terminal,
        stderr=terminal,
        env=settings,
    )
    os.close(terminal)
    said = b""
    try:
        while part := os.read(reading, 65536):
            said += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(reading)
    started.wait(timeout=60)
    return said.decode()


@pytest.mark.parametrize("arguments", [["sample", "--help"], ["sample", "--depth", "x"]])
def test_no_color_is_honoured(arguments: list[str]) -> None:
    coloured, empty, plain = (
        on_terminal(*arguments),
        on_terminal(*arguments, NO_COLOR=""),
        on_terminal(*arguments, NO_COLOR="1"),
    )
    assert "\x1b[" in coloured
    assert "\x1b[" in empty  # as no-color.org has it
    assert "\x1b" not in plain
    words = [re.findall(r"\w+", re.sub(r"\x1b\[[0-9;]*m", "", text)) for text in (coloured, plain)]
    assert words[0] == words[1]


@functools.cache
def bash_script() -> str:
    return completion("bash")


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    script = (
        f"{bash_script()}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tyro_odelt_fast;"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bash_completes_commands_options_and_values() -> None:
    assert set(COMMANDS) <= set(completed("odelt-fast", ""))
    assert {"--depth", "--depth-schedule", "--device"} <= set(
        completed("odelt-fast", "sample", "--de")
    )
    assert set(completed("odelt-fast", "sample", "--device", "")) == {"auto", "cpu", "cuda"}
    assert "--model.depth-min" in completed("odelt-fast", "train", "--model.de")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_option_and_nothing_else_is_completed(name: str) -> None:
    fields = dataclasses.fields(command(name).Command)
    options = {
        f"--{field.name.replace('_', '-')}"
        for field in fields
        if "Positional" not in str(field.type)
    }
    offered = completed("odelt-fast", name, "--")
    assert options <= set(offered)
    assert all(re.fullmatch(r"--?[\w.-]+", word) for word in offered), (
        offered
    )  # no line of a help text


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    assert capsys.readouterr().out.startswith("#")


@pytest.mark.parametrize("arguments", [[], ["tcsh"], ["bash", "zsh"]])
def test_a_shell_without_completion_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-completion", *arguments]) == 2
    assert "must be followed by one of bash, zsh, fish" in capsys.readouterr().err


def test_env_as_json_says_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert found["versions"]["torch"] == torch.__version__
    assert "digits" in found["bundled_models"]
    assert found["extras"].keys() >= {"cuda", "train", "eval", "diffusers", "demo", "serve"}
    for line in (*found["packages"], *found["native"], f"--dtype auto is {found['cpu']['dtype']}"):
        assert line in said
    for extra, missing in found["extras"].items():
        assert (
            f"extra {extra}: "
            + (f"not installed ({', '.join(missing)}): pip install" if missing else "installed\n")
            in said
        )
