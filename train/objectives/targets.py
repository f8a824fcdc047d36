"""What every objective takes and gives, and the computations that several share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from odelt_fast.train.draws import StepDraws, to_device
from odelt_fast.train.paths import FlowMatchingPath, as_rows

Depths = list[int] | None  # per row, on the host; None: all blocks
Model = Callable[..., Tensor]  # (x, t, log2_steps, y, depth=None) -> velocity, as DiT
SHORTCUT_MODELS_PATH = FlowMatchingPath(1e-5)  # of all methods of shortcut-models


@dataclass(frozen=True)
class Networks:
    """The networks of a step: live (being trained), its EMA, a frozen teacher where there is one.

    depths: of the student, per row, where teachers run at the student's depth (Algorithm 1); None:
    teachers run all blocks. chosen: what makes targets in place of the EMA.
    """

    live: Model
    ema: Model
    teacher: Model | None = None
    depths: Depths = None
    chosen: Model | None = None

    @property
    def target(self) -> Model:
        """The network that makes targets: the EMA unless another was chosen."""
        return self.ema if self.chosen is None else self.chosen

    def depth(self, rows: slice) -> Depths:
        """Depth at which a teacher runs for these rows of the batch; None is all blocks."""
        return None if self.depths is None else self.depths[rows]


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step: images (B, C, H, W) in [-1, 1], labels (B,) int64, and their draws."""

    images: Tensor
    labels: Tensor
    draws: StepDraws
    step: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def rows(self) -> slice:
        """All rows."""
        return slice(0, len(self))

    def to(self, device: torch.device) -> StepBatch:
        """Images and labels there; draws stay on the host until they are asked for."""
        images, labels = to_device(self.images, device), to_device(self.labels, device)
        return replace(self, images=images, labels=labels)

    def uniform(self) -> Tensor:
        """Uniform numbers in [0, 1) for the times, (B,)."""
        return to_device(self.draws.uniform("time", self.rows), self.images.device)

    def noise(self, name: str = "noise") -> Tensor:
        """Standard normal numbers of the images' shape."""
        drawn = self.draws.normal(name, self.rows, self.images.shape[1:])
        return to_device(drawn, self.images.device)

    def full(self, value: int) -> Tensor:
        """`value` in every row, (B,) int64."""
        return torch.full((len(self),), value, device=self.images.device)

    def starting_again(self, first: int) -> StepBatch:
        """The batch whose rows from `first` on show the first images again, as the reference's."""
        images, labels = (
            torch.cat([values[:first], values[: len(self) - first]])
            for values in (self.images, self.labels)
        )
        return replace(self, images=images, labels=labels)


@dataclass(frozen=True)
class Targets:
    """A batch to regress on: v(x_t, t, log2_steps, y, depth) should be `velocity`.

    Rows stand in the order of TrainConfig.row_sizes.
    """

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    log2_steps: Tensor  # (B,) int64, or of any duration float32
    y: Tensor  # (B,) int64, the null label where dropped
    velocity: Tensor  # (B, C, H, W); for the diffusion baseline, the noise
    depth: Depths = None  # on the host, where the schedule of shrinking prefixes is made
    weight: Tensor | None = None  # (B,), of the rows' squared errors; None: 1
    guidance: Tensor | None = None  # (B,), scales that a network is told; None: it is not

    def told(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """What networks are told of these rows beside their other inputs."""
        return {} if self.guidance is None else {"guidance": self.guidance[rows]}


Objective = Callable[[Networks, StepBatch], Targets]  # a training method; builds no graph


@dataclass(frozen=True)
class Method:
    """Options that methods share, and what follows from them.

    Attributes:
        num_classes: of the model; also its null label.
        log2_steps: log2 T, of the finest step size.
        label_dropout: probability that a row's label becomes the null label.
        guidance_scale: w of the velocities that teach; None: labels only.
        guided_channels: guidance acts on the first so many; None: on all.
        compat: repeat the shortcuts of the reference, which each method lists.
    """

    num_classes: int
    log2_steps: int = 7
    label_dropout: float = 0.1
    guidance_scale: float | None = None
    guided_channels: int | None = None
    compat: bool = False

    def dropped(self, batch: StepBatch, kept: int = 0) -> Tensor:
        """The labels (B,), with the null label where a row draws it; compat: the first `kept` rows
        keep theirs."""
        first = kept if self.compat else 0
        if first == len(batch):
            return batch.labels
        rows = slice(first, len(batch))
        drawn = batch.draws.bernoulli("label_drop", rows, self.label_dropout)
        drop = to_device(drawn, batch.labels.device)
        labels = torch.where(drop, self.num_classes, batch.labels[rows])
        return torch.cat([batch.labels[:first], labels])

    def guided(self, model: Model, rows: Tensor | None = None) -> Model:
        """The model with this method's guidance; see `guided`."""
        return guided(model, self.guidance_scale, self.num_classes, rows, self.guided_channels)


@dataclass(frozen=True)
class WithoutLabels:
    """Wraps any objective for data without classes: every row has the null label, which is what
    such models are sampled with."""

    objective: Objective
    null_label: int

    def __call__(self, networks: Networks, batch: StepBatch) -> Targets:
        return self.objective(networks, replace(batch, labels=batch.full(self.null_label)))


def grid_times(uniform: Tensor, sections: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> the times 0, 1/sections, .. 1 - 1/sections, equally likely.

    sections: a power of 2, or (B,) of them.
    """
    return torch.floor(uniform * sections) / sections


def guided(
    model: Model,
    scale: float | None,
    null_label: int,
    rows: Tensor | None = None,
    channels: int | None = None,
) -> Model:
    """A model whose velocities are v_null + scale (v_label - v_null), from one call of `model`.

    Args:
        scale: None or 1: labels only; 0: null label only.
        rows: indices, on the host, of the rows to guide (None: all); the others get v_label. A row
            that has the null label gets v_null whatever the scale.
        channels: the first so many are guided (None: all), as `DiTConfig.guided_channels`.
    """
    if scale is None or scale == 1 or (rows is not None and not len(rows)):
        return model

    def velocities(
        x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, depth: Depths = None
    ) -> Tensor:
        chosen = torch.arange(len(x)) if rows is None else rows
        picked = to_device(chosen, x.device)
        null = torch.full_like(y[picked], null_label)
        if scale == 0:
            return model(x, t, log2_steps, y.index_copy(0, picked, null), depth=depth)
        depths = None if depth is None else depth + [depth[row] for row in chosen.tolist()]
        inputs = [torch.cat([value, value[picked]]) for value in (x, t, log2_steps)]
        both = model(*inputs, torch.cat([y, null]), depth=depths)
        with_label, without = both[: len(x)], both[len(x) :]
        mixed = torch.lerp(without, with_label[picked], scale)
        if channels is not None:
            mixed[:, channels:] = with_label[picked, channels:]
        return with_label.index_copy(0, picked, mixed)

    return velocities


def two_half_steps(
    teacher: Model,
    x: Tensor,
    t: Tensor,
    index: Tensor,
    y: Tensor,
    depth: Depths,
    clip: float | None = None,
) -> Tensor:
    """The velocity of one step from t that ends where two Euler steps of the teacher do.

    Each of the two is d = 2^-index long; the state between them is clipped to +-clip.
    """
    d = 1 / torch.exp2(index.float())
    first = teacher(x, t, index, y, depth=depth)
    middle = x + as_rows(d, x) * first
    if clip is not None:
        middle = middle.clamp(-clip, clip)
    return (first + teacher(middle, t + d, index, y, depth=depth)) / 2


def euler(teacher: Model, x: Tensor, index: Tensor, y: Tensor, depth: Depths, steps: int) -> Tensor:
    """The teacher's data from noise x, by Euler's method in `steps` steps."""
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x + teacher(x, t, index, y, depth=depth) / steps
    return x


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
