"""`odelt-fast train`: the entry in the list of commands; train/main.py parses and runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Train a model (`odelt-fast train --help` lists the options)."""
