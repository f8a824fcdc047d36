"""The native operators: built from the sources here, held to float64, and told apart from what
cannot be built or loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.cli import main
from odelt_fast.engine.native import build as native

ROOT = Path(__file__).resolve().parents[2]
NVCC = native.cuda_toolkit()
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (1, 3, 16, 31, 33, 96, 384, 1152, 8192)


@pytest.fixture(scope="module")
def cache(native_cache: Path) -> Path:
    """The cache folder, with the CPU library in it."""
    return native_cache


class Case:
    """Inputs of one dtype and size: x, y, xr, vr (3, tokens, D), packed rows of 6*D columns, bias
    (D,), steps (3,).

    Neighbouring values of x, xr and vr lie on both sides of the mean: no row is so even that its
    LayerNorm is rounding alone.
    """

    def __init__(
        self, dtype: torch.dtype, size: int, seed: int = 0, rows: int = 3, tokens: int = 5
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.size = size
        sides = 2.0 * (torch.arange(size) % 2).to(dtype) - 0.5
        self.x, self.y, self.xr, self.vr = (draw(3, tokens, size) / 4 + sides for _ in range(4))
        self.table, self.bias, self.steps = (
            draw(rows, 6 * size),
            draw(size),
            torch.rand(3, generator=generator),
        )

    def to(self, dtype: torch.dtype) -> Case:
        other = Case.__new__(Case)
        other.__dict__.update(
            {
                key: value.to(dtype) if isinstance(value, Tensor) else value
                for key, value in self.__dict__.items()
            }
        )
        return other


def norm(case: Case, base: Tensor) -> Tensor:
    size = case.size
    shift, scale = case.table[:, None, size : 2 * size], case.table[:, None, 4 * size : 5 * size]
    return torch.addcmul(shift, F.layer_norm(base, (size,), eps=1e-6), 1 + scale)


def gated(case: Case) -> Tensor:
    return torch.addcmul(
        case.x, case.table[:, None, 3 * case.size :][..., : case.size], case.y + case.bias
    )


def plain(name: str, case: Case) -> tuple[Tensor, ...]:
    """The operator in plain PyTorch, in the dtype of the case."""
    if name == "norm_modulate":
        return (norm(case, case.x),)
    if name == "gated_residual":
        return gated(case), norm(case, gated(case))
    v = gated(case) * case.steps[:, None, None].to(case.x.dtype)
    if name == "last_group_end":
        return case.vr + v, norm(case, case.vr + v)
    return case.xr + v, case.vr + v, norm(case, case.xr + v)


def ours(name: str, case: Case, make: Callable[[], Tensor] | None = None) -> tuple[Tensor, ...]:
    """The native operator, writing into fresh memory full of NaN, or what `make` gives."""
    make = make or (lambda: torch.full(case.x.shape, torch.nan, dtype=case.x.dtype))
    size, out = case.size, [make() for _ in range(3)]
    columns = case.table, size, 4 * size
    gates = case.table, 3 * size
    if name == "norm_modulate":
        native.norm_modulate(case.x, *columns, out=out[0])
        return (out[0],)
    if name == "gated_residual":
        native.gated_residual(case.x, case.y, case.bias, *gates, *columns, out_x=out[0], out=out[1])
        return out[0], out[1]
    xr, out_xr = (None, None) if name == "last_group_end" else (case.xr, out[2])
    arguments = case.x, case.y, case.bias, xr, case.vr, *gates, *columns, case.steps
    native.group_end(*arguments, out_xr=out_xr, out_vr=out[0], out=out[1])
    return (out[0], out[1]) if out_xr is None else (out_xr, out[0], out[1])


OPERATORS = ("norm_modulate", "gated_residual", "group_end", "last_group_end")


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_as_accurate(
    results: tuple[Tensor, ...], peers: tuple[Tensor, ...], truths: tuple[Tensor, ...]
) -> None:
    """Root mean square and largest error at most twice those of PyTorch in the same dtype."""
    for result, peer, truth in zip(results, peers, truths, strict=True):
        error, other = (result.double() - truth).abs(), (peer.double() - truth).abs()
        assert error.max() <= 2 * other.max()
        assert error.square().mean().sqrt() <= 2 * other.square().mean().sqrt()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_rows_are_as_accurate_as_pytorch(
    cache: Path, name: str, dtype: torch.dtype, size: int
) -> None:
    case = Case(
        dtype, size, seed=size, tokens=max(5, 4096 // size)
    )  # enough values for PyTorch's error not to be luck
    assert_as_accurate(ours(name, case), plain(name, case), plain(name, case.to(torch.float64)))


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16_is_float32_arithmetic_rounded_once(cache: Path, name: str) -> None:
    case = Case(torch.bfloat16, 77, tokens=100)
    for narrow, wide in zip(ours(name, case), ours(name, case.to(torch.float32)), strict=True):
        assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_hold_to_one_millionth_in_float32(cache: Path, name: str) -> None:
    case = Case(torch.float32, 768)
    for result, truth in zip(ours(name, case), plain(name, case.to(torch.float64)), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=2e-6)


def test_a_constant_row_with_a_large_mean_does_not_lose_its_variance(cache: Path) -> None:
    case = Case(torch.float32, 768)
    case.x = case.x * 1e-2 + 1000  # E[x^2] - E[x]^2 in float32 would give noise here
    assert_as_accurate(
        ours("norm_modulate", case),
        plain("norm_modulate", case),
        plain("norm_modulate", case.to(torch.float64)),
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_may_overwrite_the_inputs(cache: Path, name: str, dtype: torch.dtype) -> None:
    case, same = Case(dtype, 100), Case(dtype, 100)
    memory = iter(
        [same.x]
        if name == "norm_modulate"
        else [same.x, same.y]
        if name == "gated_residual"
        else [same.vr, same.y, same.xr]
    )
    written = ours(name, same, lambda: next(memory, torch.empty_like(case.x)))
    for apart, over in zip(ours(name, case), written, strict=True):
        assert torch.equal(apart, over)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_written_beside_the_result(cache: Path, name: str) -> None:
    case, rest = Case(torch.bfloat16, 33), []

    def make() -> Tensor:
        around = torch.full((case.x.numel() + 64,), 7.0, dtype=case.x.dtype)
        rest.append(around)
        return around[32:-32].view(case.x.shape)

    assert all(torch.isfinite(result).all() for result in ours(name, case, make))
    assert all((around[:32] == 7).all() and (around[-32:] == 7).all() for around in rest)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_strides_are_read(cache: Path, name: str) -> None:
    straight, strided = Case(torch.float32, 48), Case(torch.float32, 48)
    strided.x = strided.x.transpose(0, 1).contiguous().transpose(0, 1)
    strided.y = torch.cat([strided.y, strided.y + 1], dim=2)[..., :48]
    strided.xr = (
        strided.xr.transpose(1, 2).contiguous().transpose(1, 2)
    )  # the last dimension is not contiguous
    straight.vr = straight.vr[:1].expand(3, 5, 48).contiguous()
    strided.vr = strided.vr[:1].expand(3, 5, 48)
    strided.table = torch.cat([strided.table, strided.table], dim=1)[:, : 6 * 48]
    for one, other in zip(ours(name, straight), ours(name, strided), strict=True):
        assert torch.equal(one, other)


def test_rows_of_a_single_value_may_have_any_stride(cache: Path) -> None:
    wide, out = torch.randn(2, 5, 4), torch.empty(2, 5, 1)
    native.norm_modulate(wide[..., ::4], torch.tensor([[3.0, 1.0]]), 0, 1, out=out)
    assert bool((out == 3).all())


@pytest.mark.parametrize("name", OPERATORS)
def test_one_modulation_row_serves_all_samples_in_any_dtype(cache: Path, name: str) -> None:
    one, each, wide = (
        Case(torch.bfloat16, 40, rows=1),
        Case(torch.bfloat16, 40, rows=1),
        Case(torch.bfloat16, 40, rows=1),
    )
    each.table = each.table.expand(3, -1).contiguous()
    wide.table = wide.table.float()
    for results in zip(ours(name, one), ours(name, each), ours(name, wide), strict=True):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def tiles(x: Tensor) -> Tensor:
    """(B, N, D) as (B, N/32, D/32, 32, 32)."""
    return x.unflatten(1, (-1, 32)).unflatten(3, (-1, 32)).transpose(2, 3).contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_tiles_are_rows_in_another_order(cache: Path, name: str, dtype: torch.dtype) -> None:
    """y and the last result, which matrix products write and read, may be in tiles."""
    rows, tiled = Case(dtype, 96, tokens=64), Case(dtype, 96, tokens=64)
    tiled.y = tiles(tiled.y)
    memory = iter(
        [torch.empty_like(tiled.y)]
        if name == "norm_modulate"
        else [torch.empty_like(rows.x), torch.empty_like(tiled.y)]
    )
    *states, last = ours(name, rows)
    *tiled_states, tiled_last = ours(
        name, tiled, lambda: next(memory, torch.full_like(rows.x, torch.nan))
    )
    assert tiled_last.shape == native.tiled(3, 64, 96)
    assert torch.equal(tiled_last, tiles(last))
    assert all(map(torch.equal, states, tiled_states))


def test_absent_parts_are_zero_and_one(cache: Path) -> None:
    case, zero = Case(torch.float32, 24), torch.zeros(3, 5, 24)
    columns = case.table, 72, case.table, 24, 96
    full, bare = ([torch.empty(3, 5, 24) for _ in range(3)] for _ in range(2))
    native.group_end(
        case.x,
        case.y,
        torch.zeros(24),
        case.xr,
        zero,
        *columns,
        torch.ones(1),
        out_xr=full[0],
        out_vr=full[1],
        out=full[2],
    )
    native.group_end(
        case.x,
        case.y,
        None,
        case.xr,
        None,
        *columns,
        None,
        out_xr=bare[0],
        out_vr=bare[1],
        out=bare[2],
    )
    assert all(map(torch.equal, full, bare))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(cache: Path, dtype: torch.dtype) -> None:
    good, bad = Case(dtype, 70), Case(dtype, 70)
    bad.x[1, 2, 69] = torch.nan
    bad.y[2, 4, 0] = torch.inf
    for before, after in zip(ours("group_end", good), ours("group_end", bad), strict=True):
        assert not torch.isfinite(after[1, 2]).all()
        assert not torch.isfinite(after[2, 4]).all()
        after[1, 2], after[2, 4] = before[1, 2], before[2, 4]
        assert torch.equal(before, after)


def test_threads_change_no_bit(cache: Path) -> None:
    case, threads = Case(torch.float32, 64), torch.get_num_threads()
    case.x, case.y, case.xr, case.vr = (
        tensor.repeat(1, 400, 1) for tensor in (case.x, case.y, case.xr, case.vr)
    )
    try:
        torch.set_num_threads(1)
        one = ours("group_end", case)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, ours("group_end", case)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_as_accurate_as_pytorch(cache: Path, dtype: torch.dtype) -> None:
    x = torch.cat(
        [
            torch.linspace(-12, 12, 100_003),
            10 ** torch.linspace(-30, 3, 501),
            -(10 ** torch.linspace(-30, 1, 501)),
        ]
    ).to(dtype)
    out = x.clone()
    native.bias_gelu_(out, None)
    truth = F.gelu(x.double(), approximate="tanh")
    error, other = (
        (value.double() - truth).abs() for value in (out, F.gelu(x, approximate="tanh"))
    )
    assert error.square().mean() <= 4 * other.square().mean()
    assert error.max() <= torch.maximum(2 * other.max(), rounding(dtype) * x.abs().max().double())
    # Where PyTorch's form cancels to 0 or worse, ours keeps the value.
    tail = (x > -5) & (x < -1)
    assert ((error / truth.abs())[tail] <= 4 * rounding(dtype) + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 100])
def test_gelu_adds_the_bias_and_keeps_what_is_not_finite(
    cache: Path, dtype: torch.dtype, size: int
) -> None:
    x, bias = torch.randn(4, size).to(dtype), torch.randn(size).to(dtype)
    x[0, 0], x[1, -1] = torch.nan, torch.inf
    out = x.clone()
    native.bias_gelu_(out, bias)
    assert torch.isnan(out[0, 0])
    assert out[1, -1] == torch.inf
    truth = F.gelu(x.double() + bias.double(), approximate="tanh")
    ordinary = torch.isfinite(truth)
    torch.testing.assert_close(
        out.double()[ordinary], truth[ordinary], rtol=2 * rounding(dtype), atol=2 * rounding(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_euler_update_adds_in_float32(cache: Path, dtype: torch.dtype) -> None:
    x, v = torch.randn(3, 7, 11), torch.randn(3, 7, 11).to(dtype)
    out = torch.full_like(x, torch.nan)
    native.euler_update(x, v, 0.125, out=out)
    torch.testing.assert_close(out, x + 0.125 * v.float(), rtol=2e-7, atol=0)


def refusals() -> list[tuple[str, Callable[[Case], Any]]]:
    def norm_with(**changes: Any) -> Callable[[Case], Any]:
        def call(case: Case) -> None:
            given = {
                "x": case.x,
                "modulation": case.table,
                "shift_column": 0,
                "scale_column": 8,
                "out": torch.empty_like(case.x),
            } | changes
            native.norm_modulate(**given)

        return call

    return [
        ("columns", norm_with(scale_column=41)),
        ("columns", norm_with(shift_column=-1)),
        ("B or 1", norm_with(modulation=torch.zeros(2, 48))),
        ("float32 or bfloat16", norm_with(x=torch.zeros(3, 5, 8, dtype=torch.float64))),
        ("B, N, D", norm_with(x=torch.zeros(5, 8))),
        (
            "8192",
            norm_with(
                x=torch.zeros(1, 1, 8200),
                modulation=torch.zeros(1, 8200),
                scale_column=0,
                out=torch.zeros(1, 1, 8200),
            ),
        ),
        ("contiguous", norm_with(out=torch.empty(3, 8, 5).transpose(1, 2))),
        ("contiguous", norm_with(out=torch.empty(3, 5, 16)[..., ::2])),
        ("dtype", norm_with(out=torch.empty(3, 5, 8, dtype=torch.bfloat16))),
        ("in tiles", norm_with(out=torch.empty(3, 1, 1, 32, 32))),
        ("B, N, D", norm_with(x=torch.empty(3, 1, 1, 32, 32))),
        ("contiguous", lambda case: native.bias_gelu_(torch.zeros(8, 4).t(), None)),
        ("shape", lambda case: ours("gated_residual", _with(case, y=torch.zeros(3, 4, 8)))),
        (
            "dtype",
            lambda case: ours(
                "gated_residual", _with(case, y=torch.zeros(3, 5, 8, dtype=torch.bfloat16))
            ),
        ),
        ("columns", lambda case: native.bias_gelu_(torch.zeros(2, 8), torch.zeros(7))),
        (
            "one shape",
            lambda case: native.euler_update(
                torch.zeros(4), torch.zeros(5), 1.0, out=torch.zeros(4)
            ),
        ),
    ]


def _with(case: Case, **changes: Tensor) -> Case:
    case.__dict__.update(changes)
    return case


@pytest.mark.parametrize(("text", "call"), refusals())
def test_what_does_not_fit_is_refused(cache: Path, text: str, call: Callable[[Case], Any]) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(Case(torch.float32, 8))


def test_an_empty_batch_is_no_error(cache: Path) -> None:
    nothing = torch.empty(0, 5, 8)
    native.norm_modulate(nothing, torch.zeros(1, 16), 0, 8, out=nothing)
    native.bias_gelu_(nothing, None)


def run_python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CAPABILITY = """
import sys
sys.path.insert(0, "tests")
import torch, test_native as t
assert t.native.load("cpu", build_it=False) is None
for dtype in t.DTYPES:
    for size in (1, 5, 33, 1152):
        for name in t.OPERATORS:
            case = t.Case(dtype, size, seed=size, tokens=max(5, 4096 // size))
            t.assert_as_accurate(t.ours(name, case), t.plain(name, case), t.plain(name, case.to(torch.float64)))
    t.test_gelu_is_as_accurate_as_pytorch(None, dtype)
    t.test_gelu_adds_the_bias_and_keeps_what_is_not_finite(None, dtype, 17)
    t.test_euler_update_adds_in_float32(None, dtype)
print(torch.ops.odelt_native.cpu_width())
"""


@pytest.mark.parametrize(("capability", "width"), [("default", "4"), ("avx2", "8")])
def test_narrower_vectors_are_as_accurate(cache: Path, capability: str, width: str) -> None:
    """PyTorch's own switch chooses the instruction set, in a process of its own."""
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    assert (
        run_python(CAPABILITY, ATEN_CPU_CAPABILITY=capability, ODELT_FAST_CACHE=str(cache)) == width
    )


def test_the_widest_vectors_of_the_processor_are_chosen(cache: Path) -> None:
    width = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    assert torch.ops.odelt_native.cpu_width() == width
    assert f"{32 * width} bits" in native.describe()[0]


# Finding, building, loading


def test_the_name_of_a_library_follows_sources_flags_and_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {native.library_path("cpu"), native.library_path("cuda")}
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    assert native.library_path("cpu") in names  # the stable ABI: one build serves them
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    names.add(native.library_path("cpu"))
    monkeypatch.setattr(native, "CXX_FLAGS", (*native.CXX_FLAGS, "-g"))
    names.add(native.library_path("cpu"))
    for path in native.CSRC.rglob("*.*"):
        copy = tmp_path / path.relative_to(native.CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "CSRC", tmp_path)
    assert native.library_path("cpu") in names
    for header in ("vec.h", "rows.cpp"):
        (tmp_path / "cpu" / header).write_text((tmp_path / "cpu" / header).read_text() + "\n")
        names.add(native.library_path("cpu"))
    assert len(names) == 6


def tiny_library(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "source.cpp").write_text(text)
    monkeypatch.setattr(native, "sources", lambda library: [folder / "source.cpp"])
    monkeypatch.setenv("ODELT_FAST_CACHE", str(folder / "cache"))


def test_two_builds_at_once_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_library(tmp_path, 'extern "C" int answer() { return 42; }', monkeypatch)
    built: list[Path] = []
    threads = [threading.Thread(target=lambda: built.append(native.build("cpu"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [native.library_path("cpu")] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [built[0].name]


def test_a_source_that_does_not_compile_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_library(tmp_path, "int answer() { return undeclared; }", monkeypatch)
    with pytest.raises(native.BuildError, match=r"error: .undeclared. was not declared") as raised:
        native.build("cpu")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


UNUSABLE = """
from odelt_fast.engine.native import build as native
print(native.load("cpu"))
print(*native.describe(), sep="\\n")
"""


@pytest.mark.parametrize("broken", ["compiler", "file", "folder"])
def test_what_cannot_be_used_is_one_line_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path))
    environment = {"ODELT_FAST_CACHE": str(tmp_path)}
    if broken == "compiler":
        environment["CXX"] = "/nowhere/g++"
    elif broken == "file":
        native.library_path("cpu").write_bytes(b"\x7fELF, but no library")
    else:
        (tmp_path / "taken").write_text("")
        environment["ODELT_FAST_CACHE"] = str(tmp_path / "taken")
    said = run_python(UNUSABLE, **environment).splitlines()
    assert len(said) == 3
    words = {"compiler": "/nowhere/g++", "file": "build-ops --force", "folder": "taken"}
    assert words[broken] in said[0]
    assert said[1].startswith("native cpu operators: ")


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(ValueError, match="one of cpu, cuda, not 'rocm'"):
        native.library_path("rocm")


@pytest.mark.parametrize("how", ["script", "variable", "none"])
def test_the_toolkit_behind_a_script_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """torch takes the folder above the nvcc on PATH, which is wrong where that is a script."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    real = tmp_path / "toolkit"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "nvcc").write_text(
        f'#!/bin/sh\necho "#$ _HERE_={real}/bin" >&2\necho "#$ TOP={real}/bin/.." >&2\n'
    )
    (real / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "nvcc").write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    (tmp_path / "nvcc").chmod(0o755)
    find: Callable[[], Path | None] = native.cuda_toolkit.__wrapped__  # type: ignore[attr-defined]
    if how == "script":
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert find() == real
    elif how == "variable":
        monkeypatch.setenv("CUDA_HOME", str(real))
        assert find() == real
    else:
        monkeypatch.setattr(native, "DEFAULT_NVCC", str(tmp_path / "absent"))
        monkeypatch.setenv("PATH", str(real))
        assert find() is None


def test_the_command_builds_and_says_where(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODELT_FAST_CACHE", str(cache))
    assert main(["build-ops", "--no-cuda"]) == 0
    assert capsys.readouterr().out.startswith(f"cpu: {native.library_path('cpu')} (")
    monkeypatch.setattr(native, "cuda_toolkit", lambda: None)
    assert main(["build-ops"]) == 0
    assert "cuda: left out, there is no nvcc" in capsys.readouterr().out


def test_the_command_ends_in_one_line_where_it_cannot_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("ODELT_FAST_CACHE", str(tmp_path / "taken"))
    assert main(["build-ops", "--no-cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: the cpu operators cannot be built: ")


# CUDA


@pytest.fixture(scope="module")
def cuda_library(cache: Path) -> Path:
    if NVCC is None:
        pytest.skip("no nvcc")
    path = native.build("cuda")
    assert native.load("cuda", build_it=False) is None
    return path


def test_the_cuda_library_builds_and_loads_without_a_gpu(cuda_library: Path) -> None:
    driver, runtime = torch.ops.odelt_native.while_graph_versions()
    assert runtime >= native.WHILE_NODES
    if not torch.cuda.is_available():
        assert native.while_graph_reason() == "no CUDA GPU"
        assert "no CUDA GPU" in native.describe()[1]
    elif driver < runtime // 1000 * 1000:
        assert "driver" in str(native.while_graph_reason())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU: CUDA's own error")
def test_cudas_own_words_come_back_as_an_error(cuda_library: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cudaSetDevice.*: \w+.*(driver|device)"):
        torch.ops.odelt_native.while_graph_create(0, 0, 0, 0)


def test_a_flag_that_is_none_is_refused() -> None:
    for flag in (
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(1),
    ):
        with pytest.raises(ValueError, match=r"flag must be \(1,\) int32 on a GPU"):
            native.WhileGraph(None, flag)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [0, 1, 1000])
def test_a_while_graph_counts_to_its_limit(cuda_library: Path, limit: int) -> None:
    count, flag, started = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(3))
    end = torch.full((1,), limit, dtype=torch.int32, device="cuda")

    def first() -> None:
        started.add_(1)
        count.zero_()
        flag.copy_(count < end)

    def body() -> None:
        count.add_(1)
        flag.copy_(count < end)

    graphs = []
    for function in (first, body):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            function()
        graphs.append(graph)
    loop = native.WhileGraph(graphs[1], flag, first=graphs[0])
    for launch in range(1, 4):
        loop.launch()
        assert (count.item(), started.item()) == (limit, launch)
