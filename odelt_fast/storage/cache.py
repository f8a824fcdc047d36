"""Objects in the cache folder: copies of files behind URLs, and what is made of them. Together they
are bounded, the least recently used go first.

An object appears whole or not at all. Of processes that want the same one makes it, and the others
wait. Whoever has opened an object keeps it when it goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from odelt_fast.checks import parse_memory, show_memory
from odelt_fast.files import PARTIAL, cache_folder, locked

from .places import Version, copy_of, reason, version_of

VARIABLE = "ODELT_FAST_CACHE_SIZE"
_SHARE = 0.9  # by default: of what is free on the disk, with what the objects take
_LOCK = "lock"  # how names begin that are no objects'
_LOCKS = 64  # of each kind: copies, and what is made, perhaps of copies, whose locks come after


def limit() -> int:
    """Bytes that objects may take together: $ODELT_FAST_CACHE_SIZE (0: there are none), else nine
    tenths of what the disk has room for. ValueError for what is no amount."""
    given = os.environ.get(VARIABLE, "")
    if given.strip() == "0":
        return 0
    if given:
        try:
            return parse_memory(given)
        except ValueError as error:
            raise ValueError(f"{VARIABLE} {error}; 0 for no copies") from None
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = sum(size for _, size, _ in _objects(folder))
        return int(_SHARE * (shutil.disk_usage(folder).free + taken))
    except OSError:  # it cannot be written
        return 0


def object_of(
    key: str, size: int, make: Callable[[BinaryIO], object], kind: str = "made"
) -> BinaryIO | None:
    """The object of a key, open to be read.

    Args:
        key: changes with the content.
        size: bytes that it will take, for which room is made.
        make: writes it to a file if it is not there; it may ask for copies.
        kind: of its locks: copy, made.

    Returns:
        None where there is no room.

    Raises:
        What `make` raises; OSError: it cannot be written.
    """
    folder = _folder()
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(FileNotFoundError):
        return _used(path)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{_LOCK}-{kind}-{int(path.name, 16) % _LOCKS}"):
        with contextlib.suppress(FileNotFoundError):
            return _used(path)
        partial = _with_room(folder, size)
        if partial is None:
            return None
        try:
            make(partial)
            partial.flush()
            os.fsync(partial.fileno())
            made = open(partial.name, "rb")  # noqa: SIM115  (whose caller closes it)
            os.replace(partial.name, path)
            return made
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial.name)
            partial.close()


def copy(url: str, version: Version) -> BinaryIO | None:
    """The copy of a file behind a URL, open; None where there is no room for one.

    Raises:
        ValueError: the file is not what it was when its version was told. Any exception: it cannot
            be reached.
    """
    key = f"{url} {version.text}"
    return object_of(key, version.size, lambda file: _fetch(url, version, file), "copy")


def local(url: str, version: Version) -> BinaryIO:
    """As `copy`, or where there is no room one that ends when it is closed.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if (kept := copy(url, version)) is not None:
            return kept
        with contextlib.ExitStack() as stack:
            passing: Any = stack.enter_context(tempfile.NamedTemporaryFile(prefix=PARTIAL))
            _fetch(url, version, passing)
            passing.seek(0)
            stack.pop_all()  # whose caller closes it
            return cast(BinaryIO, passing)
    except Exception as error:  # file systems raise most kinds
        raise ValueError(f"{url} cannot be read: {reason(error)}") from None


def needed(what: str, size: int) -> str:
    """That something has no room."""
    return (
        f"{what} need {show_memory(size)} in {_folder()}, whose files may take"
        f" {show_memory(limit())}: {VARIABLE}=100GB allows more, ODELT_FAST_CACHE names another"
    )


def _fetch(url: str, version: Version, file: BinaryIO) -> None:
    if version_of(url) != version:
        raise ValueError("it has changed since it was opened first")
    copy_of(url, version.size, file)


def _folder() -> Path:
    return cache_folder() / "objects"


def _used(path: Path) -> BinaryIO:
    file = path.open("rb")
    os.utime(file.fileno())
    return file


def _objects(folder: Path) -> list[tuple[int, int, str]]:
    """When each was used last, its bytes, its path; the oldest first."""
    found = []
    for entry in os.scandir(folder):
        if not entry.name.startswith((_LOCK, PARTIAL)):
            with contextlib.suppress(FileNotFoundError):
                facts = entry.stat()
                found.append((facts.st_mtime_ns, facts.st_size, entry.path))
    return sorted(found)


def _with_room(folder: Path, size: int) -> BinaryIO | None:
    """A file to write to, whose name says how much it will take, and which is locked while its
    process lives; None where others leave no room."""
    with locked(folder / _LOCK):
        objects, bound = _objects(folder), limit()
        taken = size + sum(size for _, size, _ in objects) + _being_written(folder)
        if taken - sum(size for _, size, _ in objects) > bound:
            return None
        for _, freed, path in objects:
            if taken <= bound:
                break
            os.unlink(path)
            taken -= freed
        partial = (folder / f"{PARTIAL}{size}-{os.urandom(8).hex()}").open("x+b")
        _held(partial)
        return partial


def _held(file: BinaryIO) -> bool:
    """Whether this process holds the file's lock now; some file systems have none."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _being_written(folder: Path) -> int:
    """Bytes that the objects will take that are being made. What killed processes were making is
    removed."""
    size = 0
    for path in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if _held(file):
                path.unlink()
            else:
                size += int(path.name.removeprefix(PARTIAL).partition("-")[0])
    return size
