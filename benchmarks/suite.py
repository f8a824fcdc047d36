"""Everything that is measured, correctness first: `python -m benchmarks.suite --out DIR [--part
PART ...]`.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness
from benchmarks.ceilings import measure_ceilings
from benchmarks.jax_peer import JaxPeer
from benchmarks.kernel_speed import measure_kernel
from benchmarks.kernel_table import cases, operators
from benchmarks.measure import Results, nvidia_smi, release
from benchmarks.report import part_table
from benchmarks.sampling import CONFIGS, MODES, Cell, measure_cell, measure_memory
from benchmarks.solver_speed import SCALE, measure_proof, measure_race, table3_cells

PARTS = ("correctness", "kernels", "latency", "throughput", "xl", "solvers", "peers", "training")
FINISHED, REFUSED, AGAIN = 0, 1, 3


@dataclass(frozen=True)
class Grid:
    """What is measured on one kind of device. Tuples of (network, batch) or (network, batch,
    depth); seconds: of each variant."""

    dtype: torch.dtype
    network: str
    depths: tuple[int, ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    adaptive: tuple[float, ...]
    xl: tuple[str, int, tuple[int, ...]]
    kernels: tuple[tuple[str, int], ...]
    peers: tuple[tuple[str, int, int], ...]
    variants: tuple[str, ...]
    inductor: bool
    cases: int
    seconds: float


GRIDS = {
    "full": Grid(
        torch.bfloat16, "DiT-B/2", (4, 8, 12), (1, 4, 128), (8, 128), (1e-2, 1e-4), ("DiT-XL/2", 64, (12, 20, 28)),
        (("DiT-B/2", 1), ("DiT-B/2", 128), ("DiT-XL/2", 64)),
        (("DiT-B/2", 1, 12), ("DiT-B/2", 1, 4), ("DiT-B/2", 128, 12), ("DiT-B/2", 128, 4), ("DiT-XL/2", 64, 28)),
        ("eager", "fused", "fused-fp8"), True, 40, 1.0,
    ),
    "reduced": Grid(
        torch.float32, "DiT-S/2", (4, 8, 12), (1, 4), (4,), (1e-2,), ("DiT-B/2", 1, (4, 12)), (("DiT-S/2", 1),), (("DiT-S/2", 1, 4),),
        ("eager", "auto"), True, 4, 1.0,
    ),
    "tiny": Grid(
        torch.float32, "tiny", (4, 12), (1, 2), (2,), (1e-2,), ("tiny", 1, (4,)), (("tiny", 1),), (("tiny", 2, 4),), ("eager", "fused"),
        False, 1, 0.05,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One configuration: its key in the part's file, and what measures it."""

    key: str
    run: Callable[[], dict[str, Any]]


def kernel_items(grid: Grid, device: torch.device, ceilings: dict[str, float]) -> Iterator[Item]:
    for network, batch in grid.kernels:
        config = CONFIGS[network]
        triton = operators(config.num_heads, config.patch_size) if device.type == "cuda" else {}
        for case in cases(config, batch, grid.dtype, triton):
            yield Item(
                f"{network} batch {batch} {case.name}",
                lambda case=case: measure_kernel(
                    case, grid.dtype, device, ceilings, grid.seconds, grid.inductor
                ),  # type: ignore[misc]
            )


def sampling_cells(part: str, grid: Grid, reference: bool) -> Iterator[Cell]:
    """The cells of latency, throughput, xl and peers; T ascends, because the longest are held to a
    shorter one's check."""
    if part == "peers":
        for network, batch, depth in grid.peers:
            variants = (
                *grid.variants,
                *(MODES if grid.inductor else ()),
                *(("jax",) if reference else ()),
            )
            yield Cell(network, depth, 4, batch, grid.dtype, variants)
        return
    network, batches, depths = (
        grid.network,
        {"latency": (1,), "throughput": grid.batches}.get(part, (grid.xl[1],)),
        grid.depths,
    )
    if part == "xl":
        network, _, depths = grid.xl
    for batch in batches:
        for depth in depths:
            for steps in grid.steps if part != "xl" else grid.steps[:2]:
                yield Cell(network, depth, steps, batch, grid.dtype, grid.variants)
    if part == "throughput":
        for depth in depths:
            for tolerance in grid.adaptive:
                yield Cell(
                    network,
                    depth,
                    1,
                    batches[-1],
                    grid.dtype,
                    grid.variants[:2],
                    "dopri5",
                    tolerance,
                )


def sampling_items(
    part: str, grid: Grid, device: torch.device, ceilings: dict[str, float], peer: JaxPeer | None
) -> Iterator[Item]:
    found = list(sampling_cells(part, grid, peer is not None))
    for cell in found:
        yield Item(
            cell.key, lambda cell=cell: measure_cell(cell, device, ceilings, grid.seconds, peer)
        )  # type: ignore[misc]
    if part != "peers":
        for cell in found:
            if cell.steps == grid.steps[0] and cell.solver == "euler":
                yield Item(f"memory {cell.key}", lambda cell=cell: measure_memory(cell, device))  # type: ignore[misc]


def solver_items(grid: Grid, device: torch.device, ceilings: dict[str, float]) -> Iterator[Item]:
    """Table 3 without its one-step samples; races and proofs at batch 1 and the largest batch, of
    the longest network."""
    variant, batch, depth = (
        "fused" if device.type == "cuda" else "auto",
        grid.batches[-1],
        max(grid.depths),
    )
    network, dtype, seconds = grid.network, grid.dtype, grid.seconds
    for cell in table3_cells(
        network,
        grid.depths,
        [count for count in grid.steps if count > 1],
        grid.adaptive,
        batch,
        dtype,
        variant,
    ):
        yield Item(cell.key, lambda cell=cell: measure_cell(cell, device, ceilings, seconds, None))  # type: ignore[misc]
        if cell.solver == "euler" and cell.steps == max(grid.steps):
            yield Item(f"memory {cell.key}", lambda cell=cell: measure_memory(cell, device))  # type: ignore[misc]
    for count in (1, batch):
        cell = Cell(network, depth, 1, count, dtype, (), "dopri5", scale=SCALE)
        yield Item(
            f"race {cell.key}", lambda cell=cell: measure_race(cell, device, seconds, grid.inductor)
        )  # type: ignore[misc]
        yield Item(f"proof {cell.key}", lambda cell=cell: measure_proof(cell, device))  # type: ignore[misc]


def training_items(device: torch.device, limit_s: float) -> Iterator[Item]:
    def run() -> dict[str, Any]:
        from benchmarks.training_speed import measure

        return {"rows": measure(device.type, limit_s)}

    yield Item("training", run)


def check_groups(
    results: Results, needed: set[str], cuda: bool, cases: int, deadline: float
) -> int:
    """Runs the groups that are not known to be green; prints a line for each. REFUSED if one is
    red, AGAIN if time ran out."""

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
        runs = {
            pool.submit(correctness.run_group, group, cuda, cases, left): group for group in waiting
        }
        for done in as_completed(runs):
            group, found = runs[done], done.result()
            if "reason" in found:
                print(f"correctness: {group.name}: {found['reason']}", flush=True)
                state = state or (AGAIN if "not finished" in found["reason"] else REFUSED)
                continue
            results.add(group.name, {"group": group.group, "cases": cases, **found})
            counts = (
                f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped,"
                f" {found['seconds']:.0f} s"
            )
            print(
                f"correctness: {group.name}: {'green' if found['green'] else 'RED'} ({counts})",
                flush=True,
            )
            if not found["green"]:
                print("\n".join(found["tail"]), flush=True)
                state = REFUSED
    return state


def run_part(
    part: str, options: argparse.Namespace, device: torch.device, peer: JaxPeer | None
) -> int:
    """Measures what is left of a part, within --limit-s."""
    begin, grid = time.perf_counter(), GRIDS[options.grid]
    deadline = begin + options.limit_s
    needed = (
        {group for groups in correctness.NEEDS.values() for group in groups}
        if part == "correctness"
        else correctness.NEEDS[part]
    )
    checks = Results(options.out / "correctness.json", "correctness")
    state = check_groups(
        checks, set(needed), device.type == "cuda", options.cases or grid.cases, deadline
    )
    if state != FINISHED or part == "correctness":
        if state == REFUSED and part != "correctness":
            print(f"{part}: refused: it would measure what is not correct", flush=True)
        return state
    results = Results(options.out / f"{part}.json", part)
    ceilings: dict[str, float] = {}
    items = list(
        kernel_items(grid, device, ceilings)
        if part == "kernels"
        else (
            training_items(device, deadline - time.perf_counter())
            if part == "training"
            else (
                solver_items(grid, device, ceilings)
                if part == "solvers"
                else sampling_items(part, grid, device, ceilings, peer)
            )
        )
    )
    items = [
        item
        for item in items
        if any(fnmatch.fnmatch(item.key, pattern) for pattern in options.only)
    ]
    longest = 0.0
    for item in items:
        if item.key in results.configurations:
            continue
        start = time.perf_counter()
        if start + longest > deadline:
            done = sum(item.key in results.configurations for item in items)
            print(
                f"{part}: {done} of {len(items)} configurations finished; run the same command"
                " again for the rest",
                flush=True,
            )
            return AGAIN
        try:
            if not ceilings:  # once, and only if there is something left to measure
                ceilings |= measure_ceilings(device, grid.seconds)
                results.run |= {"ceilings": ceilings}
                if device.type == "cuda":
                    results.run["nvidia_smi"] = nvidia_smi()  # the clocks of a busy card
            found = item.run()
        # one configuration's fault, of any type, must not keep the others from being measured
        except Exception as error:
            hint = (
                ": carry the wheels in a folder and pass --wheels FOLDER"
                if isinstance(error, ImportError)
                else ""
            )
            print(f"{part}: {item.key}: {type(error).__name__}: {error}{hint}", flush=True)
            state = REFUSED
            continue
        finally:
            release(device)
        took = time.perf_counter() - start
        longest = max(longest, took)
        results.add(item.key, {"seconds": took, **found})
        print(f"{part}: {item.key}: {took:.1f} s", flush=True)
    print(part_table(results.content), flush=True)
    return state


def install_wheels(folder: Path, target: Path) -> None:
    """Makes the packages of the wheels in `folder` importable, here and in child processes."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise ValueError(f"--wheels {folder}: there are no wheels in it")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(target),
        *wheels,
    ]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(target), os.environ.get("PYTHONPATH")])
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the JSON files; existing ones are gone on with",
    )
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts, in this order (default: all)",
    )
    parser.add_argument(
        "--grid", choices=tuple(GRIDS), help="default: full on a CUDA GPU, reduced elsewhere"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help='only such configurations, e.g. "DiT-B/2 * l=12 *"',
    )
    parser.add_argument(
        "--cases", type=int, help="random cases of each kernel (default: 40 on a GPU)"
    )
    parser.add_argument(
        "--limit-s", type=float, default=540, help="seconds after which a part stops"
    )
    parser.add_argument(
        "--reference-dir",
        type=Path,
        help="checkout of github.com/gudovskiy/odelt: adds the JAX reference to the peers",
    )
    parser.add_argument(
        "--reference-python", default=sys.executable, help="a Python that has jax, flax and einops"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels for packages that are missing here"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.grid = options.grid or ("full" if device.type == "cuda" else "reduced")
    state = FINISHED
    with ExitStack() as stack:
        try:
            if options.wheels:
                install_wheels(
                    options.wheels, Path(stack.enter_context(tempfile.TemporaryDirectory()))
                )
            peer = None
            if options.reference_dir and "peers" in options.part:
                peer = JaxPeer(options.reference_dir, options.reference_python)
                stack.callback(peer.close)
            for part in PARTS:
                if part in options.part:
                    state = max(state, run_part(part, options, device, peer))
                    if state == AGAIN:
                        break
        except (ValueError, subprocess.CalledProcessError) as error:
            print(f"suite: {error}", file=sys.stderr)
            return REFUSED
    return state


if __name__ == "__main__":
    sys.exit(main())
