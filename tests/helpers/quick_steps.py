"""Steps that take no time, to be killed: `python -m tests.helpers.quick_steps OUT STARTED`.

Each step appends its name to the file STARTED when it begins.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.steps import Log, Runner, Step

COUNT = 24


def work(name: str, started: Path, _: Mapping[str, str]) -> Iterator[dict[str, object]]:
    with started.open("a") as file:
        file.write(f"{name}\n")
    yield {"much": ["x" * 100] * 200}
    time.sleep(0.03)
    yield {"name": name}


def steps(started: Path) -> list[Step]:
    return [
        Step(f"quick: {number}", partial(work, f"quick: {number}", started))
        for number in range(COUNT)
    ]


def main(out: str, started: str) -> int:
    log = Log(Path(out) / "card.jsonl", {"device": "none", "sources": "same"})
    until = time.monotonic() + 60
    with Runner(log, print) as runner:
        runner.phase(steps(Path(started)), 3, until, until)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
