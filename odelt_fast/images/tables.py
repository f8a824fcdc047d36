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

from odelt_fast.files import one_line

from .pixels import Opened

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "class", "cls")
SAVED_MARKS = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` made
_MAX_CLASSES = 10_000_000


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images and of labels (None: there are only images), and the class
    names if the table knows them."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None

    def names_for(self, labels: np.ndarray, only: str) -> tuple[str, ...]:
        """The class names, or numbers for them; `only`: of the one class of a table of images."""
        return self.class_names or (numbered_classes(labels) if self.label else (only,))


def find_columns(schema: Any, where: str) -> Columns:
    """Chooses the columns of an Arrow schema.

    By the types in its `huggingface` metadata, else by name; else ValueError with all names.
    """
    features = _features(schema)

    def choose(type_: str, usual: Sequence[str]) -> str | None:
        """The one column of the type; else the first that has a usual name, of the type if any."""
        typed = [name for name in schema.names if features.get(name, {}).get("_type") == type_]
        if len(typed) == 1:
            return typed[0]
        return next((name for name in usual if name in (typed or schema.names)), None)

    def missing(what: str, usual: Sequence[str]) -> ValueError:
        present = ", ".join(map(one_line, schema.names)) or "(none)"
        return ValueError(
            f"{where} has the columns {present}; none (or more than one) can be the {what}: name"
            f" that column {', '.join(usual)}"
        )

    image, label = choose("Image", IMAGE_COLUMNS), choose("ClassLabel", LABEL_COLUMNS)
    if image is None:
        raise missing("images", IMAGE_COLUMNS)
    if label is None and len(schema.names) > 1:
        raise missing("labels", LABEL_COLUMNS)
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


def label_array(column: Any, class_names: Sequence[str] | None, where: str) -> np.ndarray:
    """Labels (N,) int64 of an Arrow column.

    Raises:
        ValueError: names the first row whose label is missing, negative or beyond the class names.
    """
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise ValueError(
            f"{where}: the labels are of type {one_line(column.type)}; whole numbers from 0 are"
            " needed"
        )
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{where}: row {row} has no label")
    labels = np.asarray(column.to_numpy(zero_copy_only=False))
    check_labels(labels, class_names, lambda row: f"{where}: row {row}")
    return labels.astype(np.int64)


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
    import pyarrow as pa

    fields = {f.name: f.type for f in type_} if pa.types.is_struct(type_) else {"bytes": type_}
    if fields.get("bytes") not in (pa.binary(), pa.large_binary()):
        raise ValueError(
            f"{where} holds {one_line(type_)}; encoded images are needed: {{bytes, path}}, or bytes"
        )


def open_dataset(name: str, split: str) -> Opened:
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
    columns = find_columns(schema, name)
    check_image_type(schema.field(columns.image).type, f"{name}: column {columns.image}")
    if not len(dataset):
        raise ValueError(f"{name!r} has no rows in its split {split!r}")
    if columns.label is None:
        labels = np.zeros(len(dataset), np.int64)
    else:
        table = dataset.select_columns([columns.label]).with_format("arrow")[:]
        labels = label_array(table[columns.label], columns.class_names, name)
    names = columns.names_for(labels, name.rpartition("/")[2])
    return DatasetStore(dataset, columns.image, name), labels, names


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
