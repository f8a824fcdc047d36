"""Folders here and behind URLs: what is written appears whole, failures are one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from odelt_fast.storage import places
from odelt_fast.storage.places import Place
from tests.helpers.object_store import Faults, object_store


@pytest.fixture(params=["folder", "file", "moved", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "s3":
        with object_store() as url:
            yield Place(f"{url}/some/folder")
        return
    if request.param == "memory":
        yield Place(f"memory://{tmp_path.name}")
        return
    # local:// is a file system of fsspec that is no object store
    prefix = {"folder": "", "file": "file://", "moved": "local://"}[request.param]
    yield Place(f"{prefix}{tmp_path}/some/folder")


def put(place: Place, name: str, content: bytes) -> None:
    place.write(name, lambda file: file.write(content))


def test_what_is_written_is_there(place: Place) -> None:
    assert place.names() == set()
    put(place, "a", b"one")
    put(place, "b", b"")
    put(place, "a", b"two")
    put(place.below("c"), "d", b"below")
    assert place.names() == {"a", "b", "c"}
    assert (place.read("a"), place.read("b"), place.below("c").read("d")) == (b"two", b"", b"below")
    with place.open("a") as file:
        file.seek(1)
        assert file.read() == b"wo"
    with pytest.raises(FileNotFoundError):
        place.read("z")
    place.delete()
    assert place.names() == set()


def test_what_fails_while_it_is_written_is_not_there(place: Place) -> None:
    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("stopped")

    put(place, "a", b"before")
    for name in ("a", "b"):
        with pytest.raises(KeyError):
            place.write(name, half)
    assert place.names() == {"a"}
    assert place.read("a") == b"before"


def test_requests_that_fail_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PAUSES", (0.0,) * 8)
    faults = Faults(failing=0.2, stalled=0.05, stall=0.05, seed=1)
    with object_store(faults) as url:
        place = Place(f"{url}/x")
        for number in range(10):
            put(place, f"{number}", bytes([number]) * 1000)
        assert place.names() == set(map(str, range(10)))
        assert all(place.read(f"{number}") == bytes([number]) * 1000 for number in range(10))
    assert faults.counts["failing"] > 2


@pytest.mark.parametrize("name", ["s3://no-such-bucket/x", "s3://no-such-bucket"])
def test_a_bucket_that_is_not_there_is_named(name: str) -> None:
    with object_store():
        assert Place(name).names() == set()
        with pytest.raises(ValueError, match="cannot be written: there is no such bucket"):
            put(Place(name), "a", b"")


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written: "):
        put(Place(tmp_path / "file"), "a", b"")
