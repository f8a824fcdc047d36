"""Latents of other projects: the layouts of fast-DiT and REPA, one .npy file a sample."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from odelt_fast.config import Latents
from odelt_fast.files import one_line

from .latents import SCALE, LatentSource, Moments
from .listing import entries_of, files_below
from .sources import warn_left_out
from .tables import check_labels, numbered_classes

Header = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a .npy file


class FileLatents(LatentSource):
    """One .npy file a sample.

    Args:
        paths, labels: of the samples, below `folder`.
        posterior: the files hold mean and std (2C, S, S); else scaled latents ((1,) C, S, S). Both
            are of a Stable Diffusion VAE.
        left_out: what is no sample, by kind.
    """

    flippable = False

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        posterior: bool,
        left_out: Counter[str],
    ) -> None:
        seen: dict[bytes, Header] = {}
        good: list[int] = []
        skipped: dict[str, str] = {}
        first: tuple[int, ...] | None = None
        for row, path in enumerate(paths):
            try:
                shape, dtype = npy_header(folder / path, seen)
                if dtype.kind != "f":
                    raise ValueError(f"{dtype}, not floating point")
            except (OSError, ValueError) as error:
                skipped[path] = one_line(error)
                continue
            if first is not None and shape != first:
                raise ValueError(
                    f"the latents have different shapes: {paths[good[0]]} is {first}, {path} is"
                    f" {shape}"
                )
            first = shape
            good.append(row)
        if first is None:
            raise ValueError(
                f"none of the {len(paths)} latents in {folder} can be read;"
                f" {next(iter(skipped.items()), '')}"
            )
        depth, *sides = first[1:] if len(first) == 4 and first[0] == 1 else first
        square = len(sides) == 2 and sides[0] == sides[1] and math.prod(first) > 0
        if not square or (posterior and depth % 2):
            mean_and_std = "(2C, S, S), mean and standard deviation"
            wanted = mean_and_std if posterior else "(C, S, S) or (1, C, S, S)"
            raise ValueError(
                f"{folder / paths[good[0]]} has the shape {first}; {wanted}, is needed"
            )
        self.name, self.folder, self.latents = str(folder), folder, Latents(SCALE)
        self.scaled = not posterior
        self.channels, self.image_size = (depth // 2 if posterior else depth), sides[0]
        every = np.array(labels, np.int64)
        check_labels(every, None, lambda row: paths[row])
        self.class_names, self.labels = numbered_classes(every), every[good]
        self.skipped = list(skipped)
        self._paths, self.posterior = [paths[row] for row in good], posterior
        warn_left_out("latents", skipped, len(paths), left_out)

    def sample_name(self, index: int) -> str:
        return self._paths[index]

    def moments(self, index: int, flip: bool) -> Moments:
        array = np.load(self.folder / self._paths[index], allow_pickle=False).astype(np.float32)
        array = array.reshape(-1, *self.image_shape)
        if len(array) != 1 + self.posterior:
            raise ValueError("its shape has changed")
        return array[0], (array[1] if self.posterior else None)


def npy_header(path: Path, seen: dict[bytes, Header]) -> Header:
    """Shape and dtype of a .npy file.

    Args:
        seen: headers met before, by their first 128 bytes: parsing one takes longer than reading.

    Raises:
        ValueError: it is damaged, shorter than its header says, or pickled.
    """
    with open(path, "rb") as file:
        head, size, offset = file.read(128), file.seek(0, 2), 128
        if head in seen:
            shape, dtype = seen[head]
        else:
            file.seek(0)
            formats = np.lib.format
            read = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
            version = formats.read_magic(file)
            if version not in read:
                raise ValueError(f"version {version} of the npy format")
            shape, _, dtype = read[version](file)
            offset = file.tell()
            if dtype.hasobject:
                raise ValueError("pickled objects")
            if offset == 128:
                seen[head] = shape, dtype
    needed = offset + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size:
        raise ValueError(f"truncated: {size} bytes, {dtype} {shape} needs {needed}")
    return shape, dtype


def _is_npy(path: str) -> bool:
    return path.endswith(".npy")


def is_repa(path: str) -> bool:
    """Whether a file is named as REPA names latents."""
    return fnmatch(os.path.basename(path), "img-mean-std-*.npy")


def _is_label(value: object) -> bool:
    return type(value) is int and abs(value) <= 1 << 62


def open_fast_dit(folder: Path, features: Path) -> FileLatents:
    """fast-DiT: X_features/N.npy, latents times 0.18215; X_labels/N.npy, one integer."""
    labels_folder = folder / (features.name.removesuffix("_features") + "_labels")
    if not labels_folder.is_dir():
        raise ValueError(f"{folder} has {features.name} but no {labels_folder.name} beside it")
    left_out: Counter[str] = Counter()
    names = entries_of(features, "", _is_npy, left_out)[1]
    if not names:
        raise ValueError(f"{features} has no .npy files")
    names.sort(key=lambda name: (len(name), name))
    labelled = entries_of(labels_folder, "", _is_npy, left_out)[1]
    left_out["label without latents"] += len(set(labelled) - set(names))
    seen: dict[bytes, Header] = {}
    labels = []
    for name in names:
        try:
            shape, dtype = npy_header(labels_folder / name, seen)
            if dtype.kind not in "iu" or math.prod(shape) != 1:
                raise ValueError(f"{dtype} {shape}, not one whole number")
            label = int(np.load(labels_folder / name, allow_pickle=False).reshape(()))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the label {labels_folder / name} cannot be read: {one_line(error)}"
            ) from None
        if not _is_label(label):
            raise ValueError(f"{name} has the label {label}, which is no class")
        labels.append(label)
    paths = [f"{features.name}/{name}" for name in names]
    return FileLatents(folder, paths, labels, False, left_out)


def open_repa(folder: Path, features: Path) -> FileLatents:
    """REPA: img-mean-std-*.npy, mean and standard deviation (2C, S, S), below a folder.

    dataset.json, there or in `folder`, has their labels by path.
    """
    left_out: Counter[str] = Counter()
    paths = files_below(features, "", is_repa, left_out)
    if not paths:
        raise ValueError(f"{features} has no img-mean-std-*.npy files")
    places = [place / "dataset.json" for place in (features, folder)]
    index = next((place for place in places if place.is_file()), None)
    if index is None:
        raise ValueError(f"{features} has no dataset.json with the labels")
    try:
        pairs = json.loads(index.read_text())["labels"]
        labels = {str(path).replace("\\", "/"): label for path, label in pairs or ()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{index} holds no list `labels` of pairs of path and label: {one_line(error)}"
        ) from None
    if pairs is None:
        labels = dict.fromkeys(paths, 0)
    left_out["label without latents"] += len({*filter(is_repa, labels)} - set(paths))
    left_out[".json"] -= index.parent == features
    for path in paths:
        if path not in labels:
            raise ValueError(f"{index}: {path} has no label")
        if not _is_label(labels[path]):
            raise ValueError(f"{index}: {path} has the label {labels[path]!r}, no whole number")
    return FileLatents(features, paths, [labels[path] for path in paths], True, left_out)
