"""The same images in a folder, tar files, Parquet and Lance, here and in an object store: the same
batches, the same runs; what is lost on the way is told in one line."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from odelt_fast.images import open_source, parquet, pixels
from odelt_fast.images.encoded import EncodedImages
from odelt_fast.images.pixels import Unreachable
from odelt_fast.images.sources import ImageSource
from odelt_fast.storage import places
from odelt_fast.storage.cache import VARIABLE
from odelt_fast.storage.places import Place
from odelt_fast.train import main
from odelt_fast.train.data import Loader, open_images
from odelt_fast.train.loop import Trainer
from odelt_fast.train.run import train
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


@pytest.mark.parametrize(("kind", "room"), [*((kind, "1MB") for kind in KINDS), ("shards", "0")])
def test_a_network_with_faults_changes_nothing_but_time(
    kind: str, room: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, room)
    data = laid(kind, f"{store}/faults")
    FAULTS.counts.clear()
    with FAULTS.having(failing=0.05, truncated=0.01, stalled=0.02, stall=0.1):
        check_same(open_source(data), in_folder(tmp_path / "folder"))
        while FAULTS.counts.get("failing", 0) < 3:  # however few requests a reader makes
            Place(data).names()


@pytest.mark.parametrize("kind", ["shards", "parquet"])
@pytest.mark.parametrize("room", ["0", "60KB", "1MB"])
def test_copies_take_no_more_room_than_they_have(
    kind: str, room: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, of some shards, of all; the batches are the same."""
    monkeypatch.setenv(VARIABLE, room)
    monkeypatch.setattr(parquet, "_IN_MEMORY", 0 if room == "1MB" else 1 << 30)
    data = laid(kind, f"{store}/room")
    some = kind == "shards" and room == "60KB"
    with (
        pytest.warns(UserWarning, match="images of 2 of 3 shards are fetched one by one")
        if (some)
        else contextlib.nullcontext()
    ):
        source = open_source(data)
    check_same(source, in_folder(tmp_path / "folder"))
    objects = tmp_path / "cache" / "objects"
    kept = [path for path in objects.glob("*") if not path.name.startswith("lock")]
    counts = {"shards": {"0": 0, "60KB": 1, "1MB": 3}, "parquet": {"0": 0, "60KB": 2, "1MB": 3}}
    assert len(kept) == counts[kind][room]  # two tables, and what is unpacked of them
    assert sum(path.stat().st_size for path in kept) <= {"0": 0, "60KB": 60e3, "1MB": 1e6}[room]


def test_a_table_that_has_no_room_unpacked_is_told(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_IN_MEMORY", 0)
    monkeypatch.setenv(VARIABLE, "1KB")
    data = laid("parquet", f"{store}/unpacked")
    assert f"whose files may take 1 KB: {VARIABLE}=100GB allows more" in told(data)
    monkeypatch.setenv(VARIABLE, "much")
    assert f"{VARIABLE} must be a number and a unit" in told(laid("shards", f"{store}/unpacked"))


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
def test_what_has_vanished_ends_a_run_and_is_named(
    kind: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another image in its place would change the run unseen."""
    monkeypatch.setenv(VARIABLE, "0")
    data = laid(kind, f"{store}/vanishing")
    source = open_source(data)
    source = pickle.loads(pickle.dumps(source))  # as a worker has it
    Place(data).delete()
    with pytest.raises(Unreachable, match=r"cannot be (reached|read): ") as caught:
        source.read_many([1, 2])
    assert "vanishing" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("room", ["0", "1MB"])
def test_what_becomes_shorter_or_other_ends_a_run_and_is_named(
    room: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, room)
    data = laid("shards", f"{store}/shorter")
    source = open_source(data)
    source.read_many([59])
    source = pickle.loads(pickle.dumps(source))
    for copied in (tmp_path / "cache" / "objects").glob("*"):  # as others' copies take the room
        copied.unlink()
    whole = Place(data).read("part-2.tar")
    put(Place(data), "part-2.tar", whole[:3000])
    with pytest.raises(Unreachable, match=r"shards/part-2.tar cannot be reached: ") as caught:
        source.read_many([59])
    said = "requested range" if room == "0" else "it has changed"
    assert said in str(caught.value)


def test_a_run_whose_data_vanish_ends_with_one_line_and_goes_on_when_they_are_back(
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setattr(EncodedImages, "_KEPT", 0)
    data = laid("shards", f"{store}/gone")
    config = small_run(tmp_path / "run", data=data, checkpointing_steps=3)
    expected = train(replace(config, output_dir=tmp_path / "whole"))
    step = Trainer.step

    def losing(trainer: Trainer) -> torch.Tensor:
        if trainer.finished_steps == 4:
            Place(data).delete()
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", losing)
    monkeypatch.setattr(main, "parse", lambda arguments, prog: config)
    capfd.readouterr()
    assert main.main([]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert re.search(r"gone/shards/part-\d.tar cannot be reached: it is not there", said[0])
    monkeypatch.setattr(Trainer, "step", step)
    laid("shards", f"{store}/gone")
    found = train(replace(config, resume_from_checkpoint="latest"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("kind", KINDS)
def test_without_credentials_it_says_so(
    kind: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    data = laid(kind, f"{store}/secret")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert "there are no credentials for it" in told(data)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


# What is looked at beforehand


def test_of_many_images_a_sample_is_looked_at_and_the_others_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(in_folder(tmp_path / "folder"))
    files = sorted(folder.glob("*/*.png"))
    for broken in (files[12], files[13]):
        broken.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 10 images left out: 2/012.png"):
        source = open_source(folder, check_images=10)  # 0, 6, 12, ...
    assert len(source) == COUNT - 1
    assert source.remark.startswith("10 of the 60 images of ")
    assert "decoded beforehand, 1 cannot be" in source.remark
    with pytest.warns(UserWarning, match=r"2/013.png cannot be read .*the next one is used"):
        images, labels = source.read_many([12, 13])
    assert np.array_equal(images[0], images[1])
    assert labels.tolist() == [2, 2]
    with pytest.warns(UserWarning, match="2 of 60 images left out"):
        assert len(open_source(folder)) == COUNT - 2
    monkeypatch.setattr(pixels, "_MOST_CHECKED", 59)
    monkeypatch.setattr(pixels, "_SAMPLE", 20)
    with pytest.warns(UserWarning, match="1 of 20 images left out"):
        assert len(open_images(small_run(tmp_path, data=str(folder)))) == COUNT - 1
    with pytest.warns(UserWarning, match="2 of 60 images left out"):
        open_images(small_run(tmp_path, data=str(folder), check_images="all"))


def test_what_cannot_be_looked_at_beforehand_is_told() -> None:
    with pytest.raises(ValueError, match="no files of images, which --check-images 9 would"):
        open_source("digits", check_images=9)
    with pytest.raises(ValueError, match="check_images must be a whole number"):
        open_source("digits", check_images=0)


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
