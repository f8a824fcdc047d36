"""Native operators (csrc/): finds, builds and loads them, and what they do.

There are two libraries, "cpu" (built with the C++ compiler that torch would use) and "cuda" (with
nvcc). Each is built once for a version of its sources, of the flags and of torch's stable ABI, and
kept in the cache folder (`files.cache_folder`). Nothing needs them: where one
cannot be built or loaded, `load` says why in one line, and PyTorch does the work.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS
from odelt_fast.files import cache_folder

CSRC = Path(__file__).parents[2] / "csrc"
LIBRARIES = ("cpu", "cuda")
# Only what torch 2.11 has is used, so that one build serves it and every later torch of the same
# major version.
CXX_FLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")
# Code for Hopper, and PTX that the driver turns into code for every other card.
ARCHITECTURES = ("-gencode=arch=compute_80,code=compute_80", "-gencode=arch=compute_90,code=sm_90")
NVCC_FLAGS = (*CXX_FLAGS, "-std=c++20", "-shared", "-Xcompiler=-fPIC", *ARCHITECTURES)
EPS = LAYER_NORM_EPS
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
PANEL, TILE, MAX_TOKENS, MAX_HEAD_DIM = 32, 32, 1024, 192  # of csrc/cpu/products.h
WHILE_NODES = 12040  # CUDA 12.4, the first with while nodes


class BuildError(RuntimeError):
    """Why a library cannot be built, in one line."""


def sources(library: str) -> list[Path]:
    """The files that are compiled for a library."""
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, not {library!r}")
    return (
        [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
        if library == "cpu"
        else sorted((CSRC / "cuda").glob("*.cu"))
    )


def library_path(library: str) -> Path:
    """Where the library is kept once it is built: the name changes with everything that the result
    depends on."""
    digest = hashlib.sha256(
        repr(
            (
                CXX_FLAGS,
                NVCC_FLAGS,
                torch.__version__.split(".")[0],
                platform.machine(),
                sys.platform,
            )
        ).encode()
    )
    for path in sorted({*sources(library), *CSRC.glob(f"{library}/*.h")}):
        digest.update(path.read_bytes())
    return cache_folder() / f"odelt_native_{library}_{digest.hexdigest()[:16]}.so"


def build(library: str, verbose: bool = False, force: bool = False) -> Path:
    """Builds a library unless it is there already (force: even then), and returns where it is.
    Raises BuildError.

    Several processes may build at once: each works in a folder of its own, and the finished file is
    moved into place.
    """
    path = library_path(library)
    if path.exists() and not force:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            made = (
                _build_cpu(path.stem, folder, verbose)
                if library == "cpu"
                else _build_cuda(path.stem, folder, verbose)
            )
            os.replace(made, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise BuildError(_one_line(error)) from error
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
    return Path(folder) / f"{name}.so"


def _build_cuda(name: str, folder: str, verbose: bool) -> Path:
    # Not through cpp_extension: it would link against libtorch_cuda, which is not needed, and so
    # could not build on a machine without it.
    toolkit = cuda_toolkit()
    if toolkit is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")
    torch_folder = Path(torch.__file__).parent
    made = Path(folder) / f"{name}.so"
    inputs = [
        f"-I{torch_folder / 'include'}",
        *map(str, sources("cuda")),
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
    ]
    _run([str(toolkit / "bin" / "nvcc"), *NVCC_FLAGS, *inputs, "-o", str(made)], verbose)
    return made


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if verbose:
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(
            done.stdout + done.stderr or f"{command[0]} failed with exit code {done.returncode}"
        )


def _one_line(error: Exception) -> str:
    """The line of a compiler's output that says most: its first error, else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    telling = [
        line
        for line in lines
        if re.search(r"\berror: |fatal|: not found|cannot find -l|No such file", line)
    ]
    return (telling or lines[-1:])[0][:300]


@functools.cache
def cuda_toolkit() -> Path | None:
    """Folder of the CUDA toolkit whose bin holds nvcc: $CUDA_HOME, $CUDA_PATH, or that of the nvcc
    on PATH; None without one.

    The nvcc on PATH may be a script that calls the real one, so it is asked where that is (its dry
    run prints TOP=).
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name) and (Path(os.environ[name]) / "bin" / "nvcc").exists():
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc") or DEFAULT_NVCC
    if not Path(nvcc).exists():
        return None
    try:
        said = subprocess.run(
            [nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    folder = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent).resolve()
    return folder if (folder / "bin" / "nvcc").exists() else None


def load(library: str, build_it: bool = True) -> str | None:
    """Makes the operators of a library callable (torch.ops.odelt_native); returns None, or in one
    line why they cannot be had.

    build_it: whether to build it (seconds to a minute) when that has not been done yet. What failed
    once is not tried again by a process.
    """
    if library == "cuda":  # the schemas are in the other library
        reason = load("cpu", build_it)
        if reason is not None:
            return reason
    if not library_path(library).exists():
        reason = _build_once(library) if build_it else "not built: odelt-fast build-ops"
        if reason is not None:
            return reason
    return _open_once(library)


@functools.cache
def _build_once(library: str) -> str | None:
    try:
        build(library)
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _open_once(library: str) -> str | None:
    try:
        torch.ops.load_library(str(library_path(library)))
    except (OSError, RuntimeError) as error:
        return f"{_one_line(error)}: odelt-fast build-ops --force builds it anew"
    return None


def describe() -> list[str]:
    """One line for each library: what it runs on, or why it is not there. Builds nothing."""
    said = [load(library, build_it=False) for library in LIBRARIES]
    if said[0] is None:
        said[0] = (
            f"vectors of {32 * torch.ops.odelt_native.cpu_width()} bits, {library_path('cpu')}"
        )
    if said[1] is None:
        said[1] = while_graph_reason(build_it=False) or f"ready, {library_path('cuda')}"
    return [
        f"native {name}: {line}"
        for name, line in zip(("cpu operators", "cuda while graph"), said, strict=True)
    ]


def norm_modulate(
    x: Tensor,
    modulation: Tensor,
    shift_column: int,
    scale_column: int,
    eps: float = EPS,
    *,
    out: Tensor,
) -> None:
    """out = LN(x)*(1 + scale) + shift. What is said here holds for all: x (B, N, D), float32 or
    bfloat16, D up to 8192, any strides; every other (B, N, D) tensor of its dtype; shift, scale and
    gate are D columns, from the column named on, of packed rows (B or 1, K), float32 or bfloat16.
    Arithmetic is float32. Results overwrite contiguous tensors, which may be inputs of the same
    place in memory. y and out, which matrix products write and read, may be in tiles (`tiled`),
    contiguous. Raises RuntimeError for shapes and dtypes that do not fit.
    """
    torch.ops.odelt_native.norm_modulate(x, modulation, shift_column, scale_column, eps, out)


def gated_residual(
    x: Tensor, y: Tensor, bias: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor, shift_column: int, scale_column: int,
    eps: float = EPS, *, out_x: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """out_x = x + gate*(y + bias); out = LN(that)*(1 + scale) + shift. bias (D,)."""
    torch.ops.odelt_native.gated_residual(
        x, y, bias, gates, gate_column, modulation, shift_column, scale_column, eps, out_x, out
    )


def group_end(
    x: Tensor, y: Tensor, bias: Tensor | None, xr: Tensor | None, vr: Tensor | None, gates: Tensor, gate_column: int, modulation: Tensor,
    shift_column: int, scale_column: int, steps: Tensor | None = None, eps: float = EPS, *,
    out_xr: Tensor | None, out_vr: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """v = steps*(x + gate*(y + bias)); out_xr = xr + v; out_vr = vr + v; out = LN(out_xr)*(1 +
    scale) + shift (kernels/group_end.py).

    xr None: the last group, whose norm is of out_vr. vr None: 0. steps (B or 1,) float32, None: 1.
    """
    torch.ops.odelt_native.group_end(
        x,
        y,
        bias,
        xr,
        vr,
        gates,
        gate_column,
        modulation,
        shift_column,
        scale_column,
        steps,
        eps,
        out_xr,
        out_vr,
        out,
    )


def bias_gelu_(x: Tensor, bias: Tensor | None) -> None:
    """x = GELU(x + bias) in its tanh form, in place; x (..., D) contiguous, float32 or bfloat16;
    bias (D,)."""
    torch.ops.odelt_native.bias_gelu_(x, bias)


def euler_update(x: Tensor, v: Tensor, d: float, *, out: Tensor) -> None:
    """out = x + d*v; x and out float32, v float32 or bfloat16, all contiguous and of one shape."""
    torch.ops.odelt_native.euler_update(x, v, d, out)


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions for `linear` and `attention`: AVX-512 for
    float32, AMX for bfloat16."""
    return dtype in (torch.float32, torch.bfloat16) and bool(
        torch.ops.odelt_native.has_products(torch.empty(0, dtype=dtype))
    )


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether `linear`, `mlp` and `attention` take tensors in tiles (`tiled`) of this dtype, which
    they read and write fastest."""
    return dtype == torch.bfloat16 and has_products(dtype)


def tiled(batch: int, tokens: int, size: int) -> tuple[int, int, int, int, int]:
    """Shape of (B, N, D) in tiles of 32 tokens and 32 values: (B, N/32, D/32, 32, 32)."""
    if tokens % TILE or size % TILE:
        raise ValueError(
            f"{tokens} tokens of {size} values are not whole tiles: both must be multiples of"
            f" {TILE}"
        )
    return batch, tokens // TILE, size // TILE, TILE, TILE


def pack_weight(weight: Tensor) -> Tensor:
    """The copy of a weight (N, K) that `linear` reads, N and K filled up to multiples of 32; K even
    in bfloat16."""
    columns, inner = (-(-size // PANEL) * PANEL for size in weight.shape)
    packed = torch.empty(columns, inner, dtype=weight.dtype)
    torch.ops.odelt_native.pack_weight(weight, packed)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """out = x W^T + bias; x (M, K), packed from W (N, K), bias (N,), out (M, N). Sums are float32.

    x, packed and out have one dtype, for which `has_products` holds; rows are contiguous. Where
    `has_tiles` holds, x and out may be in tiles, (M/32, K/32, 32, 32), contiguous.
    """
    torch.ops.odelt_native.linear(x, packed, bias, out)


def mlp(x: Tensor, packed_in: Tensor, bias_in: Tensor, packed_out: Tensor, *, out: Tensor) -> None:
    """out = GELU(x W_in^T + bias_in) W_out^T, GELU in its tanh form; x (M, K), W_in (H, K), bias_in
    (H,), W_out (N, H), out (M, N).

    As `linear` otherwise. What lies between the two layers is rounded to the dtype, and its memory
    kept for the next call.
    """
    torch.ops.odelt_native.mlp(x, packed_in, bias_in, packed_out, out)


def attention(qkv: Tensor, heads: int, scale: float, *, out: Tensor) -> None:
    """out = softmax(scale q k^T) v; qkv (B, N, 3*D), packed as (q, k, v), out (B, N, D); scale > 0.
    dtypes as for `linear`. Where `has_tiles` holds and D/heads is a multiple of 32, qkv and out may
    be in tiles (`tiled`).

    N up to MAX_TOKENS, D/heads up to MAX_HEAD_DIM and even in bfloat16.
    """
    torch.ops.odelt_native.attention(qkv, heads, scale, out)


def while_graph_reason(build_it: bool = True) -> str | None:
    """Why `WhileGraph` cannot run here, in one line; None if it can. build_it as for `load`."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    reason = load("cuda", build_it)
    if reason is not None:
        return reason
    driver, runtime = torch.ops.odelt_native.while_graph_versions()
    needed = max(WHILE_NODES, runtime // 1000 * 1000)
    if driver < needed:
        return (
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, while graphs need"
            f" {needed // 1000}.{needed % 1000 // 10}"
        )
    return None


class WhileGraph:
    """A captured CUDA graph that the GPU repeats on its own while `flag` is not 0: one launch, no
    host in between.

    body: captured with torch.cuda.CUDAGraph(keep_graph=True); it works on tensors that stay where
    they are, and writes flag. No random numbers and no cooperative kernels in it. flag (1,) int32
    on the GPU, read before every repetition, the first too. first: another such graph, which runs
    once before all. Keep the object until what it launched has ended. Raises ValueError for another
    flag, RuntimeError with CUDA's own words for a body that cannot be repeated.
    """

    def __init__(
        self, body: torch.cuda.CUDAGraph, flag: Tensor, first: torch.cuda.CUDAGraph | None = None
    ) -> None:
        if flag.shape != (1,) or flag.dtype != torch.int32 or not flag.is_cuda:
            raise ValueError(
                f"flag must be (1,) int32 on a GPU, not {tuple(flag.shape)} {flag.dtype} on"
                f" {flag.device}"
            )
        reason = while_graph_reason()
        if reason is not None:
            raise RuntimeError(reason)
        self._kept = first, body, flag  # their memory is used by the graph
        self._device: int = flag.device.index
        graphs = 0 if first is None else first.raw_cuda_graph(), body.raw_cuda_graph()
        self._graph, self._executable = torch.ops.odelt_native.while_graph_create(
            self._device, *graphs, flag.data_ptr()
        )
        self._finalizer = weakref.finalize(
            self,
            torch.ops.odelt_native.while_graph_destroy,
            self._device,
            self._graph,
            self._executable,
        )
        self._finalizer.atexit = False  # the driver may be gone by then, and frees it anyway

    def launch(self) -> None:
        """Starts it on the current stream of its device and returns at once."""
        torch.ops.odelt_native.while_graph_launch(
            self._device, self._executable, torch.cuda.current_stream(self._device).cuda_stream
        )
