"""Which files lie below a folder, of which split, and what else: nothing is passed over unsaid."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from odelt_fast.files import one_line
from odelt_fast.storage.places import Place

_SPLITS = {
    "train": "train|training",
    "test": "test|testing|eval|evaluation",
    "validation": "validation|valid|val|dev",
}
Wanted = Callable[[str], bool]  # path -> whether the file is one of those looked for


def files_below(folder: Path, place: str, wanted: Wanted, left_out: Counter[str]) -> list[str]:
    """The files in `folder`/`place` and below that `wanted` takes, as sorted paths from `folder`.

    Links are followed. A folder that is reached twice is read once, `folder` and those above it not
    at all: loops of links end, and a link upwards makes no images of other classes this one's.

    Args:
        left_out: what is no such file is counted in it, by kind.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {_identity(str(above)) for above in (folder.resolve(), *folder.resolve().parents)}
    if not place:
        seen.discard(_identity(str(folder)))
    found: list[str] = []
    waiting = [place]
    while waiting:
        inside = waiting.pop()
        identity = _identity(os.path.join(folder, inside))
        if identity in seen:
            left_out["linked to a folder that is read already"] += 1
            continue
        seen.add(identity)
        folders, files = entries_of(folder, inside, wanted, left_out)
        waiting += reversed(folders)
        found += files
    return sorted(found)


def split_named(name: str) -> str | None:
    """The split that a folder is called by, and nothing else; None if none."""
    known = (split for split, words in _SPLITS.items() if name.lower() in words.split("|"))
    return next(known, None)


def split_of(path: str) -> str | None:
    """The split that a file's path names, as `datasets` understands it; None if none.

    train-00000-of-00001.parquet, test/0.parquet.
    """
    for part in reversed(path.split("/")):
        for split, words in _SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", part):
                return split
    return None


def files_of_split(folder: Path, kind: str, split: str, left_out: Counter[str]) -> list[str]:
    """Paths of a split's files below a folder, sorted; all are `train` where no path names one.

    Args:
        kind: whose name, in lower case, ends the files' names.
        left_out: as in `files_below`; files that name no split while others do are counted, too.

    Raises:
        ValueError: there are none.
    """
    ending = f".{kind.lower()}"
    files = files_below(folder, "", lambda path: path.lower().endswith(ending), left_out)
    return [os.path.join(folder, path) for path in _of_split(folder, files, kind, split, left_out)]


def urls_of_split(folder: str, kind: str, split: str, left_out: Counter[str]) -> list[str]:
    """`files_of_split` of a folder behind a URL."""
    place, ending = Place(folder), f".{kind.lower()}"
    files = []
    for path in place.files():
        if path.lower().endswith(ending):
            files.append(path)
        else:
            left_out[one_line(os.path.splitext(path)[1].lower(), 20) or "without ending"] += 1
    return [place.full(path) for path in _of_split(folder, files, kind, split, left_out)]


def _of_split(
    folder: str | Path, files: list[str], kind: str, split: str, left_out: Counter[str]
) -> list[str]:
    splits = {path: split_of(path) for path in files}
    if not any(splits.values()):
        splits = dict.fromkeys(files, "train")
    known = {name for name in splits.values() if name}
    chosen = [path for path in files if splits[path] == (split_of(split) or split)]
    if not chosen:
        raise ValueError(
            f"{folder} has no {kind} file of the split {split!r}; it has {', '.join(sorted(known))}"
        )
    left_out[f".{kind.lower()} of no split"] += sum(name is None for name in splits.values())
    return chosen


def check_split(file: str, split: str) -> None:
    """ValueError unless a file that is given by its name can be the split."""
    own = split_of(os.path.basename(file)) or "train"
    if split != "train" and own != (split_of(split) or split):
        raise ValueError(f"{file} has no split {split!r}: it is all of the split {own!r}")


def entries_of(
    folder: Path, place: str, wanted: Wanted, left_out: Counter[str]
) -> tuple[list[str], list[str]]:
    """Folders, and files that `wanted` takes, in `folder`/`place`: sorted paths from `folder`.

    Hidden ones are neither; the rest is counted in `left_out`, by kind. OSError as `files_below`.
    """
    folders, files = [], []
    with os.scandir(os.path.join(folder, place)) as entries:
        for entry in entries:
            mode, path = _mode(entry), os.path.join(place, entry.name)
            good = stat.S_ISREG(mode) and wanted(entry.path)
            if entry.name.startswith("."):
                left_out["hidden"] += good
            elif good:
                files.append(path)
            elif stat.S_ISDIR(mode):
                folders.append(path)
            else:
                left_out[_kind(entry, mode)] += 1
    return sorted(folders), sorted(files)


def listed(left_out: Counter[str]) -> str:
    """Kinds with their numbers, the most frequent first: 3 .heic, 2 .txt, 1 hidden."""
    kinds = (+left_out).most_common()
    more = [f"{sum(number for _, number in kinds[8:])} of other kinds"] if len(kinds) > 8 else []
    return ", ".join([f"{number} {kind}" for kind, number in kinds[:8]] + more)


def _identity(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _mode(entry: os.DirEntry[str]) -> int:
    """Of what it is or links to; 0 where that is not there."""
    try:
        return entry.stat().st_mode
    except OSError:
        return 0


def _kind(entry: os.DirEntry[str], mode: int) -> str:
    if not mode:
        return "linked to nothing" if entry.is_symlink() else "unreadable"
    if not stat.S_ISREG(mode):
        return "no regular file"
    return one_line(os.path.splitext(entry.name)[1].lower(), limit=20) or "without ending"
