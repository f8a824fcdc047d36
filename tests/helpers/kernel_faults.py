"""Kernels that are wrong on purpose: `kernel_checks` must catch each fault.

Otherwise a green run would mean nothing.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers.kernel_checks import guarded, watched

# Faults that only the interpreter's audit can see, not the guards and NaNs on a card: a load whose
# value is thrown away, and races.
AUDITED = (
    "reads past its input",
    "stores one element in two programs",
    "loads what another program stores",
)
EXCHANGES = (
    "none",
    "counts without releasing",
    "adds up shares before all are there",
    "counts past its counters",
)
DESCRIPTORS = ("none", "describes more rows than there are", "two programs store one tile")
FAULTS = (
    "none",
    "stores past its output",
    "stores before its output",
    "leaves an element out",
    "stores into its input",
    *AUDITED,
)


@triton.jit
def _double_kernel(x, out, count, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    o_n = first + tl.arange(0, BLOCK)
    mask = o_n < count
    b_x = tl.load(x + o_n, mask=mask, other=0.0)
    if FAULT == "reads past its input":
        b_past = tl.load(x + o_n + 1, mask=mask, other=0.0)
        b_x = tl.where(o_n < count, b_x, b_past)
    if FAULT == "stores into its input":
        tl.store(x + o_n, b_x + 1.0, mask=mask)
    if FAULT == "stores past its output":
        tl.store(out + o_n + 1, b_x, mask=mask)
    if FAULT == "stores before its output":
        tl.store(out + o_n - 1, b_x, mask=mask)
    if FAULT == "leaves an element out":
        mask = mask & (o_n != count // 2)
    if FAULT == "loads what another program stores":
        b_x += 0.0 * tl.load(out + (o_n + BLOCK) % count, mask=mask, other=0.0)
    tl.store(out + o_n, 2.0 * b_x, mask=mask)
    if FAULT == "stores one element in two programs":
        tl.store(
            out + tl.minimum(first + BLOCK, count - 1),
            2.0 * tl.load(x + tl.minimum(first + BLOCK, count - 1)),
        )


def _double(x: Tensor, fault: str) -> Tensor:
    out = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), 4),)](x, out, x.numel(), FAULT=fault, BLOCK=4)
    return out


@triton.jit
def _exchange_kernel(
    x,
    partial,
    counter,
    out,
    count,
    FAULT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (BLOCK,): sum of PROGRAMS parts of x; the last program to arrive adds them up."""
    program = tl.program_id(0)
    o_n = tl.arange(0, BLOCK)
    tl.store(partial + program * BLOCK + o_n, tl.load(x + program * BLOCK + o_n))
    if FAULT == "counts without releasing":
        arrived = tl.atomic_add(counter, 1, sem="relaxed")
    elif FAULT == "counts past its counters":
        arrived = tl.atomic_add(counter + program, 1, sem="acq_rel") + program
    else:
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    last = PROGRAMS - 2 if FAULT == "adds up shares before all are there" else PROGRAMS - 1
    if arrived == last:
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(PROGRAMS):
            total += tl.load(partial + other * BLOCK + o_n)
        tl.store(out + o_n, total)
        tl.store(counter, 0)


def _exchange(x: Tensor, fault: str) -> Tensor:
    out, partial = torch.empty(4, device=x.device), torch.empty_like(x)
    counter = torch.zeros(4, dtype=torch.int32, device=x.device)[:1]
    _exchange_kernel[(3,)](x, partial, counter, out, 12, FAULT=fault, PROGRAMS=3, BLOCK=4)
    return out


@triton.jit
def _descriptor_kernel(x_desc, out_desc, FAULT: tl.constexpr):
    row = tl.program_id(0) * 8
    out_desc.store([0 if FAULT == "two programs store one tile" else row, 0], x_desc.load([row, 0]))


def _copy(x: Tensor, fault: str) -> Tensor:
    out = torch.empty_like(x)
    descriptor = TensorDescriptor.from_tensor(x, [8, 8])
    if fault == "describes more rows than there are":
        descriptor = TensorDescriptor(x, [x.shape[0] + 1, x.shape[1]], list(x.stride()), [8, 8])
    _descriptor_kernel[(triton.cdiv(len(x), 8),)](
        descriptor, TensorDescriptor.from_tensor(out, [8, 8]), FAULT=fault
    )
    return out


def faults_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The right kernel passes; each wrong one is caught."""
    x = guarded(rng, (rng.randint(33, 63),), dtype, device, layout="contiguous")
    for fault in FAULTS:
        if fault in AUDITED and device.type == "cuda":
            continue
        given = (
            x
            if fault != "stores into its input"
            else guarded(rng, x.shape, dtype, device, layout="contiguous").copy_(x)
        )
        expect(fault, functools.partial(_double, given, fault), 2 * x, given)
    if device.type == "cpu":
        parts = guarded(rng, (12,), torch.float32, device, layout="contiguous")
        for fault in EXCHANGES:
            expect(
                fault, functools.partial(_exchange, parts, fault), parts.view(3, 4).sum(0), parts
            )
        tile = torch.randn(12, 8)
        for fault in DESCRIPTORS:
            expect(fault, functools.partial(_copy, tile, fault), tile, tile)
    return None


def expect(fault: str, kernel: Callable[[], Tensor], right: Tensor, *given: Tensor) -> None:
    """AssertionError unless a kernel passes exactly when its fault is "none"."""
    caught = None
    try:
        with watched(*given):
            got = kernel()
        assert torch.allclose(got, right, atol=1e-6), "a wrong result"
    except (AssertionError, triton.runtime.errors.InterpreterError) as error:
        caught = error
    assert (caught is None) == (fault == "none"), f"a kernel that {fault}: {caught}"


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("faults", faults_case)
]
