"""WebDataset shards: tar files of samples, on a disk or behind a URL."""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import tarfile
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from odelt_fast.images import open_source, webdataset
from odelt_fast.storage import places
from odelt_fast.train.data import Loader
from tests.images.test_images import as_pixels, encode, picture

IMAGES = [encode(picture(i)) for i in range(6)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def shard(members, **options) -> bytes:
    """A tar file of pairs of name and content."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return memory.getvalue()


def samples(rows, label=lambda i: {"cls": str(i % 3).encode()}, image="png"):
    """Members of samples with these pictures."""
    members = []
    for i in rows:
        parts = {image: IMAGES[i]} | label(i)
        members += [(f"{i:04d}.{ending}", content) for ending, content in parts.items()]
    return members


def written(path: Path, members, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard(members, **options))
    return str(path)


def same(source, order=range(6), labels=(0, 1, 2, 0, 1, 2)) -> None:
    shuffled = np.random.default_rng(0).permutation(len(order))
    images, found = source.read_many(shuffled)
    expected = np.array([as_pixels(picture(i)) for i in order])
    np.testing.assert_allclose(images, expected[shuffled], atol=1e-6)
    assert found.tolist() == np.array(labels)[shuffled].tolist()


@pytest.mark.parametrize(
    "kind", ["file", "folder", "braces", "list", "glob", "url", "memory", "urls", "cached"]
)
def test_shards_are_read_at_any_place_wherever_they_lie(tmp_path, kind):
    for i in range(2):
        content = written(tmp_path / "data" / f"part-00{i}.tar", samples(range(3 * i, 3 * i + 3)))
        fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{i}.tar", Path(content).read_bytes())
    one = written(tmp_path / "one.tar", samples(range(6)))
    data = {
        "file": one,
        "folder": f"{tmp_path}/data",
        "braces": f"{tmp_path}/data/part-{{000..001}}.tar",
        "list": f"{tmp_path}/data/{{part-000,part-001}}.tar",
        "glob": f"{tmp_path}/data/*.tar",
        "urls": f"memory://{tmp_path.name}/*.tar",
        "url": f"file://{tmp_path}/data/part-{{000..001}}.tar",
        "memory": f"memory://{tmp_path.name}/{{0..1}}.tar",
        "cached": f"simplecache::file://{tmp_path}/data/part-{{000..001}}.tar",
    }[kind]
    source = open_source(data)
    assert (source.class_names, source.image_shape) == (("0", "1", "2"), (3, 8, 8))
    same(source)
    same(pickle.loads(pickle.dumps(source)))
    if kind == "url":
        same(open_source(Path(data)))  # which loses a slash


def test_members_are_indexed_once(tmp_path, monkeypatch):
    data = written(tmp_path / "x.tar", samples(range(6)))
    read, indexed = webdataset._read_index, []
    monkeypatch.setattr(webdataset, "_read_index", lambda file: (indexed.append(1), read(file))[1])
    for _ in range(2):
        same(open_source(data))
    assert len(indexed) == 1
    written(tmp_path / "x.tar", samples(range(5)))
    assert len(open_source(data)) == 5
    assert len(indexed) == 2


def test_batches_depend_on_seed_step_and_row_alone(tmp_path):
    """The order of a shuffled stream would depend on where a run was resumed."""
    for i in range(2):
        written(tmp_path / f"{i}.tar", samples(range(3 * i, 3 * i + 3)))
    whole, parts = (Loader(open_source(str(tmp_path)), 7, 4) for _ in range(2))
    images, labels = whole.batch(5, np.arange(4))
    for row in (3, 1, 0, 2):
        image, label = parts.batch(5, np.array([row]))
        np.testing.assert_array_equal(image[0], images[row])
        assert label == labels[row]


# Labels


def as_json(**values):
    return lambda i: {"json": json.dumps({k: v(i) for k, v in values.items()}).encode()}


@pytest.mark.parametrize(
    ("label", "column", "names", "numbers"),
    [
        (lambda i: {"cls": b"%d\n" % (2 - i)}, None, ("0", "1", "2"), [2, 1, 0]),
        (lambda i: {"cls": [b"owl", b"cat", b"owl"][i]}, None, ("cat", "owl"), [1, 0, 1]),
        (lambda i: {"cls": [b"k10", b"k2", b"7"][i]}, None, ("7", "k2", "k10"), [2, 1, 0]),
        (as_json(label=lambda i: i), None, ("0", "1", "2"), [0, 1, 2]),
        (as_json(cls=lambda i: "ba"[i % 2], text=str), None, ("a", "b"), [1, 0, 1]),
        (as_json(fine=lambda i: i, coarse=lambda i: i // 2), "coarse", ("0", "1"), [0, 0, 1]),
        (as_json(good=lambda i: i == 1), "good", ("false", "true"), [0, 1, 0]),
        (lambda i: {"txt": b"a cat", "cls": b"%d" % i}, "txt", ("a cat",), [0, 0, 0]),
        (
            lambda i: {"cls": b"0", "json": b'{"label": %d}' % i},
            "label",
            ("0", "1", "2"),
            [0, 1, 2],
        ),
        (as_json(text=str), "", ("faces",), [0, 0, 0]),
        (lambda i: {}, None, ("faces",), [0, 0, 0]),
    ],
)
def test_labels_stand_in_cls_or_json(tmp_path, label, column, names, numbers):
    data = written(tmp_path / "faces.tar", samples(range(3), label))
    source = open_source(data, label_column=column)
    assert source.class_names == names
    same(source, range(3), numbers)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: {"cls": b"1"} if i else {}, r"0000.png of x.tar has no label: .cls, in .json"),
        (as_json(text=str), r"0000.png of x.tar has no label: .* --label-column names; '' for one"),
        (as_json(label=lambda i: None), "has no label"),
        (as_json(label=lambda i: -i), "0001.png of x.tar has the label -1; allowed are 0 to"),
        (as_json(label=lambda i: 10**30), "has the label 4611686018427387904; allowed are 0 to"),
        (as_json(label=lambda i: 0.5), "has the label 0.5; whole numbers from 0, texts or"),
        (as_json(label=lambda i: [True, 1, 1][i]), "0001.png of x.tar has the label 1; whole"),
        (as_json(label=lambda i: [i]), r"has the label \[0\]; whole numbers"),
        (lambda i: {"json": b'{"label": '}, "0000.png: its .json is damaged"),
        (lambda i: {"json": b"[" * 100_000}, "0000.png: its .json is damaged"),
        (lambda i: {"cls": b""}, "has the label ''; allowed are texts that are not empty"),
        (lambda i: {"png.jpg": IMAGES[i]}, "several images, png, png.jpg: .* --image-column"),
    ],
)
def test_what_gives_no_label_or_image_is_told(tmp_path, label, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(written(tmp_path / "x.tar", samples(range(3), label)))
    assert "\n" not in str(caught.value)


def test_an_image_among_several_is_named_by_its_ending(tmp_path):
    def other(i):
        return {"mask.png": IMAGES[5 - i], "cls": b"0"}

    data = written(tmp_path / "x.tar", samples(range(3), other))
    same(open_source(data, image_column="png"), [0, 1, 2], [0] * 3)
    same(open_source(data, image_column="mask.png"), [5, 4, 3], [0] * 3)
    with pytest.raises(ValueError, match=r"no samples with images \.jpg"):
        open_source(data, image_column="jpg")


# What is left out


def test_what_is_no_sample_is_counted_and_bad_images_are_named(tmp_path):
    members = [*samples(range(3)), ("9.cls", b"1"), ("README", b""), ("a/._0000.png", b"trace")]
    members += [("bad.jpg", b"no image"), ("bad.cls", b"2")]
    written(tmp_path / "data" / "train-0.tar", members)
    with tarfile.open(tmp_path / "data" / "train-1.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, content in samples([3]):
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    written(tmp_path / "data" / "extra.tar", samples([4]))
    (tmp_path / "data" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match=r"1 of 5 images left out: bad.jpg of train-0.tar") as said:
        source = open_source(str(tmp_path / "data"))
    same(source, range(4), [0, 1, 2, 0])
    text = str(said[0].message)
    for kind in (
        *("1 sample without image", "1 without ending in a shard", "1 hidden in a shard"),
        *("1 no regular file in a shard", "1 .txt", "1 .tar of no split"),
    ):
        assert kind in text


def test_shards_have_splits(tmp_path):
    written(tmp_path / "x-train-0.tar", samples(range(4)))
    written(tmp_path / "x-val-0.tar", samples([4, 5]))
    assert len(open_source(str(tmp_path))) == 4
    same(open_source(str(tmp_path), split="validation"), [4, 5], [1, 2])
    with pytest.raises(ValueError, match="no tar file of the split 'test'; it has train, valid"):
        open_source(str(tmp_path), split="test")
    with pytest.raises(ValueError, match="has no split 'test'"):
        open_source(str(tmp_path / "x-val-0.tar"), split="test")


def test_a_shard_that_is_not_whole_is_no_shorter_data_set(tmp_path):
    """tarfile takes whatever is no header for the end."""
    good = shard(samples(range(6)))
    end = len(good.rstrip(b"\0")) // 512 * 512 + 512
    third = good.index(b"0003.png") - good.index(b"0003.png") % 512
    cases = {
        good[:end]: "cut off",
        good[: end - 700]: "unexpected end of data|cut off",
        good[: third + 100]: "cut off",
        good[:third] + b"\xff" * 512 + good[third + 512 :]: f"damaged at byte {third}",
        good[:end] + bytes(1024) + good: "archives were joined",
        b"": "empty|cut off",
        b"not a tar file" * 99: "invalid header|damaged|truncated|bad checksum",
    }
    for content, message in cases.items():
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match=f"shard .*x.tar cannot be read: .*({message})"):
            open_source(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(good)
    same(open_source(str(tmp_path / "x.tar")))


def test_formats_of_tar_with_long_names_are_read(tmp_path):
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(f"{'deep/' * 40}ü {name}", content) for name, content in samples(range(3))]
        same(open_source(written(tmp_path / "x.tar", members, format=format_)), range(3), range(3))
    with pytest.raises(ValueError, match=r"has 0000.png twice"):
        open_source(written(tmp_path / "x.tar", [*samples([0]), *samples([0])]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{base}/missing.tar", "does not exist"),
        ("{base}/part-{{0..3}}.tar", r"shard .*part-0.tar cannot be read: .*No such file"),
        ("memory://nowhere/x.tar", "shard memory://nowhere/x.tar cannot be read"),
        ("{base}/*.tar", r"no file matches .*\*.tar"),
        ("memory://nowhere/*.tar", r"no file matches memory://nowhere/\*.tar"),
        ("nonsense://host/x.tar", "cannot be read: .*nonsense"),
        ("https://host/x.png", "is a URL of no known kind: give those of .tar or .parquet files"),
        ("{base}/{{0..99999999999}}.tar", "too many shards"),
        ("{base}/x.tar.gz", "is a file of no known kind"),
    ],
)
def test_shards_that_are_not_there_are_told(tmp_path, data, message):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(data.format(base=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_system_that_fails_is_tried_again_and_costs_no_image(tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe(f"/{tmp_path.name}/x.tar", shard(samples(range(6))))
    monkeypatch.setattr(places, "PAUSES", (0, 0))
    monkeypatch.setenv("ODELT_FAST_CACHE_SIZE", "0")
    cat, failures = type(system).cat_file, iter([1, 1, 0, 1, 0] + [0] * 99)

    def cat_file(self, *arguments, **options):
        if next(failures):
            raise TimeoutError("the network is away")
        return cat(self, *arguments, **options)

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    same(open_source(f"memory://{tmp_path.name}/x.tar"))
    failures = iter([1] * 99)
    with pytest.raises(ValueError, match=r"x.tar cannot be reached: the network is away"):
        open_source(f"memory://{tmp_path.name}/x.tar")


class _Ranges(SimpleHTTPRequestHandler):
    """Files with the Range header, which the standard handler ignores."""

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        found = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (
            (int(part or len(content) - 1) for part in found.groups()) if found else (0, 0)
        )
        self.send_response(206 if found else 200)
        part = content[first : last + 1] if found else content
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder: Path):
    handler = functools.partial(_Ranges, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_are_read_over_http(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    for i in range(2):
        written(tmp_path / f"part-{i}.tar", samples(range(3 * i, 3 * i + 3)))
    with served(tmp_path) as url:
        same(open_source(f"{url}/part-{{0..1}}.tar"))
