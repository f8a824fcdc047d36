"""Checkpoint folders of a run: checkpoint-N is complete or absent, at whatever moment the process
is killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from odelt_fast.files import flush

# A folder being written, one that a newer one of the same number replaces, one that is being
# deleted.
_WRITING, _REPLACED, _DELETED = ".partial", ".replaced", ".deleted"
STATE_NAME = "state.json"  # written last: its absence marks a folder that is not ours


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoint-N folders of a run, oldest first."""
    found = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE_NAME).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def recover(output_dir: Path) -> None:
    """Puts back a checkpoint whose replacement was cut off, and clears what a killed process left
    behind."""
    for path in output_dir.glob(f"checkpoint-*{_REPLACED}"):
        original = path.with_name(path.name.removesuffix(_REPLACED))
        if original.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, original)
    for suffix in (_WRITING, _DELETED):
        for path in output_dir.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(path)


def unfinished(folder: Path) -> Path:
    """Where the contents of `folder` stand until they are complete."""
    return folder.with_name(folder.name + _WRITING)


def start_writing(folder: Path) -> None:
    """Makes `unfinished(folder)`, empty."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)
    unfinished(folder).mkdir(parents=True)


def finish_writing(folder: Path, limit: int | None) -> None:
    """Flushes `unfinished(folder)` and gives it its name; then deletes the oldest checkpoints
    beyond `limit`."""
    partial = unfinished(folder)
    for path in sorted(partial.rglob("*"), reverse=True):  # contents before their folders
        flush(path)
    flush(partial)
    replaced = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    if limit is not None:
        for old in checkpoints(folder.parent)[:-limit]:
            deleted = old.with_name(
                old.name + _DELETED
            )  # first out of the list: a half-deleted folder must not pass for a checkpoint
            os.replace(old, deleted)
            shutil.rmtree(deleted)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """Removes the unfinished folder if writing it fails (a full disk), and says so in one line; the
    checkpoints before it are untouched."""
    try:
        yield
    except _disk_errors() as error:
        shutil.rmtree(unfinished(folder), ignore_errors=True)
        kept = checkpoints(folder.parent)
        rest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise ValueError(
            f"{folder} cannot be written ({str(error).splitlines()[0]}): {rest}"
        ) from error


def _disk_errors() -> tuple[type[BaseException], ...]:
    """torch, safetensors and, for sharded weights, torch.distributed have errors of their own for
    the disk's."""
    from safetensors import SafetensorError

    sharded = sys.modules.get(
        "torch.distributed.checkpoint.api"
    )  # slow to import, and only of use if it is there
    return (
        OSError,
        RuntimeError,
        ValueError,
        SafetensorError,
        *([sharded.CheckpointException] if sharded else []),
    )
