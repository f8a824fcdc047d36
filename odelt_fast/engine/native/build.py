"""Finds, builds and loads the native operators (csrc/).

There are two libraries, "cpu" (built with the C++ compiler that torch would use) and "cuda" (with
nvcc). Each is built once for a version of its sources, of the flags and of torch's stable ABI, and
kept in the cache folder (`files.cache_folder`). Nothing needs them: where one cannot be built or
loaded, `load` gives the reason in one line, and PyTorch does the work.

$ODELT_FAST_CPU_LEVEL holds the operators on a CPU to one of `LEVELS`, at most the processor's own;
PyTorch's $ATEN_CPU_CAPABILITY holds them, too. The environment is read once in a process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from odelt_fast.files import cache_folder

logger = logging.getLogger(__name__)

CSRC = Path(__file__).parents[2] / "csrc"
LIBRARIES = ("cpu", "cuda")
LEVELS = ("baseline", "avx2", "avx512", "amx")  # of csrc/cpu/processor.h
# Only what torch 2.11 has is used, so that one build serves it and every later torch of the same
# major version.
CXX_FLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")
# Code for Hopper, and PTX that the driver turns into code for every other card.
ARCHITECTURES = ("-gencode=arch=compute_80,code=compute_80", "-gencode=arch=compute_90,code=sm_90")
NVCC_FLAGS = (*CXX_FLAGS, "-std=c++20", "-shared", "-Xcompiler=-fPIC", *ARCHITECTURES)
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"


class BuildError(RuntimeError):
    """Why a library cannot be built, in one line."""


def sources(library: str) -> list[Path]:
    """The files that are compiled for a library."""
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    if library == "cuda":
        return sorted((CSRC / "cuda").glob("*.cu"))
    return [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]


def library_path(library: str) -> Path:
    """Where the library is kept once it is built: the name changes with everything that the result
    depends on."""
    major = torch.__version__.split(".")[0]
    built_for = CXX_FLAGS, NVCC_FLAGS, major, platform.machine(), sys.platform
    digest = hashlib.sha256(repr(built_for).encode())
    for path in sorted({*sources(library), *CSRC.glob(f"{library}/*.h")}):
        digest.update(path.read_bytes())
    return cache_folder() / f"odelt_native_{library}_{digest.hexdigest()[:16]}.so"


def build(library: str, verbose: bool = False, force: bool = False) -> Path:
    """Builds a library unless it is there already (force: even then), and returns where it is.

    Several processes may build at once: each works in a folder of its own, and the finished file is
    moved into place.

    Raises:
        BuildError: it cannot be built.
    """
    path = library_path(library)
    if path.exists() and not force:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            compile_it = _build_cpu if library == "cpu" else _build_cuda
            os.replace(compile_it(path.stem, folder, verbose), path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise BuildError(_telling_line(error)) from error
    return path


def _build_cpu(name: str, folder: str, verbose: bool) -> Path:
    from torch.utils import cpp_extension

    # Loads it too, so that what is kept has been seen to load. In a process of its own: a process
    # can register operators only once.
    code = (
        "import sys; from torch.utils.cpp_extension import load; name, folder, flags, verbose,"
        " *sources = sys.argv[1:]; load(name, sources, extra_cflags=flags.split(),"
        " build_directory=folder, is_python_module=False, verbose=verbose == 'True')"
    )
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja is not installed: pip install ninja")
    arguments = [name, folder, " ".join(CXX_FLAGS), str(verbose), *map(str, sources("cpu"))]
    _run([sys.executable, "-c", code, *arguments], verbose)
    return Path(folder, f"{name}.so")


def _build_cuda(name: str, folder: str, verbose: bool) -> Path:
    # Not through cpp_extension: it would link against libtorch_cuda, which is not needed, and so
    # could not build on a machine without it.
    toolkit = cuda_toolkit()
    if toolkit is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")
    made, torch_folder = Path(folder, f"{name}.so"), Path(torch.__file__).parent
    libraries = f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu"
    inputs = map(str, sources("cuda"))
    _run([f"{toolkit}/bin/nvcc", *NVCC_FLAGS, *inputs, *libraries, "-o", str(made)], verbose)
    return made


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if verbose:
        print(output, flush=True)
    if done.returncode:
        raise RuntimeError(output or f"{command[0]} failed with exit code {done.returncode}")


def _telling_line(error: Exception) -> str:
    """The line of a compiler's output that says most: its first error, else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = re.compile(r"\berror: |fatal|: not found|cannot find -l|No such file")
    last = lines[-1] if lines else type(error).__name__
    return next(filter(telling.search, lines), last)[:300]


@functools.cache
def cuda_toolkit() -> Path | None:
    """Folder of the CUDA toolkit whose bin holds nvcc: $CUDA_HOME, $CUDA_PATH, or that of the nvcc
    on PATH; None without one.

    The nvcc on PATH may be a script that calls the real one, so it is asked where that is (its dry
    run prints TOP=).
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name) and Path(os.environ[name], "bin", "nvcc").exists():
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc") or DEFAULT_NVCC
    if not Path(nvcc).exists():
        return None
    try:
        dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE)
    folder = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent).resolve()
    return folder if (folder / "bin" / "nvcc").exists() else None


def load(library: str, build_it: bool = True) -> str | None:
    """Makes the operators of a library callable (torch.ops.odelt_native).

    Args:
        library: "cpu", or "cuda", which takes its schemas from the other one.
        build_it: whether to build it (seconds to a minute) when that has not been done yet. What
            failed once is not tried again by a process.

    Returns:
        None, or in one line the reason why they cannot be had.

    Raises:
        ValueError: $ODELT_FAST_CPU_LEVEL names no level, or one that this processor does not have.
    """
    held = os.environ.get("ODELT_FAST_CPU_LEVEL") or LEVELS[0]
    if held not in LEVELS:
        raise ValueError(f"ODELT_FAST_CPU_LEVEL must be one of {', '.join(LEVELS)}, not {held!r}")
    if library == "cuda":
        reason = load("cpu", build_it)
        if reason is not None:
            return reason
    if not library_path(library).exists():
        reason = _build_once(library) if build_it else "not built: odelt-fast build-ops"
        if reason is not None:
            return reason
    reason = _open_once(library)
    if reason is None and LEVELS.index(held) > torch.ops.odelt_native.cpu_level():
        most = LEVELS[torch.ops.odelt_native.cpu_level()]
        raise ValueError(f"ODELT_FAST_CPU_LEVEL is {held}, and this processor has {most} at most")
    return reason


@functools.cache
def _build_once(library: str) -> str | None:
    try:
        build(library)
    except BuildError as error:
        logger.info("the native %s operators cannot be built", library, exc_info=True)
        return str(error)
    return None


@functools.cache
def _open_once(library: str) -> str | None:
    try:
        torch.ops.load_library(str(library_path(library)))
    except (OSError, RuntimeError) as error:
        logger.info("the native %s operators cannot be loaded", library, exc_info=True)
        return f"{_telling_line(error)}: odelt-fast build-ops --force builds it anew"
    return None
