"""One run at a time has an output folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from odelt_fast.files import one_line

_LOCK = ".run.lock"
_LEAVING = 5.0  # seconds that the children of a killed run may hold its lock


@contextlib.contextmanager
def held(output_dir: Path, patience: float = 0.0) -> Iterator[str | None]:
    """Holds the folder for one run; gives a remark if a run before left its lock.

    patience: seconds to wait for the end of another, which its host was cut off from.

    The lock ends with the process that holds it, so that one of a dead process is none; its file
    says whose it is.

    Raises:
        ValueError: another run has it, naming process and host.
    """
    made = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / _LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"{output_dir} cannot be written: {error.strerror or error}") from None
    with file:
        left = _take(file, output_dir, patience)
        file.seek(0)
        file.truncate()
        mine = {"pid": os.getpid(), "host": socket.gethostname()}
        file.write(json.dumps(mine))
        file.flush()
        try:
            yield left
        except BaseException:
            if made:  # what a mistake ended before its first step leaves nothing
                _remove(output_dir)
            raise
        finally:
            file.seek(0)
            file.truncate()


def _remove(output_dir: Path) -> None:
    if [path.name for path in output_dir.iterdir()] == [_LOCK]:
        (output_dir / _LOCK).unlink()
        output_dir.rmdir()


def _take(file: Any, output_dir: Path, patience: float) -> str | None:
    """Locks the file, or says who has it; a remark on what it held."""
    begin = time.monotonic()
    while True:
        free = _lock(file)
        pid, host = _owner(file)
        here = host == socket.gethostname()
        alive = here and _is_alive(pid)
        if free or (free is None and here and not alive):
            return f"the run of process {pid} on {host} ended without its end" if host else None
        waited = time.monotonic() - begin
        if waited > patience and (not here or alive or waited > _LEAVING):
            hint = "" if free is False else f" (if that run is dead, delete {output_dir / _LOCK})"
            raise ValueError(
                f"{output_dir} is in use by a run, process {pid} on {host or 'another host'}:"
                f" choose another --output-dir, or wait for its end{hint}"
            )
        time.sleep(0.05)


def _lock(file: Any) -> bool | None:
    """Whether the file could be locked; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return None
    return True


def _owner(file: Any) -> tuple[int, str]:
    file.seek(0)
    try:
        values = json.loads(file.read(4096) or "{}")
        return int(values.get("pid", 0)), one_line(values.get("host", ""), 100)
    except (ValueError, TypeError, AttributeError):
        return 0, ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid > 0
