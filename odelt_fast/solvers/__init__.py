"""Integration of velocity fields in time: `solve` takes any solver by its name."""


def __getattr__(name: str) -> object:
    # Late: what a solver can be asked for (options.py) is read where torch must not be loaded.
    if name != "solve":
        raise AttributeError(f"module 'odelt_fast.solvers' has no attribute {name!r}")
    from odelt_fast.solvers.dispatch import solve

    return solve
