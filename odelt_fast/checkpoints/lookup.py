"""Which folder a model's name means: a folder, a bundled model, or a repository on the Hub."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odelt_fast.files import one_line

from .errors import CheckpointError

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


# Of a Hub id: the keywords with which huggingface_hub downloads.
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with the package, sorted."""
    models = importlib.resources.files("odelt_fast").joinpath("models")
    if not models.is_dir():
        return ()
    found = (entry.name for entry in models.iterdir() if entry.joinpath(CONFIG_NAME).is_file())
    return tuple(sorted(found))


def find_folder(name: str | Path, download: Mapping[str, Any] | None = None) -> Path:
    """The local folder of a model: one that exists (or that of its own files), else a bundled one,
    else a download.

    Raises:
        CheckpointError: `name` is none of them.
        TypeError: an option of the download that is unknown.
    """
    for option in download or ():
        if option not in DOWNLOAD_OPTIONS:
            raise TypeError(
                f"{option} is no option of loading a model: there are dtype, depth and, for a"
                f" download, {', '.join(DOWNLOAD_OPTIONS)}"
            )
    if os.path.isdir(name):
        return _model_in(Path(name))
    if os.path.isfile(name):
        return _folder_of(Path(name))
    if isinstance(name, str) and name in bundled_models():
        return Path(str(importlib.resources.files("odelt_fast"))) / "models" / name
    if isinstance(name, str) and re.fullmatch(
        r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII
    ):
        return _model_in(_download(name, download or {}))
    bundled = ", ".join(bundled_models()) or "none"
    raise CheckpointError(
        f"no model {one_line(repr(str(name)))}: give a folder that exists, a bundled name"
        f" ({bundled}) or a Hub id (user/repo)"
    )


def _model_in(folder: Path) -> Path:
    """The folder itself, or the model in it: of a pipeline, or the EMA of a checkpoint of training.

    CheckpointError for a run that has no finished model yet, naming its newest checkpoint.
    """
    if (folder / CONFIG_NAME).exists():
        return folder
    for inner in (folder / "transformer", folder / "ema"):
        if (inner / CONFIG_NAME).is_file():
            return inner
    if (folder / "shards").is_dir() and (folder / "state.json").is_file():
        raise CheckpointError(
            f"{one_line(repr(str(folder)))} is a checkpoint in shards: training goes on from it"
            " (--resume-from-checkpoint), and leaves a model"
        )
    kept = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r".*-\d{1,15}", path.name)]
    kept = [path for path in kept if (path / "ema" / CONFIG_NAME).is_file()]
    if kept:
        newest = max(kept, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        raise CheckpointError(
            f"{one_line(repr(str(folder)))} is a run that has not left its model yet: give a"
            f" checkpoint, such as {one_line(newest)}"
        )
    return folder


def _folder_of(file: Path) -> Path:
    """The model folder that a file is part of; CheckpointError for a file that is in none."""
    parts = file.name in (CONFIG_NAME, INDEX_NAME) or file.suffix == ".safetensors"
    if parts and (file.parent / CONFIG_NAME).is_file():
        return file.parent
    raise CheckpointError(
        f"{one_line(repr(str(file)))} is a file: give the folder of a model, with {CONFIG_NAME} and"
        f" {WEIGHTS_NAME}; odelt-fast convert makes one of a checkpoint"
    )


def _download(name: str, options: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    files = [CONFIG_NAME, INDEX_NAME, "*.safetensors"]
    files += [f"transformer/{file}" for file in (CONFIG_NAME, INDEX_NAME)]
    try:
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except Exception as error:  # the client's own, its HTTP library's and the system's
        bundled = ", ".join(bundled_models()) or "none"
        problem = f"is no folder here and cannot be had from the Hub ({one_line(error)})"
        raise CheckpointError(f"{name!r} {problem}; bundled models: {bundled}") from None
