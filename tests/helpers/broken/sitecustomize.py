"""Breaks an operator of the engine on purpose, in every process that has this folder in PYTHONPATH.

ODELT_FAST_BREAK=FAULT:OPERATOR, OPERATOR a name in what `operators.load_operators` gives, FAULT one
of wrong, nan, changing, SIGSEGV, SIGABRT, SIGKILL, hang, raises, memory, prints.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def broken(operator: Callable[..., Any], fault: str) -> Callable[..., Any]:
    """The operator with that fault."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        import torch

        nonlocal calls
        calls += 1
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
        if fault == "hang":
            time.sleep(1000)
        if fault == "raises":
            raise RuntimeError("CUDA error: invalid device function\nmore of it")
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "prints":
            print("hello from a library")
            os.write(1, b"and from below\n")
        results = operator(*arguments, **options)
        several = results if isinstance(results, tuple) else (results,)
        factor = {"wrong": 1.05, "nan": float("nan"), "changing": 1 + 1e-7 * (calls % 7)}
        spoilt = tuple(each * factor.get(fault, 1) for each in several)
        return spoilt if isinstance(results, tuple) else spoilt[0]

    return call


def break_operators(fault: str, name: str) -> None:
    """From here on every engine of this process has the fault."""
    from odelt_fast.engine import engine

    load = engine.load_operators

    def load_broken(kind: str) -> SimpleNamespace:
        loaded = load(kind)
        setattr(loaded, name, broken(getattr(loaded, name), fault))
        return loaded

    engine.load_operators = load_broken


if "ODELT_FAST_BREAK" in os.environ and "-m" in sys.orig_argv:
    break_operators(*os.environ["ODELT_FAST_BREAK"].split(":"))
