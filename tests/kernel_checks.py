"""Instruments of the kernel cases: guarded tensors, poisoned outputs, an audit of every address a kernel touches, and the error bound.

A case is a function(rng, device, dtype): it draws sizes and inputs from `rng` (random.Random), runs a kernel inside `watched(...)`,
compares it with float64 and returns what must be equal at every repeat. `kernel_cases_rows` and `kernel_cases_gemm` hold lists `CASES`
of (name, case); `kernel_cases` runs them.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

GUARD = 64  # elements before and after each tensor
Ranges = list[tuple[int, int]]  # addresses [first, end)


def batch_size(rng: random.Random, most: int = 257) -> int:
    """Mostly small, sometimes up to `most`."""
    return rng.choice([1, 1, 2, 3, 5, rng.randint(1, min(most, 17)), rng.randint(1, most) if rng.random() < 0.1 else 2])


def guarded(
    rng: random.Random, shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0, layout: str = ""
) -> Tensor:
    """Normal values times `scale` inside a buffer that is NaN everywhere else, so that a read from outside shows.

    layout: "contiguous", "strided" (rows further apart), "misaligned" (starts off a 16-byte border), "transposed" (last dimension not
    contiguous), "expanded" (first dimension of stride 0); "" draws one.
    """
    layout = layout or rng.choice(["contiguous", "contiguous", "strided", "misaligned", "transposed", "expanded"])
    if layout == "expanded" and len(shape) > 1:
        return guarded(rng, (1, *shape[1:]), dtype, device, scale, "contiguous").expand(shape)
    sizes = list(shape)
    if layout == "transposed" and len(sizes) > 1:
        sizes[-1], sizes[-2] = sizes[-2], sizes[-1]
    padding = rng.choice([1, 3, 8]) if layout == "strided" else 0
    offset = GUARD + (rng.randint(1, 7) if layout == "misaligned" else 0)
    padded = [*sizes[:-1], sizes[-1] + padding] if sizes else []
    count = math.prod(padded)
    buffer = torch.full((offset + count + GUARD,), math.nan, dtype=dtype, device=device)
    view = buffer[offset : offset + count].view(padded)
    view = view[..., : sizes[-1]] if sizes else view
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    view.copy_((torch.randn(sizes, generator=generator) * scale).to(dtype))
    return view.transpose(-1, -2) if layout == "transposed" and len(sizes) > 1 else view


@contextlib.contextmanager
def watched(*inputs: Tensor | None, reachable: Sequence[Tensor] = ()) -> Iterator[None]:
    """Runs kernels under guard; raises AssertionError for what they do to memory that is not theirs.

    Every torch.empty and torch.empty_like inside gives a NaN-filled tensor (largest value for integers) with guards on both sides; at the
    end the guards and all `inputs`, with what surrounds them, must hold the bits they held before. In the interpreter every address that
    is loaded or stored must belong to an argument of its launch or to a tensor in `reachable`, and no two programs of a launch may store
    to one address, nor one load what another stores.
    """
    before = [(_bits(tensor), _bits(tensor).clone()) for tensor in inputs if tensor is not None]
    guards: list[Tensor] = []
    empty = torch.empty

    def guarded_empty(*size: int | Sequence[int], **options: object) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)  # type: ignore[arg-type]
        buffer = empty((count + 2 * GUARD,), **options)  # type: ignore[call-overload]
        buffer.fill_(math.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
        guards.extend([buffer[:GUARD], buffer[GUARD + count :]])
        return buffer[GUARD : GUARD + count].view(shape)  # type: ignore[arg-type]

    def guarded_empty_like(tensor: Tensor, **options: object) -> Tensor:
        options = {"dtype": tensor.dtype, "device": tensor.device, **options}
        return guarded_empty(tuple(tensor.shape), **options)

    empty_like = torch.empty_like
    torch.empty, torch.empty_like = guarded_empty, guarded_empty_like  # type: ignore[assignment]
    try:
        with audited(reachable) if _interpreting() else contextlib.nullcontext():
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    for guard in guards:
        untouched = guard.isnan() if guard.is_floating_point() else guard == torch.iinfo(guard.dtype).max
        assert bool(untouched.all()), "a kernel wrote outside its output"
    for now, then in before:
        assert torch.equal(now, then), "a kernel wrote into an input or beside it"


@contextlib.contextmanager
def audited(reachable: Sequence[Tensor] = ()) -> Iterator[None]:
    """In the interpreter: AssertionError for a load or store outside the launch's tensors, and for a race between its programs."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    allowed: Ranges = []
    accesses: dict[str, list[tuple[np.ndarray, int]]] = {"load": [], "store": []}

    def record(kind: str, program: tuple[int, int, int], ptrs: Any, mask: Any) -> None:
        chosen = ptrs.data[mask.data.astype(bool)].ravel().astype(np.int64)
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        inside = sum((((first <= chosen) & (chosen + width <= end)) for first, end in allowed), start=chosen < 0)
        assert inside.all(), f"a {kind} of program {program}: {int((~inside).sum())} addresses are in no argument of the launch"
        assert kind == "load" or len(np.unique(chosen)) == len(chosen), f"program {program} writes an address twice in one store"
        accesses[kind].append((chosen, (program[0] << 40) + (program[1] << 20) + program[2]))

    def audited_load(self: Any, ptrs: Any, mask: Any, *others: Any, **named: Any) -> Any:
        record("load", self.grid_idx, ptrs, mask)
        return load(self, ptrs, mask, *others, **named)

    def audited_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        record("store", self.grid_idx, ptrs, mask)
        return store(self, ptrs, value, mask, *others, **named)

    def audited_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bases = [getattr(arg, "base", None) for arg in (*args, *kwargs.values())]
        tensors = [tensor for tensor in (*args, *kwargs.values(), *bases, *reachable) if isinstance(tensor, Tensor) and tensor.numel()]
        allowed[:] = [_extent(tensor) for tensor in tensors]
        accesses.update(load=[], store=[])
        result = call(self, *args, **kwargs)
        stored, writers = _gather(accesses["store"])
        loaded, readers = _gather(accesses["load"])
        order = np.lexsort((writers, stored))
        stored, writers = stored[order], writers[order]
        assert not ((stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1])).any(), "two programs store to one address"
        if len(stored):
            place = np.searchsorted(stored, loaded).clip(max=len(stored) - 1)
            assert not ((stored[place] == loaded) & (writers[place] != readers)).any(), "one program loads what another stores"
        return result

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = audited_load, audited_store, audited_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


def check_error(name: str, got: Tensor, plain: Tensor, exact: Tensor, terms: float = 1.0) -> None:
    """AssertionError unless `got` is at most twice as far from `exact` (float64) as `plain`, PyTorch's result in the same dtype, is.

    Distances are the largest and the root of the mean square over all elements. `terms` is how many values a result is the sum of. What any
    correct order of summation may lose is never counted against a kernel: the rounding of the largest value to the dtype, and the random
    walk of sqrt(terms) roundings to float32. Where PyTorch is luckier than that (few elements), that is the bound.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: {got.dtype}, not {plain.dtype}"
    if not exact.numel():
        return
    assert bool(torch.isfinite(got).all()), f"{name}: not finite"
    ours, theirs = ((tensor.double() - exact).abs() for tensor in (got, plain))
    rounding = (torch.finfo(got.dtype).eps + torch.finfo(torch.float32).eps * terms**0.5) * exact.abs().max().item()
    for kind, mine, other in (
        ("largest", ours.max().item(), theirs.max().item()),
        ("mean square", ours.square().mean().sqrt().item(), theirs.square().mean().sqrt().item()),
    ):
        bound = max(2 * other, rounding)
        assert mine <= bound, f"{name}: {kind} error {mine:.3e} is above {bound:.3e} (PyTorch: {other:.3e})"


def _gather(accesses: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses and the programs that touched them."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    programs = [np.full(len(addresses), program, np.int64) for addresses, program in accesses]
    return np.concatenate([addresses for addresses, _ in accesses]), np.concatenate(programs)


def _bits(tensor: Tensor) -> Tensor:
    """The whole storage behind a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
