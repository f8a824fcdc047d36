"""What the interpreter is taught: to refuse wrong addresses and races, to round as a card does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

LOAD, STORE, ATOMIC = range(3)
KINDS = ("load", "store", "atomic")


class Accesses(NamedTuple):
    """Of one launch, a row for each access of an element.

    epochs: how many atomics the program had done.
    """

    addresses: np.ndarray
    programs: np.ndarray
    epochs: np.ndarray
    kinds: np.ndarray

    def at(self, rows: np.ndarray) -> Accesses:
        return Accesses(*(column[rows] for column in self))


class Launch:
    """Accesses of one launch, and what each program knows of the others through atomics.

    An acquire-release atomic passes on what its program knows: its own accesses so far and those
    that it learned of. knowledge[p, e] maps a program q to the epoch below which q's accesses come
    before those of p from epoch e on.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.allowed = [_extent(tensor) for tensor in tensors]
        self.parts: list[Accesses] = []
        self.epochs: dict[int, int] = {}
        self.knowledge: dict[tuple[int, int], dict[int, int]] = {}
        self.released: dict[int, dict[int, int]] = {}  # address -> what its atomics have passed on

    def record(
        self, kind: int, grid_index: tuple[int, int, int], ptrs: Any, mask: Any
    ) -> np.ndarray:
        """Checks the addresses of one access and notes them."""
        chosen = ptrs.data[np.asarray(mask.data).astype(bool)].ravel().astype(np.int64)
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        inside = sum(
            (((first <= chosen) & (chosen + width <= end)) for first, end in self.allowed),
            start=chosen < 0,
        )
        what = f"{KINDS[kind]} of program {grid_index}"
        assert inside.all(), (
            f"a {what}: {int((~inside).sum())} addresses are in no argument of the launch"
        )
        assert kind != STORE or len(np.unique(chosen)) == len(chosen), (
            f"a {what} writes an address twice"
        )
        program = _number(grid_index)
        columns = (
            np.full(len(chosen), value) for value in (program, self.epochs.get(program, 0), kind)
        )
        self.parts.append(Accesses(chosen, *columns))
        return chosen

    def synchronise(
        self, grid_index: tuple[int, int, int], addresses: np.ndarray, passes_on: bool
    ) -> None:
        """After an atomic on `addresses`: a new epoch.

        passes_on: it acquires and releases, with what earlier atomics there had passed on.
        """
        program = _number(grid_index)
        epoch = self.epochs.get(program, 0) + 1
        known = dict(self.knowledge.get((program, epoch - 1), {}))
        for address in addresses.tolist() if passes_on else ():
            _learn(known, self.released.get(address, {}))
        for address in addresses.tolist() if passes_on else ():
            _learn(self.released.setdefault(address, {}), {**known, program: epoch})
        self.epochs[program], self.knowledge[program, epoch] = epoch, known

    def check_races(self) -> None:
        """AssertionError where programs share an address that one writes, ordered by no atomics."""
        if not self.parts:
            return
        everything = Accesses(*(np.concatenate(columns) for columns in zip(*self.parts)))
        written = everything.at(everything.kinds != LOAD)
        # Every write beside every access of its address: after a stable sort by address these are
        # ranges.
        everything = everything.at(np.argsort(everything.addresses, kind="stable"))
        first = np.searchsorted(everything.addresses, written.addresses, "left")
        count = np.searchsorted(everything.addresses, written.addresses, "right") - first
        write = np.repeat(np.arange(len(count)), count)
        one, other = (
            written.at(write),
            everything.at(
                np.arange(count.sum()) - np.repeat(count.cumsum() - count - first, count)
            ),
        )
        suspects = (one.programs != other.programs) & (
            (one.kinds != ATOMIC) | (other.kinds != ATOMIC)
        )
        pairs = np.stack([*one.at(suspects)[1:], *other.at(suspects)[1:]], axis=1)
        for p, p_epoch, p_kind, q, q_epoch, q_kind in np.unique(pairs, axis=0).tolist():
            if p_epoch >= self.knowledge.get((q, q_epoch), {}).get(
                p, 0
            ) and q_epoch >= self.knowledge.get((p, p_epoch), {}).get(q, 0):
                raise AssertionError(
                    f"a race: {KINDS[p_kind]} of one program, {KINDS[q_kind]} of another, at one"
                    " address and in no order"
                )


@contextlib.contextmanager
def audited(reachable: Sequence[Tensor] = ()) -> Iterator[None]:
    """In the interpreter: AssertionError for accesses that would be wrong on a card.

    That is a load, store or atomic, through pointers or tensor descriptors, outside the launch's
    tensors and `reachable`, and a race between programs of a launch, which the interpreter hides by
    running them one after another.
    """
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    add, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    launches: list[Launch] = []

    # Descriptors load and store through these two as well.
    def audited_load(self: Any, ptrs: Any, mask: Any, *others: Any, **named: Any) -> Any:
        launches[-1].record(LOAD, self.grid_idx, ptrs, mask)
        return load(self, ptrs, mask, *others, **named)

    def audited_store(
        self: Any, ptrs: Any, value: Any, mask: Any, *others: Any, **named: Any
    ) -> Any:
        launches[-1].record(STORE, self.grid_idx, ptrs, mask)
        return store(self, ptrs, value, mask, *others, **named)

    def audited_add(
        self: Any, operation: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any
    ) -> Any:
        touched = launches[-1].record(ATOMIC, self.grid_idx, ptr, mask)
        result = add(self, operation, ptr, value, mask, sem, scope)
        launches[-1].synchronise(self.grid_idx, touched, sem == ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
        return result

    def audited_swap(self: Any, ptr: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones_like(ptr.data, dtype=bool), value.dtype)
        touched = launches[-1].record(ATOMIC, self.grid_idx, ptr, everywhere)
        result = swap(self, ptr, compare, value, sem, scope)
        launches[-1].synchronise(self.grid_idx, touched, sem == ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
        return result

    def audited_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        tensors = [
            *given,
            *(getattr(arg, "base", None) for arg in given),
            *reachable,
        ]  # base: of a tensor descriptor
        launches.append(
            Launch([tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel()])
        )
        result = call(self, *args, **kwargs)
        launches.pop().check_races()
        return result

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = (
        audited_load,
        audited_store,
        audited_call,
    )
    builder.create_atomic_rmw, builder.create_atomic_cas = audited_add, audited_swap
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = (
            load,
            store,
            call,
        )
        builder.create_atomic_rmw, builder.create_atomic_cas = add, swap


@contextlib.contextmanager
def exact_fma() -> Iterator[None]:
    """Rounds tl.fma once, as the hardware does: the interpreter rounds the product too."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.create_fma

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        # Twice the bits hold the product; the sum's first rounding is then far below the last.
        wide = {np.dtype(np.float16): np.float32, np.dtype(np.float32): np.float64}.get(
            z.data.dtype, np.longdouble
        )
        total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    builder.create_fma = fused
    try:
        yield
    finally:
        builder.create_fma = plain


def _learn(known: dict[int, int], news: dict[int, int]) -> None:
    for program, epoch in news.items():
        known[program] = max(known.get(program, 0), epoch)


def _number(grid_index: tuple[int, int, int]) -> int:
    return (grid_index[0] << 40) + (grid_index[1] << 20) + grid_index[2]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses [first, end) that a tensor spans."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
