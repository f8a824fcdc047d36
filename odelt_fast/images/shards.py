"""Our own layout of latents: shards of posterior moments, written by `encode`, memory-mapped.

`manifest.json`; shards `moments-00000.npy` (n, copies, 2, C, S, S) float16, copies: the image and,
if the source may be flipped, the mirrored image; 2: mean and standard deviation; beside each
`labels-00000.npy` (n,) int64.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from odelt_fast.checks import number, shown, whole
from odelt_fast.config import Latents
from odelt_fast.files import PARTIAL, one_line, problem_of, read_object, write_atomically

from .latents import SCALE, LatentSource, Moments
from .tables import check_labels

MANIFEST_NAME, SETTINGS_NAME = "manifest.json", "encoding.json"
_FORMAT = "odelt-fast latents"
_JSON_LIMIT = 64 << 20  # bytes of a manifest; a million classes fit
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json that reading needs; `lengths` of the shards, in their order."""

    channels: int
    size: int
    copies: int
    latents: Latents
    class_names: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Manifest:
        """ValueError for what is no manifest, or names other files than its own shards."""
        if (values.get("format"), values.get("version")) != (_FORMAT, 1):
            raise ValueError(f"no manifest of latents: its format must be {_FORMAT!r}, version 1")
        names, shards = values.get("class_names"), values.get("shards")
        if not isinstance(names, list) or not names or any(type(name) is not str for name in names):
            raise ValueError("class_names must be a list of at least one name")
        if not isinstance(shards, list) or not shards:
            raise ValueError("shards must be a list of at least one shard")
        facts = values.get("facts")
        encoder = facts.get("encoder", "") if isinstance(facts, dict) else ""
        latents = Latents(
            number("scale", values.get("scale"), 1e-30, 1e6),
            number("shift", values.get("shift", 0.0), -1e6, 1e6),
            encoder if isinstance(encoder, str) else "",
            values.get("encoder_sha256", ""),
        )
        lengths = []
        for i, shard in enumerate(shards):
            name = _file("moments", i)
            if not isinstance(shard, dict) or shard.get("moments") != name:
                raise ValueError(f"shard {i} must be named {name}, not {shown(shard)}")
            lengths.append(whole(f"the length of shard {i}", shard.get("length"), 1, 1 << 40))
        return cls(
            whole("channels", values.get("channels"), 1, 4096),
            whole("size", values.get("size"), 1, 4096),
            whole("copies", values.get("copies"), 1, 2),
            latents,
            tuple(names),
            tuple(lengths),
        )


def _file(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}.npy"


def _read(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """make(the JSON object in a file); ValueError that names the file if it is damaged or wrong."""
    try:
        return make(read_object(path, _JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {problem_of(path, error)}") from None


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped .npy file; ValueError if damaged, pickled, or of another dtype or shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except Exception as error:  # numpy's reader of headers raises most kinds
        raise ValueError(f"{path} cannot be read: {problem_of(path, error)}") from None
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
    return array


class ShardedLatents(LatentSource):
    """A folder of shards; files are opened on first use in each process."""

    posterior = True

    def __init__(self, folder: Path) -> None:
        manifest = _read(folder / MANIFEST_NAME, Manifest.of)
        self.name, self.folder, self.manifest = str(folder), folder, manifest
        self.channels, self.image_size = manifest.channels, manifest.size
        self.class_names, self.flippable = manifest.class_names, manifest.copies == 2
        self.latents = manifest.latents
        self._starts = np.concatenate([[0], np.cumsum(manifest.lengths)])
        _ = self._shards  # a damaged file is found out now
        self.labels = np.concatenate(self._mapped("labels", np.int64))
        check_labels(self.labels, self.class_names, self.sample_name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        shape = (self.manifest.copies, 2, *self.image_shape)
        return self._mapped("moments", np.float16, *shape)

    def _mapped(self, kind: str, dtype: Any, *shape: int) -> list[np.ndarray]:
        return [
            map_array(self.folder / _file(kind, i), dtype, (length, *shape))
            for i, length in enumerate(self.manifest.lengths)
        ]

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - self._starts[shard]

    def sample_name(self, index: int) -> str:
        shard, row = self._place(index)
        return f"row {row} of {_file('moments', shard)}"

    def moments(self, index: int, flip: bool) -> Moments:
        shard, row = self._place(index)
        mean, std = self._shards[shard][row, int(flip)].astype(np.float32)
        return mean, std

    def stacked(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.searchsorted(self._starts, indices, side="right") - 1
        moments = np.empty((len(indices), 2, *self.image_shape), np.float32)
        for shard in np.unique(places):
            chosen = places == shard
            rows = indices[chosen] - self._starts[shard]
            moments[chosen] = self._shards[shard][rows, mirrored[chosen].astype(np.int64)]
        used = indices.copy()
        for row in np.flatnonzero(~np.isfinite(moments).all(axis=(1, 2, 3, 4))):
            moments[row], used[row] = self.readable(int(indices[row]), bool(mirrored[row]))
        return moments, used


class LatentWriter:
    """Appends moments to shards of `shard_length` samples; `completed` ones are there already.

    A shard appears under its name complete or not at all, its labels before it; manifest.json,
    which makes the folder readable, comes last. One writer at a time.

    Args:
        folder: new, or of a run with the same settings, which is continued.
        copies: 2 with the mirrored images, else 1.
        latents: what becomes of the moments when they are read, and what made them.
        facts: what else must be equal for a run to continue (the encoder, the labels), kept in the
            manifest.

    Raises:
        ValueError: the folder holds latents of other settings; moments that cannot be stored.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        channels: int,
        size: int,
        class_names: Sequence[str],
        *,
        copies: int = 2,
        latents: Latents = Latents(SCALE),  # noqa: B008 (frozen)
        shard_length: int = 2048,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.folder, self.class_names = str(folder), Path(folder), tuple(class_names)
        self.shard_length = whole("shard_length", shard_length)
        self._shape = (copies, 2, channels, size, size)
        settings = {"format": _FORMAT, "version": 1, "channels": channels, "size": size}
        settings |= {"copies": copies, "scale": latents.scale, "shift": latents.shift}
        settings |= {"encoder_sha256": latents.encoder_sha256, "class_names": list(class_names)}
        facts = {"encoder": latents.encoder} | dict(facts or {})
        settings |= {"shard_length": shard_length, "facts": facts}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._lengths: list[int] = []
        self.finished = False
        self._begin()

    def _begin(self) -> None:
        """Opens the folder and finds out what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{PARTIAL}*"):  # by a kill
            left.unlink()
        self.finished = (self.folder / MANIFEST_NAME).is_file()
        started = self.folder / (MANIFEST_NAME if self.finished else SETTINGS_NAME)
        if not started.is_file():
            self._write(SETTINGS_NAME, self._settings)
            return
        before = _read(started, dict)
        self._check(before)
        if self.finished:
            self._lengths = [shard["length"] for shard in before["shards"]]
            return
        # Only whole shards are trusted: a shorter last one is written again.
        length = self.shard_length
        with contextlib.suppress(ValueError):
            for shard in itertools.count():
                moments, labels = (
                    self.folder / _file(kind, shard) for kind in ("moments", "labels")
                )
                map_array(moments, np.float16, (length, *self._shape))
                map_array(labels, np.int64, (length,))
                self._lengths.append(length)

    def _check(self, there: Mapping[str, Any]) -> None:
        """ValueError unless latents with the settings `there` are those that are written."""
        # Folders of earlier versions know neither.
        before = {name: self._settings[name] for name in ("shift", "encoder_sha256")} | dict(there)
        for name, value in self._settings.items():
            if before.get(name) != value:
                found, here = (one_line(json.dumps(v)) for v in (before.get(name), value))
                raise ValueError(
                    f"{self.name} holds other latents (its {name} is {found}, here it is {here}):"
                    " choose another folder or remove it"
                )

    @property
    def completed(self) -> int:
        return sum(self._lengths)

    @property
    def _waiting(self) -> int:
        return sum(len(labels) for _, labels in self._pending)

    def append(self, moments: np.ndarray, labels: np.ndarray) -> None:
        """Adds samples.

        Args:
            moments: (n, copies, 2, C, S, S), mean and standard deviation, stored as float16.
            labels: (n,) integer.
        """
        labels = np.asarray(labels)
        if moments.shape != (len(labels), *self._shape):
            raise ValueError(
                f"moments of shape {moments.shape} for {len(labels)} labels; {('n', *self._shape)}"
                " is needed"
            )
        classes = len(self.class_names)
        if labels.dtype.kind not in "iu" or ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"labels must be whole numbers from 0 to {classes - 1}")
        with np.errstate(over="ignore"):
            stored = moments.astype(np.float16)
        finite = np.isfinite(stored).reshape(len(stored), -1).all(1)
        if not finite.all():
            raise ValueError(
                "the encoder made values for image"
                f" {self.completed + self._waiting + int(finite.argmin())} that float16 cannot"
                " hold: run it in float32 or bfloat16"
            )
        self._pending.append((stored, labels.astype(np.int64)))
        while self._waiting >= self.shard_length:
            self._write_shard(self.shard_length)

    def finish(self) -> None:
        """Writes the last, shorter shard and then the manifest."""
        if self.finished:
            return
        if self._waiting:
            self._write_shard(self._waiting)
        if not self._lengths:
            raise ValueError("no latents were written")
        self._end()
        self.finished = True

    def _end(self) -> None:
        """Makes what was written readable."""
        shards = [
            {"moments": _file("moments", i), "labels": _file("labels", i), "length": length}
            for i, length in enumerate(self._lengths)
        ]
        manifest = self._settings | {"count": self.completed, "shards": shards}
        self._write(MANIFEST_NAME, manifest, indent=1)
        (self.folder / SETTINGS_NAME).unlink(missing_ok=True)

    def _write_shard(self, length: int) -> None:
        shard = len(self._lengths)
        moments, labels = (np.concatenate(parts) for parts in zip(*self._pending))
        self._put(shard, moments[:length], labels[:length])
        self._lengths.append(length)
        self._pending = [(moments[length:].copy(), labels[length:])] if len(labels) > length else []

    def _put(self, shard: int, moments: np.ndarray, labels: np.ndarray) -> None:
        for kind, array in (("labels", labels), ("moments", moments)):
            write_atomically(self.folder / _file(kind, shard), partial(np.save, arr=array))

    def _write(self, name: str, values: dict[str, Any], indent: int | None = None) -> None:
        text = json.dumps(values, indent=indent).encode()
        write_atomically(self.folder / name, lambda file: file.write(text))
