"""Latents in a Lance table are those of the shards, wherever it lies and whatever was killed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from odelt_fast.images import is_latents, open_source
from odelt_fast.images.encode import encode_images
from odelt_fast.images.latents import LatentSource
from odelt_fast.train.data import Loader
from tests.helpers.object_store import object_store
from tests.images.test_images import class_folders

lance = pytest.importorskip("lance")


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as url:
        yield url


def encoder(images: Tensor) -> tuple[Tensor, Tensor]:
    mean = images[:, :2, ::2, ::2]
    return mean, mean.abs() / 4 + 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "images", {"a": 7, "b": 6})


def encode(folder: Path, out: str | Path, encoder=encoder) -> LatentSource:
    encode_images(open_source(folder), encoder, out, batch_size=3, shard_length=4, progress=False)
    assert is_latents(str(out))
    source = open_source(str(out))
    assert isinstance(source, LatentSource)
    return source


def batches(source: LatentSource) -> list[np.ndarray]:
    loader = Loader(source, 5, 8)
    return [part.numpy() for step in range(4) for part in loader.batch(step, np.arange(8))]


@pytest.mark.parametrize("where", ["here", "store"])
def test_a_table_of_latents_is_read_as_its_shards(
    where: str, folder: Path, store: str, tmp_path: Path
) -> None:
    shards = encode(folder, tmp_path / "shards")
    root = str(tmp_path) if where == "here" else store
    table = encode(folder, f"{root}/x.lance")
    assert table.class_names == ("a", "b")
    assert table.labels.tolist() == shards.labels.tolist()
    assert (table.latents, table.image_shape) == (shards.latents, shards.image_shape)
    for source in (table, pickle.loads(pickle.dumps(table))):
        for a, b in zip(batches(source), batches(shards)):
            assert np.array_equal(a, b)


def test_a_killed_encoding_goes_on(folder: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    calls: list[int] = []

    def dying(images: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(images))
        if len(calls) == 7:
            raise Killed
        return encoder(images)

    out = tmp_path / "x.lance"
    with pytest.raises(Killed):
        encode(folder, out, dying)
    with pytest.raises(ValueError, match=r"are not finished, 4 of 13 are there: run `odelt-fast"):
        open_source(out)
    calls.clear()
    calls += [0] * 10
    found = encode(folder, out, dying)
    assert sum(calls[11:]) == 2 * 9  # both views of the rest, after the first that tells the shape
    for a, b in zip(batches(found), batches(encode(folder, tmp_path / "whole.lance"))):
        assert np.array_equal(a, b)
    version = lance.dataset(str(out)).version
    encode(folder, out)  # is finished
    assert lance.dataset(str(out)).version == version


def test_other_tables_are_left_alone(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    out = tmp_path / "x.lance"
    lance.write_dataset(pa.table({"a": [1]}), str(out))
    with pytest.raises(ValueError, match="is a table of something else"):
        encode(folder, out)
    encode(folder, tmp_path / "y.lance")
    more = class_folders(tmp_path / "more", {"a": 7, "c": 6})
    with pytest.raises(ValueError, match=r"y\.lance holds other latents \(its class_names"):
        encode(more, tmp_path / "y.lance")
    assert lance.dataset(str(out)).to_table().to_pydict() == {"a": [1]}
