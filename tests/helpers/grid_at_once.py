"""Triton's interpreter with all programs of a grid at once, for kernels whose programs wait for
each other.

Each program is a thread, of which one runs at a time: where it loads with acquire, the next one has
its turn. What the kernels of the project write in PTX is done here: that load, the number of the
program, and prefetching, whose addresses are looked at.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import triton.language as tl  # the interpreter looks for it where a kernel's function is
from torch import Tensor

STUCK = 10_000  # turns of a program that waits


class Turns:
    """Programs that run in turn.

    Args:
        count: of the programs.
        body: what each of them does.
        place: place(i), before i goes on.
    """

    def __init__(self, count: int, body: Callable[[], None], place: Callable[[int], None]) -> None:
        self.body, self.place, self.now, self.waits = body, place, 0, 0
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.ended, self.error = [False] * count, BaseException()
        self.over = threading.Event()

    def run(self) -> None:
        """Returns when all have ended; raises what one of them raised."""
        threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(self.turns))]
        for thread in threads:
            thread.start()
        self._give(0)
        self.over.wait()
        for turn in self.turns:  # where one has failed the others end, too
            turn.release()
        for thread in threads:
            thread.join()
        if not all(self.ended):
            raise self.error

    def wait(self) -> None:
        """Called by the program whose turn it is: it ends here, and comes again."""
        mine, self.waits = self.now, self.waits + 1
        assert self.waits < STUCK, "the programs wait for each other, and none goes on"
        self._give_next()
        self.turns[mine].acquire()
        if self.over.is_set():
            raise SystemExit
        self.place(mine)

    def _run(self, program: int) -> None:
        self.turns[program].acquire()
        try:
            self.place(program)
            self.body()
            self.ended[program] = True
        except BaseException as error:
            self.error = error if not self.over.is_set() else self.error
            self.over.set()
        if all(self.ended):
            self.over.set()
        elif not self.over.is_set():
            self._give_next()

    def _give_next(self) -> None:
        after = [*range(self.now + 1, len(self.turns)), *range(self.now + 1)]
        self._give(next(program for program in after if not self.ended[program]))

    def _give(self, program: int) -> None:
        self.now = program
        self.turns[program].release()


@contextlib.contextmanager
def grid_at_once(prefetched: Sequence[Tensor]) -> Iterator[None]:
    """Grids (programs,) run so; what is prefetched must lie in one of these tensors."""
    from triton.runtime import interpreter

    executor, grid = interpreter.GridExecutor, interpreter.interpreter_builder
    init, asm = executor.__init__, tl.inline_asm_elementwise
    spans = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in prefetched]
    running: list[Turns] = []

    def gathering(self: Any, function: Any, *given: Any, **named: Any) -> None:
        init(self, function, *given, **named)

        @functools.wraps(function)
        def gathered(**arguments: Any) -> None:
            if grid.grid_idx[0] + 1 < grid.grid_dim[0]:  # the last one runs them all
                return
            running.append(
                Turns(
                    grid.grid_dim[0],
                    lambda: function(**arguments),
                    lambda program: grid.set_grid_idx(program, 0, 0),
                )
            )
            running[0].run()
            running.clear()

        gathered.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        self.fn = gathered

    def in_python(
        text: str, constraints: str, args: Any, dtype: Any, is_pure: Any, pack: Any
    ) -> Any:
        if text.startswith("mov.u32 $0, %ctaid.x;"):
            return tl.program_id(0)
        if text.startswith("ld.acquire.gpu.global.b32 $0, [$1];"):
            running[0].wait()
            flag = args[0].to(tl.pointer_type(dtype))
            return tl.atomic_add(flag, 0, sem="acq_rel", scope="gpu")
        assert text.startswith("prefetch.global.L2 [$1];"), f"no Python for {text}"
        for address in args[0].handle.data.ravel().tolist():
            assert any(first <= address < end for first, end in spans), "a prefetch of nothing"
        return args[0].to(dtype)

    executor.__init__, tl.inline_asm_elementwise = gathering, in_python
    try:
        yield
    finally:
        executor.__init__, tl.inline_asm_elementwise = init, asm
