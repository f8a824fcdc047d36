"""Folders of image files: one folder for each class, or one folder of images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .listing import entries_of, files_below, listed, split_named
from .pixels import Opened, is_image_file
from .tables import natural_order


class FileStore:
    """Image files below a folder, by relative paths; `left_out`: what else is there, by kind."""

    def __init__(self, folder: Path, paths: Sequence[str], left_out: Counter[str]) -> None:
        self.folder, self.paths, self.left_out = folder, list(paths), left_out

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return self.paths[row]

    def encoded(self, row: int) -> str:
        return os.path.join(self.folder, self.paths[row])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.folder.resolve()).encode())
        for path in self.paths:
            facts = os.stat(os.path.join(self.folder, path))
            digest.update(
                f"{path}\0{facts.st_size} {facts.st_mtime_ns}\0".encode(errors="surrogateescape")
            )
        return digest.hexdigest()


def open_folder(folder: Path, split: str) -> Opened:
    """A folder of class folders, or one folder of images (one class).

    Labels are the positions of the class folders in natural order (2 before 10); images, all that
    Pillow decodes, may lie in folders below them; links are followed; hidden files are no images.

    Returns:
        The image files, labels (N,) int64 and class names.

    Raises:
        ValueError: a class folder without images, images beside class folders, a split that the
            folder does not have.
        OSError: a folder cannot be read.
    """
    left_out: Counter[str] = Counter()
    folder, classes, loose = _of_split(folder, split, left_out)
    if loose:
        store = FileStore(folder, loose, left_out)
        return store, np.zeros(len(loose), np.int64), (folder.resolve().name,)
    images = {}
    for name in natural_order(classes):
        inside: Counter[str] = Counter()
        images[name] = files_below(folder, name, is_image_file, inside)
        if not images[name]:
            raise ValueError(f"the class folder {folder / name} has no images{_only(inside)}")
        left_out += inside
    if not images:
        raise ValueError(
            f"{folder} has no images{_only(left_out)}: a folder for each class is needed, with"
            " images in it"
        )
    labels = np.repeat(np.arange(len(images)), list(map(len, images.values())))
    store = FileStore(folder, [path for paths in images.values() for path in paths], left_out)
    return store, labels, tuple(images)


def _only(left_out: Counter[str]) -> str:
    return f" (only {listed(left_out)})" if +left_out else ""


def _of_split(
    folder: Path, split: str, left_out: Counter[str]
) -> tuple[Path, list[str], list[str]]:
    """The sub-folder of a split, if the sub-folders are splits, else the folder, which is `train`;
    the folders and the images in it."""
    beside: Counter[str] = Counter()
    names, loose = entries_of(folder, "", is_image_file, beside)
    if loose and names:
        raise ValueError(
            f"{folder} has images outside its class folders, such as {loose[0]}: move them into one"
        )
    splits = {name: split_named(name) for name in names}
    named = [name for name, found in splits.items() if found]
    if "train" in splits.values() and 1 < len(named) < len(names):
        other = next(name for name in names if name not in named)
        raise ValueError(
            f"{folder} has folders of splits ({', '.join(named)}) and others, such as {other}: give"
            " the folder of one split, or move the others away"
        )
    if not names or len(named) < len(names):
        if split != "train":
            raise ValueError(
                f"{folder} has no sub-folder for the split {split!r}: it is all of the split"
                " 'train'"
            )
        left_out += beside
        return folder, names, loose
    chosen = [name for name in names if splits[name] == (split_named(split) or split)]
    if len(chosen) == 1:
        return _of_split(folder / chosen[0], "train", left_out)
    raise ValueError(
        f"{folder} has {'several sub-folders' if chosen else 'no sub-folder'} for the split"
        f" {split!r}; it has {', '.join(names)}"
    )
