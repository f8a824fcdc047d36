"""JSON of anyone's making: read with a limit on its size, without doubled keys, without numbers that JSON does not have; values checked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. ValueError for anything else, for doubled keys, and for NaN and infinities."""
    try:
        values = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("must be a JSON object")
    return values


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes. ValueError and OSError for anything else."""
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return parse_object(data)


def whole(name: str, value: Any, least: int = 1, most: int = 2**53) -> int:
    """value, if it is a whole number from least to most; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {shown(value)}")
    return value


def number(name: str, value: Any, least: float = -1e300, most: float = 1e300) -> float:
    """value as a float, if it is a number from least to most; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def text(name: str, value: Any, most: int = 300) -> str:
    """value, if it is printable text of at most `most` characters; else ValueError."""
    if not isinstance(value, str) or not value or len(value) > most or not value.isprintable():
        raise ValueError(f"{name} must be printable text of 1 to {most} characters, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value from a file in an error message: printable, of at most 60 characters."""
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to write the longest ones
        return "a huge number"
    said = "".join(c if c.isprintable() else " " for c in repr(value)[:200])
    return said if len(said) <= 60 else said[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(said: str) -> None:
    raise ValueError(f"{said} is not a number that JSON has")


def _finite(said: str) -> float:
    value = float(said)
    if math.isinf(value):
        raise ValueError(f"{shown(said)} is too large a number")
    return value
