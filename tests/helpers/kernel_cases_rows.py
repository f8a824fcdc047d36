"""Cases of the row kernels, modulation and the ends of the network; `kernel_cases` runs them.

`kernel_checks` says what a case is.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.kernels.final_layer import (
    final_euler,
    final_euler_reference,
    final_velocity,
    final_velocity_reference,
)
from odelt_fast.kernels.gated_residual import gated_residual, gated_residual_reference
from odelt_fast.kernels.group_end import (
    group_end,
    group_end_reference,
    last_group_end,
    last_group_end_reference,
)
from odelt_fast.kernels.modulation import modulation, modulation_reference
from odelt_fast.kernels.norm_modulate import norm_modulate, norm_modulate_reference
from odelt_fast.kernels.patch import patch_embed, patch_embed_reference
from odelt_fast.kernels.row_float8 import (
    gated_residual_float8,
    gated_residual_float8_reference,
    group_end_float8,
    group_end_float8_reference,
    norm_modulate_float8,
    norm_modulate_float8_reference,
)
from tests.helpers.kernel_cases_gemm import exact_float8_cast
from tests.helpers.kernel_checks import (
    Axes,
    as_tuple,
    batch_size,
    check_error,
    enough_tokens,
    guarded,
    watched,
)

SIZES = (1, 4, 8, 12, 20, 24, 33, 64, 72, 96, 100, 128, 130)
WIDE = (384, 768, 1152)


def agree(
    rng: random.Random,
    operator: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    axes: Axes,
) -> tuple[Tensor, ...]:
    """Outputs of `operator`, each within twice the error of `reference` in the same dtype."""
    with watched(*(value for value in arguments if isinstance(value, Tensor))):
        mine = as_tuple(operator(*arguments))
    doubled = (value.double() if isinstance(value, Tensor) else value for value in arguments)
    exact = as_tuple(reference(*doubled))
    plain = zip(*axes.results(rng, reference, *arguments))
    for index, (got, right, others) in enumerate(zip(mine, exact, plain, strict=True)):
        check_error(f"output {index}", got, others, right)
    return mine


def token_shape(rng: random.Random) -> tuple[int, int, int]:
    batch = batch_size(rng)
    tokens = rng.randint(1, 40) if batch < 6 else rng.randint(1, 2)
    size = rng.choice(WIDE if rng.random() < 0.05 and batch < 6 else SIZES)
    return batch, enough_tokens(tokens, batch * size), size


def packed(
    rng: random.Random, batch: int, size: int, parts: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[int]]:
    """A packed modulation (batch or 1, K) and `parts` distinct columns in it.

    They are those of a block, or lie anywhere.
    """
    table = guarded(rng, (rng.choice([1, batch]), 6 * size + rng.choice([0, 0, 5])), dtype, device)
    shift = rng.randint(0, table.shape[1] - 6 * size) if rng.random() < 0.3 else 0
    return table, [shift + size * column for column in rng.sample(range(6), parts)]


def row_axes(shape: tuple[int, int, int], arguments: Sequence[Any], outputs: int) -> Axes:
    """Of a row kernel: tokens (B, N, D), steps (B or 1,), and packed tables.

    A table is followed by the columns that are read of it, D from each on.
    """
    names: list[str | None] = []
    derived: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {}
    for index, value in enumerate(arguments):
        names.append(
            {3: "bnd", 1: "b"}.get(value.dim(), f"b{index}") if isinstance(value, Tensor) else None
        )
        if isinstance(value, Tensor) and value.dim() == 2:
            columns = list(
                itertools.takewhile(lambda given: isinstance(given, int), arguments[index + 1 :])
            )
            derived[str(index)] = functools.partial(_column_order, value.shape[1], columns)
    return Axes(names, ["bnd"] * outputs, dict(zip("bnd", shape)), derived)


def _column_order(total: int, columns: Sequence[int], order: Mapping[str, Tensor]) -> Tensor:
    """The columns of a packed table, those that are read permuted as the features are."""
    result = torch.arange(total)
    for column in columns:
        result[column : column + len(order["d"])] = column + order["d"]
    return result


def gate_and_norm(
    rng: random.Random, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    """(gates, gate's column, modulation, shift's and scale's column)."""
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    return gates, gate, table, *columns


def norm_modulate_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x = guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0]))
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    arguments = (x, table, *columns)
    axes = row_axes(shape, arguments, 1)
    return agree(rng, norm_modulate, norm_modulate_reference, arguments, axes)


def gated_residual_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y = (guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0])) for _ in range(2))
    arguments = (x, y, *gate_and_norm(rng, shape, dtype, device))
    axes = row_axes(shape, arguments, 2)
    return agree(rng, gated_residual, gated_residual_reference, arguments, axes)


def group_end_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    columns = gate_and_norm(rng, shape, dtype, device)
    # Values that every dtype holds, so that all computations are given the same steps.
    values = [rng.choice([0.25, 0.5, 1.0]) for _ in range(rng.choice([1, shape[0]]))]
    steps = rng.choice([None, torch.tensor(values, device=device)])
    first = rng.choice([None, vr])
    if rng.random() < 0.5:
        arguments: tuple[Any, ...] = (x, y, xr, first, *columns, steps)
        axes = row_axes(shape, arguments, 3)
        return agree(rng, group_end, group_end_reference, arguments, axes)
    arguments = (x, y, first, *columns, steps)
    axes = row_axes(shape, arguments, 2)
    return agree(rng, last_group_end, last_group_end_reference, arguments, axes)


def float8_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The sums as without float8, bit by bit; q*scales within twice the error of PyTorch's."""
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    gates, gate, table, *columns = gate_and_norm(rng, shape, dtype, device)
    border = (x, y, xr, rng.choice([None, vr]), gates, gate, table, *columns)
    operator, reference, plain_operator, plain_reference, arguments = rng.choice(
        [
            (
                *(norm_modulate_float8, norm_modulate_float8_reference),
                *(norm_modulate, norm_modulate_reference),
                (x, table, *columns),
            ),
            (
                *(gated_residual_float8, gated_residual_float8_reference),
                *(gated_residual, gated_residual_reference),
                (x, y, gates, gate, table, *columns),
            ),
            (
                *(group_end_float8, group_end_float8_reference),
                *(group_end, group_end_reference),
                border,
            ),
        ]
    )
    with watched(x, y, xr, vr, gates, table), exact_float8_cast():
        *sums, q, scales = operator(*arguments)
        *unquantised, _ = as_tuple(plain_operator(*arguments))
    for got, right in zip(sums, unquantised, strict=True):
        assert torch.equal(got, right)
    assert bool((q.float().abs() <= 448).all()), "a value outside e4m3, or NaN"
    doubled = (value.double() if isinstance(value, Tensor) else value for value in arguments)

    def dequantised(*values: Any) -> Tensor:
        *_, plain_q, plain_scales = reference(*values)
        return plain_q.float() * plain_scales[..., None]

    plain = row_axes(shape, arguments, 1).plain(rng, dequantised, *arguments)
    exact = as_tuple(plain_reference(*doubled))[-1]
    check_error("float8", q.float() * scales[..., None], plain, exact)
    return (*sums, q.view(torch.uint8), scales)


def modulation_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    size, count = rng.choice(SIZES), rng.choice([1, 2, 3, 15, 16, 17, batch_size(rng)])
    columns = enough_tokens(rng.randint(1, 200), count)
    condition = guarded(rng, (count, size), rng.choice([dtype, torch.float32]), device)
    weight = guarded(rng, (columns, size), dtype, device, size**-0.5)
    bias = guarded(rng, (columns,), dtype, device)
    axes = Axes(("rd", "kd", "k"), ("rk",), {"r": count, "d": size, "k": columns})
    return agree(rng, modulation, modulation_reference, (condition, weight, bias), axes)


def patch_embed_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    patch, channels, batch = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 3, 4, 5]), batch_size(rng)
    size = rng.choice(SIZES)
    rows, columns = (rng.randint(1, 6 if batch < 6 else 1) for _ in range(2))
    rows = enough_tokens(rows, batch * columns * min(size, channels * patch**2))
    height, width = patch * rows, patch * columns
    x = guarded(rng, (batch, channels, height, width), rng.choice([dtype, torch.float32]), device)
    weight = guarded(rng, (size, channels * patch**2), dtype, device, 0.3)
    bias = guarded(rng, (size,), dtype, device)
    positions = guarded(rng, (rows * columns, size), torch.float32, device)
    # A state that the weights' dtype holds exactly, so that its rounding is no error of either.
    x.copy_(x.to(dtype)) if 0 not in x.stride() else None
    inside = torch.arange(patch)
    derived = {
        "h": lambda order: (order["r"][:, None] * patch + inside).flatten(),
        "w": lambda order: (order["s"][:, None] * patch + inside).flatten(),
        "n": lambda order: (order["r"][:, None] * columns + order["s"]).flatten(),
        "k": lambda order: (order["c"][:, None] * patch**2 + torch.arange(patch**2)).flatten(),
    }
    sizes = {"b": batch, "c": channels, "d": size, "r": rows, "s": columns}
    axes = Axes(("bchw", "dk", "d", "nd", None), ("bnd",), sizes, derived)
    arguments = (x, weight, bias, positions, patch)
    return agree(rng, patch_embed, patch_embed_reference, arguments, axes)


def final_layer_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    patch, channels, batch = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 3, 4, 5]), batch_size(rng)
    rows, columns = (rng.randint(1, 6 if batch < 6 else 1) for _ in range(2))
    height = patch * enough_tokens(rows, batch * columns * channels * patch**2)
    width, size = patch * columns, rng.choice(SIZES)
    guidance, step = rng.choice([None, None, 1.5, 0.0, -2.0]), rng.choice([1.0, 1 / 3, 1 / 128])
    state = rng.choice([dtype, torch.float32])
    guided_channels = rng.choice([None, rng.randint(1, channels)])
    samples = batch if guidance is None else 2 * batch
    h = guarded(rng, (samples, height * width // patch**2, size), dtype, device)
    weight = guarded(rng, (channels * patch**2, size), dtype, device, size**-0.5)
    bias = guarded(rng, (channels * patch**2,), dtype, device)
    names, sizes = ("snd", "vd", "v"), {"d": size}
    if rng.random() < 0.6:
        x = guarded(rng, (batch, channels, height, width), state, device)
        arguments: tuple[Any, ...] = (x, h, weight, bias, patch, step, guidance, guided_channels)
        axes = Axes(("bchw", *names, None, None, None, None), ("bchw",), sizes)
        return agree(rng, final_euler, final_euler_reference, arguments, axes)
    with watched(h, weight, bias):
        mixing = guidance, guided_channels
        got = final_velocity(h, weight, bias, patch, height, width, state, *mixing)

    def reference(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Guidance in the dtype of the product: what a float32 state gets beyond it is a gain.
        return final_velocity_reference(h, weight, bias, patch, height, width, h.dtype, *mixing)

    plain = Axes(names, ("bchw",), sizes).plain(rng, reference, h, weight, bias)
    exact = reference(h.double(), weight.double(), bias.double())
    check_error("velocity", got, [result.to(state) for result in plain], exact)
    return got


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that torch.library.opcheck may try it on."""
    x, y, xr, vr = (torch.randn(2, 3, 8) for _ in range(4))
    table, weight, bias = torch.randn(2, 48), torch.randn(16, 8), torch.randn(16)
    image, h = torch.randn(2, 4, 2, 6), torch.randn(2, 3, 8)
    columns, border = (table, 16, table, 24, 32), (table, 40, table, 0, 8)
    return [
        (norm_modulate, (x, table, 0, 8)),
        (norm_modulate_float8, (x, table, 24, 32)),
        (gated_residual, (x, y, *columns)),
        (gated_residual_float8, (x, y, *columns)),
        (group_end, (x, y, xr, vr, *border, torch.ones(2))),
        (group_end, (x, y, xr, None, *border)),
        (group_end_float8, (x, y, xr, vr, *columns)),
        (last_group_end, (x, y, vr, *border)),
        (modulation, (torch.randn(2, 8), weight, bias)),
        (modulation, (torch.randn(17, 8), weight.half(), bias.half())),
        (patch_embed, (image, weight.t().contiguous(), torch.randn(8), torch.randn(3, 8), 2)),
        (final_euler, (image, h, weight, bias, 2, 0.5)),
        (final_velocity, (torch.cat([h, h]), weight, bias, 2, 2, 6, torch.float32, 1.5, 3)),
    ]


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("norm_modulate", norm_modulate_case),
    ("gated_residual", gated_residual_case),
    ("group_end", group_end_case),
    ("modulation", modulation_case),
    ("patch_embed", patch_embed_case),
    ("final_layer", final_layer_case),
    ("row_float8", float8_case),
]
