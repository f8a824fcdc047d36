"""Files for the user: refused before work starts if they cannot be written, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def picture_formats() -> tuple[str, ...]:
    """File name endings that Pillow can write."""
    from PIL import Image

    Image.init()
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in Image.SAVE))


def check_target(option: str, path: Path, endings: tuple[str, ...]) -> None:
    """ValueError unless a regular file with one of the endings can be written at `path`; found out by making one beside it."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file in it")
    if path.suffix.lower() not in endings:
        common = [ending for ending in (".png", ".jpg", ".webp", ".gif") if ending in endings] or endings
        raise ValueError(f"{option} {path}: the name must end in {', '.join(common)}, not {path.suffix or path.name!r}")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {target.parent}; make it first")
    if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
        raise ValueError(f"{option} {path} exists and cannot be replaced: name another file")
    check_folder(option, path, target.parent)


def check_folder(option: str, path: Path, folder: Path) -> None:
    """ValueError unless a file can be made in `folder`, which `path` needs. Permission bits say too little: root, read-only systems."""
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

    write_whole(path, lambda file: picture.save(file, format=Image.registered_extensions()[path.suffix.lower()]))


def try_out(option: str, path: Path, picture: Any) -> None:
    """ValueError unless the format can hold `picture`, whose size and colours are those of the real one; nothing is kept."""
    from PIL import Image

    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))) as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError, RuntimeError, SystemError) as error:
        raise ValueError(f"{option} {path}: a picture of {picture.width}x{picture.height} cannot be written: {error}") from None


def flush(path: Path) -> None:
    """Makes a file's contents, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
