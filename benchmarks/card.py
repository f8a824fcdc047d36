"""What a card can do, in nine minutes: what is right, what is fast, what to do next.

    python -m benchmarks.card --minutes 9 --out DIR

Correctness first, then times; every question is a step of its own process, so that one which
raises, crashes or hangs costs itself alone. What it finds is appended to DIR/card.jsonl at once: it
may be stopped at any moment, and the same command goes on with what is missing. A kernel or backend
whose check failed is not measured. After what nine minutes are for (versions, ceilings, checks;
eager, fused, float8 and torch.compile at batch 1 and 128; tuning; an adaptive solve) comes, time
permitting or in the next calls, everything else: all kernels, the full grid of latency and
throughput, DiT-XL/2, the paper's Table 3, races against torchdiffeq and, with --reference-dir, the
paper's JAX reference, training. Without a GPU the grid is smaller.

It needs torch, Triton, numpy and tqdm, and pytest and safetensors for the checks that are tests: a
machine with a card is often bare, which is why its options are argparse's. Native libraries are
built in its first seconds where there is a compiler (nvcc); elsewhere carry them (docs/gpu.md).

Exit code: 0 finished, 1 something failed or was refused, 2 wrong usage, 3 time is up: run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from . import plan, report
from .jax_peer import JaxPeer
from .measure import ROOT, SOURCES, Record, command_parser, device_record, source_digest
from .scope import GRIDS
from .steps import Log, Runner, elsewhere

FINISHED, FAILED, USAGE, AGAIN = 0, 1, 2, 3
CARRIED = ROOT / "carry"  # where native libraries lie that came with the checkout


def install_wheels(folder: Path, target: str) -> None:
    """Makes the packages of the wheels in `folder` importable, here and in child processes."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise ValueError(f"--wheels {folder}: there are no wheels in it")
    flags = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
    subprocess.run([sys.executable, *flags, target, *wheels], check=True)
    sys.path.insert(0, target)
    paths = target, os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("card", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results, gone on with if it exists")
    add("--minutes", type=float, default=plan.MINUTES, help="after which it ends (default: 9)")
    add("--grid", choices=tuple(GRIDS), help="default: full on a CUDA GPU, reduced elsewhere")
    text = 'only such steps, and what they stand on, e.g. "latency: * l=12 *" "kernels: *"'
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help=text)
    text = "checkout of github.com/gudovskiy/odelt: adds the JAX reference to the peers"
    add("--reference-dir", type=Path, help=text)
    text = "a Python that has jax, flax and einops"
    add("--reference-python", default=sys.executable, help=text)
    add("--wheels", type=Path, help="folder of wheels for packages that are missing here")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, not {options.minutes:g}")
    return options


def describe() -> Record:
    """The record that this run's results must be read with."""
    every = *SOURCES, "benchmarks/*.py", "tests/**/*.py"
    command = " ".join(["python -m benchmarks.card", *sys.argv[1:]])
    return device_record() | {"command": command, "sources": source_digest(*every)}


def run(options: argparse.Namespace, begin: float) -> int:
    """Runs the phases, one after the other; prints a line for each step that has ended."""
    found = elsewhere(describe)
    cuda = found["kind"] == "cuda"
    log = Log(options.out / report.NAME, found)
    reference = options.reference_dir and (options.reference_dir, options.reference_python)
    grid = options.grid or ("full" if cuda else "reduced")
    phases = plan.make_plan(grid, found["kind"], log, reference).phases(options.only)
    if not phases[-1].steps:
        raise ValueError(f"--only {' '.join(options.only)}: there are no such steps")
    second = options.minutes / plan.MINUTES
    end = begin + 60 * options.minutes
    with Runner(log, lambda line: print(line, flush=True)) as runner:
        for phase in phases:
            runner.phase(phase.steps, phase.workers, begin + phase.until_s * second, end)
    states = [log.state(step.key) for step in phases[-1].steps]
    left = sum(not log.settled(step) for step in phases[-1].steps if log.state(step.key) in OPEN)
    if log.found:
        print(report.summary(report.load(options.out)), flush=True)
    if left:
        print(f"{left} of {len(states)} steps are left: run the same command again", flush=True)
        return AGAIN
    return FAILED if {"failed", "missing", "refused"} & {*states} else FINISHED


OPEN = ("", "unfinished", "done")  # done: with other sources


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    try:
        import platformdirs  # noqa: F401  # knows the user's cache folder
    except ImportError:
        os.environ.setdefault("ODELT_FAST_CACHE", str(CARRIED))
    with ExitStack() as stack:
        try:
            if options.wheels:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                install_wheels(options.wheels, folder)
            if options.reference_dir:
                JaxPeer.check(options.reference_dir)
            return run(options, begin)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            print(f"card: {error}", file=sys.stderr)
            return USAGE


if __name__ == "__main__":
    # Stopped politely, it takes its steps along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))
    sys.exit(main())
