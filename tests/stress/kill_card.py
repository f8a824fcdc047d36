"""Kills benchmarks.card at random moments: `python -m tests.stress.kill_card --kills 30`.

Every run of the tiny grid is killed with SIGKILL again and again and gone on with until it has
finished; then the next one starts, until there were `kills` kills. What was once in the file must
stay there, no step that is done may run again, no process may live on, and in the end every step is
done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.steps import read_log
from tests.helpers import quick_steps

ROOT = Path(__file__).resolve().parents[2]
MARK = "ODELT_FAST_KILL_TEST"
Command = Callable[[Path], list[str]]


def card(out: Path) -> list[str]:
    """The command on the tiny grid."""
    arguments = "--grid", "tiny", "--minutes", "60", "--out", str(out)
    return [sys.executable, "-m", "benchmarks.card", *arguments]


def quick(out: Path) -> list[str]:
    """The same machinery over steps that take no time."""
    return [sys.executable, "-m", quick_steps.__name__, str(out), str(out / "started")]


def living(mark: str) -> Iterator[int]:
    """Processes with the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue


def dead(mark: str) -> bool:
    return not any(living(mark))


def moved(process: subprocess.Popen[bytes], path: Path, size: int) -> bool:
    """Whether it has written something, or ended."""
    return process.poll() is not None or (path.exists() and path.stat().st_size > size)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def check(path: Path, before: Mapping[str, str]) -> dict[str, str]:
    """{step: state} of a file; AssertionError if a step was lost or done twice."""
    found = {key: record["state"] for key, record in read_log(path)[1].items()}
    done = {key for key, state in before.items() if state == "done"}
    assert done <= found.keys(), f"lost: {done - found.keys()}"
    assert all(found[key] == "done" for key in done), "done, and run again"
    counts: Counter[str] = Counter()
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        counts[record.get("step", "")] += record.get("state") == "done"
    twice = [key for key, count in counts.items() if count > 1]
    assert not twice, f"done twice: {twice}"
    return found


def torture(command: Command, kills: int, longest_s: float, seed: int, folder: Path) -> int:
    """Kills and goes on until there were `kills` kills and a run has finished; returns how many
    runs did.

    longest_s: that a run is let alone, once it has written something new or for a while.
    """
    chance, killed, finished, number = random.Random(seed), 0, 0, 0
    while killed < kills or not finished:
        number += 1
        out, found, ended = folder / f"run {number}", dict[str, str](), False
        out.mkdir()
        path = out / "card.jsonl"
        while not ended:
            mark, size = uuid.uuid4().hex, path.stat().st_size if path.exists() else 0
            with (out / "output").open("ab") as output:
                process = subprocess.Popen(
                    command(out), cwd=ROOT, env=os.environ | {MARK: mark}, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            last = killed >= kills
            if not last and chance.random() < 0.7:  # most of a run is its start
                wait_until(partial(moved, process, path, size), 60)
            try:
                code = process.wait(3600 if last else chance.uniform(0, longest_s))
                assert code == 0, (out / "output").read_text()[-3000:]
                ended, finished = True, finished + 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                print(f"{killed} kills", end="\r", file=sys.stderr)
            assert wait_until(partial(dead, mark), 20), "a process lives on"
            found = check(path, found)
        assert {*found.values()} <= {"done", "missing"}, found
    return finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="steps that take no time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command, longest_s = (quick, 0.4) if options.quick else (card, 10.0)
        finished = torture(command, options.kills, longest_s, options.seed, Path(folder))
    print(f"{options.kills} kills, {finished} runs finished, nothing lost, nothing done twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
