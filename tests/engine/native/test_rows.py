"""The native row operators, held to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.cpu_ops import InnerState, Modulation

pytestmark = pytest.mark.usefixtures("native_cache")

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (1, 3, 16, 31, 33, 96, 384, 1152, 8192)


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
    columns = Modulation(case.table, 3 * size, case.table, size, 4 * size)
    if name == "gated_residual":
        cpu_ops.gated_residual(case.x, case.y, case.bias, columns, out_x=out[0], out=out[1])
        return out[0], out[1]
    xr, out_xr = (None, None) if name == "last_group_end" else (case.xr, out[2])
    inner = InnerState(xr, case.vr, case.steps)
    cpu_ops.group_end(case.x, case.y, case.bias, inner, columns, (out_xr, out[0], out[1]))
    return (out[0], out[1]) if out_xr is None else (out_xr, out[0], out[1])


OPERATORS = ("gated_residual", "group_end", "last_group_end")


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


def skip_short_vectors() -> None:
    """Sums of many values, or of large ones, in eight lanes are a little less accurate."""
    if cpu_ops.level() == "baseline":
        pytest.skip("with vectors of four values the error is a little above twice PyTorch's")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_rows_are_as_accurate_as_pytorch(name: str, dtype: torch.dtype, size: int) -> None:
    if size == SIZES[-1]:
        skip_short_vectors()
    # Enough values for PyTorch's error not to be luck.
    case = Case(dtype, size, seed=size, tokens=max(5, 4096 // size))
    assert_as_accurate(ours(name, case), plain(name, case), plain(name, case.to(torch.float64)))


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16_is_float32_arithmetic_rounded_once(name: str) -> None:
    case = Case(torch.bfloat16, 77, tokens=100)
    for narrow, wide in zip(ours(name, case), ours(name, case.to(torch.float32)), strict=True):
        assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_hold_to_one_millionth_in_float32(name: str) -> None:
    case = Case(torch.float32, 768)
    for result, truth in zip(ours(name, case), plain(name, case.to(torch.float64)), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=2e-6)


def test_a_constant_row_with_a_large_mean_does_not_lose_its_variance() -> None:
    skip_short_vectors()
    case = Case(torch.float32, 768)
    case.x = case.x * 1e-2 + 1000  # E[x^2] - E[x]^2 in float32 would give noise here
    case.y, case.bias, name = torch.zeros_like(case.y), torch.zeros_like(case.bias), OPERATORS[0]
    assert_as_accurate(ours(name, case), plain(name, case), plain(name, case.to(torch.float64)))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_may_overwrite_the_inputs(name: str, dtype: torch.dtype) -> None:
    case, same = Case(dtype, 100), Case(dtype, 100)
    memory = iter([same.x if name == "gated_residual" else same.vr, same.y, same.xr])
    written = ours(name, same, lambda: next(memory, torch.empty_like(case.x)))
    for apart, over in zip(ours(name, case), written, strict=True):
        assert torch.equal(apart, over)


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_written_beside_the_result(name: str) -> None:
    case, rest = Case(torch.bfloat16, 33), []

    def make() -> Tensor:
        around = torch.full((case.x.numel() + 64,), 7.0, dtype=case.x.dtype)
        rest.append(around)
        return around[32:-32].view(case.x.shape)

    assert all(torch.isfinite(result).all() for result in ours(name, case, make))
    assert all((around[:32] == 7).all() and (around[-32:] == 7).all() for around in rest)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_strides_are_read(name: str) -> None:
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


def test_rows_of_a_single_value_may_have_any_stride() -> None:
    wide, out = torch.randn(2, 5, 4), torch.empty(2, 5, 1)
    table, zero = torch.tensor([[3.0, 1.0]]), torch.zeros(2, 5, 1)
    columns = Modulation(table, 0, table, 0, 1)
    cpu_ops.gated_residual(wide[..., ::4], zero, None, columns, out_x=zero, out=out)
    assert bool((out == 3).all())


@pytest.mark.parametrize("name", OPERATORS)
def test_one_modulation_row_serves_all_samples_in_any_dtype(name: str) -> None:
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
def test_tiles_are_rows_in_another_order(name: str, dtype: torch.dtype) -> None:
    """y and the last result, which matrix products write and read, may be in tiles."""
    rows, tiled = Case(dtype, 96, tokens=64), Case(dtype, 96, tokens=64)
    tiled.y = tiles(tiled.y)
    memory = iter([torch.empty_like(rows.x), torch.empty_like(tiled.y)])
    *states, last = ours(name, rows)
    *tiled_states, tiled_last = ours(
        name, tiled, lambda: next(memory, torch.full_like(rows.x, torch.nan))
    )
    assert tiled_last.shape == cpu_ops.tiled(3, 64, 96)
    assert torch.equal(tiled_last, tiles(last))
    assert all(map(torch.equal, states, tiled_states))


def test_absent_parts_are_zero_and_one() -> None:
    case, zero = Case(torch.float32, 24), torch.zeros(3, 5, 24)
    columns = Modulation(case.table, 72, case.table, 24, 96)
    full, bare = ([torch.empty(3, 5, 24) for _ in range(3)] for _ in range(2))
    inner, bare_inner = InnerState(case.xr, zero, torch.ones(1)), InnerState(case.xr, None)
    cpu_ops.group_end(case.x, case.y, torch.zeros(24), inner, columns, tuple(full))
    cpu_ops.group_end(case.x, case.y, None, bare_inner, columns, tuple(bare))
    assert all(map(torch.equal, full, bare))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(dtype: torch.dtype) -> None:
    good, bad = Case(dtype, 70), Case(dtype, 70)
    bad.x[1, 2, 69] = torch.nan
    bad.y[2, 4, 0] = torch.inf
    for before, after in zip(ours("group_end", good), ours("group_end", bad), strict=True):
        assert not torch.isfinite(after[1, 2]).all()
        assert not torch.isfinite(after[2, 4]).all()
        after[1, 2], after[2, 4] = before[1, 2], before[2, 4]
        assert torch.equal(before, after)


def test_threads_change_no_bit() -> None:
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
def test_gelu_is_as_accurate_as_pytorch(dtype: torch.dtype) -> None:
    x = torch.cat(
        [
            torch.linspace(-12, 12, 100_003),
            10 ** torch.linspace(-30, 3, 501),
            -(10 ** torch.linspace(-30, 1, 501)),
        ]
    ).to(dtype)
    out = x.clone()
    cpu_ops.bias_gelu_(out, None)
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
def test_gelu_adds_the_bias_and_keeps_what_is_not_finite(dtype: torch.dtype, size: int) -> None:
    x, bias = torch.randn(4, size).to(dtype), torch.randn(size).to(dtype)
    x[0, 0], x[1, -1] = torch.nan, torch.inf
    out = x.clone()
    cpu_ops.bias_gelu_(out, bias)
    assert torch.isnan(out[0, 0])
    assert out[1, -1] == torch.inf
    truth = F.gelu(x.double() + bias.double(), approximate="tanh")
    ordinary = torch.isfinite(truth)
    torch.testing.assert_close(
        out.double()[ordinary], truth[ordinary], rtol=2 * rounding(dtype), atol=2 * rounding(dtype)
    )


def refusals() -> list[tuple[str, Callable[[Case], Any]]]:
    def gated_with(**changes: Any) -> Callable[[Case], Any]:
        def call(case: Case) -> None:
            table = case.table
            columns = {"gates": table, "gate_column": 0, "table": table}
            columns |= {"shift_column": 0, "scale_column": 8}
            given = {"x": case.x, "y": case.y, "bias": None}
            given |= {name: torch.empty_like(case.x) for name in ("out_x", "out")}
            for name, value in changes.items():
                (columns if name in columns else given)[name] = value
            cpu_ops.gated_residual(**given, modulation=Modulation(**columns))

        return call

    return [
        ("columns", gated_with(scale_column=41)),
        ("columns", gated_with(shift_column=-1)),
        ("columns", gated_with(gate_column=41)),
        ("B or 1", gated_with(table=torch.zeros(2, 48))),
        ("float32 or bfloat16", gated_with(x=torch.zeros(3, 5, 8, dtype=torch.float64))),
        ("B, N, D", gated_with(x=torch.zeros(5, 8))),
        ("8192", gated_with(x=torch.zeros(1, 1, 8200))),
        ("contiguous", gated_with(out=torch.empty(3, 8, 5).transpose(1, 2))),
        ("contiguous", gated_with(out=torch.empty(3, 5, 16)[..., ::2])),
        ("dtype", gated_with(out=torch.empty(3, 5, 8, dtype=torch.bfloat16))),
        ("in tiles", gated_with(out=torch.empty(3, 1, 1, 32, 32))),
        ("B, N, D", gated_with(x=torch.empty(3, 1, 1, 32, 32))),
        ("contiguous", lambda case: cpu_ops.bias_gelu_(torch.zeros(8, 4).t(), None)),
        ("shape", lambda case: ours("gated_residual", _with(case, y=torch.zeros(3, 4, 8)))),
        (
            "dtype",
            lambda case: ours(
                "gated_residual", _with(case, y=torch.zeros(3, 5, 8, dtype=torch.bfloat16))
            ),
        ),
        ("columns", lambda case: cpu_ops.bias_gelu_(torch.zeros(2, 8), torch.zeros(7))),
    ]


def _with(case: Case, **changes: Tensor) -> Case:
    case.__dict__.update(changes)
    return case


@pytest.mark.parametrize(("text", "call"), refusals())
def test_what_does_not_fit_is_refused(text: str, call: Callable[[Case], Any]) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(Case(torch.float32, 8))


def test_an_empty_batch_is_no_error() -> None:
    nothing = torch.empty(0, 5, 8)
    columns = Modulation(torch.zeros(1, 24), 0, torch.zeros(1, 24), 8, 16)
    cpu_ops.gated_residual(nothing, nothing, None, columns, out_x=nothing, out=nothing)
    cpu_ops.bias_gelu_(nothing, None)
