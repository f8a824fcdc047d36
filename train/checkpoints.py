"""Checkpoint folders of a run: checkpoint-N is complete or absent, at whatever moment the process
is killed; one run at a time has the folder; nothing of a branch that is left is deleted."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.checkpoints.folder import read_config, read_trained_on
from odelt_fast.config import DiTConfig, TrainedOn
from odelt_fast.files import flush, one_line, read_object

# A folder being written, one that a newer one of the same number replaces, one that is being
# deleted.
_WRITING, _REPLACED, _DELETED = ".partial", ".replaced", ".deleted"
STATE_NAME = "state.json"  # written last: its absence marks a folder that is not ours
_STATE_LIMIT = 16 << 20  # bytes


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


def set_aside(output_dir: Path, step: int, others: Sequence[Path] = ()) -> Path | None:
    """Moves the checkpoints after `step`, of a branch that the run leaves, and `others` of it to a
    new folder abandoned-K in the run's; returns it, None if there was nothing."""
    later = [path for path in checkpoints(output_dir) if step_of(path) > step] + [*others]
    if not later:
        return None
    folders = (output_dir / f"abandoned-{k}" for k in itertools.count(1))
    folder = next(folder for folder in folders if not folder.exists())
    for path in later:
        place = folder / path.relative_to(output_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    return folder


def make_room(output_dir: Path, overwrite: bool, others: Sequence[Path] = ()) -> None:
    """For a run that starts anew: ValueError if the folder has checkpoints, unless they are to be
    deleted, with `others`."""
    kept = checkpoints(output_dir)
    if kept and not overwrite:
        raise ValueError(
            f"{output_dir} holds the checkpoints of a run, the newest {kept[-1].name}: go on with"
            " it (--resume-from-checkpoint latest), choose another --output-dir, or delete them"
            " (--overwrite-output-dir)"
        )
    for path in (*kept, *others) if overwrite else ():
        shutil.rmtree(path)


def state_of(folder: Path, sizes: bool = False, **values: Any) -> dict[str, Any]:
    """The contents of state.json; sizes: with the size in bytes of every file in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()] if sizes else []
    return {
        **values,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)},
    }


def read_state(folder: Path) -> dict[str, Any]:
    """What `state_of` made of a whole checkpoint; CheckpointError that names the first file that is
    missing, or has another size than when it was written."""
    try:
        state = read_object(folder / STATE_NAME, _STATE_LIMIT)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE_NAME}: {one_line(error)}") from None
    if type(state.get("finished_steps")) is not int:
        raise CheckpointError(f"{STATE_NAME} names no step")
    files = state.get("files")
    if not isinstance(files, dict):  # of a version before: an empty file is damaged, at least
        files = {str(path.relative_to(folder)): -1 for path in folder.rglob("*") if path.is_file()}
    for name, size in files.items():
        path = folder / name
        if type(size) is not int or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{STATE_NAME} has a size that cannot be")
        if not path.is_file():
            raise CheckpointError(f"{one_line(name)} is missing")
        has = path.stat().st_size
        if has != size if size != -1 else not has:
            raise CheckpointError(f"{one_line(name)} has {has} bytes, not {max(size, 1)}")
    return state


def newest_state(output_dir: Path, name: str | None) -> dict[str, Any]:
    """The state of the checkpoint that a run is to go on from, or of one before it that can be
    read; empty where there is none."""
    paths = [Path(name)] if name not in (None, "latest") else []
    if name == "latest":
        paths = [*checkpoints(output_dir)[::-1], *output_dir.glob(f"checkpoint-*{_REPLACED}")]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            return read_object(path / STATE_NAME, _STATE_LIMIT)
    return {}


def model_of(folder: Path, state: dict[str, Any]) -> tuple[DiTConfig, TrainedOn]:
    """The network of a checkpoint, and what is known of its data."""
    values = state.get("model")
    if values is None:
        return read_config(folder / "ema"), read_trained_on(folder / "ema")
    try:
        values = dict(values)
        trained_on = TrainedOn.taken_from(values, values.get("num_classes", DiTConfig.num_classes))
        return DiTConfig.from_dict(values), trained_on
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE_NAME} names no model: {one_line(error)}") from None


def check_run(folder: Path, state: dict[str, Any], config: DiTConfig, objective: str) -> None:
    """ValueError if the checkpoint is of another network or objective than the run's."""
    if state.get("objective", objective) != objective:
        raise ValueError(
            f"{folder} is of objective {one_line(state['objective'])}, this run's is {objective}:"
            " --init-from starts another objective from a model"
        )
    theirs = model_of(folder, state)[0].to_dict()
    for name, value in config.to_dict().items():
        if name not in ("dropout", "image_size") and theirs[name] != value:
            raise ValueError(
                f"{folder} is of a model with {name} {theirs[name]}, this run's has {value}: set"
                f" --model.{name.replace('_', '-')}"
            )


def is_damage(error: Exception) -> bool:
    """Whether loading a checkpoint failed by the fault of its files: not for want of memory, of
    permission or of the disk's service."""
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError

    if isinstance(error, (torch.OutOfMemoryError, OSError)):
        return isinstance(error, FileNotFoundError)
    kinds = (RuntimeError, EOFError, LookupError, SafetensorError, CheckpointError)
    return isinstance(error, (*kinds, pickle.UnpicklingError, zipfile.BadZipFile))


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
        # safetensors makes files that only their owner can read: all get what the user's mask says.
        mode = stat.S_IMODE((partial / STATE_NAME).stat().st_mode)
        for path in sorted(partial.rglob("*"), reverse=True):  # contents before their folders
            if path.is_file():
                path.chmod(mode)
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
        older = [path for path in checkpoints(folder.parent) if step_of(path) < step_of(folder)]
        for old in older[: max(0, len(older) + 1 - limit)]:
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
