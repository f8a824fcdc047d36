"""Which files lie below a folder, and what else does, by kind: nothing is passed over unsaid."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from odelt_fast.files import one_line

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
