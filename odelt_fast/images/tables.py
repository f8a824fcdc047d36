"""Tables of images as Hugging Face `datasets` keeps them, and its data sets by id.

A table has a column of {bytes, path} and a column of labels.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from odelt_fast.checks import shown
from odelt_fast.files import one_line

from .pixels import Opened

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls")
SAVED_MARKS = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` made
_MAX_CLASSES = 10_000_000


@dataclass(frozen=True)
class Choice:
    """The columns of images and of labels that the user names; None: they are looked for. An empty
    name of labels: there are none, all images are one class."""

    image: str | None = None
    label: str | None = None


NO_CHOICE = Choice()


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images and of labels (None: there are only images), and the class
    names if the table knows them."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None


def find_columns(schema: Any, where: str, choice: Choice = NO_CHOICE) -> Columns:
    """Chooses the columns of an Arrow schema.

    As the user says, else by the types in its `huggingface` metadata, else by name; else ValueError
    with all names.
    """
    features = _features(schema)
    present = ", ".join(map(one_line, schema.names)) or "(none)"

    def choose(what: str, named: str | None, type_: str, usual: Sequence[str]) -> str | None:
        """The named column; the one column of the type; else the first that has a usual name, of
        the type if any."""
        if named is not None:
            if named not in schema.names:
                raise ValueError(f"{where} has no column {named!r}; it has {present}")
            return named
        typed = [name for name in schema.names if features.get(name, {}).get("_type") == type_]
        if len(typed) == 1:
            return typed[0]
        found = next((name for name in usual if name in (typed or schema.names)), None)
        if found is None and typed:
            listed = ", ".join(map(one_line, typed))
            raise ValueError(
                f"{where} has several columns of {what}s, {listed}: choose one with --{what}-column"
            )
        return found

    def missing(what: str, usual: Sequence[str], or_none: str = "") -> ValueError:
        return ValueError(
            f"{where} has the columns {present}; none of them can be the {what}s by its name"
            f" ({', '.join(usual)}): choose one with --{what}-column{or_none}"
        )

    image = choose("image", choice.image, "Image", IMAGE_COLUMNS)
    label = choice.label or None
    if choice.label != "":
        label = choose("label", choice.label, "ClassLabel", LABEL_COLUMNS)
    if image is None:
        raise missing("image", IMAGE_COLUMNS)
    if label is None and len(schema.names) > 1 and choice.label != "":
        raise missing("label", LABEL_COLUMNS, ", or none ('')")
    names = features.get(label or "", {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    return Columns(image, label, tuple(names) if names else None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features in the `huggingface` metadata of an Arrow schema; none if missing or damaged."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def label_values(column: Any, class_names: Sequence[str] | None, where: str) -> np.ndarray:
    """The labels (N,) of an Arrow column: int64, or texts as objects (truth values are the texts
    false and true).

    Raises:
        ValueError: another type; names the first row whose label is missing, or no class.
    """
    import pyarrow as pa

    type_ = column.type
    if pa.types.is_dictionary(type_):
        column, type_ = column.cast(type_.value_type), type_.value_type
    if not (pa.types.is_integer(type_) or pa.types.is_boolean(type_) or is_text(type_)):
        raise ValueError(
            f"{where}: the labels are of type {one_line(type_)}; whole numbers from 0, texts or"
            " truth values are needed"
        )
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{where}: row {row} has no label")
    if pa.types.is_integer(type_):
        labels = np.asarray(column.to_numpy(zero_copy_only=False))
        check_labels(labels, class_names, lambda row: f"{where}: row {row}")
        return labels.astype(np.int64)
    return text_labels(column.to_pylist(), class_names, lambda row: f"{where}: row {row}")


def text_labels(
    values: Sequence[str | bool], class_names: Sequence[str] | None, name: Any
) -> np.ndarray:
    """Texts and truth values as objects (N,); ValueError for the first that is no class.

    name: row -> text.
    """
    texts = [str(v).lower() if isinstance(v, bool) else v for v in values]
    allowed = set(class_names or texts) - {""}
    row = next((row for row, text in enumerate(texts) if text not in allowed), None)
    if row is not None:
        raise ValueError(
            f"{name(row)} has the label {shown(texts[row])}; allowed are"
            f" {one_line(', '.join(class_names or ['texts that are not empty']))}"
        )
    return np.array(texts, object)


def number_labels(
    values: np.ndarray, class_names: Sequence[str] | None, only: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 and the class names of `label_values`.

    Texts are numbered by the class names, or in natural order; numbers without class names are
    their own. only: the name of the one class of a table without labels.
    """
    if only is not None:
        return values, (only,)
    if values.dtype != object:
        return values, tuple(class_names or numbered_classes(values))
    names = tuple(class_names or natural_order(set(values)))
    if set(names) < {"false", "true"}:
        names = ("false", "true")  # one class of truth values is half of two
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[value] for value in values], np.int64), names


def is_text(type_: Any) -> bool:
    """Whether an Arrow type is text, in any of its layouts."""
    return _layout(type_) in ("string", "large_string", "string_view")


def _layout(type_: Any) -> str:
    return str(type_.value_type if hasattr(type_, "index_type") else type_)  # of a dictionary


def check_labels(labels: np.ndarray, class_names: Sequence[str] | None, name: Any) -> None:
    """ValueError for the first label that is no class: below 0, or beyond the class names.

    name: row -> text.
    """
    limit = _MAX_CLASSES if class_names is None else len(class_names)
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise ValueError(
            f"{name(int(wrong[0]))} has the label {labels[wrong[0]]}; allowed are 0 to {limit - 1}"
        )


def numbered_classes(labels: np.ndarray) -> tuple[str, ...]:
    """Names for classes of which only the labels are known: "0" .. the largest label."""
    return tuple(map(str, range(int(labels.max()) + 1)))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted as people count: 2 before 10, class9 before class10."""

    def key(name: str) -> list[tuple[int, str]]:
        parts = re.split(r"([0-9]+)", name)  # text and digits in turn
        parts[1::2] = [part.lstrip("0") for part in parts[1::2]]
        return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)] + [(0, name)]

    return sorted(names, key=key)


def check_image_type(type_: Any, where: str) -> None:
    """ValueError for an Arrow type that holds no encoded images: not bytes, nor {bytes, path}."""
    import pyarrow as pa

    fields = {f.name: f.type for f in type_} if pa.types.is_struct(type_) else {"bytes": type_}
    content = _layout(fields.get("bytes"))
    if not re.fullmatch(r"binary|large_binary|binary_view|fixed_size_binary\[\d+\]", content):
        raise ValueError(
            f"{where} holds {one_line(type_)}; encoded images are needed: {{bytes, path}}, or bytes"
        )


def open_dataset(name: str, split: str, choice: Choice = NO_CHOICE) -> Opened:
    """A data set by its Hub id (`user/name`, `user/name:config`), or a folder of `save_to_disk`.

    Returns:
        The images, labels (N,) int64 and class names.

    Raises:
        ValueError: in one line, where `datasets` cannot find, download or read it.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"opening {name!r} needs the package datasets: pip install 'odelt-fast[train]'"
        ) from None
    try:
        if any(os.path.isfile(os.path.join(name, mark)) for mark in SAVED_MARKS):
            dataset = datasets.load_from_disk(name)
        else:
            identifier, _, config = name.partition(":")
            dataset = datasets.load_dataset(identifier, config or None, split=split)
    except Exception as error:  # its errors come from many packages
        also = "" if os.path.exists(name) else "; and no file or folder has this name"
        raise ValueError(
            f"the data set {name!r} (split {split!r}) cannot be loaded: {one_line(error)}{also}"
        ) from None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"{name!r} has no split {split!r}; it has {', '.join(dataset)}")
        dataset = dataset[split]
    schema = dataset.features.arrow_schema
    columns = find_columns(schema, name, choice)
    check_image_type(schema.field(columns.image).type, f"{name}: column {columns.image}")
    if not len(dataset):
        raise ValueError(f"{name!r} has no rows in its split {split!r}")
    only = name.rpartition("/")[2] if columns.label is None else None
    if columns.label is None:
        values = np.zeros(len(dataset), np.int64)
    else:
        table = dataset.select_columns([columns.label]).with_format("arrow")[:]
        values = label_values(table[columns.label], columns.class_names, name)
    store = DatasetStore(dataset, columns.image, name)
    return store, *number_labels(values, columns.class_names, only)


class DatasetStore:
    """The image column of a `datasets.Dataset`, undecoded."""

    def __init__(self, dataset: Any, column: str, title: str) -> None:
        import datasets

        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self._dataset = dataset.select_columns([column]).with_format(None)
        self._column, self._title = column, title
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._dataset)

    def fingerprint(self) -> str:
        return f"{self._dataset._fingerprint} {self._column}"

    def name(self, row: int) -> str:
        item = self._dataset[row][self._column]
        path = item.get("path") if isinstance(item, dict) else None
        return f"{path} (row {row} of {self._title})" if path else f"row {row} of {self._title}"

    def encoded(self, row: int) -> bytes | str:
        item = self._dataset[row][self._column] or {}
        content = item if isinstance(item, bytes) else item.get("bytes") or item.get("path")
        if not content:
            raise ValueError("the row has no image")
        return content  # type: ignore[no-any-return]
