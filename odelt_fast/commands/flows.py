"""What `odelt-fast sample` draws besides images from a seed: states on the way, images to noise and
back, images between two seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odelt_fast.checks import check_seed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from odelt_fast.commands.sample_options import Command
    from odelt_fast.sampling.sampler import Sampler


@dataclass(frozen=True)
class Drawing:
    """images (N, C, H, W): what --npz calls arr_0. tiles (M, C, H, W): what the picture shows,
    `columns` a row (None: about square). arrays: what --npz holds besides. remark: a line for the
    user."""

    images: Tensor
    labels: np.ndarray | None
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
    draw: Callable[[Callable[[int], None]], Drawing]


def check_options(options: Command) -> None:
    """ValueError for options that exclude each other or are out of range."""
    given = [name for name in ("trajectory", "invert", "interpolate") if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} draw different pictures: leave one out")
    times = list(options.trajectory)
    if any(not 0 <= time <= 1 for time in times) or times != sorted(times):
        raise ValueError(
            "--trajectory must be rising times from 0 (noise) to 1 (data), not"
            f" {' '.join(map(str, times))}"
        )
    for seed in options.interpolate or ():
        check_seed(seed, "--interpolate: a seed")
    if options.frames < 2:
        raise ValueError(
            f"--frames must be at least 2, the two seeds' own images, not {options.frames}"
        )
    if options.interpolate is not None and len(options.labels) > 1:
        raise ValueError(f"--interpolate draws one class, not {len(options.labels)} --labels")


def plan(options: Command, sampler: Sampler, labels: np.ndarray | None) -> Plan:
    """What the options ask for; opens the images of --invert."""
    count, steps = options.num_images, sampler.operation.steps or 0
    if options.trajectory:
        times = options.trajectory
        tiles = count * len(times)
        states = partial(_trajectory, options, sampler, labels)
        return Plan(tiles, len(times), count * steps, states)
    if options.interpolate is not None:
        frames, (seed_a, seed_b) = options.frames, options.interpolate
        label = None if labels is None else int(labels[0])

        def between(update: Callable[[int], None]) -> Drawing:
            import numpy as np

            from odelt_fast.sampling.flow_map import interpolate
            from odelt_fast.sampling.noise import drawn_labels

            drawn = drawn_labels(seed_a, [0], sampler.model.config.num_classes)
            chosen = int(drawn[0]) if label is None else label
            images = interpolate(sampler, seed_a, seed_b, frames, chosen, progress=update)
            return Drawing(images, np.full(frames, chosen), images, frames)

        return Plan(frames, frames, frames * steps, between)
    if options.invert is not None:
        images, own, _ = data_images(options.invert, sampler, count)
        chosen = labels[: len(images)] if labels is not None else own
        tiles = 3 * len(images)
        there_and_back = partial(_invert, sampler, images, chosen)
        return Plan(tiles, 3, 2 * len(images) * steps, there_and_back)

    def draw(update: Callable[[int], None]) -> Drawing:
        images = sampler(num_images=count, labels=labels, seed=options.seed, progress=update)
        return Drawing(images, labels, images)

    return Plan(count, None, count * steps, draw)


def data_images(
    data: Path, sampler: Sampler, count: int
) -> tuple[Tensor, np.ndarray | None, float | None]:
    """The first `count` images (N, C, H, W) of an image file or of what `open_source` opens, at the
    model's size; their labels where their classes can be those of the model (None: the null label
    is to be used); the distance between levels (`quantisation_step`)."""
    import torch

    from odelt_fast.images import open_source
    from odelt_fast.images.pixels import decode_failure, decode_image
    from odelt_fast.sampling.likelihood import quantisation_step

    config = sampler.model.config
    if data.is_file() and data.suffix != ".parquet" and config.channels in (1, 3):
        try:
            pixels = decode_image(str(data), config.image_size, config.channels)
        except Exception as error:  # Pillow's readers raise most kinds
            raise ValueError(f"{data} cannot be read: {decode_failure(error)}") from None
        return torch.from_numpy(pixels[None] / 127.5 - 1).float(), None, 1 / 127.5
    pixelwise: dict[str, Any] = {}
    if config.channels in (1, 3):
        pixelwise = {"image_size": config.image_size, "channels": config.channels}
    source = open_source(str(data), **pixelwise)
    if source.channels != config.channels or source.image_size != config.image_size:
        has, wants = (f"{s.channels}x{s.image_size}x{s.image_size}" for s in (source, config))
        raise ValueError(f"{data} has {has} numbers an image, the model wants {wants}")
    images, labels = source.read_many(range(min(count, len(source))))
    fitting = labels if 1 < config.num_classes == source.num_classes else None
    return torch.from_numpy(images), fitting, quantisation_step(source)


def _trajectory(
    options: Command, sampler: Sampler, labels: np.ndarray | None, update: Callable[[int], None]
) -> Drawing:
    import numpy as np

    from odelt_fast.sampling.flow_map import trajectory

    solution = trajectory(
        sampler, options.trajectory, options.num_images, labels, options.seed, progress=update
    )
    assert solution.trajectory is not None
    states = solution.trajectory.transpose(0, 1)  # (N, S, C, H, W): an image's states side by side
    arrays = {
        "trajectory": states.permute(0, 1, 3, 4, 2).cpu().numpy(),
        "times": np.array(options.trajectory),
    }
    images, tiles = (_decoded(sampler, x) for x in (solution.x, states.flatten(0, 1)))
    return Drawing(images, labels, tiles, states.shape[1], arrays)


def _invert(
    sampler: Sampler, images: Tensor, labels: np.ndarray | None, update: Callable[[int], None]
) -> Drawing:
    import numpy as np
    import torch

    from odelt_fast.sampling.flow_map import invert

    inverted = invert(sampler, images, labels, progress=update)
    noise, error = inverted.noise, inverted.error
    rows = torch.stack([images.to(noise), noise, inverted.images], 1)
    arrays = {"noise": noise.permute(0, 2, 3, 1).cpu().numpy(), "error": error.cpu().numpy()}
    remark = (
        f"originals, their noise, and what it becomes: error {error.mean():.2g} (root mean"
        f" square; at most {error.max():.2g})"
    )
    null = np.full(len(images), sampler.model.config.num_classes)
    back, tiles = (_decoded(sampler, x) for x in (inverted.images, rows.flatten(0, 1)))
    return Drawing(back, null if labels is None else labels, tiles, 3, arrays, remark)


def _decoded(sampler: Sampler, states: Tensor) -> Tensor:
    return sampler.decoder(states) if sampler.decoder else states
