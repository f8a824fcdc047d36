"""`open_source`: which reader the data need."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from odelt_fast.checks import Size, check_size, whole
from odelt_fast.files import one_line
from odelt_fast.storage.places import Place, is_url

from .arrays import ArrayImages
from .digits import DigitsSource
from .encoded import EncodedImages
from .folders import open_folder
from .foreign_latents import is_repa, open_fast_dit, open_repa
from .lance_latents import LanceLatents, is_latents_table
from .lance_tables import open_lance
from .latents import LatentSource
from .listing import files_below
from .parquet import open_parquet
from .pixels import HowMany, Opened, image_endings
from .shards import MANIFEST_NAME, SETTINGS_NAME, ShardedLatents
from .sources import ImageSource
from .tables import SAVED_MARKS, Choice, open_dataset
from .webdataset import open_shards

_FILES = {".parquet": "parquet", ".npz": "arrays", ".tar": "shards"}
_TABLES = ("dataset", "parquet", "shards", "lance")
_TABLES_BY_ENDING = ((".parquet", "parquet"), (".tar", "shards"))


def open_source(
    data: str | Path,
    *,
    image_size: Size | None = None,
    channels: int | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    check_images: HowMany = "all",
) -> ImageSource:
    """Opens labelled images or latents.

    Args:
        data: one of
            - digits: the digits of scikit-learn
            - a folder of class folders (labels are their positions in natural order, 2 before 10),
              of train/ and test/ with class folders, or of images (one class)
            - a Parquet file, or a folder of them, with columns of images and labels as Hugging
              Face `datasets` writes them
            - WebDataset shards: a .tar file, a folder of them, or their names or URLs with braces,
              shard-{000..011}.tar
            - a Lance table (x.lance), or the folder of one
            - a URL, of any file system of fsspec, of a Parquet file, a Lance table, shards, or a
              folder of these
            - the id of a data set on the Hugging Face Hub (user/name, user/name:config), or a
              folder made by its `save_to_disk`
            - a .npz file with images as arr_0 (`ArrayImages`)
            - a folder of latents: written by `odelt-fast encode`, by fast-DiT (*_features,
              *_labels), or for REPA (img-mean-std-*.npy)
        image_size: a side, or height and width: images become their largest centred part of that
            shape, resized to it; None: all have one size, whose centred square is taken. Latents
            are never changed.
        channels: 1 (grey) or 3; None: 1 if every image is grey.
        split: which part, where the data have parts.
        image_column, label_column: of a table, or ending and key of JSON in shards; None: looked
            for by type and by name. An empty label_column: one class.
        check_images: how many are decoded now, evenly spread; auto: all of up to 500 000, 50 000 of
            more. Of encoded images only.

    Returns:
        The source. Images that are found not to decode are left out (`skipped`).

    Raises:
        ValueError: in one line, before anything is read for training: no data, none of these
            kinds, wrong labels, mixed sizes.
    """
    if image_size is not None:
        image_size = check_size("image_size", image_size, 4096)
    if channels is not None:
        whole("channels", channels)
    if check_images not in ("all", "auto"):
        whole("check_images", check_images)
    name, path = _as_written(data), Path(data).expanduser()
    try:
        kind = "digits" if name == "digits" else _kind(path, name)
        if (image_column or label_column) and kind not in _TABLES:
            raise ValueError(
                f"{name} is no table: --image-column and --label-column choose columns of tables"
                " and parts of shards"
            )
        decoded = kind in ("digits", "latents", "arrays")
        if decoded and check_images not in ("all", "auto"):
            raise ValueError(
                f"{name} are no files of images, which --check-images {check_images} would decode"
            )
        if decoded and split != "train":
            raise ValueError(f"{name} has no split {split!r}: it is all of the split 'train'")
        if kind == "latents":
            return _open_latents(name, path, image_size, channels)
        if channels not in (None, 1, 3):
            raise ValueError(
                f"channels must be 1 or 3 for images such as {name}, not {channels}: models of"
                " latents need latents, which odelt-fast encode makes"
            )
        if kind == "digits":
            return DigitsSource(image_size or 8, channels or 1)
        if kind == "arrays":
            return ArrayImages(path, image_size, channels)
        store, labels, names = _open_store(
            name, path, kind, split, Choice(image_column, label_column)
        )
        return EncodedImages(name, store, labels, names, image_size, channels, check_images)
    except OSError as error:
        raise ValueError(f"{data} cannot be read: {one_line(error)}") from None


def _as_written(data: str | Path) -> str:
    """As the user wrote it: a path has lost a slash of a URL."""
    if isinstance(data, str):
        return data
    return re.sub(r"(\w{2,}):/(?!/)", r"\1://", str(data)).replace("file://", "file:///")


def is_latents(data: str | Path) -> bool:
    """Whether data are latents, and no images; ValueError for what is no data."""
    try:
        return (
            str(data) != "digits" and _kind(Path(data).expanduser(), _as_written(data)) == "latents"
        )
    except OSError:  # `open_source` tells it
        return False


def _open_store(data: str, path: Path, kind: str, split: str, choice: Choice) -> Opened:
    if kind == "dataset":
        return open_dataset(str(path) if path.exists() else data, split, choice)
    if kind == "parquet":
        return open_parquet(data if is_url(data) else path, split, choice)
    if kind == "lance":
        return open_lance(str(_table_in(data, path)), split, choice)
    if kind == "shards":
        return open_shards(data if is_url(data) else str(path), split, choice)
    return open_folder(path, split)


def _table_in(data: str, path: Path) -> str | None:
    """The path or URL of the Lance table that data are, or that lies in them alone."""
    place = Place(data if is_url(data) else path)
    names = place.names()
    if "_versions" in names:
        return place.name
    tables = [name for name in names if name.endswith(".lance")]
    return place.full(tables[0]) if len(tables) == 1 else None


def _kind_of_table(table: str) -> str:
    return "latents" if is_latents_table(table) else "lance"


def _open_latents(
    data: str, folder: Path, image_size: Size | None, channels: int | None
) -> LatentSource:
    table = _table_in(data, folder)
    source = _latents_of(folder) if table is None else LanceLatents(table)
    for name, wanted in (("image_size", image_size), ("channels", channels)):
        if wanted is not None and wanted != getattr(source, name):
            raise ValueError(
                f"the latents in {data} have {name} {getattr(source, name)}, which cannot be"
                f" changed to {wanted}"
            )
    return source


def _latents_of(folder: Path) -> LatentSource:
    if (folder / MANIFEST_NAME).is_file():
        return ShardedLatents(folder)
    if (folder / SETTINGS_NAME).is_file():
        raise ValueError(
            f"the latents in {folder} are not finished: run `odelt-fast encode` again, it continues"
            " where it stopped"
        )
    features = sorted(path for path in folder.glob("*_features") if path.is_dir())
    if len(features) > 1:
        names = " and ".join(path.name for path in features)
        raise ValueError(f"{folder} has {names}: give a folder with one of them")
    if features:
        return open_fast_dit(folder, features[0])
    below = folder / "vae-sd"
    return open_repa(folder, below if below.is_dir() else folder)


def _kind(path: Path, data: str) -> str:
    """latents, dataset, parquet, arrays or folder; ValueError for what is none of them.

    data: as the user wrote it (./a/b is never an id).
    """
    if path.is_file():
        kind = _FILES.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path} is a file of no known kind: give a .parquet, .tar or .npz file or a folder"
            )
        return kind
    if re.search(r"\.tar($|[?#])", data) and (is_url(data) or re.search(r"[{*]", data)):
        return "shards"
    if is_url(data):
        return _kind_behind(data)
    if not path.is_dir() or not data:
        files = {*_FILES, ".npy", ".json", *image_endings()}
        is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", data)
        if is_id and path.suffix not in files:
            return "dataset"
        raise ValueError(
            f"{data!r} does not exist: give digits, a folder, a .parquet file or the id of a"
            " Hugging Face data set"
        )
    entries = list(os.scandir(path))
    names = {entry.name for entry in entries}
    folders = {entry.name for entry in entries if os.path.isdir(entry)}  # links may end nowhere
    if {MANIFEST_NAME, SETTINGS_NAME} & names and not folders:
        return "latents"
    if "vae-sd" in folders or any(name.endswith("_features") for name in folders):
        return "latents"
    if names & set(SAVED_MARKS):
        return "dataset"
    if "dataset.json" in names and files_below(path, "", is_repa, Counter()):
        return "latents"
    if (table := _table_in(data, path)) is not None:
        return _kind_of_table(table)
    for ending, kind in _TABLES_BY_ENDING:
        if any(any(path.glob(pattern)) for pattern in (f"*{ending}", f"*/*{ending}")):
            return kind
    return "folder"


def _kind_behind(url: str) -> str:
    """parquet, shards or lance; ValueError for URLs of anything else."""
    if url.lower().endswith(".parquet"):
        return "parquet"
    if os.path.splitext(url)[1].lower() not in {".npz", ".npy", ".json", *image_endings()}:
        if (table := _table_in(url, Path())) is not None:
            return _kind_of_table(table)
        endings = {os.path.splitext(path)[1].lower() for path in Place(url).files()}
        for ending, kind in _TABLES_BY_ENDING:
            if ending in endings:
                return kind
    raise ValueError(
        f"{url} is a URL of no known kind: give those of .tar or .parquet files, a .lance table, or"
        " of a folder of them that is there"
    )
