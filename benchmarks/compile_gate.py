"""Compiles every kernel for sm_80, sm_90 and sm_100 without a GPU; slow code fails.

    python -m benchmarks.compile_gate [--arch 80 90 100] [--case PATTERN ...] [--one] [--sample N
    --seed S] [--update-baseline [--missing]]

For each `CompileCase` of each module in kernels/: it compiles, no spills, shared memory within the
card's limit, global loads as wide as the case demands, and no more registers than the stored
baseline (benchmarks/compile_baseline.json, one table for each Triton version; a case that it lacks
is shown as new). Nothing is cached. Prints a table; exit code 1 when a case fails. All cases take
minutes: --sample draws some. The baseline is saved after every case, so that an interrupted update
goes on with --missing.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ROOT, command_parser
from odelt_fast.files import write_atomically

if TYPE_CHECKING:
    from odelt_fast.kernels.compile_case import CompileCase

Table = dict[str, dict[str, int]]  # "CASE sm_ARCH" -> registers and shared
BASELINE = Path(__file__).with_name("compile_baseline.json")
ARCHES = (80, 90, 100)
# Shared memory that one block may use, in bytes: the CUDA programming guide's table of compute
# capabilities (163 and 227 KiB).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes of shared memory, of spills a thread, of the widest global load."""

    registers: int
    shared: int
    spills: int
    load_bytes: int


def collect(patterns: list[str], one: bool) -> Iterator[CompileCase]:
    """The cases in kernels/ that match a pattern; `one`: the first of each module and function.

    Raises:
        ValueError: two cases have one name.
    """
    sys.path.insert(0, str(ROOT))
    seen: set[object] = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"odelt_fast.kernels.{path.stem}")
        for case in getattr(module, "compile_cases", tuple)():
            if case.name in seen:
                raise ValueError(f"two compile cases are called {case.name}")
            function = (path.stem, case.fn.__name__)
            matches = any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
            if matches and not (one and function in seen):
                seen.add(function)
                yield case
            seen.add(case.name)


def compiled(case: CompileCase, arch: int) -> Any:
    """Triton's compiled kernel of one case for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    index = {name: i for i, name in enumerate(case.signature)}
    source = (GluonASTSource if case.fn.is_gluon() else ASTSource)(
        case.fn,
        dict(case.signature),
        constexprs={(index[name],): value for name, value in case.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_case(case: CompileCase, arch: int) -> Resources:
    """Compiles one case for one target; its resources, from the machine code and the PTX."""
    kernel = compiled(case, arch)
    registers, stack = machine_resources(kernel.asm["cubin"])
    # A stack frame without spills (an array indexed at run time) is as slow: it counts as spilled.
    return Resources(registers, kernel.metadata.shared, stack, widest_load(kernel.asm["ptx"]))


def machine_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread, from `cuobjdump -res-usage`.

    The stack is where ptxas puts spills.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.check_output([str(tool), "-res-usage", file.name], text=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resources: {report!r}")
    usage = [tuple(map(int, numbers)) for numbers in found]
    return max(registers for registers, _, _ in usage), max(s + local for _, s, local in usage)


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory in the PTX; one by TMA counts as 128."""
    tma = re.search(r"cp\.async\.bulk\.tensor[\w.:]*\.shared[\w.:]*\.global", ptx)
    widths = [128 if tma else 0]
    copies = (
        r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)"
    )
    widths += [int(size, 0) for size in re.findall(copies, ptx)]
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)(?![\w.:])", ptx)
    return max(*widths, *(int(vector or 1) * int(bits) // 8 for vector, bits in loads), 0)


def judge(
    case: CompileCase, arch: int, found: Resources, baseline: dict[str, int] | None
) -> list[str]:
    """The reasons why a compiled case fails; none when it passes."""
    faults = []
    if found.spills:
        faults.append(f"spills or local memory: {found.spills} bytes a thread")
    if found.shared > SHARED_LIMIT[arch]:
        faults.append(f"shared memory {found.shared} is over the card's {SHARED_LIMIT[arch]} bytes")
    if found.load_bytes < case.vector_bytes:
        faults.append(
            f"scalar loads: the widest is {found.load_bytes} bytes, {case.vector_bytes} are due"
        )
    if baseline is not None and found.registers > baseline["registers"]:
        faults.append(f"registers grew from {baseline['registers']} to {found.registers}")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("compile_gate", __doc__)
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=ARCHES, default=ARCHES, help="targets")
    text = 'only cases with such names, e.g. "linear/*/bf16/*"'
    add("--case", nargs="+", default=["*"], metavar="PATTERN", help=text)
    text = "only the first matching case of each kernel function"
    add("--one", action="store_true", help=text)
    text = "only N of the matching cases and targets, drawn by --seed"
    add("--sample", type=int, metavar="N", help=text)
    add("--seed", type=int, default=0)
    add("--missing", action="store_true", help="only what the baseline lacks")
    add("--baseline", type=Path, default=BASELINE, help="file of the stored register counts")
    text = "store this run's registers and shared memory for this Triton version"
    add("--update-baseline", action="store_true", help=text)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("", "0", "false", "off", "no"):
        print(
            "compile_gate: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled:"
            " unset it",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return run(options)


def run(options: argparse.Namespace) -> int:
    import triton

    path, version = options.baseline, f"triton {triton.__version__}"
    stored: dict[str, Table] = json.loads(path.read_text()) if path.exists() else {}
    baseline = stored.setdefault(version, {})
    pairs = [
        (case, arch)
        for case in collect(options.case, options.one)
        for arch in options.arch
        if arch in case.arches
    ]
    if not pairs:
        print("no case matches", file=sys.stderr)
        return 1
    if options.missing:
        pairs = [(case, arch) for case, arch in pairs if f"{case.name} sm_{arch}" not in baseline]
    if options.sample is not None:
        pairs = random.Random(options.seed).sample(pairs, min(options.sample, len(pairs)))
    print(f"{version}: {len(baseline)} cases in the baseline")
    print(f"{'case':44} {'arch':>6} {'registers':>9} {'shared':>7} {'load':>4} {'s':>6}")
    failed = 0
    for case, arch in pairs:
        key, start = f"{case.name} sm_{arch}", time.perf_counter()
        try:
            found = compile_case(case, arch)
        # A compiler's fault has any type; the other cases are still to be judged.
        except Exception as error:
            *_, last = ("", *str(error).strip().splitlines())
            reason = f"{type(error).__name__}: {last}"
            print(f"{case.name:44} sm_{arch:<4} does not compile: {reason}", flush=True)
            failed += 1
            continue
        known = None if options.update_baseline else baseline.get(key)
        faults = judge(case, arch, found, known)
        if options.update_baseline and not faults:
            baseline[key] = {"registers": found.registers, "shared": found.shared}
            save(path, stored)
        new = "" if known or options.update_baseline else " (new)"
        resources = f"{found.registers:9} {found.shared:7} {found.load_bytes:4}"
        seconds, verdict = time.perf_counter() - start, "; ".join(faults) or f"ok{new}"
        print(f"{case.name:44} sm_{arch:<4} {resources} {seconds:5.1f}  {verdict}", flush=True)
        failed += bool(faults)
    print(f"{len(pairs) - failed} of {len(pairs)} passed")
    return 1 if failed else 0


def save(path: Path, stored: dict[str, Table]) -> None:
    """Writes the baseline in one move, a line a case."""
    tables = []
    for version, table in sorted(stored.items()):
        lines = ",\n".join(f'  "{key}": {json.dumps(table[key])}' for key in sorted(table))
        tables.append(f' "{version}": {{\n{lines}\n }}')
    text = "{\n" + ",\n".join(tables) + "\n}\n"
    write_atomically(path, lambda file: file.write(text.encode()), flushed=False)


if __name__ == "__main__":
    sys.exit(main())
