"""`odelt-fast demo` in a process of its own, which is ended if it looks up or connects to anything
but this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

from tests.helpers.serving import HANG, ROOT, interruptible

_START = """
import os, sys

PLACES = {"socket.connect": 1, "socket.getaddrinfo": 0}

def only_this_machine(event, arguments):
    if event not in PLACES:
        return
    name = arguments[PLACES[event]]
    name = name[0] if isinstance(name, tuple) else name
    name = name.decode() if isinstance(name, bytes) else name
    if name not in (None, "127.0.0.1", "::1", "localhost") and not str(name).startswith("/"):
        print("OUTSIDE", event, name, file=sys.stderr, flush=True)
        os._exit(97)

sys.addaudithook(only_this_machine)
from odelt_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


class DemoServer(NamedTuple):
    url: str
    process: subprocess.Popen[str]
    errors: list[str]
    """Lines of its stderr so far."""


@contextlib.contextmanager
def demo_server(*options: str, quiet: bool = True) -> Iterator[DemoServer]:
    """Starts it on a free port; afterwards interrupts it, and fails unless it ends as it should,
    with nothing on stderr if `quiet`."""
    command = [sys.executable, "-c", _START, "demo", "--port", "0", "--dtype", "float32", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=interruptible,
    )
    errors: list[str] = []
    assert process.stdout
    assert process.stderr
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        line = process.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+) shows", line)
        assert url, f"{line!r} {''.join(errors)}"
        yield DemoServer(url[1], process, errors)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=HANG)
        reader.join(timeout=HANG)
        assert code == 130, "".join(errors)
        assert not quiet or "".join(errors) == ""
    finally:
        process.kill()
        process.wait()
