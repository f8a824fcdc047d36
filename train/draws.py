"""Every random number of training, from (seed, step, row of the global batch): the number of
processes and a resume change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
)


def generator(seed: int, stream: str, *counter: int) -> np.random.Generator:
    """Generator of one purpose; up to two counter words (step, row) select independent ones."""
    return philox(seed, STREAMS.index(stream), *counter)


@dataclass(frozen=True)
class StepDraws:
    """Draws of one step for local rows, float32 or int64 tensors on the CPU.

    `rows` of its methods is a slice of the local batch; the same name and row always give the same
    number.

    Attributes:
        global_rows: the local rows' places in the global batch.
        kinds: rows of each kind in the global batch, in their order; then "depth" and
            "teacher_depth" are not drawn but stratified.
    """

    seed: int
    step: int
    global_rows: np.ndarray
    kinds: Sequence[int] | None = None

    def normal(self, name: str, rows: slice, shape: Sequence[int]) -> Tensor:
        chosen = self.global_rows[rows]
        out = np.empty((len(chosen), *shape), np.float32)
        for row, values in zip(chosen, out):
            generator(self.seed, name, self.step, int(row)).standard_normal(
                out=values, dtype=np.float32
            )
        return torch.from_numpy(out)

    def uniform(self, name: str, rows: slice) -> Tensor:
        values = self._scalars(name, rows).astype(np.float32)  # which may round to 1
        return torch.from_numpy(values.clip(max=np.float32(1 - 2**-24)))

    def integers(self, name: str, rows: slice, high: int) -> Tensor:
        if self.kinds is not None and name in ("depth", "teacher_depth"):
            chosen, second = self.global_rows[rows], name == "teacher_depth"
            values = stratified(self.kinds, chosen, high, self.step, second=second)
        else:
            values = (self._scalars(name, rows) * high).astype(np.int64)
        return torch.from_numpy(values)

    def bernoulli(self, name: str, rows: slice, probability: float) -> Tensor:
        return torch.from_numpy(self._scalars(name, rows) < probability)

    def _scalars(self, name: str, rows: slice) -> np.ndarray:
        chosen = self.global_rows[rows]
        return generator(self.seed, name, self.step).random(int(chosen.max(initial=-1)) + 1)[chosen]


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
