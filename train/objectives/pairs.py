"""Pairs of noise and data for two-stage Reflow: a teacher makes them once, in all processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from odelt_fast.checks import check_size
from odelt_fast.config import NUM_STEP_INDICES, TrainedOn
from odelt_fast.files import flush, one_line, read_object, write_json
from odelt_fast.generation.processes import Processes
from odelt_fast.generation.shards import Shards
from odelt_fast.generation.streams import ahead
from odelt_fast.images.sources import Batch, Flips, ImageSource, Indices, Noise
from odelt_fast.model import DiT
from odelt_fast.storage.places import Place
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.draws import StepDraws

from .targets import euler, guided

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState

MANIFEST = "pairs.json"
_BOUND = "generation.json"  # while batches are made
# dtype, number of axes besides the pairs'
_ARRAYS = {"noise": ("<f4", 3), "data": ("<f4", 3), "labels": ("<i8", 0)}


def generate_pairs(teacher: DiT, config: TrainConfig, state: AcceleratorState) -> Path:
    """First stage of Reflow: `num_pairs` pairs, by Euler's method at full depth, in `pairs`.

    Pair i depends on (seed, i) alone: Gaussian noise, a class drawn uniformly (the null label with
    probability label_dropout, and always for a model of one class), guidance as in sampling.
    Processes make every `num_processes`-th batch each and must see the same folder. It appears
    under its name when it is complete: noise.npy and data.npy (count, C, H, W) float32, labels.npy
    (count,) int64, pairs.json. Until then the batches lie in a folder beside it (`.partial`), from
    which a killed run with the same options goes on.

    Returns:
        The folder.

    Raises:
        ValueError: it exists or cannot be written, or the data are not finite.
    """
    from tqdm import tqdm

    assert config.pairs is not None
    folder, count, size = config.pairs, config.num_pairs, config.train_batch_size
    partial = folder.with_name(folder.name + ".partial")
    waiting = state.wait_for_everyone
    processes = Processes(state.process_index, state.num_processes, teacher.device, waiting)
    if folder.exists():
        raise ValueError(f"{folder} exists: pairs are written to a new folder")
    processes.barrier()  # nobody looks for the folder any more
    manifest = _manifest(teacher, config)
    bound = manifest | {"batch": size, "teacher_sha256": _digest(teacher)}
    try:
        if processes.first and not _goes_on(partial, bound):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / _BOUND, bound)
        processes.barrier()
        batches = Shards(Place(partial / "batches"), count, size)
        todo = batches.missing(processes.index, processes.count)
        hidden = None if processes.first else True

        def draw(batch: int) -> dict[str, torch.Tensor]:
            return _drawn(teacher, config, np.array(batches.images(batch)))

        bar = tqdm(ahead(todo, draw), "pairs", len(todo), unit="batch", disable=hidden)
        for batch, drawn in bar:
            batches.write(batch, **_pairs(teacher, config, **drawn))
        processes.barrier()
        if processes.first:
            for name in _ARRAYS:
                batches.write_npy(partial / f"{name}.npy", name)
            write_json(partial / MANIFEST, manifest)
            batches.delete()
            (partial / _BOUND).unlink()
            for name in (MANIFEST, *(f"{name}.npy" for name in _ARRAYS)):
                flush(partial / name)
            flush(partial)
            os.replace(partial, folder)
            flush(folder.parent)
        processes.barrier()
    except OSError as error:
        raise ValueError(f"cannot write pairs to {folder}: {one_line(error)}") from None
    return folder


def _manifest(teacher: DiT, config: TrainConfig) -> dict[str, Any]:
    """What is kept of how pairs were made."""
    return {
        "count": config.num_pairs,
        "shape": teacher.config.image_shape,
        "num_classes": teacher.config.num_classes,
        "steps": config.denoise_timesteps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
    } | teacher.trained_on.to_dict()


def _digest(teacher: DiT) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _goes_on(partial: Path, bound: Mapping[str, Any]) -> bool:
    """Whether a folder holds the batches of a run that was to make the same pairs."""
    try:
        return read_object(partial / _BOUND, 8 << 20) == json.loads(json.dumps(bound))
    except (OSError, ValueError):
        return False


def _drawn(teacher: DiT, config: TrainConfig, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Noise and labels of the pairs `rows`."""
    draws, every = StepDraws(config.seed, 0, rows), slice(0, len(rows))
    null = teacher.config.num_classes
    drop = draws.bernoulli("pair_drop", every, 1.0 if null == 1 else config.label_dropout)
    y = torch.where(drop, null, draws.integers("pair_label", every, null))
    return {"noise": draws.normal("pair_noise", every, teacher.config.image_shape), "labels": y}


@torch.no_grad()
def _pairs(
    teacher: DiT, config: TrainConfig, noise: torch.Tensor, labels: torch.Tensor
) -> dict[str, np.ndarray]:
    """Pairs of drawn noise and labels, by the names of the arrays."""
    null = teacher.config.num_classes
    # Only shortcuts are given the number of steps; flow rows of the other methods were trained with
    # the index of 128 steps.
    shortcut = teacher.config.sampling == "shortcut"
    index = torch.full_like(labels, config.log2_steps if shortcut else NUM_STEP_INDICES - 1)
    x, index, y = (tensor.to(teacher.device) for tensor in (noise, index, labels))
    model = guided(teacher, config.guidance_scale, null, channels=teacher.config.guided_channels)
    data = euler(model, x, index, y, None, config.denoise_timesteps)
    if not data.isfinite().all():
        raise ValueError("the teacher made values that are not finite")
    return {"noise": noise.numpy(), "data": data.float().cpu().numpy(), "labels": labels.numpy()}


class PairSource(ImageSource):
    """The pairs of a folder that `generate_pairs` wrote, memory-mapped; an image is noise and data,
    stacked: (2C, H, W).

    Raises ValueError, in one line, for a folder that is none or is damaged.
    """

    flippable = False

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        try:
            manifest = read_object(folder / MANIFEST, 8 << 20)
            shape, num_classes = tuple(manifest["shape"]), int(manifest["num_classes"])
            teacher = TrainedOn.taken_from(manifest, num_classes)
            shapes = [(int(manifest["count"]), *shape[:axes]) for _, axes in _ARRAYS.values()]
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no pairs: {error.filename} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no readable pairs: {one_line(error)}") from None
        self._noise, self._data, labels = arrays
        kinds = {self._noise.dtype, self._data.dtype}
        if [array.shape for array in arrays] != shapes or kinds != {np.dtype("f4")}:
            raise ValueError(
                f"{folder} holds no readable pairs: its arrays are not {shapes[0][0]} of shape"
                f" {one_line(shape)}"
            )
        self.labels = np.array(labels, np.int64)
        if not len(labels) or self.labels.min() < 0 or self.labels.max() > num_classes:
            raise ValueError(f"{folder} holds no readable pairs: labels must be 0..{num_classes}")
        self.channels, self.image_size = shape[0], check_size("sides", shape[1:], 4096)
        self.class_names = teacher.class_names or tuple(map(str, range(num_classes)))
        self.latents = teacher.latents

    def __reduce__(self) -> tuple[Any, ...]:
        return PairSource, (self._folder,)  # not what the arrays hold

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noise = None) -> Batch:
        rows = np.asarray(indices)
        return np.concatenate([self._noise[rows], self._data[rows]], axis=1), self.labels[rows]
