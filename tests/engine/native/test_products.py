"""Packed matrix products and attention on the CPU: held to float64, and to what they refuse; the
network that runs on them is the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast import DiT, DiTConfig
from odelt_fast.engine import cpu as cpu_network
from odelt_fast.engine.cpu import CpuNetwork
from odelt_fast.engine.native import cpu_ops

pytestmark = pytest.mark.usefixtures("native_cache")

DTYPES = (torch.float32, torch.bfloat16)
# Rows, inner, columns: one value, ragged ends of tiles and of parts of K, K in several parts with
# the sums of all columns kept.
SHAPES = (
    (1, 2, 1),
    (3, 34, 31),
    (4, 192, 32),
    (15, 194, 33),
    (29, 768, 65),
    (37, 1152, 40),
    (45, 1154, 72),
    (61, 3072, 100),
    (256, 96, 288),
)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not cpu_ops.has_products(request.param):
        pytest.skip(f"this processor has no instructions for products of {request.param}")
    return request.param


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix of NaN in the middle of a larger one, and the larger one."""
    around = torch.full((rows + 2, columns + 6), torch.nan, dtype=dtype)
    return around[1:-1, 3:-3], around


def assert_as_accurate(result: Tensor, peer: Tensor, truth: Tensor) -> None:
    """Largest error at most twice that of PyTorch in the same dtype, or the rounding of the largest
    value, as few can be right by luck."""
    error, other = ((value.double() - truth).abs().max() for value in (result, peer))
    assert error <= 2 * max(other, torch.finfo(result.dtype).eps / 2 * truth.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_as_accurate_as_pytorch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    # PyTorch's error is that of a large product: small ones it adds up in another order.
    x, weight, bias = (
        draw(256, inner, dtype=dtype),
        draw(512, inner, dtype=dtype) / inner**0.5,
        draw(512, dtype=dtype),
    )
    out, around = poisoned(rows, columns, dtype)
    cpu_ops.linear(x[:rows], cpu_ops.pack_weight(weight[:columns]), bias[:columns], out=out)
    truth, peer = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    assert (out.double() - truth[:rows, :columns]).abs().max() <= 2 * (
        peer.double() - truth
    ).abs().max()
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 4, 1),
        (33, 34, 30, 31),
        (70, 192, 768, 192),
        (40, 1152, 4610, 1152),
        (2, 3072, 64, 70),
    ],
)
def test_mlp_is_as_accurate_as_pytorch(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    rows, inner, hidden, columns = shape
    x, bias = draw(256, inner, dtype=dtype), draw(hidden, dtype=dtype)
    weights = (
        draw(hidden, inner, dtype=dtype) / inner**0.5,
        draw(columns, hidden, dtype=dtype) / hidden**0.5,
    )
    out, around = poisoned(rows, columns, dtype)
    cpu_ops.mlp(
        x[:rows], cpu_ops.pack_weight(weights[0]), bias, cpu_ops.pack_weight(weights[1]), out=out
    )

    def plain(x: Tensor, bias: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, first, bias), approximate="tanh"), second)

    truth, peer = (
        plain(x.double(), bias.double(), *(weight.double() for weight in weights)),
        plain(x, bias, *weights),
    )
    assert (out.double() - truth[:rows]).abs().max() <= 2 * (peer.double() - truth).abs().max()
    assert around.isnan().sum() == around.numel() - out.numel()


def test_linear_without_a_bias_of_a_slice_of_rows_and_of_none(dtype: torch.dtype) -> None:
    wide, weight = draw(40, 200, dtype=dtype), draw(50, 100, dtype=dtype)
    x, packed = wide[:, 60:160], cpu_ops.pack_weight(weight)
    out = torch.empty(40, 50, dtype=dtype)
    cpu_ops.linear(x, packed, out=out)
    assert_as_accurate(out, x @ weight.t(), x.double() @ weight.double().t())
    cpu_ops.linear(x[:0], packed, out=out[:0])


def tiles(x: Tensor) -> Tensor:
    """(M, K) as (M/32, K/32, 32, 32); (B, N, D) likewise."""
    return x.unflatten(-2, (-1, 32)).unflatten(-1, (-1, 32)).transpose(-3, -2).contiguous()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(32, 32, 32), (96, 768, 320), (64, 1568, 96), (1120, 3072, 64)]
)
def test_tiles_are_rows_in_another_order(rows: int, inner: int, columns: int, threads: int) -> None:
    dtype, before = torch.bfloat16, torch.get_num_threads()
    if not cpu_ops.has_tiles(dtype):
        pytest.skip("this processor has no instructions for tiles")
    x, weight, back = (
        draw(rows, inner, dtype=dtype),
        draw(columns, inner, dtype=dtype),
        draw(inner, columns, dtype=dtype),
    )
    packed, packed_back, bias = (
        cpu_ops.pack_weight(weight / inner**0.5),
        cpu_ops.pack_weight(back),
        draw(columns, dtype=dtype),
    )
    plain, pair = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, inner, dtype=dtype)
    cpu_ops.linear(x, packed, bias, out=plain)
    cpu_ops.mlp(x, packed, bias, packed_back, out=pair)
    try:
        torch.set_num_threads(threads)
        for given in (x, tiles(x)):
            for result in (
                torch.full_like(plain, torch.nan),
                tiles(torch.full_like(plain, torch.nan)),
            ):
                cpu_ops.linear(given, packed, bias, out=result)
                assert torch.equal(result, tiles(plain) if result.dim() == 4 else plain)
            for result in (
                torch.full_like(pair, torch.nan),
                tiles(torch.full_like(pair, torch.nan)),
            ):
                cpu_ops.mlp(given, packed, bias, packed_back, out=result)
                assert torch.equal(result, tiles(pair) if result.dim() == 4 else pair)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(32, 1, 32), (64, 3, 64), (256, 2, 96), (1024, 1, 192)]
)
def test_attention_in_tiles_is_that_of_rows(tokens: int, heads: int, dim: int) -> None:
    dtype = torch.bfloat16
    if not cpu_ops.has_tiles(dtype):
        pytest.skip("this processor has no instructions for tiles")
    qkv = draw(2, tokens, 3 * heads * dim, dtype=dtype)
    plain = torch.empty(2, tokens, heads * dim, dtype=dtype)
    cpu_ops.attention(qkv, heads, dim**-0.5, out=plain)
    for given in (qkv, tiles(qkv)):
        for result in (torch.full_like(plain, torch.nan), tiles(torch.full_like(plain, torch.nan))):
            cpu_ops.attention(given, heads, dim**-0.5, out=result)
            assert torch.equal(result, tiles(plain) if result.dim() == 5 else plain)


def test_tiles_may_lie_anywhere_in_memory() -> None:
    dtype = torch.bfloat16
    if not cpu_ops.has_tiles(dtype):
        pytest.skip("this processor has no instructions for tiles")

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)

    x, weight = tiles(draw(64, 64, dtype=dtype)), draw(64, 64, dtype=dtype)
    qkv, packed = tiles(draw(1, 64, 192, dtype=dtype)), cpu_ops.pack_weight(weight)
    for run, given in (
        (lambda x, out: cpu_ops.linear(x, packed, out=out), x),
        (lambda x, out: cpu_ops.mlp(x, packed, draw(64, dtype=dtype), packed, out=out), x),
        (lambda x, out: cpu_ops.attention(x, 2, 1.0, out=out), qkv),
    ):
        shape = (2, 2, 32, 32) if given is x else (1, 2, 2, 32, 32)
        plain, other = torch.empty(shape, dtype=dtype), shifted(torch.empty(shape, dtype=dtype))
        run(given, plain)
        run(shifted(given), other)
        assert other.data_ptr() % 64
        assert torch.equal(plain, other)


def test_what_is_no_whole_tile_is_refused() -> None:
    for shape in ((1, 33, 32), (1, 32, 48)):
        with pytest.raises(ValueError, match="multiples of 32"):
            cpu_ops.tiled(*shape)
    x = torch.zeros(1, 1, 32, 32)
    if cpu_ops.has_products(x.dtype):
        with pytest.raises(RuntimeError, match="no tiles"):
            cpu_ops.linear(x, cpu_ops.pack_weight(torch.zeros(32, 32)), out=torch.zeros_like(x))
    if not cpu_ops.has_tiles(torch.bfloat16):
        return
    x = x.bfloat16()
    packed = cpu_ops.pack_weight(x[0, 0])
    for wrong in (
        x[:, :, :16],
        torch.zeros(1, 32, 32, 2, dtype=x.dtype)[..., 0][None],
        x.expand(2, 1, 32, 32),
    ):
        with pytest.raises(RuntimeError, match="in tiles must be"):
            cpu_ops.linear(wrong, packed, out=torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="multiple of 32 values"):
        cpu_ops.attention(
            torch.zeros(cpu_ops.tiled(1, 32, 144 * 2), dtype=x.dtype),
            2,
            1.0,
            out=torch.zeros(1, 32, 96, dtype=x.dtype),
        )


def test_a_row_is_the_same_in_every_batch_and_with_any_number_of_threads(
    dtype: torch.dtype,
) -> None:
    x, threads = draw(300, 1154, dtype=dtype), torch.get_num_threads()
    packed, back = (
        cpu_ops.pack_weight(draw(*shape, dtype=dtype)) for shape in ((70, 1154), (90, 70))
    )
    bias = draw(70, dtype=dtype)
    layers: dict[tuple[int, int], Tensor] = {}
    pairs: dict[tuple[int, int], Tensor] = {}
    try:
        for count, used in ((300, 1), (300, 3), (7, 1), (20, 2), (1, 8), (40, 5)):
            torch.set_num_threads(used)
            layers[count, used], pairs[count, used] = (
                torch.empty(count, 70, dtype=dtype),
                torch.empty(count, 90, dtype=dtype),
            )
            cpu_ops.linear(x[:count], packed, out=layers[count, used])
            cpu_ops.mlp(x[:count], packed, bias, back, out=pairs[count, used])
    finally:
        torch.set_num_threads(threads)
    for results in (layers, pairs):
        assert all(
            torch.equal(result, results[300, 1][:count]) for (count, _), result in results.items()
        )


def test_denormal_numbers_are_everyone_elses_as_before(dtype: torch.dtype) -> None:
    tiny, x = torch.full((4,), 1e-40), torch.zeros(64, 64, dtype=dtype)
    cpu_ops.linear(x, cpu_ops.pack_weight(x), out=torch.empty_like(x))
    cpu_ops.attention(
        torch.zeros(1, 8, 96, dtype=dtype), 2, 1.0, out=torch.zeros(1, 8, 32, dtype=dtype)
    )
    assert bool((tiny * 0.5 > 0).all())


@pytest.mark.parametrize(
    ("tokens", "heads", "dim"),
    [(1, 1, 2), (5, 3, 8), (16, 2, 64), (33, 2, 72), (256, 12, 64), (256, 2, 72), (1024, 1, 192)],
)
def test_attention_is_as_accurate_as_pytorch(
    dtype: torch.dtype, tokens: int, heads: int, dim: int
) -> None:
    qkv = draw(2, tokens, 3 * heads * dim, dtype=dtype) * 2
    out = torch.full((2, tokens, heads * dim), torch.nan, dtype=dtype)
    cpu_ops.attention(qkv, heads, dim**-0.5, out=out)

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    assert_as_accurate(out, plain(qkv), plain(qkv.double()))


@pytest.mark.parametrize("largest", [20, 60, 100, 300, 3000])
def test_attention_takes_logits_of_any_size(dtype: torch.dtype, largest: float) -> None:
    """Beside each other: queries whose logits are all small, all large, all far below 0, and
    both."""
    tokens, dim = 80, 32
    q, k, v = (draw(1, tokens, dim + extra, dtype=torch.float64)[..., :dim] for extra in range(3))
    k[..., 0] = 1 + 0.01 * k[..., 0]
    q *= torch.linspace(0.01, 1, tokens, dtype=torch.float64)[:, None]
    q[0, ::3, 0] += largest  # one common logit shifts all of a query
    q[0, 1::3, 0] -= largest
    qkv = torch.cat([q, k, v], dim=2).to(dtype)
    out = torch.full((1, tokens, dim), torch.nan, dtype=dtype)
    cpu_ops.attention(qkv, 1, 1.0, out=out)

    def plain(qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv.chunk(3, dim=2), scale=1.0)

    assert_as_accurate(out, plain(qkv), plain(qkv.double()))


def test_attention_takes_large_logits_and_keeps_a_nan_to_its_sample(dtype: torch.dtype) -> None:
    qkv = draw(2, 40, 48, dtype=dtype) * 30
    qkv[0, 3, 5] = torch.nan
    out = torch.empty(2, 40, 16, dtype=dtype)
    cpu_ops.attention(qkv, 1, 1.0, out=out)
    assert out[0, 3].isnan().all()
    assert out[1].isfinite().all()


def refusals() -> list[tuple[str, Callable[[torch.dtype], None]]]:
    def linear(dtype: torch.dtype, columns: int = 8, inner: int = 16, **changes: Tensor) -> None:
        given = {
            "x": torch.zeros(4, 16, dtype=dtype),
            "packed": torch.zeros(32, 32, dtype=dtype),
            "out": torch.zeros(4, columns, dtype=dtype),
        }
        cpu_ops.linear(**(given | changes))  # type: ignore[arg-type]

    def mlp(dtype: torch.dtype, **changes: Tensor) -> None:
        packed = torch.zeros(32, 32, dtype=dtype)
        given = {
            "bias": torch.zeros(8, dtype=dtype),
            "out": torch.zeros(4, 8, dtype=dtype),
        } | changes
        cpu_ops.mlp(
            torch.zeros(4, 16, dtype=dtype), packed, given["bias"], packed, out=given["out"]
        )

    def attention(
        dtype: torch.dtype, tokens: int = 4, size: int = 16, heads: int = 2, scale: float = 1.0
    ) -> None:
        cpu_ops.attention(
            torch.zeros(1, tokens, 3 * size, dtype=dtype),
            heads,
            scale,
            out=torch.zeros(1, tokens, size, dtype=dtype),
        )

    return [
        ("no instructions", lambda _: linear(torch.float64)),
        ("pack_weight", lambda dtype: linear(dtype, columns=40)),
        ("pack_weight", lambda dtype: linear(dtype, x=torch.zeros(4, 40, dtype=dtype))),
        ("rows are contiguous", lambda dtype: linear(dtype, x=torch.zeros(16, 4, dtype=dtype).t())),
        (
            "rows are contiguous",
            lambda dtype: linear(dtype, out=torch.zeros(4, 8, dtype=torch.float16)),
        ),
        ("as many rows", lambda dtype: linear(dtype, out=torch.zeros(5, 8, dtype=dtype))),
        ("bias must have the shape", lambda dtype: linear(dtype, bias=torch.zeros(9, dtype=dtype))),
        ("pack_weight", lambda dtype: mlp(dtype, bias=torch.zeros(40, dtype=dtype))),
        ("pack_weight", lambda dtype: mlp(dtype, out=torch.zeros(4, 40, dtype=dtype))),
        ("as many rows", lambda dtype: mlp(dtype, out=torch.zeros(3, 8, dtype=dtype))),
        ("multiple of the number of heads", lambda dtype: attention(dtype, heads=3)),
        ("multiple of the number of heads", lambda dtype: attention(dtype, heads=0)),
        ("1024 tokens", lambda dtype: attention(dtype, tokens=1025)),
        ("192 values", lambda dtype: attention(dtype, size=388)),
        ("scale must be positive", lambda dtype: attention(dtype, scale=0.0)),
    ]


@pytest.mark.parametrize(("text", "call"), refusals())
def test_what_does_not_fit_is_refused(
    dtype: torch.dtype, text: str, call: Callable[[torch.dtype], None]
) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(dtype)


def network(heads: int, dim: int, image_size: int = 8) -> DiT:
    torch.manual_seed(0)
    size = heads * dim
    config = DiTConfig(
        image_size=image_size,
        channels=1,
        hidden_size=size,
        depth=4,
        depth_min=2,
        depth_group=2,
        num_heads=heads,
        num_classes=10,
    )
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def error_of(run: Callable[..., Tensor], exact: DiT, batch: int, side: int = 8) -> float:
    generator = torch.Generator().manual_seed(batch)
    x, y = torch.randn(batch, 1, side, side, generator=generator), torch.arange(batch) % 11
    with torch.no_grad():
        truth = exact(x.double(), 0.5, 3, y, depth=4)
        return float((run(x, 0.5, 3, y, depth=4).double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=False)
@pytest.mark.parametrize(
    ("heads", "dim", "side"),
    [(2, 64, 8), (2, 72, 8), (3, 20, 8), (2, 64, 16), (2, 80, 16), (3, 24, 16)],
)
def test_the_network_is_the_model_at_every_batch(
    dtype: torch.dtype, heads: int, dim: int, side: int
) -> None:
    """With 64 tokens in tiles: all of it, all but the heads, and nothing."""
    model = network(heads, dim, side).to(dtype)
    exact, ours = network(heads, dim, side).double(), CpuNetwork(model)
    exact.load_state_dict(model.state_dict())
    assert ours.products == cpu_ops.has_products(dtype)
    for batch in range(1, 10):
        assert (
            error_of(ours, exact, batch, side) <= 1.25 * error_of(model, exact, batch, side) + 1e-7
        )
    for other in (12, 16):
        assert error_of(ours, exact, 2, other) <= 1.25 * error_of(model, exact, 2, other) + 1e-7


def test_a_few_samples_at_a_time_are_the_whole_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(2, 64).to(dtype)
    x, t, y = torch.randn(7, 1, 8, 8), torch.rand(7), torch.arange(7)
    results = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for rows in (16, 32, 48, 512):  # 1, 2, 3 samples of 16 tokens, the 7 in even parts, and all
        monkeypatch.setattr(cpu_network, "ROWS_AT_ONCE", rows)
        ours = CpuNetwork(model)
        with torch.no_grad():
            results += [ours(x, t, 3, y, depth=4), ours(x, 0.5, 3, y[:1].expand(7), depth=4)]
    assert all(
        torch.equal(result, whole) for result, whole in zip(results, 4 * results[-2:], strict=True)
    )


def test_more_tokens_than_the_native_attention_takes(dtype: torch.dtype) -> None:
    model = network(1, 32, image_size=66).to(dtype)  # 1089 tokens
    exact = network(1, 32, image_size=66).double()
    exact.load_state_dict(model.state_dict())
    assert (
        error_of(CpuNetwork(model), exact, 1, side=66)
        <= 1.25 * error_of(model, exact, 1, side=66) + 1e-7
    )


def test_weights_that_change_are_packed_anew(dtype: torch.dtype) -> None:
    model, other = network(2, 64).to(dtype), network(2, 64).to(dtype)
    ours, arguments = CpuNetwork(model), (torch.randn(2, 1, 8, 8), 0.5, 3, torch.tensor([1, 2]))
    with torch.no_grad():
        for block in other.blocks:
            block.mlp_in.weight.mul_(1.5)
        before = ours(*arguments, depth=4)
        model.load_state_dict(other.state_dict())
        assert torch.equal(ours(*arguments, depth=4), CpuNetwork(other)(*arguments, depth=4))
        assert not torch.equal(ours(*arguments, depth=4), before)
