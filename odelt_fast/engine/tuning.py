"""Measured times of matrix products and attentions, by card: which is fastest depends on the card
and the shape.

`tuning/NAME.json` holds what `benchmarks/tune.py` measured on a card; without a table for this
card cuBLAS and PyTorch's attention run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

Measured = Sequence[dict[str, Any]]


def read_tuning(device: torch.device) -> Measured:
    """Measured times of this card, empty if there are none.

    Returns:
        Entries {"operator", "dtype", ..., "amount", "microseconds": {name: time}}: for "linear"
        with "activation", "columns", "inner", amount = rows; for "attention" with "heads",
        "head_dim", "tokens", amount = samples; for "plan" the same.
    """
    if device.type != "cuda":
        return ()
    path = tuning_path(torch.cuda.get_device_name(device))
    return json.loads(path.read_text())["entries"] if path.is_file() else ()


def tuning_path(device_name: str) -> Path:
    """Where the times of a card are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(__file__).parents[1] / "tuning" / f"{name}.json"


def fastest(
    measured: Measured, available: Collection[str], amount: int, **exact: object
) -> str | None:
    """The fastest of `available` at the measured shape nearest to `amount` (at most a factor 2
    away) that agrees in all of `exact`."""

    def distance(entry: dict[str, Any]) -> float:
        return abs(math.log2(entry["amount"] / amount))

    near = [
        entry
        for entry in measured
        if all(entry.get(key) == value for key, value in exact.items()) and distance(entry) <= 1
    ]
    if not near:
        return None
    times = min(near, key=distance)["microseconds"]
    return min((name for name in times if name in available), key=times.__getitem__, default=None)


def winners(measured: Measured, operator: str) -> set[str]:
    """Names that are fastest of an operator somewhere."""
    entries = [entry["microseconds"] for entry in measured if entry["operator"] == operator]
    return {min(times, key=times.__getitem__) for times in entries if times}
