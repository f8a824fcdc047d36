"""Integration of velocity fields in time: `solve` takes any solver by its name."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from odelt_fast.solvers.adaptive import integrate_adaptive
    from odelt_fast.solvers.dispatch import solve
    from odelt_fast.solvers.fixed import integrate_fixed
    from odelt_fast.solvers.options import Limits, SolverOptions
    from odelt_fast.solvers.solution import Solution

__all__ = [
    "Limits",
    "Solution",
    "SolverOptions",
    "integrate_adaptive",
    "integrate_fixed",
    "solve",
]
_HOME = {
    "Limits": "options",
    "Solution": "solution",
    "SolverOptions": "options",
    "integrate_adaptive": "adaptive",
    "integrate_fixed": "fixed",
    "solve": "dispatch",
}


def __getattr__(name: str) -> object:  # options.py is read where torch must not be loaded
    if name not in _HOME:
        raise AttributeError(f"module 'odelt_fast.solvers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"odelt_fast.solvers.{_HOME[name]}"), name)
