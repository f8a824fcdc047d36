"""Sharded tensors in files, through torch.distributed.checkpoint: each process writes its own part,
in the background, as safetensors; any number of processes reads its own parts of them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.files import one_line


class BackgroundWriter:
    """One of each process; one checkpoint at a time. Their group is their own: what they tell each
    other does not meet what training does. Every process must make it, and call its methods."""

    def __init__(self, timeout: float) -> None:
        # gloo: it is the thread that waits, not a stream of the device
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        whole: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Copies this process's parts to the host; the rest follows in a thread.

        Args:
            folder: where the files go.
            whole: inside it, they are written; when it ends, all are there.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        staged = writer.stage(dict(tensors))

        def write() -> None:
            try:
                with whole():
                    dist.barrier(self._group)  # the folder is there
                    save(staged, storage_writer=writer, process_group=self._group)
            except BaseException as error:  # of torch.distributed.checkpoint too
                self._error = error

        # A process that has lost the others ends, whatever its thread waits for.
        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Until it is written; the error, if it is not."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error


def read_shards(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Fills `tensors`, each process its parts. CheckpointError where they are not there."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    _read(HuggingFaceStorageReader(str(folder)), folder, tensors)


def read_by_accelerate(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Fills those of network and optimizer from what `Accelerator.save_state` wrote of them."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for part, name in (("model.", "pytorch_model_fsdp_0"), ("optimizer.", "optimizer_0")):
        mine = {key: tensor for key, tensor in tensors.items() if key.startswith(part)}
        _read(FileSystemReader(folder / name), folder, mine)


def _read(reader: Any, folder: Path, tensors: Mapping[str, Any]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of processes that do not ask each other
        try:
            load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            for problem, _ in error.failures.values():
                if isinstance(problem, OSError) and not isinstance(problem, FileNotFoundError):
                    raise problem from error
                raise CheckpointError(f"{folder.name}: {one_line(problem)}") from error
