"""Everything that is measured, correctness first.

    python -m benchmarks.suite --out DIR [--part PART ...]

Parts: correctness (the tests that the rest depends on; a red group refuses the parts that need it),
kernels (each against plain PyTorch and Inductor), latency (batch 1), throughput (larger batches,
memory, adaptive solvers), xl (DiT-XL/2), solvers (the paper's Table 3, a race against torchdiffeq,
what a solve launches), peers (torch.compile's modes and, with --reference-dir, the paper's JAX
reference), training. Each part is one JSON file in DIR with every sample, the device, versions and
commit. A finished configuration is never measured again; a part that comes near --limit-s stops
between two and goes on when it is run again. Where there is no git repository, set COMMIT to say
what is measured. Without a GPU the grid is smaller.

Exit code: 0 finished, 1 refused or wrong usage, 3 stopped at the limit: run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from . import correctness
from .ceilings import measure_ceilings
from .jax_peer import JaxPeer
from .kernel_speed import measure_kernel
from .kernel_table import cases
from .measure import Record, Results, command_parser, nvidia_smi, release
from .report import part_table
from .sampling import CONFIGS, Workload, dopri5, measure_memory, measure_workload
from .scope import GRIDS, SCALE, Scope, table3, workloads
from .solver_speed import measure_proof, measure_race

PARTS = ("correctness", "kernels", "latency", "throughput", "xl", "solvers", "peers", "training")
FINISHED, REFUSED, AGAIN = 0, 1, 3


Item = tuple[str, Callable[[], Record]]  # key in the part's file, and what measures it


@dataclass
class Session:
    """What a run measures with. ceilings: filled before the first measurement."""

    options: argparse.Namespace
    device: torch.device
    peer: JaxPeer | None
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        return GRIDS[self.options.grid]

    def items(self, part: str, limit_s: float) -> Iterator[Item]:
        """The configurations of a part, in the order in which they are measured."""
        if part == "kernels":
            return self.kernel_items()
        if part == "training":
            return iter([("training", partial(measure_training, self.device, limit_s))])
        return self.solver_items() if part == "solvers" else self.sampling_items(part)

    def kernel_items(self) -> Iterator[Item]:
        scope, cuda = self.scope, self.device.type == "cuda"
        arguments = scope.dtype, self.device, self.ceilings, scope.seconds, scope.inductor
        for network, batch in scope.kernels:
            for case in cases(CONFIGS[network], batch, scope.dtype, cuda):
                key = f"{network} batch {batch} {case.name}"
                yield key, partial(measure_kernel, case, *arguments)

    def time_item(self, load: Workload) -> Item:
        arguments = self.device, self.ceilings, self.scope.seconds, self.peer
        return load.key, partial(measure_workload, load, *arguments)

    def memory_item(self, load: Workload) -> Item:
        return f"memory {load.key}", partial(measure_memory, load, self.device)

    def sampling_items(self, part: str) -> Iterator[Item]:
        loads = list(workloads(part, self.scope, self.peer is not None))
        yield from map(self.time_item, loads)
        if part != "peers":
            for load in loads:
                if load.operation.steps == self.scope.steps[0]:
                    yield self.memory_item(load)

    def solver_items(self) -> Iterator[Item]:
        """Table 3 without its one-step samples, then races and proofs.

        These at batch 1 and the largest batch, of the longest network.
        """
        scope, device = self.scope, self.device
        for load in table3(scope, "fused" if device.type == "cuda" else "auto"):
            yield self.time_item(load)
            if load.operation.steps == max(scope.steps):
                yield self.memory_item(load)
        operation = dopri5(max(scope.depths))
        for batch in (1, scope.batches[-1]):
            load = Workload(scope.network, operation, batch, scope.dtype, scale=SCALE)
            arguments = load, device, scope.seconds, scope.inductor
            yield f"race {load.key}", partial(measure_race, *arguments)
            yield f"proof {load.key}", partial(measure_proof, load, device)


def measure_training(device: torch.device, limit_s: float) -> Record:
    from .training_speed import Options, measure

    return {"rows": measure(Options(), device.type, limit_s)}


def check_groups(
    results: Results, needed: Collection[str], cuda: bool, cases: int, deadline: float
) -> int:
    """Runs the groups that are not known to be green; prints a line for each.

    Returns:
        REFUSED if one is red, AGAIN if time ran out, else FINISHED.
    """

    def known(group: correctness.Group) -> bool:
        found = results.configurations.get(group.name, {})
        enough = found.get("cases", 0) >= cases or not group.kernels
        return bool(found.get("green") and found.get("sources") == group.digest and enough)

    left, state = deadline - time.perf_counter(), FINISHED
    waiting = [
        group for group in correctness.groups(cuda) if group.group in needed and not known(group)
    ]
    if waiting and left < 5:
        return AGAIN
    # Most of a GPU's groups is compilation, which the processors share; nothing is timed yet.
    with ThreadPoolExecutor(min(6, (os.cpu_count() or 2) // 2) if cuda else 1) as pool:
        runs = {pool.submit(correctness.run_group, group, cases, left): group for group in waiting}
        for done in as_completed(runs):
            group, found = runs[done], done.result()
            if "reason" in found:
                say("correctness", group.name, found["reason"])
                state = state or (AGAIN if "not finished" in found["reason"] else REFUSED)
                continue
            results.add(group.name, {"group": group.group, "cases": cases, **found})
            counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))
            verdict = "green" if found["green"] else "RED"
            say("correctness", group.name, f"{verdict} ({counts}, {found['seconds']:.0f} s)")
            if not found["green"]:
                print("\n".join(found["tail"]), flush=True)
                state = REFUSED
    return state


def say(*words: str) -> None:
    print(": ".join(words), flush=True)


def run_part(part: str, session: Session) -> int:
    """Measures what is left of a part, within --limit-s."""
    options, scope, device = session.options, session.scope, session.device
    deadline = time.perf_counter() + options.limit_s
    needed = correctness.NEEDS.get(part) or {*chain(*correctness.NEEDS.values())}
    checks = Results(options.out / "correctness.json", "correctness")
    cuda = device.type == "cuda"
    state = check_groups(checks, needed, cuda, scope.cases, deadline)
    if state != FINISHED or part == "correctness":
        if state == REFUSED and part != "correctness":
            say(part, "refused", "it would measure what is not correct")
        return state
    results = Results(options.out / f"{part}.json", part)
    items = {
        key: run
        for key, run in session.items(part, deadline - time.perf_counter())
        if any(fnmatch.fnmatch(key, pattern) for pattern in options.only)
    }
    longest = 0.0
    session.ceilings.clear()
    for key in [key for key in items if key not in results.configurations]:
        start = time.perf_counter()
        if start + longest > deadline:
            done = len(items.keys() & results.configurations.keys())
            progress = f"{done} of {len(items)} configurations finished"
            say(part, f"{progress}; run the same command again for the rest")
            return AGAIN
        try:
            if not session.ceilings:  # once, and only if there is something left to measure
                session.ceilings |= measure_ceilings(device, scope.seconds)
                results.run["ceilings"] = dict(session.ceilings)
                if cuda:
                    results.run["nvidia_smi"] = nvidia_smi()  # the clocks of a busy card
            found = items[key]()
        # one configuration's fault, of any type, must not keep the others from being measured
        except Exception as error:
            hint = [correctness.WHEELS_HINT] if isinstance(error, ImportError) else []
            say(part, key, type(error).__name__, str(error), *hint)
            state = REFUSED
            continue
        finally:
            release(device)
        took = time.perf_counter() - start
        longest = max(longest, took)
        results.add(key, {"seconds": took, **found})
        say(part, key, f"{took:.1f} s")
    print(part_table(results.content), flush=True)
    return state


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


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("suite", __doc__)
    add = parser.add_argument
    text = "folder of the JSON files; existing ones are gone on with"
    add("--out", type=Path, required=True, help=text)
    text = "parts, in this order (default: all)"
    add("--part", nargs="+", choices=PARTS, default=PARTS, help=text)
    add("--grid", choices=tuple(GRIDS), help="default: full on a CUDA GPU, reduced elsewhere")
    text = 'only such configurations, e.g. "DiT-B/2 * l=12 *"'
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help=text)
    add("--limit-s", type=float, default=540, help="seconds after which a part stops")
    text = "checkout of github.com/gudovskiy/odelt: adds the JAX reference to the peers"
    add("--reference-dir", type=Path, help=text)
    text = "a Python that has jax, flax and einops"
    add("--reference-python", default=sys.executable, help=text)
    add("--wheels", type=Path, help="folder of wheels for packages that are missing here")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.grid = options.grid or ("full" if device.type == "cuda" else "reduced")
    state = FINISHED
    with ExitStack() as stack:
        try:
            if options.wheels:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                install_wheels(options.wheels, folder)
            session = Session(options, device, None)
            if options.reference_dir and "peers" in options.part:
                session.peer = JaxPeer(options.reference_dir, options.reference_python)
                stack.callback(session.peer.close)
            for part in (part for part in PARTS if part in options.part):
                state = max(state, run_part(part, session))
                if state == AGAIN:
                    break
        except (ValueError, subprocess.CalledProcessError) as error:
            print(f"suite: {error}", file=sys.stderr)
            return REFUSED
    return state


if __name__ == "__main__":
    sys.exit(main())
