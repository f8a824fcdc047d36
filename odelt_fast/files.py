"""Files: refused early if they cannot be written, written whole or not at all; strangers' JSON;
locks; the cache folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from odelt_fast.checks import shown

PARTIAL = ".odelt-fast-"  # how the names of files begin that are being written
T = TypeVar("T")


def one_line(error: object, limit: int = 300) -> str:
    """An error's message (its type where it has none), or text of strangers, as one line.

    Of CUDA's errors it is the first line: below it PyTorch tells how kernels are debugged.

    Args:
        error: an exception, or anything else that `str` takes.
        limit: the most characters; what is longer ends in "...".

    Returns:
        Printable text without line breaks.
    """
    text = str(error)[:2000]
    if text.startswith("CUDA error:"):
        text = text.partition("\n")[0]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text and isinstance(error, BaseException):
        return type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows warnings as one line each, without the place in the code: users of a command have not
    written it."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message, 2000)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def problem_of(path: Path, error: object) -> str:
    """Why a file could not be read, in one line: that it is another file where its first bytes say
    so (a Git LFS pointer, a web page, nothing at all), else the error."""
    start, size = b"", -1
    with contextlib.suppress(OSError):
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(256)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the file: fetch it with git lfs pull"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the file: the download was refused, download it again"
    said = one_line(error)
    if size == 0:
        return f"{said}{': ' * bool(said)}an empty file, a download or copy has failed"
    return said


def problem_in(paths: Iterable[Path], error: object) -> str:
    """Why files could not be read, as `problem_of`; which, if one of them is another file."""
    for path in paths:
        problem = problem_of(path, "")
        if problem:
            return f"{path.name} is {problem}"
    return one_line(error)


def print_anything() -> None:
    """Standard output and error write what their encoding lacks as escapes: after hours of work, a
    file name must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # somebody's own stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def cache_folder() -> Path:
    """Where the package keeps files of its own: $ODELT_FAST_CACHE, else the user's cache folder."""
    if given := os.environ.get("ODELT_FAST_CACHE"):
        return Path(given)
    import platformdirs

    return platformdirs.user_cache_path("odelt-fast")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock on a folder, or on a file that is made if missing.

    The lock ends with the process. Where there is none (a folder that cannot be written, some
    network file systems), work is only done twice.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            folder = path.is_dir()
            if not folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, write: Callable[[BinaryIO], T], *, flushed: bool = True) -> T:
    """Calls write(file) on a file that appears at `path` complete, or not at all.

    Args:
        path: links in it are written through.
        write: writes the contents; what it returns is returned.
        flushed: the file survives a loss of power.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{PARTIAL}{os.urandom(8).hex()}{target.suffix}")
    try:
        with partial.open("xb") as file:
            result = write(file)
            if flushed:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return result


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write_atomically` for a file that the user asked for: ValueError if it cannot be written."""
    try:
        write_atomically(path, write, flushed=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON with an indent of one, as `write_whole` does."""
    write_whole(path, lambda file: file.write(json.dumps(values, indent=1).encode() + b"\n"))


def flush(path: Path) -> None:
    """Makes a file's contents, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """ValueError unless a regular file with one of the endings can be written at `path`.

    Found out by making a file beside it.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file in it")
    if path.suffix.lower() not in endings:
        common = [e for e in (".png", ".jpg", ".webp", ".gif") if e in endings] or endings
        raise ValueError(
            f"{option} {path}: the name must end in {', '.join(common)}, not"
            f" {path.suffix or path.name!r}"
        )
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {target.parent}; make it first")
    if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
        raise ValueError(f"{option} {path} exists and cannot be replaced: name another file")
    check_folder(option, path, target.parent)


def check_folder(option: str, path: Path, folder: Path) -> None:
    """ValueError unless a file can be made in `folder`, which `path` needs.

    Permission bits say too little: root, read-only systems.
    """
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def make_folder(option: str, path: Path) -> bool:
    """Makes the folder, unless it is there, for files to come; returns whether it was made.

    ValueError where none can be.
    """
    there = path.exists()
    if there and not path.is_dir():
        raise ValueError(f"{option} {path} is a file: name a folder")
    path.mkdir(parents=True, exist_ok=True)
    check_folder(option, path, path)
    return not there


def picture_formats() -> tuple[str, ...]:
    """File name endings that Pillow can write."""
    from PIL import Image

    Image.init()
    formats = Image.registered_extensions().items()
    return tuple(sorted(ending for ending, name in formats if name in Image.SAVE))


def save_picture(path: Path, picture: Any) -> None:
    """Writes a PIL image, in the format that the name's ending says."""
    write_whole(path, lambda file: _save_picture(path, picture, file))


def try_out(option: str, path: Path, picture: Any) -> None:
    """ValueError unless the format can hold `picture`, of the real one's size and colours.

    Nothing is kept.
    """
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))) as file:
            _save_picture(path, picture, file)
    except (OSError, ValueError, KeyError, RuntimeError, SystemError) as error:
        raise ValueError(
            f"{option} {path}: a picture of {picture.width}x{picture.height} cannot be written:"
            f" {error}"
        ) from None


def _save_picture(path: Path, picture: Any, file: Any) -> None:
    from PIL import Image

    picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; ValueError and OSError for anything else."""
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return data


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file, as `read_bytes` and `parse_object` take it."""
    return parse_object(read_bytes(path, limit))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. ValueError for anything else, doubled keys, NaN and infinities."""
    try:
        values = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("must be a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value
