"""What every objective takes and gives, and the few computations that several share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from odelt_fast.train.draws import Draws, to_device

Model = Callable[..., Tensor]  # (x, t, log2_steps, y, depth=None) -> velocity, as DiT


@dataclass(frozen=True)
class Networks:
    """The networks of a step: live (being trained), its EMA, and a frozen teacher where the method
    has one."""

    live: Model
    ema: Model
    teacher: Model | None = None
    depths: list[int] | None = (
        # of the student, per row, where teachers run at the student's depth (Algorithm 1); None:
        # full depth
        None
    )

    def depth(self, rows: slice) -> list[int] | None:
        """Depth at which a teacher runs for these rows of the batch; None is all blocks."""
        return None if self.depths is None else self.depths[rows]


@dataclass(frozen=True)
class Targets:
    """A batch to regress on: v(x_t, t, log2_steps, y, depth) should be `velocity`. Rows stand in
    the order of TrainConfig.row_sizes."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    log2_steps: Tensor  # (B,) int64
    y: Tensor  # (B,) int64, the null label where dropped
    velocity: (
        Tensor  # (B, C, H, W), what the network is to say (the noise, for the diffusion baseline)
    )
    depth: list[int] | None = (
        # per row, on the host, where the schedule of shrinking prefixes is made; None: all blocks
        None
    )


class Objective(Protocol):
    """A training method: images (B, C, H, W) in [-1, 1], labels (B,) and draws in, targets out.
    Never builds a graph."""

    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets: ...


@dataclass(frozen=True)
class WithoutLabels:
    """Wraps any objective for data without classes: every row has the null label, which is what
    such models are sampled with."""

    objective: Objective
    null_label: int

    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        return self.objective(
            networks, images, torch.full_like(labels, self.null_label), draws, step
        )


def grid_times(uniform: Tensor, sections: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> the times 0, 1/sections, .. 1 - 1/sections, equally likely.
    sections: a power of 2, or (B,) of them."""
    return torch.floor(uniform * sections) / sections


def dropped_labels(
    labels: Tensor, draws: Draws, rows: slice, probability: float, null_label: int
) -> Tensor:
    """The labels (B,) with the null label in those of the rows `rows` for which the draw
    "label_drop" says so."""
    drop = to_device(draws.bernoulli("label_drop", rows, probability), labels.device)
    return torch.cat(
        [labels[: rows.start], torch.where(drop, null_label, labels[rows]), labels[rows.stop :]]
    )


def guided_velocity(
    model: Model,
    x: Tensor,
    t: Tensor,
    log2_steps: Tensor,
    y: Tensor,
    depth: list[int] | None,
    *,
    scale: float | None,
    null_label: int,
    rows: Tensor | None = None,
) -> Tensor:
    """v_null + scale (v_label - v_null) at (x, t), in one call of the model. scale None or 1:
    labels only; 0: null label only.

    x (n, C, H, W); t, log2_steps, y (n,); depth: n numbers or None. rows: indices, on the host, of
    the rows to guide (None: all); the others get v_label. A row that has the null label gets v_null
    whatever the scale.
    """
    chosen = torch.arange(len(x)) if rows is None else rows
    if scale is None or scale == 1 or not len(chosen):
        return model(x, t, log2_steps, y, depth=depth)
    picked = to_device(chosen, x.device)
    null = torch.full_like(y[picked], null_label)
    if scale == 0:
        return model(x, t, log2_steps, y.index_copy(0, picked, null), depth=depth)
    depths = None if depth is None else depth + [depth[row] for row in chosen.tolist()]
    inputs = [torch.cat([value, value[picked]]) for value in (x, t, log2_steps)]
    both = model(*inputs, torch.cat([y, null]), depth=depths)
    with_label, without = both[: len(x)], both[len(x) :]
    return with_label.index_copy(0, picked, torch.lerp(without, with_label[picked], scale))


@contextlib.contextmanager
def without_dropout(model: Model) -> Iterator[Model]:
    """The model as a teacher: a network in training mode is in evaluation mode inside."""
    if not isinstance(model, nn.Module) or not model.training:
        yield model
        return
    model.eval()
    try:
        yield model
    finally:
        model.train()
