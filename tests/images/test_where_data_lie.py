"""The same images in a folder, tar files, Parquet and Lance, here and in an object store: the same
batches, the same runs; what is lost on the way is told in one line."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from odelt_fast.images import open_source
from odelt_fast.images.sources import ImageSource
from odelt_fast.storage import places
from odelt_fast.storage.places import Place
from odelt_fast.train.data import Loader
from odelt_fast.train.loop import Trainer
from tests.helpers.object_store import Faults, object_store
from tests.helpers.training import small_run
from tests.images.test_images import encode, picture

KINDS = ["shards", "parquet", "lance"]
COUNT = 60
FAULTS = Faults()


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSES", (0.0,) * 4)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store(FAULTS) as url:
        yield url


def images() -> list[tuple[bytes, int]]:
    """Encoded images and labels, by class."""
    labels = sorted(i % 10 for i in range(COUNT))
    return [(encode(picture(i, mode="L")), label) for i, label in enumerate(labels)]


def in_folder(folder: Path) -> str:
    for i, (content, label) in enumerate(images()):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / f"{i:03d}.png").write_bytes(content)
    return str(folder)


def put(place: Place, name: str, content: bytes) -> None:
    place.write(name, lambda file: file.write(content))


def laid(kind: str, root: str) -> str:
    """The images as `kind` below a path or URL; the name of the data."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = Place(f"{root}/{kind}")
    table = pa.table({"image": [c for c, _ in images()], "label": [y for _, y in images()]})
    if kind == "parquet":
        for part in range(2):
            memory = io.BytesIO()
            pq.write_table(table.slice(part * 30, 30), memory, row_group_size=7)
            put(place, f"train-{part}.parquet", memory.getvalue())
    elif kind == "lance":
        pytest.importorskip("lance").write_dataset(
            table, place.full("x.lance"), max_rows_per_file=25
        )
    else:
        for part in range(3):
            memory = io.BytesIO()
            with tarfile.open(fileobj=memory, mode="w") as tar:
                for i, (content, label) in list(enumerate(images()))[part * 20 : part * 20 + 20]:
                    for ending, data in (("png", content), ("cls", str(label).encode())):
                        info = tarfile.TarInfo(f"{i:03d}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            put(place, f"part-{part}.tar", memory.getvalue())
    return place.name


def batches(source: ImageSource) -> list[np.ndarray]:
    loader = Loader(source, 3, 16)
    return [part.numpy() for step in range(6) for part in loader.batch(step, np.arange(16))]


def check_same(source: ImageSource, folder: str) -> None:
    expected = open_source(folder)
    assert source.class_names == expected.class_names
    assert source.labels.tolist() == expected.labels.tolist()
    for other in (source, pickle.loads(pickle.dumps(source))):
        for a, b in zip(batches(other), batches(expected)):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["here", "store"])
def test_batches_are_those_of_a_folder(kind: str, where: str, store: str, tmp_path: Path) -> None:
    data = laid(kind, str(tmp_path) if where == "here" else f"{store}/batches")
    check_same(open_source(data), in_folder(tmp_path / "folder"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_with_faults_changes_nothing_but_time(
    kind: str, store: str, tmp_path: Path
) -> None:
    data = laid(kind, f"{store}/faults")
    FAULTS.counts.clear()
    with FAULTS.having(failing=0.05, truncated=0.01, stalled=0.02, stall=0.1):
        check_same(open_source(data), in_folder(tmp_path / "folder"))
        while FAULTS.counts.get("failing", 0) < 3:  # however few requests a reader makes
            Place(data).names()


def run(folder: Path, data: str) -> list[torch.Tensor]:
    """The weights of a run of six steps that begins anew at the third."""
    config = small_run(folder, data=data)
    first = Trainer(config)
    for _ in range(3):
        first.step()
    first.save()
    again = Trainer(config)
    assert again.resume("latest")
    for _ in range(3):
        again.step()
    return list(again.model.parameters())


@pytest.mark.parametrize("kind", ["shards", "lance"])
def test_training_is_that_from_a_folder(kind: str, store: str, tmp_path: Path) -> None:
    expected = run(tmp_path / "a", in_folder(tmp_path / "folder"))
    found = run(tmp_path / "b", laid(kind, f"{store}/training"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# What is told, in one line


def told(data: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_vanished_ends_a_run_and_is_named(kind: str, store: str) -> None:
    """Another image in its place would change the run unseen."""
    data = laid(kind, f"{store}/vanishing")
    source = open_source(data)
    source.__dict__.pop("_kept", None)
    source._KEPT = 0  # type: ignore[attr-defined]
    Place(data).delete()
    if kind == "parquet":  # has a copy
        source.read_many([1, 2])
        return
    with pytest.raises(ValueError, match=r"cannot be (reached|read): ") as caught:
        source.read_many([1, 2])
    assert "vanishing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_off_is_named(store: str) -> None:
    data = laid("shards", f"{store}/cut")
    whole = Place(data).read("part-1.tar")
    put(Place(data), "part-1.tar", whole[: len(whole) // 2 + 100])
    assert f"{data}/part-1.tar cannot be read: " in told(data)


def test_what_is_no_data_is_told(store: str, tmp_path: Path) -> None:
    put(Place(f"{store}/texts"), "a.txt", b"no image")
    assert "is a URL of no known kind" in told(f"{store}/texts")
    assert "is a URL of no known kind" in told(f"{store}/nothing")
    assert "is a URL of no known kind" in told("s3://no-such-bucket/x")
    assert "x.parquet cannot be read: it is not there" in told(f"{store}/x.parquet")
    assert "x.tar cannot be read: it is not there" in told(f"{store}/x.tar")
    (tmp_path / "x.lance" / "_versions").mkdir(parents=True)
    if "pip install" not in (said := told(str(tmp_path / "x.lance"))):
        assert said.startswith(f"the table {tmp_path}/x.lance cannot be read: ")
