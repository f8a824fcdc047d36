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

from odelt_fast.files import flush, one_line

# A folder being written, one that a newer one of the same number replaces, one that is being
# deleted.
_WRITING, _REPLACED, _DELETED = ".partial", ".replaced", ".deleted"
STATE_NAME = "state.json"  # written last: its absence marks a folder that is not ours


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoint-N folders of a run, oldest first."""
    paths = [
        path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / STATE_NAME).is_file()
    ]
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The N of checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


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


@contextlib.contextmanager
def written_whole(folder: Path, limit: int | None) -> Iterator[None]:
    """Has the body write `unfinished(folder)`, then flushes it and gives it its name.

    Args:
        limit: the oldest checkpoints beyond this number are deleted then.

    Raises:
        ValueError: writing fails (a full disk), in one line; the checkpoints before are untouched.
    """
    partial = unfinished(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield
        for path in sorted(partial.rglob("*"), reverse=True):  # contents before their folders
            flush(path)
        flush(partial)
        _put(partial, folder, limit)
    except _disk_errors() as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints(folder.parent)
        rest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise ValueError(f"{folder} cannot be written ({one_line(error)}): {rest}") from error


def _put(partial: Path, folder: Path, limit: int | None) -> None:
    replaced = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    if limit is not None:
        for old in checkpoints(folder.parent)[:-limit]:
            # First out of the list: a half-deleted folder must not pass for a checkpoint.
            deleted = old.with_name(old.name + _DELETED)
            os.replace(old, deleted)
            shutil.rmtree(deleted)


def _disk_errors() -> tuple[type[BaseException], ...]:
    """torch, safetensors and, for sharded weights, torch.distributed have errors of their own for
    the disk's."""
    from safetensors import SafetensorError

    errors = (OSError, RuntimeError, ValueError, SafetensorError)
    # slow to import, and only of use if it is there
    sharded = sys.modules.get("torch.distributed.checkpoint.api")
    return (*errors, sharded.CheckpointException) if sharded else errors
