"""Random cases of every kernel against float64.

    python -m tests.stress.kernel_cases --cases 300 --seed 0

On a CUDA device the kernels run compiled, in float16, bfloat16 and float32, each case once more
with overlapped launches; `--repeats 1000` runs it again that many times; all want equal bits.
Elsewhere they run in Triton's
interpreter, in float16 and float32: its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import sys
import time
import traceback
from collections.abc import Callable

import torch

from tests.helpers.interpreter import interpret

Case = Callable[[random.Random, torch.device, torch.dtype], object]
REGISTRIES = (
    "tests.helpers.kernel_cases_rows",
    "tests.helpers.kernel_cases_gemm",
    "tests.helpers.kernel_cases_specialized",
    "tests.helpers.kernel_cases_whole",
    "tests.helpers.kernel_cases_solver",
    "tests.helpers.kernel_cases_network",
    "tests.helpers.kernel_cases_block",
    "tests.helpers.kernel_faults",
)

# Its weights are float8, which opcheck cannot compare on a CPU; `block_float8` runs it.
FLOAT8_ALONE = {"odelt_fast::norm_linear_float8"}


def collect() -> list[tuple[str, Case]]:
    """(name, case) of every kernel; imports Triton, so TRITON_INTERPRET must be set before."""
    cases = []
    for registry in REGISTRIES:
        cases += importlib.import_module(registry).CASES
    return cases


def once(case: Case, key: str, device: torch.device, dtype: torch.dtype) -> object:
    """A case with what it draws from either generator fixed by its key, so that it can be run
    again."""
    rng = random.Random(key)
    torch.manual_seed(random.Random(key).randrange(2**32))
    return case(rng, device, dtype)


def run(
    name: str, case: Case, cases: int, seed: int, repeats: int, device: torch.device
) -> list[str]:
    """Runs the cases of one kernel; a line for each that failed, with options to run it alone."""
    from odelt_fast.kernels.device import overlapped_launches

    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])
    failures = []
    for index in range(cases):
        key = f"{name}/{seed + index}"
        dtype = dtypes[(seed + index) % len(dtypes)]
        try:
            first = once(case, key, device, dtype)
            # On a card first with overlapped launches, beside the repeats that are asked for.
            for overlap in [True] * (device.type == "cuda") + [False] * repeats:
                with overlapped_launches() if overlap else contextlib.nullcontext():
                    again = once(case, key, device, dtype)
                if not _equal(first, again):
                    raise AssertionError("a repeat gave other bits")
        except Exception:
            error = traceback.format_exc().strip().splitlines()
            place = next((line.strip() for line in reversed(error) if "kernel_cases_" in line), "")
            failures.append(
                f"--kernel {name} --cases 1 --seed {seed + index} ({dtype}): {error[-1]} [{place}]"
            )
    return failures


def _equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return (
            isinstance(second, (tuple, list))
            and len(first) == len(second)
            and all(map(_equal, first, second))
        )
    return first is None and second is None


def check_operators() -> int:
    """Schema, fake implementation, tracing of every operator, with a line each; 1 if one fails."""
    failed, checked = 0, set()
    for registry in REGISTRIES:
        for operator, operands in getattr(importlib.import_module(registry), "opchecks", list)():
            name = str(getattr(operator, "_qualname", None) or operator.name())
            checked.add(name)
            try:
                torch.library.opcheck(operator, operands)
                print(f"{name}: opcheck passes", flush=True)
            except Exception as error:
                print(f"{name}: {error}", flush=True)
                failed = 1
    for name in sorted(set(registered_operators()) - checked - FLOAT8_ALONE):
        print(f"{name}: opcheck has no arguments for it", flush=True)
        failed = 1
    return failed


def registered_operators() -> list[str]:
    """Operators that the kernels imported so far have registered."""
    return [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("odelt_fast::")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=300, help="cases a kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernel", action="append", help="only this kernel (may be given again)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="run each case again this often; its results must be equal bit by bit",
    )
    parser.add_argument(
        "--opcheck",
        action="store_true",
        help="instead, run torch.library.opcheck on every operator",
    )
    parser.add_argument(
        "--interpret", action="store_true", help="use the interpreter on a CUDA machine too"
    )
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.interpret
    if not cuda:
        interpret()
    if arguments.opcheck:
        return check_operators()
    known = dict(collect())
    unknown = set(arguments.kernel or ()) - set(known)
    if unknown:
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = False
    for name in arguments.kernel or known:
        start = time.perf_counter()
        failures = run(
            name,
            known[name],
            arguments.cases,
            arguments.seed,
            arguments.repeats,
            torch.device("cuda" if cuda else "cpu"),
        )
        seconds = time.perf_counter() - start
        print(
            f"{name}: {arguments.cases - len(failures)} of {arguments.cases} cases right,"
            f" {seconds:.1f} s",
            flush=True,
        )
        for line in failures:
            print("  " + line, flush=True)
        failed |= bool(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
