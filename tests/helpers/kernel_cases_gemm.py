"""Cases of the matrix products, attention, quantisation; `kernel_cases` runs them.

`kernel_checks` says what a case is.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odelt_fast.kernels.attention import attention, attention_reference
from odelt_fast.kernels.attention_tangent import (
    attention_tangent,
    attention_tangent_reference,
)
from odelt_fast.kernels.linear import Epilogue, launch_linear, linear, linear_reference
from odelt_fast.kernels.quantize import FP8, quantize_rows, quantize_rows_reference
from odelt_fast.kernels.tiles import SPLITS, TILES, Tile, workspace_elements
from tests.helpers.kernel_checks import (
    GUARD,
    Axes,
    batch_size,
    check_error,
    enough_tokens,
    guarded,
    watched,
)

WIDTHS = (1, 8, 24, 33, 64, 72, 96, 100, 128, 130)
UNTOUCHED = -7


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def problem(
    rng: random.Random, device: torch.device, dtype: torch.dtype, columns: int, inner: int
) -> list[Any]:
    """x, weight, bias, activation, gate, residual of one layer, of random layouts.

    Optional parts are None now and then.
    """
    batch, tokens = token_shape(rng, columns)
    x = guarded(rng, (batch, tokens, inner), dtype, device, rng.choice([0.1, 1.0, 4.0]))
    layout = rng.choice(["contiguous", "strided", "misaligned"])
    weight = guarded(rng, (columns, inner), dtype, device, inner**-0.5, layout)
    bias = guarded(rng, (columns,), dtype, device) if rng.random() < 0.8 else None
    gate = residual = None
    if rng.random() < 0.5:
        rows = rng.choice([1, batch])
        layout = rng.choice(["contiguous", "strided", "misaligned"])
        packed = guarded(rng, (rows, 6 * columns), dtype, device, layout=layout)
        first = columns * rng.randint(0, 5)
        gate = packed[:, first : first + columns]
        residual = guarded(rng, (batch, tokens, columns), dtype, device)
    return [x, weight, bias, rng.choice(["none", "gelu"]), gate, residual]


def token_shape(rng: random.Random, width: int) -> tuple[int, int]:
    batch = batch_size(rng)
    return batch, enough_tokens(
        rng.randint(1, 40) if batch < 6 else rng.randint(1, 3), batch * width
    )


def linear_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    arguments = problem(rng, device, dtype, rng.choice(WIDTHS), rng.choice(WIDTHS))
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    with watched(*tensors):
        got = linear(*arguments)
    compare(rng, "linear", got, arguments)
    return got


def linear_tiles_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Every shipped tile, also at sizes for which `choose_tile` would take another."""
    fits = [
        tile
        for name, tile in TILES.items()
        if not name.startswith("fp8") and (dtype == torch.float32) == (name == "float32")
    ]
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        fits = [tile for tile in fits if not tile.descriptors]
    tile = rng.choice(fits)
    unit = 8 if tile.descriptors else 1  # tensor descriptors need rows of whole 16 bytes
    arguments = problem(
        rng, device, dtype, unit * rng.randint(1, 300 // unit), unit * rng.randint(1, 200 // unit)
    )
    if tile.descriptors:
        arguments[:2] = [
            tensor.clone(memory_format=torch.contiguous_format) for tensor in arguments[:2]
        ]
    got = launched(arguments, tile)
    compare(rng, str(tile), got, arguments)
    return got


def launched(arguments: list[Any], tile: Tile, workspace: Tensor | None = None) -> Tensor:
    """One launch with `tile`, into a NaN-filled output."""
    x, weight, *parts = arguments
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    with watched(*tensors), poisoned_output(len(rows), len(weight), x.dtype, x.device) as out:
        launch_linear(rows, weight, Epilogue(*parts), out, tile, workspace)
    return out.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def poisoned_output(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """A NaN-filled (rows, columns) inside a NaN-filled buffer.

    AssertionError at the end if anything was written around it.
    """
    buffer = torch.full((rows * columns + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    yield buffer[GUARD:-GUARD].view(rows, columns)
    assert bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()), (
        "a kernel wrote outside its output"
    )


def linear_split_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Split-K: programs exchange sums in the workspace, ordered by atomics; products of other
    shapes have used it before."""
    tile = replace(
        TILES["float32" if dtype == torch.float32 else "small"], splits=rng.choice(SPLITS)
    )
    arguments = problem(rng, device, dtype, rng.choice(WIDTHS), rng.randint(1, 400))
    other = problem(rng, device, dtype, rng.choice(WIDTHS), rng.randint(1, 400))
    counters, partials = (
        max(sizes)
        for sizes in zip(
            *(
                workspace_elements(x[..., 0].numel(), len(weight), tile)
                for x, weight, *_ in (arguments, other)
            )
        )
    )
    storage = torch.full(
        (counters + partials + 2 * GUARD,), UNTOUCHED, dtype=torch.int32, device=device
    )
    workspace = storage[GUARD:-GUARD]
    workspace[:counters] = 0
    results = []
    for _ in range(2):
        workspace[counters:].view(torch.float32).fill_(math.nan)
        launched(other, tile, workspace)
        results.append(launched(arguments, tile, workspace))
        assert bool((workspace[:counters] == 0).all()), "split-K left its counters set"
    assert bool((storage[:GUARD] == UNTOUCHED).all() and (storage[-GUARD:] == UNTOUCHED).all()), (
        "split-K wrote outside its workspace"
    )
    assert torch.equal(results[0], results[1]), "a second run on the same workspace gave other bits"
    compare(rng, str(tile), results[0], arguments)
    return results[0]


def compare(rng: random.Random, name: str, got: Tensor, arguments: list[Any]) -> None:
    exact = linear_reference(*map(double, arguments))
    plain = linear_axes(*arguments[:2]).plain(rng, linear_reference, *arguments)
    check_error(name, got, plain, exact)


def linear_axes(x: Tensor, weight: Tensor) -> Axes:
    names = ("bni", "oi", "o", None, "bo", "bno", "bn", "o", None)
    return Axes(names, ("bno",), {**dict(zip("bni", x.shape)), "o": len(weight)})


def float8_result(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product of float8 values is held to PyTorch's.

    A tensor core of Hopper adds them with about 14 bits: more than bfloat16's rounding hides is
    held to nothing on a card, and float16's 11 bits are too many.
    """
    return torch.bfloat16 if device == "cuda" else dtype


def linear_float8_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    out_dtype = float8_result(device.type, dtype)
    unit = rng.choice([1, 16])  # 16: rows that tensor descriptors can address
    columns, inner = (unit * rng.randint(1, 200 // unit) for _ in range(2))
    arguments = problem(rng, device, out_dtype, columns, inner)
    (x, x_scale), (weight, weight_scale) = (
        quantize_rows_reference(tensor) for tensor in arguments[:2]
    )
    arguments[:2] = [poisoned(rng, tensor) for tensor in (x, weight)]
    named = {"x_scale": x_scale, "weight_scale": weight_scale, "out_dtype": out_dtype}
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    with watched(*tensors, x_scale, weight_scale):
        got = linear(*arguments, **named)
    dequantised = (
        x.double() * x_scale.double()[..., None],
        weight.double() * weight_scale.double()[:, None],
    )
    exact = linear_reference(*dequantised, *map(double, arguments[2:]))
    plain = linear_axes(x, weight).plain(
        rng, linear_reference, *arguments, x_scale, weight_scale, out_dtype
    )
    check_error("linear float8", got, plain, exact)
    return got


def poisoned(rng: random.Random, values: Tensor) -> Tensor:
    """A copy of float8 values in a buffer that is NaN elsewhere, sometimes off a 16-byte border."""
    offset = GUARD + rng.choice([0, 0, 1, 8])
    buffer = torch.full(
        (offset + values.numel() + GUARD,), 0x7F, dtype=torch.uint8, device=values.device
    )
    buffer[offset : offset + values.numel()] = values.contiguous().view(torch.uint8).flatten()
    return buffer.view(FP8)[offset : offset + values.numel()].view(values.shape)


def attention_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    heads = rng.randint(1, 3)
    head_dim = rng.choice([64, 64, 72, 72, 24, 32, rng.randint(1, 40), rng.randint(65, 130)])
    batch, tokens = token_shape(rng, heads * head_dim)
    if batch == 1 and rng.random() < 0.2:
        tokens, heads, head_dim = rng.randint(60, 270), 1, rng.choice([64, 72])
    # At 1/head_dim the logits of unit normal values are flat; large values give peaked rows.
    qkv = guarded(
        rng, (batch, tokens, 3 * heads * head_dim), dtype, device, rng.choice([0.1, 1.0, 8.0])
    )
    with watched(qkv):
        got = attention(qkv, heads)
    check_error(
        "attention",
        got,
        packed_axes(qkv, heads, 1).plain(rng, attention_reference, qkv, heads),
        attention_reference(qkv.double(), heads),
    )
    return got


def packed_axes(qkv: Tensor, heads: int, copies: int) -> Axes:
    """The axes of a function of so many packed (B, N, 3*D) and as many results (B, N, D)."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    features: dict[str, Any] = {
        "d": lambda order: (order["h"][:, None] * head_dim + order["e"]).flatten(),
        "k": (
            lambda order: (
                torch.arange(3)[:, None, None] * (heads * head_dim)
                + order["h"][:, None] * head_dim
                + order["e"]
            ).flatten()
        ),
    }
    sizes = {"b": batch, "n": tokens, "h": heads, "e": head_dim}
    return Axes((*["bnk"] * copies, None), ["bnd"] * copies, sizes, features)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k, v (B, heads, N, head_dim) of packed (B, N, 3*D), as views."""
    return tuple(qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4))


def attention_tangent_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Values and tangents of packed projections, as a network has them."""
    heads = rng.randint(1, 3)
    head_dim = rng.choice([64, 64, 72, 72, 24, 32, rng.randint(1, 40), rng.randint(65, 128)])
    batch, tokens = token_shape(rng, heads * head_dim)
    if batch == 1 and rng.random() < 0.2:
        tokens, heads, head_dim = rng.randint(60, 270), 1, rng.choice([64, 72])
    shape = batch, tokens, 3 * heads * head_dim
    qkv, dqkv = (
        guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, most])) for most in (8.0, 3.0)
    )
    with watched(qkv, dqkv):
        got = attention_tangent(*split_heads(qkv, heads), *split_heads(dqkv, heads))

    def plain(qkv: Tensor, dqkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        return attention_tangent_reference(*split_heads(qkv, heads), *split_heads(dqkv, heads))

    results = packed_axes(qkv, heads, 2).results(rng, plain, qkv, dqkv, heads)
    for name, mine, theirs, exact in zip(
        ("y", "dy"), got, zip(*results, strict=True), plain(qkv.double(), dqkv.double(), heads)
    ):
        check_error(f"attention_tangent {name}", mine, theirs, exact)
    return got


def quantize_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    width = rng.choice([*WIDTHS, 768])
    x = guarded(
        rng, (*token_shape(rng, width), width), dtype, device, rng.choice([1e-3, 1.0, 100.0])
    )
    if rng.random() < 0.3:
        x = x.clone()
        x[0, 0] = 0
    with watched(x), exact_float8_cast():
        q, scale = quantize_rows(x)
    plain_q, plain_scale = quantize_rows_reference(x)
    torch.testing.assert_close(scale, plain_scale, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert bool((q.float().abs() <= 448).all()), "a value outside e4m3, or NaN"
    check_error(
        "quantize",
        q.float() * scale[..., None],
        plain_q.float() * plain_scale[..., None],
        x.double(),
    )
    x = x.clone()
    x[-1, -1, -1] = math.nan
    with exact_float8_cast():
        broken, _ = quantize_rows(x)
    assert int(broken.float().isnan().sum()) == 1, "NaN must stay NaN, alone"
    return q.view(torch.uint8), scale


@contextlib.contextmanager
def exact_float8_cast() -> Iterator[None]:
    """Rounds float32 to float8 e4m3 as the hardware does. No effect on a card.

    The interpreter's own conversion drops the carry.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).to(FP8).view(torch.uint8).numpy()

    interpreter._convert_float = rounded
    try:
        yield
    finally:
        interpreter._convert_float = convert


CASES = [
    ("linear", linear_case),
    ("linear_tiles", linear_tiles_case),
    ("linear_split", linear_split_case),
    ("linear_float8", linear_float8_case),
    ("attention", attention_case),
    ("attention_tangent", attention_tangent_case),
    ("quantize", quantize_case),
]


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, operands) for torch.library.opcheck."""
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(8)
    gate, residual = torch.randn(2, 48)[:, 8:16], torch.randn(2, 3, 8)
    workspace = torch.zeros(64, dtype=torch.int32)
    # Not with float8 operands: the schema check compares its arguments by arithmetic that PyTorch
    # lacks for float8 on a CPU.
    product = torch.ops.odelt_fast.linear.default  # `linear` calls it, with defaults
    return [
        (product, (x, weight, bias, "gelu", *[None] * 7)),
        (product, (x, weight, None, "none", gate, residual, None, None, None, workspace, None)),
        (attention, (torch.randn(2, 5, 48), 2)),
        (attention_tangent, tuple(torch.randn(2, 2, 5, 8) for _ in range(6))),
        (quantize_rows, (x,)),
    ]
