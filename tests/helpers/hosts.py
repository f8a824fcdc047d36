"""Hosts of a training run: each an agent of torchrun with its processes, that can be killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Host:
    """One of them.

    Attributes:
        log: what it says, appended.
        interface: how it reaches the others.
        inside: what a command begins with, to run there.
    """

    log: Path
    interface: str = "lo"
    inside: Sequence[str] = ()
    agent: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(
        self, options: Sequence[str], program: Sequence[str], module: str = "torch.distributed.run"
    ) -> None:
        """Starts a launcher, torchrun, with these options, on a program with its own."""
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": self.interface, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        # Else an agent that comes back waits for an address that was told before it was there.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = [*self.inside, sys.executable, "-m", module, "--rdzv_backend", "c10d"]
        command += [*options, *program]
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        if self.agent is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.agent.pid)
            for process in [agent, *agent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.agent.wait()

    def ended(self) -> bool:
        return self.agent is None or self.agent.poll() is not None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def until(what: str, holds: Callable[[], object], seconds: float, hosts: Sequence[Host]) -> float:
    """Waits until it holds; returns how long. AssertionError, with what the hosts said, if it
    does not."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            bars = re.compile(r"[^\r\n]*step/s[^\r\n]*[\r\n]*")
            said = "\n".join(
                f"--- {host.log.name}\n{bars.sub('', host.said())[-6000:]}" for host in hosts
            )
            raise AssertionError(f"{what}: not within {seconds:.0f} s\n{said}")
        time.sleep(0.02)
    return time.monotonic() - begin
