"""Gluon's kernel of Hopper products in Triton's interpreter, which knows no Gluon.

Each group of warps is a thread, of which one runs at a time (grid_at_once). Who comes next is
drawn, and so is when copies between global and shared memory happen: as late as the next wait for
them. Products read shared memory when they are waited for. Fresh shared memory is NaN; barriers
tell phases by parity alone, as on a card. So a stage that is read before it is full, or filled
before it was read, is a wrong result, and groups that wait for each other are an error.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from odelt_fast.kernels import linear_hopper as module
from tests.helpers.grid_at_once import Turns

BARRIERS = ("full", "empty", "turns")  # in the order in which the kernel makes them
DEVICE_FUNCTIONS = ("load_tiles", "multiply_tiles")
POISON: dict[str, tuple[Any, Any]] = {  # NaN, as the interpreter keeps it
    "fp16": (np.nan, np.float16), "fp8e4nv": (0x7F, np.uint8), "bf16": (0x7FC0, np.uint16),
}  # fmt: skip


def number(value: Any) -> int:
    """Of an integer of the kernel's."""
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


class Barrier:
    """A phase ends when `count` have arrived and all bytes that are expected have come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = self.arrived = self.bytes = self.phase = 0

    def change(self, arrived: int = 0, expected: int = 0) -> None:
        self.arrived, self.bytes = self.arrived + arrived, self.bytes + expected
        assert self.arrived <= self.count, "more have arrived at a barrier than it counts"
        if self.arrived == self.count and not self.bytes:
            self.arrived, self.phase = 0, self.phase + 1


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Any, dtype: Any) -> None:
        self.data, self.dtype, self.shape = data, dtype, data.shape

    def index(self, index: Any) -> Any:
        part = self.data[number(index)]
        return part[0] if isinstance(part[0], Barrier) else Shared(part, self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order), self.dtype)

    def store(self, value: Any) -> None:
        self.data[...] = value.handle.data

    def read(self) -> Any:
        handle = interpreter.TensorHandle(np.ascontiguousarray(self.data), self.dtype)
        return tl.tensor(handle, tl.block_type(self.dtype, list(self.shape)))


class Product:
    """A sum of products, of which the last are under way."""

    def __init__(self, total: Any, waiting: list[tuple[Shared, Shared]]) -> None:
        self.total, self.waiting = total, waiting

    def wait(self, most: int) -> Any:
        while len(self.waiting) > most:
            x, weight = self.waiting.pop(0)
            self.total = tl.dot(x.read(), weight.read(), self.total, input_precision="ieee")
        return self if self.waiting else self.total


class Processor:
    """A program's groups of warps, copies under way, and what stands for Gluon's functions.

    unheeded: the name of barriers (`BARRIERS`) for which nobody waits: a fault to be seen.
    """

    def __init__(self, rng: random.Random, unheeded: str = "") -> None:
        self.rng, self.unheeded = rng, unheeded
        self.turns = Turns(0, lambda: None, lambda _: None)
        self.barriers = itertools.cycle(BARRIERS)
        self.loads: list[Callable[[], None]] = []
        self.stores: dict[int, list[Callable[[], None]]] = {}

    def pause(self) -> None:
        """Now and then a copy happens, and another group has its turn."""
        while self.loads and self.rng.random() < 0.3:
            self.loads.pop(self.rng.randrange(len(self.loads)))()
        if self.rng.random() < 0.2:
            self.turns.wait()

    def warp_specialize(self, groups: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(groups) == 1 + len(warps) == 1 + len(registers)

        def body() -> None:
            function, arguments = groups[self.turns.now]
            function(*arguments)

        self.turns = Turns(len(groups), body, lambda _: None)
        self.turns.run()
        left = [*self.loads, *(store for each in self.stores.values() for store in each)]
        assert not left, "a program ended before its copies"

    def wait(self, barrier: Barrier, parity: Any) -> None:
        self.pause()
        while barrier.phase & 1 == number(parity) and barrier.name != self.unheeded:
            if self.loads:
                self.loads.pop(self.rng.randrange(len(self.loads)))()
            self.turns.wait()

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        self.pause()
        if number(pred):
            barrier.change(arrived=count)

    def load(self, descriptor: Any, place: Any, barrier: Barrier, target: Shared) -> None:
        def copy() -> None:
            target.store(descriptor.load(place))
            barrier.change(expected=-target.data.nbytes)

        self.loads.append(copy)
        self.pause()

    def store(self, descriptor: Any, place: Any, source: Shared) -> None:
        def copy() -> None:
            descriptor.store(place, source.read())

        self.stores.setdefault(threading.get_ident(), []).append(copy)
        self.pause()

    def store_wait(self, pendings: int) -> None:
        mine = self.stores.setdefault(threading.get_ident(), [])
        while len(mine) > pendings:
            mine.pop(0)()

    def multiply(self, x: Shared, weight: Shared, acc: Any, is_async: bool) -> Product:
        assert is_async
        self.pause()
        product = acc if isinstance(acc, Product) else Product(acc, [])
        return Product(product.total, [*product.waiting, (x, weight)])

    def multiply_wait(self, pendings: int, deps: tuple[Any]) -> Any:
        self.pause()
        return deps[0].wait(pendings) if isinstance(deps[0], Product) else deps[0]

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        if dtype == tl.int64:
            name = next(self.barriers)
            barriers = [[Barrier(name) for _ in range(shape[1])] for _ in range(shape[0])]
            return Shared(np.array(barriers, dtype=object), dtype)
        fill, kind = POISON[dtype.name]
        return Shared(np.full(shape, fill, dtype=kind), dtype)

    def names(self) -> dict[str, Any]:
        """What the module imports of Gluon, by name."""
        return {
            "gl": SimpleNamespace(
                int64=tl.int64,
                float32=tl.float32,
                arange=lambda first, end, layout: tl.arange(first, end),
                zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
                convert_layout=lambda value, layout: value,
                SliceLayout=lambda *_: None,
                NVMMADistributedLayout=lambda *_: None,
                NVMMASharedLayout=module.gl.NVMMASharedLayout,
                allocate_shared_memory=self.allocate,
                warp_specialize=self.warp_specialize,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: setattr(barrier, "count", count),
                expect=lambda barrier, bytes: barrier.change(1, bytes),
                arrive=self.arrive,
                wait=self.wait,
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=self.load,
                async_copy_shared_to_global=self.store,
                store_wait=self.store_wait,
            ),
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiply_wait,
            "fence_async_shared": lambda: None,
        }


class Interpreted:
    """The kernel, as it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **named: self.kernel[grid](*map(described, given), **named)


def described(value: Any) -> Any:
    """A descriptor of Gluon's as the interpreter's."""
    if not hasattr(value, "block_shape"):
        return value
    return TensorDescriptor(value.base, value.shape, value.strides, value.block_shape)


@contextlib.contextmanager
def warps_in_turn(rng: random.Random, unheeded: str = "") -> Iterator[None]:
    """`linear_hopper.ping_pong_kernel` runs in the interpreter; unheeded: see `Processor`."""
    patches = Processor(rng, unheeded).names()
    patches |= {name: triton.jit(getattr(module, name).fn) for name in DEVICE_FUNCTIONS}
    patches["ping_pong_kernel"] = Interpreted(triton.jit(module.ping_pong_kernel.fn))
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(module, name, value))
        base = tl.core.tensor_descriptor_base
        stack.enter_context(mock.patch.object(base, "layout", None, create=True))
        yield
