"""The processes of a run: how long they wait for each other, and what is said when one is lost."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from odelt_fast.files import one_line

from .checkpoints import checkpoints

# What gloo, NCCL and the store of torch.distributed say of peers that are gone.
_GONE = re.compile(
    r"gloo|NCCL|TCPStore|pair closure|[Cc]onnect|[Tt]imed? ?out|[Bb]roken pipe|[Ss]ocket|"
    r"(read|write|Read|Write) error|unreachable|No route|recvValue|sendBytes"
)


class ProcessLost(Exception):
    """Others of the run's processes are gone, or out of reach; the message says where to go on."""


def waits(seconds: float) -> Any:
    """What accelerate is told: a process that waits longer for the others has lost them."""
    from accelerate.utils import InitProcessGroupKwargs

    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def loss_in(error: BaseException | None) -> BaseException | None:
    """The error, or what caused it (a checkpoint that cannot be written), that says that another
    process is gone or out of reach; None where none does."""
    import torch.distributed as dist

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or not dist.is_available():
        return None
    while error is not None:
        said = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, dist.DistError) or (said and _GONE.search(str(error))):
            return error
        error = error.__cause__
    return None


def lost(error: BaseException, step: int, output_dir: Path) -> ProcessLost:
    """The one line; step: the one that was not finished."""
    kept = checkpoints(output_dir)
    rest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    who, why = (
        f"process {os.environ.get('RANK', 0)}",
        re.sub(r"^\[/\S*\] ", "", str(error)).split(". ")[0],
    )
    return ProcessLost(
        f"{who} has lost another process of the run in step {step} ({one_line(why, 120)}): {rest}"
    )


def is_elastic() -> bool:
    """Whether the launcher starts the run again, with the hosts that are left, when one is lost."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
