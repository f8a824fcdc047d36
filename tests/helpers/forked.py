"""Forked processes of a run, with torch already imported, that can be killed."""

from __future__ import annotations

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState


def start(work: Callable[[], None], processes: int, log: Path) -> list[int]:
    """Forks `processes` children that do `work`; returns their ids. Their output goes to `log`.

    They know of each other by the environment, as torchrun's do.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
                # The threads of the parent's pool are not in the child, which would wait for them.
                torch.set_num_threads(1)
                # A run in the parent may have settled that it is alone.
                AcceleratorState._reset_state(reset_partial_state=True)
                if processes > 1:
                    ranks = {
                        "RANK": rank,
                        "LOCAL_RANK": rank,
                        "WORLD_SIZE": processes,
                        "LOCAL_WORLD_SIZE": processes,
                        "MASTER_PORT": port,
                    }
                    os.environ.update(
                        {name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1"
                    )
                for stream in (1, 2):
                    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int], until: float, log: Path) -> bool:
    """Whether every process ended, well, before the time `until`; those that did not are killed
    then, without warning."""
    left, codes = set(children), []
    while left and time.monotonic() < until:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.001)
    for child in left:
        os.kill(child, signal.SIGKILL)
    for child in left:
        os.waitpid(child, 0)
    assert not any(codes), f"a process failed by itself: {log.read_text()[-2000:]}"
    return not left
