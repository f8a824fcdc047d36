"""Every random number of training, from (seed, step, row of the global batch): the number of
processes and a resume change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.sampling.noise import philox

# One Philox key per purpose. The order is part of a run's reproducibility: append, never reorder.
STREAMS = (
    "order",
    "flip",
    "noise",
    "time",
    "step_index",
    "label_drop",
    "depth",
    "teacher_depth",
    "noise2",
    "posterior",
    "pair_noise",
    "pair_label",
    "pair_drop",
    "time2",
    "pair_kind",
    "guidance",
)


# A number that a step asks for: "normal", "uniform", "integers" or "bernoulli"; its name; first and
# last row of the local batch; the shape, the bound or the probability.
Request = tuple[str, str, int, int, Any]


def generator(seed: int, stream: str, *counter: int) -> np.random.Generator:
    """Generator of one purpose; up to two counter words (step, row) select independent ones."""
    return philox(seed, STREAMS.index(stream), *counter)


def normal(seed: int, stream: str, step: int, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(len(rows), *shape) float32: row r as `generator(seed, stream, step, r)` draws it.

    One generator is set from row to row, a hundredth of the time that the numbers take.
    """
    source = generator(seed, stream, step)
    bits, out = source.bit_generator, np.empty((len(rows), *shape), np.float32)
    state: Any = bits.state
    for row, values in zip(rows, out):
        state["state"]["counter"][3] = row
        bits.state = state
        source.standard_normal(out=values, dtype=np.float32)
    return out


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step for local rows, float32, int64 or bool tensors on the CPU, not to be
    written to.

    `rows` of its methods is a slice of the local batch; the same name and row always give the same
    number.

    Attributes:
        global_rows: the local rows' places in the global batch.
        kinds: rows of each kind in the global batch, in their order; then "depth" and
            "teacher_depth" are not drawn but stratified.
        made: what was made ahead; the rest is made when it is asked for.
        asked: what was asked for so far.
    """

    seed: int
    step: int
    global_rows: np.ndarray
    kinds: Sequence[int] | None = None
    made: Mapping[Request, Tensor] = field(default_factory=dict)
    asked: set[Request] = field(default_factory=set)

    def normal(self, name: str, rows: slice, shape: Sequence[int]) -> Tensor:
        return self._drawn("normal", name, rows, tuple(shape))

    def uniform(self, name: str, rows: slice) -> Tensor:
        return self._drawn("uniform", name, rows, None)

    def integers(self, name: str, rows: slice, high: int) -> Tensor:
        return self._drawn("integers", name, rows, high)

    def bernoulli(self, name: str, rows: slice, probability: float) -> Tensor:
        return self._drawn("bernoulli", name, rows, probability)

    def _drawn(self, kind: str, name: str, rows: slice, argument: Any) -> Tensor:
        request = (kind, name, *rows.indices(len(self.global_rows))[:2], argument)
        self.asked.add(request)
        made = self.made.get(request)
        return self.make(request) if made is None else made

    def make(self, request: Request) -> Tensor:
        """What the method of this name draws."""
        kind, name, start, stop, argument = request
        rows = self.global_rows[start:stop]
        if kind == "normal":
            return torch.from_numpy(normal(self.seed, name, self.step, rows, argument))
        if self.kinds is not None and name in ("depth", "teacher_depth"):
            second = name == "teacher_depth"
            return torch.from_numpy(
                stratified(self.kinds, rows, argument, self.step, second=second)
            )
        count = int(rows.max(initial=-1)) + 1
        drawn = generator(self.seed, name, self.step).random(count)[rows]
        if kind == "integers":
            return torch.from_numpy((drawn * argument).astype(np.int64))
        if kind == "bernoulli":
            return torch.from_numpy(drawn < argument)
        values = drawn.astype(np.float32)  # which may round to 1
        return torch.from_numpy(values.clip(max=np.float32(1 - 2**-24)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor without waiting for the device: to a GPU, from pinned memory."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def stratified(
    kinds: Sequence[int], rows: np.ndarray, high: int, step: int, *, second: bool
) -> np.ndarray:
    """Whole numbers below `high` for rows of the global batch: in every kind of row each number
    equally often, but for at most one row.

    Row i of a kind gets (i + shift) mod high, or, if `second`, (i + i//high + shift) mod high: over
    high^2 rows every pair of both occurs once. The images, noises and times of rows are random
    already, so that nothing else needs to be. shift is constant where the rows of a kind divide
    evenly, and otherwise moves with the step, so that over high^2 steps every number and pair is as
    frequent as any other. Rows have the same numbers in whatever parts the batch is computed.
    """
    sizes = np.asarray(kinds)
    ends = np.cumsum(sizes)
    kind = np.searchsorted(ends, rows, side="right")
    within, size = rows - (ends - sizes)[kind], sizes[kind]
    if second:
        return (within + within // high + np.where(size % high**2, step // high, 0)) % high
    return (within + kind + np.where(size % high, step, 0)) % high


def global_rows(sizes: Sequence[int], part: int, parts: int) -> np.ndarray:
    """Rows of the global batch that part `part` of `parts` equal parts holds, when every part has
    `sizes` rows of each kind."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate(
        [parts * start + part * size + np.arange(size) for start, size in zip(starts, sizes)]
    )


def mixed_seed(seed: int, step: int, part: int) -> int:
    """One 64-bit seed from three numbers (SplitMix64's finaliser over their combination)."""
    z = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part * 0x94D049BB133111EB
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return z ^ (z >> 31)
