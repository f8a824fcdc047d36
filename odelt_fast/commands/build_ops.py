"""`odelt-fast build-ops`: builds the native operators ahead of time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Build the native operators (C++ and CUDA) now, instead of at first use, and show where they
    are."""

    cuda: bool = True
    """Build the CUDA library too, where there is an nvcc; a GPU is not needed."""
    force: bool = False
    """Build anew what is there already."""
    verbose: bool = False
    """Show the compilers' commands and output."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    import time

    from odelt_fast.engine.native.build import LIBRARIES, BuildError, build, cuda_toolkit

    for library in LIBRARIES if options.cuda else LIBRARIES[:1]:
        if library == "cuda" and cuda_toolkit() is None:
            print(
                "cuda: left out, there is no nvcc (install the CUDA toolkit, or set CUDA_HOME to"
                " its folder)"
            )
            continue
        start = time.perf_counter()
        try:
            path = build(library, options.verbose, options.force)
        except BuildError as error:
            raise ValueError(f"the {library} operators cannot be built: {error}") from error
        print(f"{library}: {path} ({time.perf_counter() - start:.1f} s)")
