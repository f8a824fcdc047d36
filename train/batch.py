"""The batch of a run, divided among its processes: another number of them, or a smaller batch of
each, keeps the rows that a step has. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .config import TrainConfig


def rows_of(config: TrainConfig, parts: int) -> dict[str, int]:
    """Rows of each kind in a batch of `parts` parts."""
    return {name: rows * parts for name, rows in config.row_sizes().items()}


def divisions(
    config: TrainConfig, kinds: Mapping[str, int], processes: int
) -> Iterator[TrainConfig]:
    """The ways in which `processes` can make a batch with so many rows of each kind, in batches of
    at most train_batch_size, the largest first; accumulation does the rest."""
    rows = sum(kinds.values())
    for size in range(config.train_batch_size, 0, -1):
        parts = rows // size
        if rows % size or parts % processes:
            continue
        with contextlib.suppress(ValueError):  # its kinds of rows do not divide the size
            other = replace(
                config, train_batch_size=size, gradient_accumulation_steps=parts // processes
            )
            if rows_of(other, parts) == kinds:
                yield other


def batch_state(asked: TrainConfig, rows: int) -> dict[str, int]:
    """What a checkpoint says of the batch: its rows, and the options that were given."""
    return {
        "rows": rows,
        "train_batch_size": asked.train_batch_size,
        "gradient_accumulation_steps": asked.gradient_accumulation_steps or 1,
    }


def kept(config: TrainConfig, state: Mapping[str, Any], processes: int) -> TrainConfig:
    """The options with which `processes` go on with the batch of a checkpoint's state, which may
    have been that of another number; options that are not those of before are taken as they are.

    Raises:
        ValueError: the batch cannot be divided among so many.
    """
    rows = state.get("rows")
    parts, odd = divmod(rows, config.train_batch_size) if type(rows) is int else (0, 0)
    if odd or parts < 1 or dict(state) != batch_state(config, int(rows or 0)):
        return config
    if parts == processes * (config.gradient_accumulation_steps or 1):
        return config
    kinds = rows_of(config, parts)
    if found := next(divisions(config, kinds, processes), None):
        return found
    nearest = (range(processes, 0, -1), range(processes, sum(kinds.values()) + 1))
    firsts = (next((n for n in each if any(divisions(config, kinds, n))), None) for each in nearest)
    counts = [n for n in firsts if n]
    raise ValueError(
        f"the batch of {rows} rows that the run began with cannot be divided among {processes}"
        f" processes: start {' or '.join(map(str, counts))}, or set --train-batch-size and"
        " --gradient-accumulation-steps of another batch"
    )
