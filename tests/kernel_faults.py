"""Kernels that are wrong on purpose: each fault must be caught by the instruments of `kernel_checks`, or a green run would mean nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from kernel_checks import check_error, guarded, watched
from torch import Tensor

# Faults that only the interpreter's audit can see, not the guards and NaNs on a card: a load whose value is thrown away, and races.
AUDITED = ("reads past its input", "stores one element in two programs", "loads what another program stores")
FAULTS = ("none", "stores past its output", "stores before its output", "leaves an element out", "stores into its input", *AUDITED)


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
        tl.store(out + tl.minimum(first + BLOCK, count - 1), 2.0 * tl.load(x + tl.minimum(first + BLOCK, count - 1)))


def _double(x: Tensor, fault: str) -> Tensor:
    out = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), 4),)](x, out, x.numel(), FAULT=fault, BLOCK=4)
    return out


def faults_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The right kernel passes; each wrong one is caught."""
    x = guarded(rng, (rng.randint(9, 15),), dtype, device, layout="contiguous")
    exact = 2 * x.double()
    for fault in FAULTS:
        if fault in AUDITED and device.type == "cuda":
            continue
        caught = None
        given = x if fault != "stores into its input" else guarded(rng, x.shape, dtype, device, layout="contiguous").copy_(x)
        try:
            with watched(given):
                got = _double(given, fault)
            check_error("double", got, 2 * x, exact)
        except (AssertionError, triton.runtime.errors.InterpreterError) as error:
            caught = error
        assert (caught is None) == (fault == "none"), f"a kernel that {fault}: {caught}"
    return None


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [("faults", faults_case)]
