"""This process among those that torchrun or `accelerate launch` started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch

from odelt_fast.checks import device_of
from odelt_fast.files import one_line

_PATIENCE = timedelta(days=1)  # processes that are done early wait for the others


@dataclass(frozen=True)
class Processes:
    """This process: index, of count.

    device: its own. barrier: waits for all.
    """

    index: int
    count: int
    device: torch.device
    barrier: Callable[[], None]

    @classmethod
    def of_this_run(cls, device: str = "auto") -> Processes:
        """The process that asks.

        Args:
            device: auto (a GPU if there is one), cpu or cuda.

        Raises:
            ValueError: for a GPU that is not there, and without accelerate, which several
                processes need.
        """
        chosen = device_of(device)
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, chosen, lambda: None)
        try:
            from accelerate import PartialState
        except ImportError:
            raise ValueError(
                "several processes need accelerate: pip install 'odelt-fast[eval]'"
            ) from None
        with _told():
            state = PartialState(cpu=chosen.type == "cpu", timeout=_PATIENCE)

        def barrier() -> None:
            with _told():
                state.wait_for_everyone()

        return cls(state.process_index, state.num_processes, state.device, barrier)

    @property
    def first(self) -> bool:
        return self.index == 0


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Why the processes do not meet, in one line."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # what torch.distributed raises
        raise ValueError(
            "another process of this run has ended, or cannot be reached"
            f" ({one_line(error, 120)}): what is finished is kept, the same command makes the rest,"
            " in any number of processes"
        ) from error
