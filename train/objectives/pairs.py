"""Pairs of noise and data for two-stage Reflow: a teacher makes them once, in all processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from odelt_fast.checks import check_size
from odelt_fast.config import NUM_STEP_INDICES, TrainedOn
from odelt_fast.files import flush, one_line, read_object
from odelt_fast.images.sources import Batch, Flips, ImageSource, Indices, Noises
from odelt_fast.model import DiT
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.draws import StepDraws

from .targets import euler, guided

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState

MANIFEST = "pairs.json"
# dtype, number of axes besides the pairs'
_ARRAYS = {"noise": ("<f4", 3), "data": ("<f4", 3), "labels": ("<i8", 0)}


def generate_pairs(teacher: DiT, config: TrainConfig, state: AcceleratorState) -> Path:
    """First stage of Reflow: `num_pairs` pairs, by Euler's method at full depth, in `pairs`.

    Pair i depends on (seed, i) alone: Gaussian noise, a class drawn uniformly (the null label with
    probability label_dropout, and always for a model of one class), guidance as in sampling.
    Processes make every `num_processes`-th batch each and must see the same folder. It appears
    under its name when it is complete: noise.npy and data.npy (count, C, H, W) float32, labels.npy
    (count,) int64, pairs.json.

    Returns:
        The folder.

    Raises:
        ValueError: it exists or cannot be written, or the data are not finite.
    """
    from tqdm import tqdm

    assert config.pairs is not None
    folder, count, size = config.pairs, config.num_pairs, config.train_batch_size
    main, partial = state.process_index == 0, folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ValueError(f"{folder} exists: pairs are written to a new folder")
    state.wait_for_everyone()  # nobody looks for the folder any more
    try:
        if main:
            _create_arrays(partial, count, teacher.config.image_shape)
        state.wait_for_everyone()
        with contextlib.ExitStack() as stack:
            files, headers = {}, {}
            for name in _ARRAYS:
                files[name] = file = stack.enter_context((partial / f"{name}.npy").open("r+b"))
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                headers[name] = file.tell()
            starts = range(state.process_index * size, count, state.num_processes * size)
            for start in tqdm(starts, desc="pairs", unit="batch", disable=None if main else True):
                rows = np.arange(start, min(start + size, count))
                # Written, not mapped: a full disk is then an error and no signal. Flushed at once:
                # a buffer writes back what lies between two of its writes, others' pairs.
                for name, values in _pairs(teacher, config, rows).items():
                    files[name].seek(headers[name] + start * values[0].nbytes)
                    files[name].write(values.tobytes())
                    files[name].flush()
            for file in files.values():
                os.fsync(file.fileno())
        state.wait_for_everyone()
        if main:
            manifest = {
                "count": count,
                "shape": teacher.config.image_shape,
                "num_classes": teacher.config.num_classes,
                "steps": config.denoise_timesteps,
                "guidance_scale": config.guidance_scale,
                "seed": config.seed,
            } | teacher.trained_on.to_dict()
            (partial / MANIFEST).write_text(json.dumps(manifest))
            flush(partial / MANIFEST)
            flush(partial)
            os.replace(partial, folder)
            flush(folder.parent)
        state.wait_for_everyone()
    except OSError as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"cannot write pairs to {folder}: {one_line(error)}") from None
    return folder


def _create_arrays(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, (dtype, axes) in _ARRAYS.items():
        header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape[:axes])}
        with (folder / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)


@torch.no_grad()
def _pairs(teacher: DiT, config: TrainConfig, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The pairs `rows`, by the names of the arrays."""
    draws, every = StepDraws(config.seed, 0, rows), slice(0, len(rows))
    null = teacher.config.num_classes
    drop = draws.bernoulli("pair_drop", every, 1.0 if null == 1 else config.label_dropout)
    y = torch.where(drop, null, draws.integers("pair_label", every, null))
    noise = draws.normal("pair_noise", every, teacher.config.image_shape)
    # Only shortcuts are given the number of steps; flow rows of the other methods were trained with
    # the index of 128 steps.
    shortcut = teacher.config.sampling == "shortcut"
    index = torch.full_like(y, config.log2_steps if shortcut else NUM_STEP_INDICES - 1)
    x, index, labels = (tensor.to(teacher.device) for tensor in (noise, index, y))
    model = guided(teacher, config.guidance_scale, null, channels=teacher.config.guided_channels)
    data = euler(model, x, index, labels, None, config.denoise_timesteps)
    if not data.isfinite().all():
        raise ValueError("the teacher made values that are not finite")
    return {"noise": noise.numpy(), "data": data.float().cpu().numpy(), "labels": y.numpy()}


class PairSource(ImageSource):
    """The pairs of a folder that `generate_pairs` wrote, memory-mapped; an image is noise and data,
    stacked: (2C, H, W).

    Raises ValueError, in one line, for a folder that is none or is damaged.
    """

    flippable = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
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

    def read_many(self, indices: Indices, flips: Flips = None, noise: Noises = None) -> Batch:
        rows = np.asarray(indices)
        return np.concatenate([self._noise[rows], self._data[rows]], axis=1), self.labels[rows]
