"""What `odelt-fast sample` draws besides images from a seed: states on the way, images to noise and
back, images between two seeds, the rest of an image of which a part is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import show_size
from odelt_fast.images import open_source
from odelt_fast.images.pixels import decode_failure, decode_image, inspect_image
from odelt_fast.sampling.flow_map import interpolate, invert, trajectory
from odelt_fast.sampling.inpaint import check_known, inpaint
from odelt_fast.sampling.labels import labels_of_classes
from odelt_fast.sampling.noise import drawn_labels
from odelt_fast.sampling.sampler import Sampler

from .options import check_guidance
from .sample_options import Command

Labels = np.ndarray | None
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Drawing:
    """images (N, C, H, W): what --npz calls arr_0. tiles (M, C, H, W): what the picture shows,
    `columns` a row (None: about square). arrays: what --npz holds besides. remark: a line for the
    user."""

    images: Tensor
    labels: Labels
    tiles: Tensor
    columns: int | None = None
    arrays: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Plan:
    """A drawing that has been checked and not begun: its number of tiles, columns, steps that the
    progress bar counts, and how to draw."""

    tiles: int
    columns: int | None
    steps: int
    draw: Callable[[Progress], Drawing]


def plan(options: Command, sampler: Sampler, labels: Labels) -> Plan:
    """What the options ask for; opens the images of --invert, and --init-image with its --mask."""
    count, steps = options.num_images, sampler.operation.steps or 0
    if options.trajectory:
        columns = len(options.trajectory)
        states = partial(_trajectory, options, sampler, labels)
        return Plan(count * columns, columns, count * steps, states)
    if options.interpolate is not None:
        frames = options.frames
        return Plan(frames, frames, frames * steps, partial(_interpolate, options, sampler, labels))
    if options.invert is not None:
        images, own, _ = data_images(options.invert, sampler, count, options)
        check_guidance(options.guidance_scale, labels is None and own is None)
        there_and_back = partial(
            _invert, sampler, images, own if labels is None else labels[: len(images)]
        )
        return Plan(3 * len(images), 3, 2 * len(images) * steps, there_and_back)
    if options.init_image is not None:
        known = partial(_inpaint, options, sampler, labels, *_known(options, sampler))
        return Plan(count, None, count * steps, known)
    return Plan(count, None, count * steps, partial(_draw, options, sampler, labels))


def _known(options: Command, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Image (C, H, W) in [-1, 1] and mask (H, W) of --init-image and --mask."""
    config = sampler.model.config
    if config.channels not in (1, 3):
        raise ValueError(
            f"--init-image: the model makes latents of {config.channels} channels, and there is no"
            " encoder here that makes them of an image: sampling.inpaint takes latents"
        )
    parts, size = [], show_size(config.image_size)
    for name, channels in (("init_image", config.channels), ("mask", 1)):
        path = getattr(options, name)
        option = f"--{name.replace('_', '-')} {path}"
        try:
            width, height, _ = inspect_image(str(path))
            pixels = decode_image(str(path), config.image_size, channels)
        except Exception as error:  # Pillow's readers raise most kinds
            raise ValueError(f"{option} cannot be read: {decode_failure(error)}") from None
        if f"{width}x{height}" != size:
            raise ValueError(
                f"{option} has {width}x{height} pixels, the model makes {size}: bring it to that"
                " size"
            )
        parts.append(torch.tensor(pixels))
    try:
        return check_known(sampler, parts[0] / 127.5 - 1, parts[1][0] >= 128)
    except ValueError as error:
        raise ValueError(f"--init-image, --mask: {error}") from None


def data_images(
    data: Path, sampler: Sampler, count: int, options: Any
) -> tuple[Tensor, Labels, float | None]:
    """The first `count` images (N, C, H, W) of an image file or of what `open_source` opens (of a
    table, the columns of the options), at the model's size; their labels where their classes can be
    those of the model (None: the null label is to be used); the distance between levels
    (`quantisation_step`)."""
    from odelt_fast.sampling.likelihood import quantisation_step  # loads scipy

    config = sampler.model.config
    size, channels = config.image_size, config.channels
    columns = {name: getattr(options, name) for name in ("image_column", "label_column")}
    one = data.is_file() and data.suffix.lower() not in (".parquet", ".tar")
    if one and channels in (1, 3) and not any(columns.values()):
        try:
            pixels = decode_image(str(data), size, channels)
        except Exception as error:  # Pillow's readers raise most kinds
            raise ValueError(f"{data} cannot be read: {decode_failure(error)}") from None
        return torch.from_numpy(pixels[None] / 127.5 - 1).float(), None, 1 / 127.5
    if channels in (1, 3):
        source = open_source(data, image_size=size, channels=channels, **columns)
    else:
        source = open_source(data, **columns)
    if source.channels != channels or source.image_size != size:
        has, wants = ("x".join(map(str, s.image_shape)) for s in (source, config))
        raise ValueError(f"{data} has {has} numbers an image, the model wants {wants}")
    trained_on = sampler.model.trained_on
    there, known = source.latents, trained_on.latents
    if there is not None and known is not None and not known.fits(there):
        raise ValueError(
            f"{data} has latents of {there}, the model was trained on those of {known}"
        )
    images, labels = source.read_many(range(min(count, len(source))))
    fitting = None
    if config.num_classes > 1 and source.num_classes > 1:
        with contextlib.suppress(ValueError):  # of other classes: without labels
            of_classes = labels_of_classes(trained_on, source.class_names, config.num_classes)
            fitting = np.array(of_classes, np.int64)[labels]
    return torch.from_numpy(images), fitting, quantisation_step(source)


def channels_last(images: Tensor) -> np.ndarray:
    """(..., C, H, W) as an array (..., H, W, C)."""
    return images.movedim(-3, -1).cpu().numpy()


def _draw(options: Command, sampler: Sampler, labels: Labels, progress: Progress) -> Drawing:
    images = sampler(options.num_images, labels, options.seed, progress=progress)
    return Drawing(images, labels, images)


def _inpaint(
    options: Command,
    sampler: Sampler,
    labels: Labels,
    image: Tensor,
    mask: Tensor,
    progress: Progress,
) -> Drawing:
    images = inpaint(
        sampler, image, mask, options.num_images, labels, options.seed, progress=progress
    )
    return Drawing(images, labels, images)


def _interpolate(options: Command, sampler: Sampler, labels: Labels, progress: Progress) -> Drawing:
    assert options.interpolate is not None
    (seed_a, seed_b), frames = options.interpolate, options.frames
    if labels is None:
        labels = drawn_labels(seed_a, [0], sampler.model.config.num_classes)
    label = int(labels[0])
    images = interpolate(sampler, seed_a, seed_b, frames, label, progress=progress)
    return Drawing(images, np.full(frames, label), images, frames)


def _trajectory(options: Command, sampler: Sampler, labels: Labels, progress: Progress) -> Drawing:
    times = options.trajectory
    solution = trajectory(
        sampler, times, options.num_images, labels, options.seed, progress=progress
    )
    assert solution.trajectory is not None
    states = solution.trajectory.transpose(0, 1)  # (N, S, C, H, W): an image's states side by side
    arrays = {"trajectory": channels_last(states), "times": np.array(times)}
    images, tiles = (_decoded(sampler, x) for x in (solution.x, states.flatten(0, 1)))
    return Drawing(images, labels, tiles, len(times), arrays)


def _invert(sampler: Sampler, images: Tensor, labels: Labels, progress: Progress) -> Drawing:
    inverted = invert(sampler, images, labels, progress=progress)
    noise, error = inverted.noise, inverted.error
    rows = torch.stack([images.to(noise), noise, inverted.images], 1)
    arrays = {"noise": channels_last(noise), "error": error.cpu().numpy()}
    remark = (
        f"originals, their noise, and what it becomes: error {error.mean():.2g} (root mean"
        f" square; at most {error.max():.2g})"
    )
    if labels is None:
        labels = np.full(len(images), sampler.model.config.num_classes)
    back, tiles = (_decoded(sampler, x) for x in (inverted.images, rows.flatten(0, 1)))
    return Drawing(back, labels, tiles, 3, arrays, remark)


def _decoded(sampler: Sampler, states: Tensor) -> Tensor:
    return sampler.decoder(states) if sampler.decoder else states
