"""Two-stage Reflow: a teacher turns noise into data once, and the student learns the straight lines
between them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import NUM_STEP_INDICES
from odelt_fast.files import flush, one_line
from odelt_fast.images import ImageSource
from odelt_fast.model import DiT
from odelt_fast.train.draws import Draws, StepDraws, to_device
from odelt_fast.train.objectives.targets import Networks, Targets, grid_times, guided_velocity

MANIFEST = "pairs.json"
_ARRAYS = {
    "noise": ("<f4", 3),
    "data": ("<f4", 3),
    "labels": ("<i8", 0),
}  # dtype, number of axes besides the pairs'


@dataclass(frozen=True)
class Reflow:
    """Second stage (Liu et al. 2023): images (B, 2C, H, W) hold noise x0 and the data x1 that a
    teacher made of it (`PairSource`).

    x_t = (1-t) x0 + t x1, target x1 - x0, step index log2 T; t = floor(T u)/T ("discrete") or u
    ("continuous"). Labels are those that the pair was made with, the null label where that was it:
    none are dropped.
    """

    log2_steps: int = 7
    times: str = "discrete"

    @torch.no_grad()
    def __call__(
        self, networks: Networks, images: Tensor, labels: Tensor, draws: Draws, step: int
    ) -> Targets:
        batch, device = len(images), images.device
        noise, data = images.chunk(2, dim=1)
        t = to_device(draws.uniform("time", slice(0, batch)), device)
        if self.times == "discrete":
            t = grid_times(t, 2**self.log2_steps)
        index = torch.full((batch,), self.log2_steps, device=device)
        return Targets(
            torch.lerp(noise, data, t[:, None, None, None]), t, index, labels, data - noise
        )


@torch.no_grad()
def generate_pairs(
    teacher: DiT,
    folder: Path,
    count: int,
    *,
    log2_steps: int = 7,
    guidance_scale: float | None = None,
    label_dropout: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    process: int = 0,
    processes: int = 1,
    wait_for_everyone: Callable[[], object] = lambda: None,
) -> Path:
    """First stage: `count` pairs by Euler's method in 2^log2_steps steps of the teacher at full
    depth; returns the folder.

    Pair i depends on (seed, i) alone: Gaussian noise, a class drawn uniformly (the null label with
    probability label_dropout, and always for a model of one class), guidance as in sampling.
    Processes make every `processes`-th batch each and must see the same folder. It appears under
    its name when it is complete: noise.npy and data.npy (count, C, H, W) float32, labels.npy
    (count,) int64, pairs.json. Raises ValueError if it exists or cannot be written.
    """
    from tqdm import tqdm

    config, main = teacher.config, process == 0
    shape = (config.channels, config.image_size, config.image_size)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists():
        raise ValueError(f"{folder} exists: pairs are written to a new folder")
    wait_for_everyone()  # nobody looks for the folder any more
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, (kind, of) in _ARRAYS.items():
                header = {"descr": kind, "fortran_order": False, "shape": (count, *shape[:of])}
                with (partial / f"{name}.npy").open("wb") as new:
                    np.lib.format.write_array_header_1_0(new, header)
        wait_for_everyone()
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context((partial / f"{name}.npy").open("r+b")) for name in _ARRAYS
            }
            headers = {}
            for name, file in files.items():
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                headers[name] = file.tell()
            starts = range(process * batch_size, count, processes * batch_size)
            for start in tqdm(starts, desc="pairs", unit="batch", disable=None if main else True):
                rows = np.arange(start, min(start + batch_size, count))
                noise, y = _draw(
                    StepDraws(seed, 0, rows), len(rows), config.num_classes, shape, label_dropout
                )
                data = _integrate(
                    teacher,
                    noise.to(teacher.device),
                    y.to(teacher.device),
                    log2_steps,
                    guidance_scale,
                )
                if not data.isfinite().all():
                    raise ValueError("the teacher made values that are not finite")
                # Written, not mapped: a full disk is then an error and no signal.
                for name, values in {
                    "noise": noise.numpy(),
                    "data": data.float().cpu().numpy(),
                    "labels": y.numpy(),
                }.items():
                    files[name].seek(headers[name] + start * values[0].nbytes)
                    files[name].write(values.tobytes())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        wait_for_everyone()
        if main:
            manifest = {
                "count": count,
                "shape": shape,
                "num_classes": config.num_classes,
                "steps": 2**log2_steps,
            }
            (partial / MANIFEST).write_text(
                json.dumps(manifest | {"guidance_scale": guidance_scale, "seed": seed})
            )
            for path in (partial / MANIFEST, partial):
                flush(path)
            os.replace(partial, folder)
            flush(folder.parent)
        wait_for_everyone()
    except OSError as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"cannot write pairs to {folder}: {one_line(error)}") from None
    return folder


def _draw(
    draws: StepDraws, count: int, num_classes: int, shape: tuple[int, ...], label_dropout: float
) -> tuple[Tensor, Tensor]:
    every = slice(0, count)
    drop = draws.bernoulli("pair_drop", every, 1.0 if num_classes == 1 else label_dropout)
    y = torch.where(drop, num_classes, draws.integers("pair_label", every, num_classes))
    return draws.normal("pair_noise", every, shape), y


def _integrate(
    teacher: DiT, x: Tensor, y: Tensor, log2_steps: int, guidance_scale: float | None
) -> Tensor:
    steps = 2**log2_steps
    # Only shortcuts are told the number of steps; flow rows of the other methods were trained with
    # the index of 128 steps.
    index = torch.full(
        (len(x),),
        log2_steps if teacher.config.sampling == "shortcut" else NUM_STEP_INDICES - 1,
        device=x.device,
    )
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = (
            x
            + guided_velocity(
                teacher,
                x,
                t,
                index,
                y,
                None,
                scale=guidance_scale,
                null_label=teacher.config.num_classes,
            )
            / steps
        )
    return x


class PairSource(ImageSource):
    """The pairs of a folder that `generate_pairs` wrote, memory-mapped; an image is noise and data,
    stacked: (2C, H, W).

    Raises ValueError, in one line, for a folder that is none or is damaged.
    """

    flippable = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            count, shape, num_classes = (
                int(manifest["count"]),
                tuple(manifest["shape"]),
                int(manifest["num_classes"]),
            )
            arrays = [
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("noise", "data", "labels")
            ]
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no pairs: {error.filename} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds no readable pairs: {one_line(error)}") from None
        if any(
            array.shape != (count, *shape) or array.dtype != np.float32 for array in arrays[:2]
        ) or arrays[2].shape != (count,):
            raise ValueError(
                f"{folder} holds no readable pairs: its arrays are not {count} of shape"
                f" {one_line(shape)}"
            )
        self._noise, self._data = arrays[:2]
        self.labels = np.array(arrays[2], np.int64)
        if not count or self.labels.min() < 0 or self.labels.max() > num_classes:
            raise ValueError(f"{folder} holds no readable pairs: labels must be 0..{num_classes}")
        self.channels, self.image_size = shape[:2]
        self.class_names = tuple(str(label) for label in range(num_classes))

    def read_many(
        self,
        indices: Sequence[int] | np.ndarray,
        flips: Sequence[bool] | np.ndarray | None = None,
        noise: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(indices)
        return np.concatenate([self._noise[rows], self._data[rows]], axis=1), self.labels[rows]
