"""Readers of VAE latents: our own shards of posterior moments, and the layouts of fast-DiT and
REPA.

Our layout: `manifest.json`; shards `moments-00000.npy` (n, copies, 2, C, S, S) float16, copies: the
image and, if the source may be flipped, the mirrored image; 2: mean and standard deviation; beside
each `labels-00000.npy` (n,) int64. Written by `encode`.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odelt_fast.files import one_line, read_object
from odelt_fast.images.sources import ImageSource, Noise, check_indices, first_readable
from odelt_fast.images.tables import check_labels, numbered_classes

SCALE = 0.18215  # of the latents of Stable Diffusion's VAE
MANIFEST_NAME, SETTINGS_NAME = "manifest.json", "encoding.json"
FORMAT = "odelt-fast latents"
_JSON_LIMIT = 64 << 20  # bytes of a manifest; a million classes fit
Moments = tuple[np.ndarray, np.ndarray | None]


class LatentSource(ImageSource):
    """Latents (C, S, S) by index: scale * (mean + std * noise), or scale * mean without noise or
    where a layout has no std."""

    scale: float

    @abstractmethod
    def moments(self, index: int, flip: bool) -> Moments:
        """Mean and standard deviation (C, S, S) float32 of the posterior, the latter None if
        unknown; any exception: unreadable."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """For messages."""

    def read_many(
        self,
        indices: Sequence[int] | np.ndarray,
        flips: Sequence[bool] | np.ndarray | None = None,
        noise: Sequence[Noise] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        indices = check_indices(indices, len(self))
        mirrored = np.zeros(len(indices), bool) if flips is None else np.asarray(flips, bool)
        if mirrored.any() and not self.flippable:
            raise ValueError(f"{self.name} has no latents of mirrored images: flip none")
        if len(mirrored) != len(indices) or (noise is not None and len(noise) != len(indices)):
            raise ValueError(f"{len(indices)} indices need as many flips and generators of noise")
        latents = np.empty(
            (len(indices), self.channels, self.image_size, self.image_size), np.float32
        )
        labels = np.empty(len(indices), np.int64)
        for row, index in enumerate(indices):

            def finite_moments(index: int, flip: bool = bool(mirrored[row])) -> Moments:
                mean, std = self.moments(index, flip)
                if not np.isfinite(mean).all() or (std is not None and not np.isfinite(std).all()):
                    raise ValueError("values that are not finite")
                return mean, std

            (mean, std), used = first_readable(self, int(index), finite_moments, self.sample_name)
            if std is not None and noise is not None:
                mean = mean + std * noise[row].standard_normal(mean.shape, np.float32)
            latents[row], labels[row] = mean, self.labels[used]
        latents *= np.float32(self.scale)
        return latents, labels


def open_latents(folder: Path) -> LatentSource:
    """Opens a folder of latents of any known layout; ValueError in one line for what is none, or
    damaged."""
    if (folder / MANIFEST_NAME).is_file():
        return ShardedLatents(folder)
    if (folder / SETTINGS_NAME).is_file():
        raise ValueError(
            f"the latents in {folder} are not finished: run `odelt-fast encode` again, it continues"
            " where it stopped"
        )
    features = sorted(path for path in folder.glob("*_features") if path.is_dir())
    if len(features) > 1:
        raise ValueError(
            f"{folder} has {' and '.join(path.name for path in features)}: give a folder with one"
            " of them"
        )
    if features:
        return _open_fast_dit(folder, features[0])
    below = folder / "vae-sd"
    return _open_repa(folder, below if below.is_dir() else folder)


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json that reading needs; `lengths` of the shards, in their order."""

    channels: int
    size: int
    copies: int
    scale: float
    class_names: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """ValueError for a manifest that is damaged, of another format, or that names other files
        than its own shards."""
        values = read_json(path)
        if values.get("format") != FORMAT or values.get("version") != 1:
            raise ValueError(
                f"{path} is no manifest of latents: its format must be {FORMAT!r}, version 1"
            )
        for name, most in (("channels", 4096), ("size", 4096), ("copies", 2)):
            if not _whole(values.get(name), 1, most):
                raise ValueError(
                    f"{path}: {name} must be a whole number from 1 to {most}, not"
                    f" {one_line(repr(values.get(name)))}"
                )
        scale, names, shards = values.get("scale"), values.get("class_names"), values.get("shards")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not (0 < scale < 1e6):
            raise ValueError(
                f"{path}: scale must be a positive number, not {one_line(repr(scale))}"
            )
        if (
            not isinstance(names, list)
            or not names
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"{path}: class_names must be a list of at least one name")
        if not isinstance(shards, list) or not shards:
            raise ValueError(f"{path}: shards must be a list of at least one shard")
        for number, shard in enumerate(shards):
            if (
                not isinstance(shard, dict)
                or shard.get("moments") != moments_name(number)
                or not _whole(shard.get("length"), 1, 1 << 40)
            ):
                raise ValueError(
                    f"{path}: shard {number} must be named {moments_name(number)} and have a"
                    f" length, not {one_line(shard)}"
                )
        lengths = tuple(shard["length"] for shard in shards)
        return cls(
            values["channels"],
            values["size"],
            values["copies"],
            float(scale),
            tuple(names),
            lengths,
        )


def moments_name(shard: int) -> str:
    return f"moments-{shard:05d}.npy"


def labels_name(shard: int) -> str:
    return f"labels-{shard:05d}.npy"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError that names the file if it is too large, damaged or no
    object."""
    try:
        return read_object(path, _JSON_LIMIT)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped .npy file; ValueError if it is damaged, pickled, or of another dtype or
    shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except Exception as error:  # numpy's reader of headers raises most kinds
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
    return array


class ShardedLatents(LatentSource):
    """Our own layout, memory-mapped: files are opened on first use in each process."""

    def __init__(self, folder: Path) -> None:
        manifest = Manifest.read(folder / MANIFEST_NAME)
        self.name, self.folder, self.manifest = str(folder), folder, manifest
        self.channels, self.image_size, self.scale = (
            manifest.channels,
            manifest.size,
            manifest.scale,
        )
        self.class_names, self.flippable = manifest.class_names, manifest.copies == 2
        self._starts = np.concatenate([[0], np.cumsum(manifest.lengths)])
        self._shards: list[np.ndarray] | None = None
        self._open()
        labels = [
            map_array(folder / labels_name(i), np.int64, (length,))
            for i, length in enumerate(manifest.lengths)
        ]
        self.labels = np.concatenate(labels)
        check_labels(self.labels, self.class_names, self.sample_name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": None}

    def _open(self) -> list[np.ndarray]:
        shape = (self.manifest.copies, 2, self.channels, self.image_size, self.image_size)
        lengths = enumerate(self.manifest.lengths)
        self._shards = [
            map_array(self.folder / moments_name(i), np.float16, (length, *shape))
            for i, length in lengths
        ]
        return self._shards

    def sample_name(self, index: int) -> str:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"row {index - self._starts[shard]} of {moments_name(shard)}"

    def moments(self, index: int, flip: bool) -> Moments:
        shards = self._open() if self._shards is None else self._shards
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        mean, std = shards[shard][index - self._starts[shard], int(flip)].astype(np.float32)
        return mean, std


class FileLatents(LatentSource):
    """One .npy file a sample, of `shape`: mean and std stacked (2C, S, S) if `posterior`, else
    scaled latents ((1,) C, S, S)."""

    flippable = False

    def __init__(
        self, folder: Path, paths: Sequence[str], labels: Sequence[int], posterior: bool
    ) -> None:
        seen: dict[bytes, tuple[tuple[int, ...], np.dtype]] = {}
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
        if (
            len(sides) != 2
            or sides[0] != sides[1]
            or not math.prod(first)
            or (posterior and depth % 2)
        ):
            wanted = (
                "(2C, S, S), mean and standard deviation"
                if posterior
                else "(C, S, S) or (1, C, S, S)"
            )
            raise ValueError(
                f"{folder / paths[good[0]]} has the shape {first}; {wanted}, is needed"
            )
        self.name, self.folder, self.scale = str(folder), folder, SCALE if posterior else 1.0
        self.channels, self.image_size = (depth // 2 if posterior else depth), sides[0]
        every = np.array(labels, np.int64)
        check_labels(every, None, lambda row: paths[row])
        self.class_names, self.labels, self.skipped = (
            numbered_classes(every),
            every[good],
            list(skipped),
        )
        self._paths, self._posterior = [paths[row] for row in good], posterior
        if skipped:
            shown = ", ".join(f"{path} ({reason})" for path, reason in list(skipped.items())[:5])
            warnings.warn(
                f"{len(skipped)} of {len(paths)} latents left out:"
                f" {shown}{' ...' if len(skipped) > 5 else ''}",
                stacklevel=2,
            )

    def sample_name(self, index: int) -> str:
        return self._paths[index]

    def moments(self, index: int, flip: bool) -> Moments:
        array = np.load(self.folder / self._paths[index], allow_pickle=False).astype(np.float32)
        array = array.reshape(-1, self.channels, self.image_size, self.image_size)
        if len(array) != 1 + self._posterior:
            raise ValueError("its shape has changed")
        return array[0], (array[1] if self._posterior else None)


def npy_header(
    path: Path, seen: dict[bytes, tuple[tuple[int, ...], np.dtype]]
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a .npy file; ValueError if it is damaged, shorter than they say, or
    pickled. `seen`: headers met before."""
    with open(path, "rb") as file:
        head, size = file.read(128), file.seek(0, 2)
        if head in seen:
            shape, dtype = seen[head]
            offset = 128
        else:
            file.seek(0)
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the npy format")
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            offset = file.tell()
            if dtype.hasobject:
                raise ValueError("pickled objects")
            if offset == 128:
                seen[head] = shape, dtype
    if min(shape, default=0) < 0 or offset + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(
            f"truncated: {size} bytes, {dtype} {shape} needs"
            f" {offset + math.prod(shape) * dtype.itemsize}"
        )
    return shape, dtype


def _open_fast_dit(folder: Path, features: Path) -> FileLatents:
    """fast-DiT: X_features/N.npy, latents times 0.18215; X_labels/N.npy, one integer."""
    labels_folder = folder / (features.name.removesuffix("_features") + "_labels")
    if not labels_folder.is_dir():
        raise ValueError(f"{folder} has {features.name} but no {labels_folder.name} beside it")
    names = sorted(
        (path.name for path in features.glob("*.npy")), key=lambda name: (len(name), name)
    )
    if not names:
        raise ValueError(f"{features} has no .npy files")
    seen: dict[bytes, tuple[tuple[int, ...], np.dtype]] = {}
    labels = []
    for name in names:
        try:
            shape, dtype = npy_header(labels_folder / name, seen)
            if dtype.kind not in "iu" or math.prod(shape) != 1:
                raise ValueError(f"{dtype} {shape}, not one whole number")
            labels.append(int(np.load(labels_folder / name, allow_pickle=False).reshape(())))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the label {labels_folder / name} cannot be read: {one_line(error)}"
            ) from None
    return FileLatents(
        folder,
        [f"{features.name}/{name}" for name in names],
        _fit_int64(labels, names),
        posterior=False,
    )


def _open_repa(folder: Path, features: Path) -> FileLatents:
    """REPA: img-mean-std-*.npy, mean and standard deviation (2C, S, S), below a folder;
    dataset.json has their labels by path."""
    paths = sorted(
        path.relative_to(features).as_posix() for path in features.rglob("img-mean-std-*.npy")
    )
    if not paths:
        raise ValueError(f"{features} has no img-mean-std-*.npy files")
    index = next(
        (
            place / "dataset.json"
            for place in (features, folder)
            if (place / "dataset.json").is_file()
        ),
        None,
    )
    if index is None:
        raise ValueError(f"{features} has no dataset.json with the labels")
    try:
        values = json.loads(index.read_text())
        pairs = values["labels"]
        known: Mapping[str, Any] | None = (
            None
            if pairs is None
            else {str(path).replace("\\", "/"): label for path, label in pairs}
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{index} holds no list `labels` of pairs of path and label: {one_line(error)}"
        ) from None
    if known is None:
        return FileLatents(features, paths, [0] * len(paths), posterior=True)
    for path in paths:
        if not _whole(known.get(path), -(1 << 62), 1 << 62):
            raise ValueError(
                f"{index}: {path} has"
                f" {'no label' if path not in known else f'the label {known[path]!r}, no whole number'}"
            )
    return FileLatents(features, paths, [known[path] for path in paths], posterior=True)


def _fit_int64(labels: Sequence[int], names: Sequence[str]) -> Sequence[int]:
    for label, name in zip(labels, names):
        if not _whole(label, -(1 << 62), 1 << 62):
            raise ValueError(f"{name} has the label {label}, which is no class")
    return labels
