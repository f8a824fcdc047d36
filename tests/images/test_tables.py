"""Tables of images as other tools write them: their types of images and labels, and which columns
are which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odelt_fast.evaluation import existing
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.images import open_source
from tests.images.test_images import as_pixels, encode, picture, rows, write_parquet

ENCODED = [encode(picture(i)) for i in range(4)]


def table(tmp_path, images, labels=None, **more):
    columns = {"image": images} | ({} if labels is None else {"label": labels}) | more
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    return str(tmp_path / "x.parquet")


def same(source, order) -> None:
    expected = [as_pixels(picture(i)) for i in order]
    np.testing.assert_allclose(source.read_many(range(len(order)))[0], expected, atol=1e-6)


@pytest.mark.parametrize("text", ["string", "large_string", "string_view"])
@pytest.mark.parametrize("binary", ["binary", "large_binary", "binary_view"])
def test_structs_of_any_layout_are_images(tmp_path, text, binary):
    """Without bytes, the path names the image: it was not looked at when it was a large_string."""
    (tmp_path / "1.png").write_bytes(ENCODED[1])
    struct = pa.struct([("bytes", getattr(pa, binary)()), ("path", getattr(pa, text)())])
    items = [{"bytes": ENCODED[0], "path": "0.png"}, {"bytes": None, "path": "1.png"}]
    same(open_source(table(tmp_path, pa.array(items, struct))), [0, 1])
    items[1]["bytes"] = b"damaged"
    with pytest.warns(UserWarning, match=r"1 of 2 images left out: 1.png \(row 1 of x.parquet\)"):
        open_source(table(tmp_path, pa.array(items, struct)))


@pytest.mark.parametrize("type_", ["binary", "large_binary", "binary_view", "dictionary", "fixed"])
def test_columns_of_bytes_of_any_layout_are_images(tmp_path, type_):
    bitmaps = [encode(picture(i), "BMP") for i in range(3)]
    if type_ == "dictionary":
        column = pa.array(bitmaps).dictionary_encode()
    else:
        kind = pa.binary(len(bitmaps[0])) if type_ == "fixed" else getattr(pa, type_)()
        column = pa.array(bitmaps, kind)
    same(open_source(table(tmp_path, column, pa.array([0, 1, 1]))), [0, 1, 2])


@pytest.mark.parametrize("layout", ["string", "large_string", "string_view", "dictionary"])
def test_texts_are_labels_in_natural_order(tmp_path, layout):
    texts = ["kind 10", "cat", "kind 2", "cat"]
    plain = pa.array(texts)
    labels = plain.dictionary_encode() if layout == "dictionary" else plain.cast(layout)
    source = open_source(table(tmp_path, pa.array(ENCODED), labels))
    assert source.class_names == ("cat", "kind 2", "kind 10")
    assert source.labels.tolist() == [2, 0, 1, 0]


def test_numbered_texts_are_ordered_as_numbers(tmp_path):
    labels = pa.array(["10", "9", "0", "10"])
    source = open_source(table(tmp_path, pa.array(ENCODED), labels))
    assert source.class_names == ("0", "9", "10")
    assert source.labels.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("values", [[True, False, True], [True] * 3, [False] * 3])
def test_truth_values_are_two_classes_whatever_occurs(tmp_path, values):
    source = open_source(table(tmp_path, pa.array(ENCODED[:3]), pa.array(values)))
    assert source.class_names == ("false", "true")
    assert source.labels.tolist() == [int(value) for value in values]


def test_dictionaries_of_numbers_are_numbers(tmp_path):
    labels = pa.array([3, 0, 3, 1]).dictionary_encode()
    source = open_source(table(tmp_path, pa.array(ENCODED), labels))
    assert source.labels.tolist() == [3, 0, 3, 1]
    assert source.class_names == ("0", "1", "2", "3")


def test_texts_are_numbered_over_all_files_and_by_the_names_that_the_table_knows(tmp_path):
    for i, labels in enumerate((["b", "c"], ["a", "c"])):
        items = pa.array(ENCODED[2 * i : 2 * i + 2])
        place = tmp_path / f"train-{i}.parquet"
        pq.write_table(pa.table({"image": items, "label": pa.array(labels)}), place)
    source = open_source(str(tmp_path))
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [1, 2, 0, 2]
    names = ["c", "b", "a"]
    path = write_parquet(tmp_path / "x.parquet", rows(2), ["a", "c"], names, label_type=pa.string())
    source = open_source(str(path))
    assert (source.class_names, source.labels.tolist()) == (("c", "b", "a"), [2, 0])
    path = write_parquet(tmp_path / "train-2.parquet", rows(2), [0, 1], metadata=False)
    with pytest.raises(ValueError, match="differ in the types of their labels"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array(["a", None]), "row 1 has no label"),
        (pa.array([True, None]), "row 1 has no label"),
        (pa.array(["a", ""]), "row 1 has the label ''; allowed are texts that are not empty"),
        (pa.array([[0], [1]]), "of type list"),
        (pa.array([0.5, 1.0]), "of type double; whole numbers from 0, texts or truth values"),
        (pa.array([b"a", b"b"]), "of type binary"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        open_source(table(tmp_path, pa.array(ENCODED[:2]), labels))


def cifar100(tmp_path, features=True):
    """Columns as the Hub's CIFAR-100 has them."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"img": pa.array(rows(3), struct), "fine_label": [2, 0, 1], "coarse_label": [1, 0, 0]}
    metadata = {
        "img": {"_type": "Image"},
        "fine_label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["insect", "mammal"], "_type": "ClassLabel"},
    }
    made = pa.table(columns)
    if features:
        info = {"info": {"features": metadata}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(made, tmp_path / "x.parquet")
    return str(tmp_path / "x.parquet")


def test_of_several_columns_of_labels_one_is_to_be_named(tmp_path):
    path = cifar100(tmp_path)
    message = r"several columns of labels, fine_label, coarse_label: choose one with --label-column"
    with pytest.raises(ValueError, match=message):
        open_source(path)
    fine, coarse = (open_source(path, label_column=f"{kind}_label") for kind in ("fine", "coarse"))
    assert (fine.class_names, fine.labels.tolist()) == (("ape", "bee", "cow"), [2, 0, 1])
    assert (coarse.class_names, coarse.labels.tolist()) == (("insect", "mammal"), [1, 0, 0])
    with pytest.raises(ValueError, match="no column 'label'; it has img, fine_label, coarse_label"):
        open_source(path, label_column="label")
    path = cifar100(tmp_path, features=False)
    with pytest.raises(ValueError, match=r"none of them can be the labels .* --label-column"):
        open_source(path)
    assert open_source(path, label_column="fine_label").labels.tolist() == [2, 0, 1]


def test_labels_are_asked_for_where_they_are_needed(tmp_path):
    """Images that exist are compared without labels: --label-column is of --data there."""
    path = Path(cifar100(tmp_path))
    assert len(existing._open(path, Evaluation(data="digits"))) == 3
    with pytest.raises(ValueError, match="several columns of labels"):
        existing._open(path, Evaluation(data="digits", metrics=("frechet", "recognised")))
    assert open_source(path, label_column="").class_names == ("x",)


def test_a_column_of_images_of_any_name_can_be_named(tmp_path):
    path = table(tmp_path, pa.array(ENCODED), pa.array([0] * 4), photo=pa.array(ENCODED[::-1]))
    same(open_source(path, image_column="photo"), [3, 2, 1, 0])
    same(open_source(path), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="column label holds int64; encoded images are needed"):
        open_source(path, image_column="label")


def test_columns_of_data_sets_can_be_named(tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features(
        {"photo": datasets.Image(), "other": datasets.Image(), "fine": labels, "coarse": labels}
        | {"text": datasets.Value("string"), "good": datasets.Value("bool")}
    )
    columns = {"photo": rows(2), "other": rows(4)[2:], "fine": [1, 0], "coarse": [0, 0]}
    columns |= {"text": ["x", "y"], "good": [False, True]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    data = str(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"columns of images, photo, other: .* --image-column"):
        open_source(data)
    source = open_source(data, image_column="other", label_column="fine")
    same(source, [2, 3])
    assert source.labels.tolist() == [1, 0]
    for column, names in (("text", ("x", "y")), ("good", ("false", "true"))):
        assert open_source(data, image_column="photo", label_column=column).class_names == names


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_columns_of_what_has_none_are_refused(tmp_path, data):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    picture(1).save(tmp_path / "folder" / "a" / "0.png")
    place = data if data == "digits" else str(tmp_path / data)
    for columns in ({"label_column": "label"}, {"image_column": "image"}):
        with pytest.raises(ValueError, match=r"is no table: --image-column and --label-column"):
            open_source(place, **columns)


def test_files_beside_tables_are_said_and_links_followed(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    for name in ("data/train-0.parquet", "data/deep/train-1.parquet", "data/extra.parquet"):
        write_parquet(tmp_path / name, rows(2), [0, 1], ["a", "b"])
    write_parquet(tmp_path / "store" / "train-2.parquet", rows(2), [0, 1], ["a", "b"])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "README.md").write_text("")
    (tmp_path / "data" / "0.png").write_bytes(ENCODED[0])
    with pytest.warns(UserWarning, match="3 others left out beside the images: ") as caught:
        assert len(open_source(str(tmp_path / "data"))) == 6
    for kind in ("1 .md", "1 .png", "1 .parquet of no split"):
        assert kind in str(caught[0].message)


def test_a_file_of_another_split_is_refused(tmp_path):
    for name, split in (("train.parquet", "test"), ("x.parquet", "test"), ("val.parquet", "test")):
        write_parquet(tmp_path / name, rows(2), [0, 1], ["a", "b"])
        with pytest.raises(ValueError, match=f"{name} has no split 'test': it is all of"):
            open_source(str(tmp_path / name), split=split)
    assert len(open_source(str(tmp_path / "val.parquet"), split="validation")) == 2
    assert len(open_source(str(tmp_path / "val.parquet"))) == 2
