"""The kernels of kernels/ at the shapes of a network: least bytes and operations, inputs, variants.

Bytes are those of the kernels' docstrings. Modulation rows are packed: shift, scale, gate
(attention), shift, scale, gate (MLP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS, DiTConfig

Operator = Callable[..., Any]
Draw = Callable[..., Tensor]  # (*shape, scale=1.0, dtype=the case's) -> normal values
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class KernelCase:
    """A kernel at one shape.

    Args:
        name: of the kernel, and its shape.
        bytes, flops: moved and computed at least.
        make: make(draw) -> arguments.
        plain: plain(*arguments), the PyTorch form.
        others: other variants by name.
        exact: the form for float64 arguments where `plain` cannot take them.
        rate: the dtype whose measured rate is the ceiling of `flops`.
        tolerance: relative error that is allowed whatever PyTorch's own.
        compiled: whether Inductor compiles the plain form.
    """

    name: str
    bytes: float
    flops: float
    make: Callable[[Draw], Sequence[Any]]
    plain: Operator
    others: dict[str, Operator] = field(default_factory=dict)
    exact: Operator | None = None
    rate: torch.dtype = torch.bfloat16
    tolerance: float = 0.0
    compiled: bool = True


def operators(heads: int, patch: int) -> dict[str, Operator]:
    """The Triton operator of each case; raises ImportError where there is no Triton."""
    from odelt_fast.kernels.attention import attention
    from odelt_fast.kernels.final_layer import final_euler
    from odelt_fast.kernels.gated_residual import gated_residual
    from odelt_fast.kernels.group_end import group_end, last_group_end
    from odelt_fast.kernels.linear import linear
    from odelt_fast.kernels.modulation import modulation
    from odelt_fast.kernels.norm_modulate import norm_modulate
    from odelt_fast.kernels.patch import patch_embed
    from odelt_fast.kernels.quantize import quantize_rows
    from odelt_fast.kernels.solver_update import combine_stages

    def inner_end(x: Tensor, y: Tensor, table: Tensor) -> Any:
        size = x.shape[2]
        return gated_residual(x, y, table, 2 * size, table, 3 * size, 4 * size)

    def border(table: Tensor) -> tuple[Any, ...]:
        size = table.shape[1] // 6
        return table, 5 * size, table, 0, size

    return {
        "norm_modulate": lambda x, table: norm_modulate(x, table, 0, x.shape[2]),
        "gated_residual": inner_end,
        "group_end": lambda *tensors: group_end(*tensors[:-1], *border(tensors[-1])),
        "last_group_end": lambda *tensors: last_group_end(*tensors[:-1], *border(tensors[-1])),
        "linear_qkv": linear,
        "linear_out": linear,
        "linear_gelu": lambda x, weight, bias: linear(x, weight, bias, "gelu"),
        "linear_down": linear,
        "linear_float8": lambda x, x_scale, weight, weight_scale, bias, activation: linear(
            x, weight, bias, activation, None, None, x_scale, weight_scale, torch.bfloat16
        ),
        "attention": lambda qkv: attention(qkv, heads),
        "modulation": modulation,
        "patch_embed": lambda *tensors: patch_embed(*tensors, patch),
        "final_euler": lambda *tensors: final_euler(*tensors, patch, 0.25),
        "combine_stages": combine_stages,
        "quantize_rows": quantize_rows,
    }


def norm(x: Tensor, table: Tensor, part: int = 0) -> Tensor:
    """LayerNorm and modulation with the shift and scale from column part*D on."""
    shift, scale = table[:, None].unflatten(2, (6, -1)).unbind(2)[part : part + 2]
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), 1 + scale)


def residual(x: Tensor, y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.addcmul(x, table[:, None, 2 * x.shape[2] : 3 * x.shape[2]], y)
    return total, norm(total, table, 3)


def group(x: Tensor, y: Tensor, xr: Tensor, vr: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    v = torch.addcmul(x, table[:, None, 5 * x.shape[2] :], y)
    return xr + v, vr + v, norm(xr + v, table)


def last_group(x: Tensor, y: Tensor, vr: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    total = vr + torch.addcmul(x, table[:, None, 5 * x.shape[2] :], y)
    return total, norm(total, table)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def cases(
    config: DiTConfig, batch: int, dtype: torch.dtype, triton: dict[str, Operator]
) -> Iterator[KernelCase]:
    """The kernels of a sampling step of `batch` images, then those of solvers and of float8.

    triton: what `operators` gave, or none.
    """
    size, heads, patch = config.hidden_size, config.num_heads, config.patch_size
    tokens = (config.image_size // patch) ** 2
    rows, element = batch * tokens, torch.finfo(dtype).bits // 8
    state_shape = (batch, config.channels, config.image_size, config.image_size)
    # Bytes of (B, N, D), and of the float32 state.
    passed, state = float(rows * size * element), 4.0 * math.prod(state_shape)
    pixels = patch**2 * config.channels

    def case(
        name: str, traffic: float, flops: float, make: Any, plain: Operator, label: str = "",
        **options: Any,
    ) -> KernelCase:  # fmt: skip
        others = {"triton": triton[name]} if name in triton else {}
        others |= options.pop("others", {})
        name = f"{name} {label or f'{rows}x{size}'}"
        return KernelCase(name, traffic, flops, make, plain, others, rate=dtype, **options)

    # Tensors of tokens, as many as in `count`, and a modulation row for each image.
    for name, passes, count, plain in (
        ("norm_modulate", 2, 1, norm),
        ("gated_residual", 4, 2, residual),
        ("group_end", 7, 4, group),
        ("last_group_end", 5, 3, last_group),
    ):
        shapes = [*[(batch, tokens, size)] * count, (batch, 6 * size)]
        make = lambda draw, shapes=shapes: [draw(*shape) for shape in shapes]  # noqa: E731
        yield case(name, passes * passed, 0, make, plain)
    for name, inner, columns in (
        ("linear_qkv", size, 3 * size),
        ("linear_out", size, size),
        ("linear_gelu", size, config.mlp_size),
        ("linear_down", config.mlp_size, size),
    ):
        gelu = name == "linear_gelu"
        # cuBLASLt's epilogue; on a CPU it is the erf form.
        others = {"addmm_activation": addmm_activation} if gelu and triton else {}
        moved, flops = rows * (inner + columns), 2.0 * rows * inner * columns

        def operands(draw: Draw, inner: int = inner, columns: int = columns) -> Sequence[Tensor]:
            weight = draw(columns, inner, scale=inner**-0.5)
            return draw(batch, tokens, inner), weight, draw(columns)

        label, plain = f"{rows}x{inner}x{columns}", gelu_linear if gelu else F.linear
        traffic = float(element * (moved + inner * columns))
        yield case(name, traffic, flops, operands, plain, label, others=others)
        if triton and dtype == torch.bfloat16:
            traffic = float(moved + rows * columns + inner * columns)
            yield float8_case(f"{name}_float8 {label}", operands, flops, traffic, triton)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1])
        return y.transpose(1, 2).flatten(2)

    names = ("flash", "cudnn", "efficient") if triton and element == 2 else ()
    yield case(
        "attention", 4 * passed, 4.0 * rows * tokens * size,
        lambda draw: [draw(batch, tokens, 3 * size)], attend, f"{batch}x{heads}x{tokens}",
        others={name: attention_by(name, attend) for name in names},
    )  # fmt: skip
    columns = 6 * size * config.depth
    for labels in sorted({1, min(batch, 16), batch}):
        yield case(
            "modulation", float(element * columns * size), 2.0 * labels * columns * size,
            lambda draw, n=labels: (
                draw(n, size), draw(columns, size, scale=size**-0.5), draw(columns)
            ),
            lambda c, w, b: F.linear(F.silu(c), w, b), f"{labels}x{size}x{columns}",
        )  # fmt: skip
    single = {"dtype": torch.float32}

    def embed(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        kernel = weight.unflatten(1, (config.channels, patch, patch))
        return (F.conv2d(x, kernel, bias, patch).flatten(2).mT + positions).to(weight.dtype)

    yield case(
        "patch_embed", passed + state, 2.0 * rows * pixels * size,
        lambda draw: (
            draw(*state_shape), draw(size, pixels, scale=pixels**-0.5), draw(size),
            draw(tokens, size, **single),
        ),
        embed,
    )  # fmt: skip

    def final(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grid = F.linear(h, weight, bias).unflatten(1, (config.image_size // patch, -1))
        grid = grid.unflatten(3, (patch, patch, config.channels)).permute(0, 5, 1, 3, 2, 4)
        return x + 0.25 * grid.reshape(state_shape).to(x.dtype)

    yield case(
        "final_euler", passed + 2 * state, 2.0 * rows * pixels * size,
        lambda draw: (
            draw(*state_shape, **single), draw(batch, tokens, size),
            draw(pixels, size, scale=size**-0.5), draw(pixels),
        ),
        final,
    )  # fmt: skip
    shapes = (state_shape, (6, *state_shape), (6,), (1,))
    yield case(
        "combine_stages", 8 * state, 0, lambda draw: [draw(*shape, **single) for shape in shapes],
        lambda x, stages, a, h: x + h * torch.tensordot(a, stages, 1), f"6x{batch} states",
    )  # fmt: skip
    if triton:
        from odelt_fast.kernels.quantize import quantize_rows_reference

        # A value beside the border of two float8 values may be rounded either way: few of them, by
        # an eighth at most.
        yield case(
            "quantize_rows", 1.5 * passed, 0, lambda draw: [draw(batch, tokens, size)],
            quantize_rows_reference, tolerance=1e-2,
        )  # fmt: skip


def addmm_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)


def float8_case(
    name: str,
    operands: Callable[[Draw], Sequence[Tensor]],
    flops: float,
    traffic: float,
    triton: dict[str, Operator],
) -> KernelCase:
    """The product of float8 operands with one scale a row: PyTorch's _scaled_mm beside Triton."""
    activation = "gelu" if "gelu" in name else "none"

    def activate(y: Tensor) -> Tensor:
        return F.gelu(y, approximate="tanh") if activation == "gelu" else y

    def make(draw: Draw) -> Sequence[Tensor]:
        from odelt_fast.kernels.quantize import quantize_rows_reference

        x, weight, bias = operands(draw)
        return *quantize_rows_reference(x), *quantize_rows_reference(weight), bias

    def plain(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> Tensor:
        scales: dict[str, Any] = {"scale_a": x_scale.reshape(-1, 1), "scale_b": weight_scale[None]}
        x = x.flatten(0, 1)
        return activate(
            torch._scaled_mm(x, weight.t(), bias=bias, out_dtype=torch.bfloat16, **scales)
        )

    def exact(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> Tensor:
        return activate(F.linear(x * x_scale[..., None], weight * weight_scale[:, None], bias))

    others = {"triton": lambda *arguments: triton["linear_float8"](*arguments, activation)}
    return KernelCase(name, traffic, flops, make, plain, others, exact, FP8, compiled=False)


def attention_by(backend: str, attend: Operator) -> Operator:
    """Attention with one of PyTorch's backends alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, f"{backend.upper()}_ATTENTION")

    def run(qkv: Tensor) -> Any:
        with sdpa_kernel(only):
            return attend(qkv)

    return run
