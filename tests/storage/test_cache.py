"""Objects of the cache folder: bounded, the least recently used go, each is made once and whole."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest

from odelt_fast.files import PARTIAL
from odelt_fast.storage import cache
from odelt_fast.storage.cache import VARIABLE, copy, limit, object_of
from odelt_fast.storage.places import version_of
from tests.helpers.forked import start, wait
from tests.helpers.serving import HANG, until


@pytest.fixture(autouse=True)
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "350B")
    return tmp_path / "cache" / "objects"


def content(key: str) -> bytes:
    return key.encode() * 100


def writing(key: str) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content(key))


def taken(objects: Path) -> int:
    return sum(path.stat().st_size for path in objects.iterdir())


def get(key: str, make: Callable[[BinaryIO], object] | None = None) -> bytes | None:
    file = object_of(key, 100, make or writing(key))
    if file is None:
        return None
    with file:
        return file.read()


def test_the_least_recently_used_go_first(objects: Path) -> None:
    made = []
    for key in "abcabdace":
        time.sleep(0.002)  # times of files are as fine as the system's clock
        assert get(key, lambda file, key=key: made.append(key) or writing(key)(file)) == content(
            key
        )
        assert taken(objects) <= 350
    assert "".join(made) == "abcdce"  # d took the place of c, c that of b, e that of d


def test_an_object_that_goes_stays_with_those_who_have_opened_it() -> None:
    file = object_of("a", 100, writing("a"))
    for key in "bcd":
        assert get(key) == content(key)
    with pytest.raises(ZeroDivisionError):
        get("a", lambda file: 1 // 0)
    with file:
        assert file.read() == content("a")


def test_what_fails_while_it_is_made_is_not_there(objects: Path) -> None:
    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        get("a", half)
    assert taken(objects) == 0
    assert get("a") == content("a")


def test_there_may_be_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert object_of("a", 351, writing("a")) is None
    monkeypatch.setenv(VARIABLE, "0")
    assert get("a") is None
    monkeypatch.delenv(VARIABLE)
    assert limit() > 10**6
    assert get("a") == content("a")
    monkeypatch.setenv(VARIABLE, "-1GB")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be a number and a unit"):
        limit()


def test_of_several_processes_one_makes_an_object(objects: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    def make(file: BinaryIO) -> None:
        with journal.open("a") as lines:
            lines.write("made\n")
        time.sleep(0.1)
        writing("a")(file)

    def want() -> None:
        assert get("a", make) == content("a")

    def want_too_much() -> None:
        for key in "bcdef":
            assert get(key) in (content(key), None)

    log = tmp_path / "log"
    for work in (want, want_too_much):
        assert wait(start(work, 4, log), time.monotonic() + HANG, log)
    assert journal.read_text() == "made\n"
    assert taken(objects) <= 350


def test_an_object_may_be_made_of_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose lock is another, whatever their keys."""
    monkeypatch.setattr(cache, "_LOCKS", 1)

    def work() -> None:
        url = "memory://cache/a"
        fsspec.filesystem("memory").pipe("/cache/a", content("a"))

        def make(file: BinaryIO) -> None:
            with copy(url, version_of(url)) as copied:
                file.write(copied.read())

        assert get("made", make) == content("a")

    log = tmp_path / "log"
    assert wait(start(work, 1, log), time.monotonic() + HANG, log)


def test_what_a_killed_process_was_making_is_removed_and_made_by_another(
    objects: Path, tmp_path: Path
) -> None:
    def hang(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        time.sleep(HANG)

    (child,) = start(lambda: get("a", hang), 1, tmp_path / "log")
    until(lambda: any(path.stat().st_size for path in objects.glob(f"{PARTIAL}*")))
    assert get("b") == content("b")
    assert object_of("c", 300, writing("c")) is None  # a is being made
    assert len(list(objects.glob(f"{PARTIAL}*"))) == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert get("a") == content("a")
    assert not list(objects.glob(f"{PARTIAL}*"))
