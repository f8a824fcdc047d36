"""Files: refused before work starts if they cannot be written, written whole or not at all; JSON of
strangers; the cache folder."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from odelt_fast.checks import shown


def picture_formats() -> tuple[str, ...]:
    """File name endings that Pillow can write."""
    from PIL import Image

    Image.init()
    return tuple(
        sorted(
            ending for ending, name in Image.registered_extensions().items() if name in Image.SAVE
        )
    )


def check_target(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """ValueError unless a regular file with one of the endings can be written at `path`; found out
    by making one beside it."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file in it")
    if path.suffix.lower() not in endings:
        common = [
            ending for ending in (".png", ".jpg", ".webp", ".gif") if ending in endings
        ] or endings
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
    """ValueError unless a file can be made in `folder`, which `path` needs. Permission bits say too
    little: root, read-only systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes the file beside its place first: it appears under its name complete, or not at all."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".odelt-fast-{os.getpid()}{target.suffix}")
    try:
        with partial.open("xb") as file:
            write(file)
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def save_picture(path: Path, picture: Any) -> None:
    """Writes a PIL image, in the format that the name's ending says."""
    from PIL import Image

    write_whole(
        path,
        lambda file: picture.save(file, format=Image.registered_extensions()[path.suffix.lower()]),
    )


def try_out(option: str, path: Path, picture: Any) -> None:
    """ValueError unless the format can hold `picture`, whose size and colours are those of the real
    one; nothing is kept."""
    from PIL import Image

    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))) as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError, RuntimeError, SystemError) as error:
        raise ValueError(
            f"{option} {path}: a picture of {picture.width}x{picture.height} cannot be written:"
            f" {error}"
        ) from None


def flush(path: Path) -> None:
    """Makes a file's contents, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. ValueError for anything else, for doubled keys, and for NaN and
    infinities."""
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


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes. ValueError and OSError for
    anything else."""
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return parse_object(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(said: str) -> None:
    raise ValueError(f"{said} is not a number that JSON has")


def _finite(said: str) -> float:
    value = float(said)
    if math.isinf(value):
        raise ValueError(f"{shown(said)} is too large a number")
    return value


def cache_folder() -> Path:
    """Where the package keeps files of its own: $ODELT_FAST_CACHE, else the user's cache folder."""
    given = os.environ.get("ODELT_FAST_CACHE")
    return (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odelt-fast"
    )
