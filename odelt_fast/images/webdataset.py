"""WebDataset shards: tar files, here or behind a URL, indexed once and then read at any place."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from odelt_fast.checks import shown
from odelt_fast.files import cache_folder, locked, one_line, read_object, write_atomically
from odelt_fast.storage import cache
from odelt_fast.storage.places import (
    Version,
    is_url,
    patiently,
    read_part,
    reason,
    system_of,
    version_of,
)

from .listing import check_split, files_of_split, urls_of_split
from .pixels import Opened, Unreachable, image_endings, num_threads
from .tables import LABEL_COLUMNS, NO_CHOICE, Choice, check_labels, number_labels, text_labels

_TEXTS = (*LABEL_COLUMNS, "json", "txt")  # endings of members that may be labels
_MOST_TEXT, _MOST_IMAGE, _MOST_INDEX = 1 << 20, 1 << 30, 1 << 31  # bytes
_MOST_SHARDS = 1_000_000
_INDEX_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Index:
    """The members of a shard: names, where their bytes begin and how many they are; texts of those
    that may be labels, by name; how many members are no files."""

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    texts: dict[str, str]
    no_files: int


def expand(data: str) -> list[str]:
    """The names that braces and asterisks stand for: shard-{000..011}.tar, {a,b}.tar, *.tar."""
    parts: list[list[str]] = []
    for part in re.split(r"(\{\d{1,18}\.\.\d{1,18}\}|\{[^{},]*(?:,[^{},]*)+\})", data):
        if not part.startswith("{"):
            parts.append([part])
        elif ".." in part:
            first, last = part[1:-1].split("..")
            numbers = range(int(first), min(int(last), int(first) + _MOST_SHARDS) + 1)
            parts.append([f"{number:0{len(first)}}" for number in numbers])
        else:
            parts.append(part[1:-1].split(","))
    names = [
        "".join(chosen) for chosen in itertools.islice(itertools.product(*parts), _MOST_SHARDS)
    ]
    if not names or len(names) == _MOST_SHARDS:
        raise ValueError(f"{data} names {'too many' if names else 'no'} shards")
    return [
        name for pattern in names for name in (_found(pattern) if "*" in pattern else [pattern])
    ]


def _found(pattern: str) -> list[str]:
    """Names of the files that match, sorted; ValueError if there are none."""
    if is_url(pattern):
        system, path = system_of(pattern)
        found = [system.unstrip_protocol(name) for name in system.glob(path)]
    else:
        found = glob.glob(pattern)
    if not found:
        raise ValueError(f"no file matches {pattern}")
    return sorted(found)


def open_shards(data: str, split: str, choice: Choice = NO_CHOICE) -> Opened:
    """The samples of a folder of .tar files, of one, or of several by braces or by URL.

    A sample are the members whose names agree up to the first dot. Its image is the member that
    Pillow decodes, or has the ending `choice.image`; its label stands in .cls or, in .json, under a
    usual name; or `choice.label` names the ending or the key.

    Returns:
        The images, labels (N,) int64 and class names.

    Raises:
        ValueError: in one line, for shards that cannot be read to their end, and for samples
            without label or of several images.
    """
    from tqdm import tqdm

    left_out: Counter[str] = Counter()
    if os.path.isdir(data):
        shards = files_of_split(Path(data), "tar", split, left_out)
    elif is_url(data) and not re.search(r"\.tar($|[?#])", data):
        shards = urls_of_split(data, "tar", split, left_out)
    else:
        shards = expand(data)
        for shard in shards:
            check_split(re.split(r"[?#]", shard)[0], split)
    look: dict[str, Any] = {"unit": "shard", "delay": 2, "disable": None, "leave": False}
    with ThreadPoolExecutor(num_threads()) as pool:
        versions = list(pool.map(_version, shards))
        copied = _copied(shards, versions)
        indexed = pool.map(index_of, shards, versions, copied)
        indices = list(tqdm(indexed, "indexing shards", len(shards), **look))
    rows: list[tuple[int, int]] = []  # shard and member
    labels: list[Any] = []
    for number, (shard, index) in enumerate(zip(shards, indices)):
        left_out["no regular file in a shard"] += index.no_files
        for members in _samples(shard, index, left_out):
            image = _image(members, choice, f"{shard}: {index.names[next(iter(members.values()))]}")
            if image is None:
                left_out["sample without image"] += 1
                continue
            rows.append((number, image))
            texts = {ending: index.texts.get(index.names[i]) for ending, i in members.items()}
            labels.append(_label(texts, choice.label, f"{shard}: {index.names[image]}"))
    if not rows:
        raise ValueError(
            f"{data} has no samples with images{f' .{choice.image}' * bool(choice.image)}"
        )
    store = ShardStore(shards, versions, copied, indices, np.array(rows), left_out)
    if choice.label == "" or not (choice.label or any(index.texts for index in indices)):
        only = re.sub(r"\W*(\{.*)?(\.tar.*)?$", "", os.path.basename(data.rstrip("/"))) or "all"
        return store, np.zeros(len(rows), np.int64), (only,)
    return store, *number_labels(_label_values(labels, store), None, None)


class ShardStore:
    """Members of shards as images.

    copied: of which shards copies are kept in the cache folder; images of other ones behind URLs
    are fetched one by one.
    """

    def __init__(
        self,
        shards: Sequence[str],
        versions: Sequence[Version],
        copied: Sequence[bool],
        indices: Sequence[Index],
        rows: np.ndarray,
        left_out: Counter[str],
    ) -> None:
        self.shards, self.left_out, self._places = list(shards), left_out, rows[:, 0]
        self._names = [indices[shard].names[member] for shard, member in rows]
        offsets = [indices[shard].offsets[member] for shard, member in rows]
        sizes = [indices[shard].sizes[member] for shard, member in rows]
        self._offsets, self._sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)
        self._versions, self._copied = list(versions), list(copied)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        return f"{self._names[row]} of {os.path.basename(self.shards[self._places[row]])}"

    def fingerprint(self) -> str:
        facts = [[version.text for version in self._versions], self._names]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encoded(self, row: int) -> bytes:
        shard, size = self.shards[self._places[row]], int(self._sizes[row])
        if size > _MOST_IMAGE:
            raise ValueError(f"{size} bytes, more than {_MOST_IMAGE}")
        try:
            content = self._part(int(self._places[row]), int(self._offsets[row]), size)
        except Exception as error:  # file systems raise most kinds
            if not is_url(shard):
                raise
            raise Unreachable(f"{shard} cannot be reached: {reason(error)}") from None
        if len(content) != size:
            raise ValueError("the shard has become shorter")
        return content

    def _part(self, number: int, offset: int, size: int) -> bytes:
        shard, version = self.shards[number], self._versions[number]
        copy = cache.copy(shard, version) if self._copied[number] else None
        if copy is None:
            return read_part(shard, offset, size)
        with copy:
            copy.seek(offset)
            return copy.read(size)


def _version(shard: str) -> Version:
    try:
        return version_of(shard)
    except Exception as error:  # file systems raise most kinds
        raise ValueError(f"the shard {shard} cannot be read: {reason(error)}") from None


def _copied(shards: Sequence[str], versions: Sequence[Version]) -> list[bool]:
    """Of which shards the cache has room for copies: of the first ones behind URLs. What has none
    is said."""
    if not any(map(is_url, shards)):
        return [False] * len(shards)
    room = cache.limit()
    sizes = [version.size * is_url(shard) for shard, version in zip(shards, versions)]
    fit = np.cumsum(sizes) <= room
    if room and not all(fit) and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"{cache.needed('copies of all shards', sum(sizes))}; images of {int(sum(~fit))} of"
            f" {len(shards)} shards are fetched one by one, each time",
            stacklevel=3,
        )
    return [is_url(shard) and bool(fits) for shard, fits in zip(shards, fit)]


def index_of(shard: str, version: Version, copied: bool) -> Index:
    """The index of a shard, read from its headers once and kept in the cache folder.

    Raises:
        ValueError: in one line, for a shard that cannot be opened or is no whole tar file.
    """
    key = hashlib.sha256(f"{_INDEX_VERSION} {version.text}".encode()).hexdigest()[:32]
    path = cache_folder() / f"shard-{key}.json"
    try:
        with locked(path.with_suffix(".lock")):
            if (remembered := _remembered(path)) is not None:
                return remembered
            index = _indexed(shard, cache.copy(shard, version) if copied else None)
            content = json.dumps(asdict(index)).encode()
            with contextlib.suppress(OSError):  # it is made again the next time
                write_atomically(path, lambda file: file.write(content))
            return index
    except Exception as error:  # file systems and tarfile raise most kinds
        raise ValueError(f"the shard {shard} cannot be read: {reason(error)}") from None


def _remembered(path: Path) -> Index | None:
    try:
        return Index(**read_object(path, _MOST_INDEX))
    except (OSError, ValueError, TypeError):
        return None


def _indexed(shard: str, copy: BinaryIO | None) -> Index:
    def read() -> Index:
        system, place = system_of(shard)
        with system.open(place, "rb") as file:
            return _read_index(file)

    if copy is None and is_url(shard):
        return patiently(read)
    with copy or open(shard, "rb") as file:
        return _read_index(file)


def _read_index(file: BinaryIO) -> Index:
    index = Index([], [], [], {}, 0)
    no_files = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                no_files += not member.isdir()
                continue
            index.names.append(member.name)
            index.offsets.append(member.offset_data)
            index.sizes.append(member.size)
            if _split_name(member.name)[1] in _TEXTS and member.size <= _MOST_TEXT:
                file.seek(member.offset_data)
                index.texts[member.name] = file.read(member.size).decode(errors="replace")
        end = tar.offset  # tarfile takes whatever is no header for the end
    file.seek(end)
    rest = file.read(_MOST_TEXT)
    if len(rest) < _BLOCK:
        raise ValueError("it is cut off: it has no end mark")
    if rest.strip(b"\0"):
        raise ValueError(f"it is damaged at byte {end}, or archives were joined there")
    return Index(index.names, index.offsets, index.sizes, index.texts, no_files)


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: up to the first dot of the file's name, and behind it."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}/{key}", ending.lower()


def _samples(shard: str, index: Index, left_out: Counter[str]) -> Iterator[dict[str, int]]:
    """The members of each sample, by ending. ValueError for a name that occurs twice."""
    samples: dict[str, dict[str, int]] = {}
    for number, name in enumerate(index.names):
        key, ending = _split_name(name)
        if key.endswith("/"):
            left_out["hidden in a shard"] += 1
        elif not ending:
            left_out["without ending in a shard"] += 1
        elif ending in samples.setdefault(key, {}):
            raise ValueError(f"the shard {shard} has {one_line(name)} twice")
        else:
            samples[key][ending] = number
    yield from samples.values()


def _image(members: dict[str, int], choice: Choice, where: str) -> int | None:
    """The member that is the sample's image; ValueError if it may be several."""
    if choice.image:
        return members.get(choice.image.lower())
    images = [ending for ending in members if f".{ending.split('.')[-1]}" in image_endings()]
    if len(images) > 1:
        raise ValueError(
            f"{one_line(where)}: the sample has several images, {one_line(', '.join(images))}:"
            " choose one with --image-column"
        )
    return members[images[0]] if images else None


def _label(texts: dict[str, str | None], wanted: str | None, where: str) -> Any:
    """The label that the texts of a sample give it, a text, a whole number or a truth value; None:
    none."""
    if wanted == "":
        return None
    ending = (wanted or "cls").lower()
    if texts.get(ending) is not None and ending != "json":
        text = str(texts[ending]).strip()
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
    if texts.get("json") is None:
        return None
    try:
        values = json.loads(str(texts["json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{one_line(where)}: its .json is damaged: {one_line(error)}") from None
    names = [wanted] if wanted else LABEL_COLUMNS
    return next((values[n] for n in names if n in values), None) if type(values) is dict else None


def _label_values(labels: Sequence[Any], store: ShardStore) -> np.ndarray:
    """Labels as `number_labels` takes them; ValueError for the first that is none."""
    if any(type(label) is str for label in labels):  # 10 among names is one of them
        labels = [str(label) if type(label) is int else label for label in labels]
    kind = type(labels[0])
    for row, label in enumerate(labels):
        if label is None:
            raise ValueError(
                f"{one_line(store.name(row))} has no label: .cls, in .json one of"
                f" {', '.join(LABEL_COLUMNS)}, or what --label-column names; '' for one class"
            )
        if type(label) is not kind or kind not in (int, str, bool):
            raise ValueError(
                f"{one_line(store.name(row))} has the label {shown(label)}; whole numbers from 0,"
                " texts or truth values are needed"
            )
    if kind is not int:
        return text_labels(labels, None, store.name)
    numbers = np.array([min(max(label, -1), 1 << 62) for label in labels], np.int64)
    check_labels(numbers, None, store.name)
    return numbers
