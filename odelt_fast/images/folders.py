"""Folders of image files: one folder for each class, or one folder of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .pixels import SUFFIXES, Opened


class FileStore:
    """Image files below a folder, by relative paths."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        self.folder, self.paths = folder, list(paths)

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

    Labels are the positions of the class folders in sorted order; images may lie in folders below
    them; hidden files are no images.

    Returns:
        The image files, labels (N,) int64 and class names.

    Raises:
        ValueError: a class folder without images, images beside class folders, a split that the
            folder does not have.
    """
    folder = _split_folder(folder, split)
    classes, files = _entries(folder)
    loose = [name for name in files if name.lower().endswith(SUFFIXES)]
    if loose and classes:
        raise ValueError(
            f"{folder} has images outside its class folders, such as {loose[0]}: move them into one"
        )
    if loose:
        return FileStore(folder, loose), np.zeros(len(loose), np.int64), (folder.resolve().name,)
    images = {name: _images_below(folder, name) for name in classes}
    for name, paths in images.items():
        if not paths:
            raise ValueError(
                f"the class folder {folder / name} has no images ({', '.join(SUFFIXES)})"
            )
    if not images:
        raise ValueError(
            f"{folder} has no images: a folder for each class is needed, with {', '.join(SUFFIXES)}"
            " files in it"
        )
    labels = np.repeat(np.arange(len(images)), list(map(len, images.values())))
    return (
        FileStore(folder, [path for paths in images.values() for path in paths]),
        labels,
        tuple(images),
    )


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted, without hidden ones."""
    seen = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in seen if entry.is_dir())
    return folders, sorted(entry.name for entry in seen if entry.is_file())


def _split_folder(folder: Path, split: str) -> Path:
    """The sub-folder of a split, if the sub-folders are splits; else the folder: it is `train`."""
    names, _ = _entries(folder)
    validation = ("val", "valid", "validation")
    if not names or not {name.lower() for name in names} <= {"train", "test", *validation}:
        if split != "train":
            raise ValueError(
                f"{folder} has no sub-folder for the split {split!r}: it is all of the split"
                " 'train'"
            )
        return folder
    wanted = validation if split in validation else (split,)
    for name in names:
        if name.lower() in wanted:
            return folder / name
    raise ValueError(
        f"{folder} has no sub-folder for the split {split!r}; it has {', '.join(names)}"
    )


def _images_below(folder: Path, name: str) -> list[str]:
    """Paths, relative to `folder`, of the images in its sub-folder `name` and below, sorted."""
    found = []
    for place, folders, files in os.walk(folder / name):
        folders[:] = [sub for sub in folders if not sub.startswith(".")]
        images = [file for file in files if file.lower().endswith(SUFFIXES) and file[0] != "."]
        found += [os.path.join(place, file) for file in images]
    return sorted(os.path.relpath(path, folder) for path in found if os.path.isfile(path))
