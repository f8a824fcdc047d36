"""Folders here and behind URLs (file systems of fsspec): listed, read, and written whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from odelt_fast.files import PARTIAL, one_line, write_atomically

T = TypeVar("T")

PAUSES = (1.0, 4.0)  # seconds before what failed over a network is tried again
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# A file there is seen when all of it has arrived. Elsewhere it is written under another name first.
_OBJECT_STORES = {*_EXTRAS, "abfs", "abfss", "az", "adl", "oci", "oss", "hf", "memory"}
# What trying again does not mend, by the names that botocore and google-auth give it, too.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, ImportError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
# What file systems call that which changes with a file.
_VERSIONS = ("size", "ETag", "etag", "mtime", "created", "LastModified", "last_modified", "blob_id")


def is_url(name: str) -> bool:
    return "://" in name or "::" in name


def system_of(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        ValueError: no such file system, or its package is missing.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        install = f"pip install 'odelt-fast[{extra}]'" if extra else one_line(error)
        raise ValueError(f"{url} needs a package that is not installed: {install}") from None
    except Exception as error:  # file systems raise most kinds
        raise ValueError(f"{url} cannot be opened: {reason(error)}") from None
    return system, path


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns. What fails is tried again after a pause, unless that cannot help."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:  # file systems raise most kinds
            if isinstance(error, _FINAL) or type(error).__name__ in _NO_CREDENTIALS:
                raise
        time.sleep(pause)
    return call()


def reason(error: BaseException) -> str:
    """Why a file system failed, in one line."""
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"there are no credentials for it ({one_line(error)})"
    if isinstance(error, FileNotFoundError):
        return f"it is not there ({one_line(error)})"
    return one_line(error)


class Version(NamedTuple):
    """Of a file: a text that changes with it, and its bytes."""

    text: str
    size: int


def version_of(file: str) -> Version:
    """That of a file, which is a path or a URL; any exception: it cannot be reached."""
    if not is_url(file):
        facts = os.stat(file)
        text = f"{os.path.realpath(file)} {facts.st_size} {facts.st_mtime_ns}"
        return Version(text, facts.st_size)
    system, path = system_of(file)

    def ask() -> Any:
        system.invalidate_cache(path)  # of a listing before
        return system.info(path)

    info = patiently(ask)
    if info.get("size") is None:
        raise OSError("its server does not say how large it is")
    text = f"{file} {[(name, str(info[name])) for name in _VERSIONS if name in info]}"
    return Version(text, int(info["size"]))


def read_part(file: str, start: int, size: int) -> bytes:
    """`size` bytes of a file, which is a path or a URL, from `start` on; fewer where it ends.

    Any exception: it cannot be reached. Over a network answers that are cut short are asked for
    again.
    """
    if not is_url(file):
        with open(file, "rb") as opened:
            opened.seek(start)
            return opened.read(size)
    system, path = system_of(file)

    def ask() -> bytes:
        content = bytes(system.cat_file(path, start=start, end=start + size))
        if len(content) < size:
            raise OSError(f"{len(content)} of {size} bytes came")
        return content

    return patiently(ask)


def copy_of(url: str, size: int, file: BinaryIO) -> None:
    """Writes a file behind a URL, of `size` bytes, to a file that has a name here.

    Any exception: it cannot be reached, or not be written.
    """
    system, path = system_of(url)

    def fetch() -> None:
        file.truncate(0)
        system.get_file(path, file.name)
        if os.path.getsize(file.name) != size:
            raise OSError(f"{os.path.getsize(file.name)} of {size} bytes came")

    patiently(fetch)


class Place:
    """A folder of files: a path, or a URL of any file system of fsspec (s3://bucket/folder).

    Args:
        name: as the user wrote it.

    Raises:
        ValueError: for every failure, in one line that names the file.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name).removeprefix("file://")
        self.path: Path | None = None
        if is_url(self.name):
            self._system, self._root = system_of(self.name.rstrip("/"))
            protocol = self._system.protocol
            protocols = {protocol} if isinstance(protocol, str) else set(protocol)
            self._whole_by_nature = bool(protocols & _OBJECT_STORES)
        else:
            self.path = Path(self.name).expanduser()

    def full(self, file: str) -> str:
        """The path or URL of a file."""
        return str(self.path / file) if self.path else f"{self.name.rstrip('/')}/{file}"

    def below(self, folder: str) -> Place:
        return Place(self.full(folder))

    def names(self) -> set[str]:
        """Names of the files and folders in it; none where it is not there."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return {entry.name for entry in self.path.iterdir()}
            return set()

        def listed() -> list[str]:
            self._system.invalidate_cache()
            return cast("list[str]", self._system.ls(self._root, detail=False))

        try:
            found = patiently(listed)
        except FileNotFoundError:
            return set()
        except Exception as error:  # file systems raise most kinds
            raise ValueError(f"{self.name} cannot be listed: {reason(error)}") from None
        return {name.rstrip("/").rpartition("/")[2] for name in found}

    def files(self) -> list[str]:
        """The files in it and below, sorted, as paths from it; of URLs only."""
        assert self.path is None
        root = f"{self._root}/"
        try:
            found = patiently(lambda: self._system.find(self._root))
        except FileNotFoundError:
            return []
        except Exception as error:  # file systems raise most kinds
            raise ValueError(f"{self.name} cannot be listed: {reason(error)}") from None
        return sorted(name.partition(root)[2] for name in found)

    def open(self, file: str) -> BinaryIO:
        """A file, to be read at any place."""
        if self.path is not None:
            return (self.path / file).open("rb")
        opened = self._remote(lambda: self._system.open(f"{self._root}/{file}", "rb"), file, "read")
        return cast(BinaryIO, opened)

    def read(self, file: str) -> bytes:
        """The contents of a file; FileNotFoundError where it is not there."""
        if self.path is not None:
            return (self.path / file).read_bytes()
        content = self._remote(lambda: self._system.cat_file(f"{self._root}/{file}"), file, "read")
        return bytes(content)

    def write(self, file: str, write: Callable[[BinaryIO], T], *, flushed: bool = False) -> T:
        """Calls write(file) on a file that appears complete, or not at all, whatever is killed.

        flushed: it also survives a loss of power (of folders here).
        """
        try:
            if self.path is not None:
                self.path.mkdir(parents=True, exist_ok=True)
                return write_atomically(self.path / file, write, flushed=flushed)
            with tempfile.NamedTemporaryFile(prefix=PARTIAL) as local:
                result = write(cast(BinaryIO, local))
                local.flush()
                self._remote(lambda: self._put(local.name, file), file, "written")
                return result
        except OSError as error:
            why = error.strerror or one_line(error)
            raise ValueError(f"{self.full(file)} cannot be written: {why}") from error

    def delete(self) -> None:
        """Removes the folder with all that is in it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.names():
            self._remote(lambda: self._system.rm(self._root, recursive=True), "", "removed")

    def _put(self, local: str, file: str) -> None:
        target = f"{self._root}/{file}"
        if self._whole_by_nature:
            self._system.put_file(local, target)
        else:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.put_file(local, f"{self._root}/{PARTIAL}{file}")
            self._system.mv(f"{self._root}/{PARTIAL}{file}", target)

    def _remote(self, call: Callable[[], T], file: str, done: str) -> T:
        try:
            return patiently(call)
        except FileNotFoundError:
            if done == "read":
                raise
            raise ValueError(f"{self.name} cannot be {done}: there is no such bucket") from None
        except Exception as error:  # file systems raise most kinds
            raise ValueError(f"{self.full(file)} cannot be {done}: {reason(error)}") from None
