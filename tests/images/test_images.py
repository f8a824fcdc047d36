"""Sources of images: what is read, what is left out, and which mistakes are told before the first
step."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odelt_fast.images import open_source, pixels


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind, **options)
    return memory.getvalue()


def class_folders(root: Path, counts: dict[str, int], size=(8, 8), mode="RGB") -> Path:
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(seed, size, mode).save(root / name / f"{i}.png")
            seed += 1
    return root


def as_pixels(image: Image.Image) -> np.ndarray:
    array = np.asarray(image, np.float32)
    return (array[None] if array.ndim == 2 else array.transpose(2, 0, 1)) / 127.5 - 1


def write_parquet(
    path: Path,
    items,
    labels,
    names=None,
    image="image",
    label="label",
    label_type=None,
    metadata=True,
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields, columns = [pa.field(image, struct)], [pa.array(items, struct)]
    features = {image: {"_type": "Image"}}
    if label is not None:
        columns.append(pa.array(labels, label_type or pa.int64()))
        fields.append(pa.field(label, columns[-1].type))
        features[label] = (
            {"names": names, "_type": "ClassLabel"}
            if names
            else {"dtype": "int64", "_type": "Value"}
        )
    schema = pa.schema(fields)
    if metadata:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=3)
    return path


def rows(count: int, **options) -> list[dict]:
    return [{"bytes": encode(picture(i, **options)), "path": f"{i}.png"} for i in range(count)]


# The digits


def test_digits_are_the_real_ones_and_never_mirrored():
    source = open_source("digits")
    assert (
        len(source),
        source.num_classes,
        source.channels,
        source.image_size,
        source.flippable,
    ) == (1797, 10, 1, 8, False)
    images, labels = source.read_many(np.arange(1797))
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert (images.min(), images.max()) == (-1, 1)
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal((images[:, 0] + 1) * 8, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)


def test_digits_take_another_size_and_three_channels():
    image, _ = open_source("digits", image_size=16, channels=3).read(5)
    assert image.shape == (3, 16, 16)
    assert np.abs(image).max() <= 1
    with pytest.raises(ValueError, match="no split 'test'"):
        open_source("digits", split="test")


def test_reading_never_hands_out_the_stored_pixels():
    source = open_source("digits")
    image, _ = source.read(0)
    before = image.copy()
    image[:] = 7
    np.testing.assert_array_equal(source.read(0)[0], before)


# Folders


def test_class_folders_are_labels_in_sorted_order_with_nested_images(tmp_path):
    class_folders(tmp_path, {"dog": 2, "cat": 1})
    (tmp_path / "cat" / "deep" / "er").mkdir(parents=True)
    for suffix, kind in ((".JPG", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP")):
        (tmp_path / "cat" / "deep" / "er" / f"x{suffix}").write_bytes(encode(picture(9), kind))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_text("a trace of another system")
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert not source.skipped
    np.testing.assert_allclose(source.read(4)[0], as_pixels(picture(0)), atol=1e-6)
    np.testing.assert_array_equal(source.read(4, flip=True)[0], source.read(4)[0][:, :, ::-1])


def test_one_folder_of_images_is_one_class_and_grey_images_have_one_channel(tmp_path):
    class_folders(tmp_path, {"only": 3}, mode="L")
    source = open_source(tmp_path / "only")
    assert (source.class_names, source.channels, len(source)) == (("only",), 1, 3)
    np.testing.assert_allclose(source.read(1)[0], as_pixels(picture(1, mode="L")), atol=1e-6)
    assert open_source(tmp_path / "only", channels=3).read(1)[0].shape == (3, 8, 8)


def test_split_folders_are_splits_and_no_classes(tmp_path):
    class_folders(tmp_path / "train", {"a": 3, "b": 1})
    class_folders(tmp_path / "val", {"a": 1, "b": 1})
    assert len(open_source(str(tmp_path))) == 4
    assert len(open_source(str(tmp_path), split="validation")) == 2
    with pytest.raises(ValueError, match=r"no sub-folder for the split 'test'; it has train, val"):
        open_source(str(tmp_path), split="test")
    with pytest.raises(ValueError, match="split 'test'"):
        open_source(str(tmp_path / "train"), split="test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no images"),
        (lambda root: (root / "a").mkdir(), "class folder .*a has no images"),
        (
            lambda root: [class_folders(root, {"a": 1}), (root / "b").mkdir()],
            "class folder .*b has no images",
        ),
        (
            lambda root: [class_folders(root, {"a": 1}), picture(1).save(root / "lost.png")],
            "outside its class folders, such as lost.png",
        ),
        (
            lambda root: [(root / "a").mkdir(), (root / "a" / "x.png").write_bytes(b"no")],
            "none of the 1 images can be decoded; a/x.png",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_at_once(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nothing", "missing.parquet", "a/b/c", "", "two words"]
)
def test_a_path_that_does_not_exist_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(name)


def test_mixed_sizes_need_an_image_size(tmp_path):
    class_folders(tmp_path, {"a": 2})
    picture(5, (10, 8)).save(tmp_path / "a" / "z.png")
    with pytest.raises(ValueError, match=r"a/0.png is 8x8, a/z.png is 10x8; give an image size"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), image_size=4)
    assert source.read_many([0, 1, 2])[0].shape == (3, 3, 4, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"image_size": -8},
        {"image_size": 8.0},
        {"channels": 2},
        {"channels": True},
    ],
)
def test_impossible_sizes_are_told(options):
    with pytest.raises(ValueError, match="must be"):
        open_source("digits", **options)


def test_indices_outside_are_refused(tmp_path):
    source = open_source(str(class_folders(tmp_path, {"a": 2})))
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"index {index} is not within 0 to 1"):
            source.read(index)


# Pixels


def test_crop_takes_the_centred_square():
    image = picture(3, (14, 9))
    np.testing.assert_array_equal(
        pixels.decode_image(encode(image), None, 3), np.asarray(image)[:, 2:11].transpose(2, 0, 1)
    )


def test_resizing_keeps_a_plain_colour_and_averages_when_halving():
    image = picture(1, (32, 32))
    halved = pixels.decode_image(encode(image), 16, 3).transpose(1, 2, 0)
    blocks = np.asarray(image, np.float64).reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(halved - blocks).max() <= 1  # a box filter, rounded after rows and after columns
    plain = pixels.decode_image(encode(Image.new("RGB", (50, 37), (10, 200, 30))), 8, 3)
    np.testing.assert_array_equal(plain.reshape(3, -1), np.repeat([[10], [200], [30]], 64, axis=1))


@pytest.mark.parametrize(
    ("own", "wanted", "part"),  # width x height; height, width; the part that is kept
    [
        ((40, 20), (10, 20), (0, 0, 40, 20)),  # of the shape as it is
        ((40, 30), (10, 20), (0, 5, 40, 25)),  # too high
        ((50, 20), (10, 20), (5, 0, 45, 20)),  # too wide
        ((25, 17), (8, 12), (0, 0, 25, 17)),  # by less than a pixel
        ((20, 40), (6, 4), (0, 5, 20, 35)),
        ((10, 10), (20, 30), (0, 1, 10, 8)),  # enlarged
        ((50, 37), 8, (6, 0, 43, 37)),  # the square
        ((50, 37), (8, 8), (6, 0, 43, 37)),
    ],
)
def test_the_largest_centred_part_of_the_shape_is_kept(own, wanted, part):
    image = picture(1, own)
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    expected = image.crop(part)
    while expected.width >= 2 * width and expected.height >= 2 * height:
        halves = expected.width // 2, expected.height // 2
        expected = expected.resize(halves, Image.Resampling.BOX)
    expected = expected.resize((width, height), Image.Resampling.BICUBIC)
    found = pixels.decode_image(encode(image), wanted, 3)
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(2, (12, 6)), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert pixels.inspect_image(content)[:2] == upright.size
    expected = np.asarray(pixels.cropped(upright, 6)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels.decode_image(content, 6, 3), expected)


def test_damaged_exif_does_not_cost_the_image():
    content = encode(picture(2), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert pixels.decode_image(content, None, 3).shape == (3, 8, 8)


def test_transparent_parts_lie_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    decoded = pixels.decode_image(encode(image), None, 3)
    assert decoded[:, 0, 0].tolist() == [0, 0, 255]
    assert decoded[:, 1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((1, 0), 1)
    decoded = pixels.decode_image(encode(palette, transparency=0), None, 3)
    assert decoded[:, 0, 1].tolist() == [50, 60, 70]
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 0 .. 65535
    decoded = pixels.decode_image(encode(Image.fromarray(values)), None, 1)
    np.testing.assert_array_equal(decoded[0], values >> 8)
    assert pixels.decode_image(encode(Image.fromarray(values)), None, 3).shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["1", "LA", "CMYK", "P"])
def test_every_mode_gives_both_channel_counts(mode):
    content = encode(picture(4).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    for channels in (1, 3):
        assert pixels.decode_image(content, 4, channels).shape == (channels, 4, 4)


# What cannot be decoded


def bad_contents() -> dict[str, bytes]:
    jpeg, png = encode(picture(7, (64, 64)), "JPEG"), encode(picture(7, (64, 64)))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty.png": b"",
        "text.jpg": b"not an image at all",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "flipped.png": bytes(flipped),
        "half.webp": encode(picture(7, (64, 64)), "WEBP", lossless=True)[:500],
        "half.bmp": encode(picture(7, (64, 64)), "BMP")[:3000],
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    }


def test_undecodable_images_are_left_out_by_name_and_the_rest_stays_in_place(tmp_path):
    class_folders(tmp_path, {"a": 3, "b": 2}, (64, 64))
    for name, content in bad_contents().items():
        (tmp_path / "a" / name).write_bytes(content)
    with pytest.warns(UserWarning, match="8 of 13 images left out"):
        source = open_source(str(tmp_path))
    assert sorted(source.skipped) == sorted(f"a/{name}" for name in bad_contents())
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    for index in range(5):
        np.testing.assert_allclose(
            source.read(index)[0], as_pixels(picture(index, (64, 64))), atol=1e-6
        )


def test_a_class_of_undecodable_images_keeps_its_label(tmp_path):
    class_folders(tmp_path, {"a": 1, "b": 1, "c": 1})
    (tmp_path / "b" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="b/0.png"):
        source = open_source(str(tmp_path))
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [0, 2]


def test_a_decompression_bomb_is_left_out(tmp_path, monkeypatch):
    class_folders(tmp_path, {"a": 2})
    picture(3, (30, 30)).save(tmp_path / "a" / "bomb.png")
    for limit in (600, 100):  # where Pillow warns, where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = open_source(str(tmp_path))
        assert list(source.skipped) == ["a/bomb.png"]
        assert any(
            "a/bomb.png" in str(warning.message) and "pixels" in str(warning.message)
            for warning in caught
        )


def test_what_becomes_unreadable_later_is_replaced_and_named(tmp_path):
    source = open_source(str(class_folders(tmp_path, {"a": 2, "b": 2})))
    (tmp_path / "a" / "1.png").write_bytes(b"overwritten")
    with pytest.warns(UserWarning, match="a/1.png has become unreadable"):
        image, label = source.read(1)
    np.testing.assert_array_equal(image, source.read(2)[0])
    assert label == 1
    assert list(source.skipped) == ["a/1.png"]


def test_data_that_are_gone_end_in_one_clear_error(tmp_path):
    source = open_source(str(class_folders(tmp_path, {"a": 12})))
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    with (
        pytest.warns(UserWarning, match="unreadable"),
        pytest.raises(ValueError, match="8 neighbours have become unreadable"),
    ):
        source.read(0)


def test_the_check_is_remembered_until_the_data_change(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_REMEMBERED_FROM", 1)
    class_folders(tmp_path, {"a": 3})
    (tmp_path / "a" / "bad.png").write_bytes(b"bad")
    inspected = []
    inspect = pixels.inspect_image
    monkeypatch.setattr(
        pixels, "inspect_image", lambda encoded: (inspected.append(encoded), inspect(encoded))[1]
    )
    for expected in (4, 4):
        with pytest.warns(UserWarning, match="bad.png"):
            assert list(open_source(str(tmp_path)).skipped) == ["a/bad.png"]
        assert len(inspected) == expected
    for path in Path(os.environ["ODELT_FAST_CACHE"]).glob("*.json"):
        path.write_text('{"count": 4}')
    with pytest.warns(UserWarning, match="bad.png"):
        open_source(str(tmp_path))
    assert len(inspected) == 8  # a damaged memory is no memory
    picture(8).save(tmp_path / "a" / "bad.png")
    assert not open_source(str(tmp_path)).skipped


def test_a_remembered_check_still_refuses_mixed_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_REMEMBERED_FROM", 1)
    class_folders(tmp_path, {"a": 2})
    picture(8, (9, 9)).save(tmp_path / "a" / "z.png")
    open_source(str(tmp_path), image_size=4)
    with pytest.raises(ValueError, match=r"a/0\.png is 8x8, a/z\.png is 9x9"):
        open_source(str(tmp_path))


def test_sources_can_be_pickled_and_read_in_worker_processes(tmp_path):
    from torch.utils.data import DataLoader

    folder = open_source(str(class_folders(tmp_path / "folder", {"a": 5})))
    table = open_source(str(write_parquet(tmp_path / "x.parquet", rows(5), [0] * 5, ["a"])))
    for source in (folder, table):
        expected = source.read_many(range(5))[0]
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(source)).read_many(range(5))[0], expected
        )
        loader = DataLoader(
            [0, 1, 2, 3, 4], batch_size=2, num_workers=1, collate_fn=source.read_many
        )
        np.testing.assert_array_equal(np.concatenate([images for images, _ in loader]), expected)


def test_large_sets_are_decoded_on_every_read_with_the_same_result(tmp_path, monkeypatch):
    class_folders(tmp_path, {"a": 6}, (200, 200))
    kept, streamed = open_source(str(tmp_path)), open_source(str(tmp_path))
    monkeypatch.setattr(streamed, "_KEPT", 0)
    order, flips = [3, 3, 0, 5], [True, False, False, True]
    np.testing.assert_array_equal(
        kept.read_many(order, flips)[0], streamed.read_many(order, flips)[0]
    )
    assert streamed._kept is None
    assert streamed.read_many([])[0].shape == (0, 3, 200, 200)


# Parquet


def test_parquet_in_the_layout_of_datasets(tmp_path):
    source = open_source(
        str(
            write_parquet(
                tmp_path / "x.parquet", rows(7), [0, 1, 2, 0, 1, 2, 0], ["red", "green", "blue"]
            )
        )
    )
    assert (len(source), source.class_names, source.channels, source.image_size) == (
        7,
        ("red", "green", "blue"),
        3,
        8,
    )
    order = np.array([6, 0, 3, 3])
    images, labels = source.read_many(order, np.array([False, True, False, True]))
    expected = [as_pixels(picture(i)) for i in order]
    np.testing.assert_allclose(
        images,
        [expected[0], expected[1][:, :, ::-1], expected[2], expected[3][:, :, ::-1]],
        atol=1e-6,
    )
    assert labels.tolist() == [0, 0, 0, 0]


def test_parquet_without_metadata_finds_its_columns_by_name(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", rows(3), [0, 2, 1], image="jpg", label="class", metadata=False
    )
    assert open_source(str(path)).class_names == ("0", "1", "2")


def test_a_folder_of_parquet_files_has_splits_and_an_order(tmp_path):
    items = rows(6)
    (tmp_path / "data").mkdir()
    write_parquet(
        tmp_path / "data" / "train-00001-of-00002.parquet", items[2:4], [1, 0], ["a", "b"]
    )
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", items[:2], [0, 1], ["a", "b"])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", items[4:], [1, 1], ["a", "b"])
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_allclose(source.read(2)[0], as_pixels(picture(2)), atol=1e-6)
    assert open_source(str(tmp_path), split="test").labels.tolist() == [1, 1]
    with pytest.raises(
        ValueError, match="no Parquet file of the split 'validation'; it has test, train"
    ):
        open_source(str(tmp_path), split="validation")


def test_parquet_of_images_alone_is_one_class(tmp_path):
    source = open_source(str(write_parquet(tmp_path / "faces.parquet", rows(2), None, label=None)))
    assert source.class_names == ("faces",)


def test_large_parquet_is_unpacked_once_and_mapped(tmp_path, monkeypatch):
    from odelt_fast.images import parquet

    monkeypatch.setattr(parquet, "_IN_MEMORY", 0)
    path = write_parquet(tmp_path / "x.parquet", rows(7), [0] * 7, ["a"])
    for _ in range(2):
        source = open_source(str(path))
        assert isinstance(source._store._content[0], np.memmap)
        np.testing.assert_allclose(source.read(4)[0], as_pixels(picture(4)), atol=1e-6)
        monkeypatch.setattr(
            parquet.ParquetStore, "_unpack", None
        )  # the second time, nothing is unpacked


def test_parquet_leaves_out_bad_images_and_reads_files_only_below_its_folder(tmp_path):
    (tmp_path / "table").mkdir()
    picture(20).save(tmp_path / "table" / "inside.png")
    picture(21).save(tmp_path / "outside.png")
    items = rows(2)
    items[1]["bytes"] = items[1]["bytes"][:60]
    items += [{"bytes": None, "path": "inside.png"}, {"bytes": None, "path": "../outside.png"}]
    items += [
        {"bytes": None, "path": str(tmp_path / "outside.png")},
        {"bytes": None, "path": None},
        None,
    ]
    path = write_parquet(tmp_path / "table" / "x.parquet", items, list(range(7)), [*"abcdefg"])
    with pytest.warns(UserWarning, match="5 of 7 images left out"):
        source = open_source(str(path))
    assert source.labels.tolist() == [0, 2]
    assert "1.png (row 1 of x.parquet)" in source.skipped
    np.testing.assert_allclose(source.read(1)[0], as_pixels(picture(20)), atol=1e-6)


def test_wrong_labels_are_told_before_the_first_step(tmp_path):
    import pyarrow as pa

    path = tmp_path / "x.parquet"
    for labels, type_, message in [
        ([0, 1, -1], pa.int64(), r"row 2 has the label -1; allowed are 0 to 1"),
        ([0, 2, 1], pa.int64(), r"row 1 has the label 2; allowed are 0 to 1"),
        ([0, None, 1], pa.int64(), r"row 1 has no label"),
        (["0", "1", "1"], pa.string(), r"row 0 has the label '0'; allowed are a, b"),
        ([0.0, 1.0, 0.5], pa.float64(), r"of type double; whole numbers"),
        ([0, 2**64 - 1, 1], pa.uint64(), r"row 1 has the label 18446744073709551615"),
    ]:
        write_parquet(path, rows(3), labels, ["a", "b"], label_type=type_)
        with pytest.raises(ValueError, match=message):
            open_source(str(path))
    write_parquet(path, rows(3), [0, 2**40, 1])
    with pytest.raises(ValueError, match="row 1 has the label 1099511627776"):
        open_source(str(path))


def test_unusable_columns_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    for table, message in [
        ({"foto": [b"x"], "label": [0]}, r"has the columns foto, label; none .* can be the images"),
        (
            {"image": [b"x"], "colour": [0], "size": [1]},
            r"has the columns image, colour, size; none .* can be the labels",
        ),
        ({"image": [1], "label": [0]}, r"column image holds int64; encoded images are needed"),
        ({"image": [["a"]], "label": [0]}, r"column image holds list"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, r"has no rows"),
    ]:
        pq.write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=message):
            open_source(str(path))
    struct = write_parquet(path, rows(1), [0], ["a"]).read_bytes()
    for damaged in (b"", b"PAR1", struct[:-9], struct[:40] + b"\xff" * 40 + struct[80:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x.parquet|none of the"):
            open_source(str(path))


def test_damaged_metadata_is_no_metadata(tmp_path):
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "x.parquet", rows(2), [0, 1], ["a", "b"])
    table = pq.read_table(path)
    for text in (
        "{",
        "[]",
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
        "[" * 100_000,
    ):
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), path)
        assert open_source(str(path)).class_names == ("0", "1")


# Hugging Face datasets


@pytest.fixture
def dataset():
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    return datasets.Dataset.from_dict({"img": rows(4), "label": [0, 1, 1, 0]}, features=features)


def test_a_saved_data_set_is_opened_with_its_splits(tmp_path, dataset):
    import datasets

    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(
        tmp_path / "two"
    )
    for folder in ("one", "two"):
        source = pickle.loads(pickle.dumps(open_source(str(tmp_path / folder))))
        assert source.class_names == ("a", "b")
        images, labels = source.read_many([3, 1])
        np.testing.assert_allclose(
            images, [as_pixels(picture(3)), as_pixels(picture(1))], atol=1e-6
        )
        assert labels.tolist() == [0, 1]
    assert len(open_source(str(tmp_path / "two"), split="test")) == 1
    with pytest.raises(ValueError, match="no split 'nope'; it has train, test"):
        open_source(str(tmp_path / "two"), split="nope")


def test_an_id_is_loaded_by_datasets(tmp_path, dataset, monkeypatch):
    import datasets

    from odelt_fast.images.tables import open_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "user" / "name" / "train.parquet")
    for identifier in (
        "user/name",
        "user/name:default",
    ):  # datasets itself looks for a folder of that name first
        store, labels, names = open_dataset(identifier, "train")
        assert labels.tolist() == [0, 1, 1, 0]
        assert names == ("a", "b")
        assert store.encoded(2) == rows(4)[2]["bytes"]
    with pytest.raises(ValueError, match=r"'user/name' \(split 'test'\) cannot be loaded"):
        open_dataset("user/name", "test")


def test_an_id_that_cannot_be_loaded_is_one_clear_line(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        ValueError, match=r"the data set 'nobody/nothing' \(split 'train'\) cannot be loaded"
    ) as caught:
        open_source("nobody/nothing")
    assert "\n" not in str(caught.value)
