"""Cases of the row and element kernels; `kernel_checks` says what a case is, `kernel_cases` runs
them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from odelt_fast.kernels.ema import EmaUpdate, ema_update, ema_update_reference
from odelt_fast.kernels.final_layer import final_euler, final_layer_reference, final_velocity
from odelt_fast.kernels.gated_residual import gated_residual, gated_residual_reference
from odelt_fast.kernels.group_end import group_end, group_end_reference, last_group_end
from odelt_fast.kernels.modulation import modulation, modulation_reference
from odelt_fast.kernels.norm_modulate import norm_modulate, norm_modulate_reference
from odelt_fast.kernels.patch import patch_embed, patch_embed_reference
from odelt_fast.kernels.quantize import quantize_rows_reference
from odelt_fast.kernels.row_float8 import (
    gated_residual_float8,
    group_end_float8,
    norm_modulate_float8,
)
from tests.helpers.kernel_cases_gemm import exact_float8_cast
from tests.helpers.kernel_checks import (
    GUARD,
    Axes,
    batch_size,
    check_error,
    dense,
    enough_tokens,
    guarded,
    inverse,
    permuted,
    watched,
)

SIZES = (1, 4, 8, 12, 20, 24, 33, 64, 72, 96, 100, 128, 130)
WIDE = (384, 768, 1152)


def differentiable(
    rng: random.Random,
    operator: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    axes: Axes,
    constant: int = 0,
) -> list[Tensor]:
    """Outputs of `operator` and its gradients for all tensors but the last `constant` ones, against
    `reference`; returns them."""
    leaves = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    leaves = leaves[: len(leaves) - constant]
    given = [argument for argument in arguments if isinstance(argument, Tensor)]
    names = (*axes.outputs, *(axes.arguments[i] for i in leaves))
    cotangents: list[Tensor] = []

    def results(
        function: Callable[..., Any],
        values: Sequence[Any],
        order: Mapping[str, Tensor],
        *watch: Tensor,
    ) -> list[Tensor]:
        values = [permuted(value, name, order) for value, name in zip(values, axes.arguments)]
        values = [
            value.detach().requires_grad_() if i in leaves else value
            for i, value in enumerate(values)
        ]
        with watched(*watch) if watch else contextlib.nullcontext():
            outputs = function(*values)
            outputs = [
                output
                for output in (outputs if isinstance(outputs, tuple) else (outputs,))
                if output is not None
            ]
        if not cotangents:
            cotangents.extend(
                guarded(rng, output.shape, output.dtype, output.device) for output in outputs
            )
        weights = [
            permuted(value, name, order).to(output.dtype)
            for value, name, output in zip(cotangents, axes.outputs, outputs)
        ]
        with watched(*watch, *cotangents) if watch else contextlib.nullcontext():
            gradients = torch.autograd.grad(outputs, [values[i] for i in leaves], weights)
        made = [*(output.detach() for output in outputs), *gradients]
        return [permuted(value, name, inverse(order)) for value, name in zip(made, names)]

    mine = results(operator, arguments, {}, *given)
    arguments, cotangents[:] = (
        [dense(value) for value in arguments],
        [dense(value) for value in cotangents],
    )
    exact = results(
        reference,
        [value.double() if isinstance(value, Tensor) else value for value in arguments],
        {},
    )
    plain = [results(reference, arguments, order) for order in ({}, *axes.orders(rng))]
    for index, (got, right) in enumerate(zip(mine, exact)):
        what = (
            f"output {index}"
            if index < len(cotangents)
            else f"gradient of argument {leaves[index - len(cotangents)]}"
        )
        check_error(what, got, [evaluation[index] for evaluation in plain], right)
    return mine


def token_shape(rng: random.Random) -> tuple[int, int, int]:
    batch = batch_size(rng)
    tokens = rng.randint(1, 40) if batch < 6 else rng.randint(1, 2)
    size = rng.choice(WIDE if rng.random() < 0.05 and batch < 6 else SIZES)
    return batch, enough_tokens(tokens, batch * size), size


def packed(
    rng: random.Random, batch: int, size: int, parts: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[int]]:
    """A packed modulation (batch or 1, K), and `parts` distinct columns in it: those of a block, or
    anywhere."""
    table = guarded(rng, (rng.choice([1, batch]), 6 * size + rng.choice([0, 0, 5])), dtype, device)
    shift = rng.randint(0, table.shape[1] - 6 * size) if rng.random() < 0.3 else 0
    return table, [shift + size * column for column in rng.sample(range(6), parts)]


def row_axes(shape: tuple[int, int, int], arguments: Sequence[Any], outputs: int) -> Axes:
    """Of a row kernel: tokens (B, N, D), steps (B or 1,), and packed tables followed by the columns
    that are read, in groups of D."""
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


def norm_modulate_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x = guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0]))
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    arguments = (x, table, *columns)
    return differentiable(
        rng, norm_modulate, norm_modulate_reference, arguments, row_axes(shape, arguments, 1)
    )


def gated_residual_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y = (guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0])) for _ in range(2))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    arguments = (x, y, gates, gate, table, *columns)
    return differentiable(
        rng, gated_residual, gated_residual_reference, arguments, row_axes(shape, arguments, 2)
    )


def group_end_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    # Values that every dtype holds, so that all computations are given the same steps.
    steps = rng.choice(
        [
            None,
            torch.tensor(
                [rng.choice([0.25, 0.5, 1.0]) for _ in range(rng.choice([1, shape[0]]))],
                device=device,
            ),
        ]
    )
    rest = (gates, gate, table, *columns, steps)
    first = rng.choice([None, vr])
    constant = int(steps is not None)
    if rng.random() < 0.5:
        arguments: tuple[Any, ...] = (x, y, xr, first, *rest)
        return differentiable(
            rng, group_end, group_end_reference, arguments, row_axes(shape, arguments, 3), constant
        )

    def last_reference(x: Tensor, y: Tensor, vr: Tensor | None, *others: Any) -> Any:
        return group_end_reference(x, y, None, vr, *others)

    arguments = (x, y, first, *rest)
    return differentiable(
        rng, last_group_end, last_reference, arguments, row_axes(shape, arguments, 2), constant
    )


def modulation_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    size, count = rng.choice(SIZES), rng.choice([1, 2, 3, 15, 16, 17, batch_size(rng)])
    columns = enough_tokens(rng.randint(1, 200), count)
    condition = guarded(rng, (count, size), rng.choice([dtype, torch.float32]), device)
    weight = guarded(rng, (columns, size), dtype, device, size**-0.5)
    bias = guarded(rng, (columns,), dtype, device)
    axes = Axes(("rd", "kd", "k"), ("rk",), {"r": count, "d": size, "k": columns})
    return differentiable(rng, modulation, modulation_reference, (condition, weight, bias), axes)


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
    # A state that the weights' dtype holds exactly, so that its rounding is no error of either;
    # positions are data, without a gradient.
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
    return differentiable(
        rng,
        patch_embed,
        patch_embed_reference,
        (x, weight, bias, positions, patch),
        axes,
        constant=1,
    )


def final_layer_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    patch, channels, batch = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 3, 4, 5]), batch_size(rng)
    rows, columns = (rng.randint(1, 6 if batch < 6 else 1) for _ in range(2))
    height, width = (
        patch * enough_tokens(rows, batch * columns * channels * patch**2),
        patch * columns,
    )
    size, guidance, step = (
        rng.choice(SIZES),
        rng.choice([None, None, 1.5, 0.0, -2.0]),
        rng.choice([1.0, 1 / 3, 1 / 128]),
    )
    state = rng.choice([dtype, torch.float32])
    h = guarded(
        rng,
        ((1 if guidance is None else 2) * batch, height * width // patch**2, size),
        dtype,
        device,
    )
    weight = guarded(rng, (channels * patch**2, size), dtype, device, size**-0.5)
    bias = guarded(rng, (channels * patch**2,), dtype, device)
    x = (
        guarded(rng, (batch, channels, height, width), state, device)
        if rng.random() < 0.6
        else None
    )
    with watched(x, h, weight, bias):
        if x is None:
            got = final_velocity(h, weight, bias, patch, height, width, state, guidance)
        else:
            got = final_euler(x, h, weight, bias, patch, step, guidance)

    def reference(x: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return final_layer_reference(x, h, weight, bias, patch, height, width, step, guidance)

    plain = Axes(("bchw", "snd", "vd", "v"), ("bchw",), {"d": size}).plain(
        rng, reference, x, h, weight, bias
    )
    exact = reference(None if x is None else x.double(), h.double(), weight.double(), bias.double())
    check_error(
        "velocity" if x is None else "state", got, [result.to(state) for result in plain], exact
    )
    return got


def ema_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    kinds, decay = (
        (rng.choice([dtype, torch.float32]), dtype),
        rng.choice([0.0, 0.5, 0.999, 0.9999, 1.0]),
    )
    layout = rng.choice(["contiguous", "misaligned"])
    kinds_of_shape = [(), (0,), (rng.randint(1, 70),), (rng.randint(1, 30), rng.randint(1, 30))]
    shapes: list[tuple[int, ...]] = [rng.choice(kinds_of_shape) for _ in range(rng.randint(1, 6))]
    shapes.append(
        (rng.choice([8191, 8192, 8193, 20000]) if rng.random() < 0.1 else rng.randint(256, 400),)
    )
    ema, live = (
        [guarded(rng, shape, kind, device, layout=layout) for shape in shapes] for kind in kinds
    )
    plain = ema_update_reference(ema, live, decay)
    exact = ema_update_reference(
        [tensor.double() for tensor in ema], [tensor.double() for tensor in live], decay
    )
    planned = None
    if rng.random() < 0.5:
        moved = rng.randrange(len(live))
        place, live[moved].data = live[moved].data, live[moved].clone()
        planned = EmaUpdate(ema, live)
        live[moved].data = place
    with watched(*live, reachable=[*ema, *live]):
        planned(decay) if planned else ema_update(ema, live, decay)
    check_error(
        "averages",
        *(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (ema, plain, exact)),
    )
    for average in ema:
        whole = torch.empty(0, dtype=average.dtype, device=device).set_(average.untyped_storage())
        start = average.storage_offset()
        around = torch.cat([whole[:start], whole[start + average.numel() :]])
        assert around.numel() >= 2 * GUARD
        assert bool(around.isnan().all()), "the kernel wrote beside an average"
    return [average.clone() for average in ema]


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that torch.library.opcheck may try it on."""
    x, y, xr, vr = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(4))
    table = torch.randn(2, 48, requires_grad=True)
    weight, bias = torch.randn(16, 8, requires_grad=True), torch.randn(16, requires_grad=True)
    image, h = torch.randn(2, 4, 2, 6), torch.randn(2, 3, 8)
    columns = table.detach(), 24, 32
    plain = [tensor.detach() for tensor in (x, y, xr, vr)]
    ops = torch.ops.odelt_fast
    return [
        (norm_modulate, (x, table, 0, 8)),
        (ops.norm_modulate_backward.default, (*plain[:2], *columns, 1e-6)),
        (ops.gated_residual_backward.default, (*plain, table.detach(), 16, *columns, 1e-6)),
        (
            ops.group_end_backward.default,
            (plain[0], None, *plain[1:], table.detach(), 16, *columns, torch.ones(2), 1e-6),
        ),
        (norm_modulate_float8, (plain[0], *columns)),
        (gated_residual_float8, (*plain[:2], table.detach(), 16, *columns)),
        (group_end_float8, (*plain, table.detach(), 16, *columns)),
        (gated_residual, (x, y, table, 16, table, 24, 32)),
        (group_end, (x, y, xr, vr, table, 40, table, 0, 8, torch.ones(2))),
        (group_end, (x, y, xr, None, table, 40, table, 0, 8)),
        (last_group_end, (x, y, vr, table, 40, table, 0, 8)),
        (modulation, (torch.randn(2, 8, requires_grad=True), weight, bias)),
        (modulation, (torch.randn(17, 8), weight.detach().half(), bias.detach().half())),
        (
            patch_embed,
            (
                image.clone().requires_grad_(),
                weight.detach().t().contiguous().requires_grad_(),
                torch.randn(8),
                torch.randn(3, 8),
                2,
            ),
        ),
        (final_euler, (image, h, weight.detach(), bias.detach(), 2, 0.5)),
        (
            final_velocity,
            (torch.cat([h, h]), weight.detach(), bias.detach(), 2, 2, 6, torch.float32, 1.5),
        ),
        (
            ema_update,
            ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], 0.9),
        ),
    ]


def float8_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The float8 forms: the sums as without float8, bit by bit, and q*scales within twice the error
    of PyTorch's result quantised."""
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    arguments, plain_operator, operator, reference = rng.choice(
        [
            ((x, table, *columns), norm_modulate, norm_modulate_float8, norm_modulate_reference),
            (
                (x, y, gates, gate, table, *columns),
                gated_residual,
                gated_residual_float8,
                gated_residual_reference,
            ),
            (
                (x, y, xr, rng.choice([None, vr]), gates, gate, table, *columns),
                group_end,
                group_end_float8,
                group_end_reference,
            ),
        ]
    )
    with watched(x, y, xr, vr, gates, table), exact_float8_cast():
        *sums, q, scales = operator(*arguments)
        unquantised = plain_operator(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sums, unquantised)) or isinstance(
        unquantised, Tensor
    )
    exact = _last(reference(*(v.double() if isinstance(v, Tensor) else v for v in arguments)))
    plain = []
    axes = row_axes(shape, arguments, 1)
    for result in axes.plain(rng, lambda *values: _last(reference(*values)), *arguments):
        plain_q, plain_scales = quantize_rows_reference(result)
        plain.append(plain_q.float() * plain_scales[..., None])
    assert bool((q.float().abs() <= 448).all()), "a value outside e4m3, or NaN"
    check_error("float8", q.float() * scales[..., None], plain, exact)
    return (*sums, q.view(torch.uint8), scales)


def _last(outputs: Any) -> Tensor:
    return outputs[-1] if isinstance(outputs, tuple) else outputs


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("norm_modulate", norm_modulate_case),
    ("gated_residual", gated_residual_case),
    ("group_end", group_end_case),
    ("modulation", modulation_case),
    ("patch_embed", patch_embed_case),
    ("final_layer", final_layer_case),
    ("ema", ema_case),
    ("row_float8", float8_case),
]
