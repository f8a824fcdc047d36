"""The kernels of kernels/ at the shapes of a network: least bytes and operations, inputs, variants.

Bytes are those of the kernels' docstrings. Modulation rows are packed: shift, scale, gate
(attention), shift, scale, gate (MLP).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.config import DiTConfig

from .kernel_peers import kernel_peers

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


def operators(heads: int, patch: int, suffix: str = "") -> dict[str, Operator]:
    """The Triton operator of each case as a function of tensors alone; "_reference": plain forms.

    Raises:
        ImportError: there is no Triton.
    """

    def load(module: str, name: str = "") -> Operator:
        kernels = importlib.import_module(f"odelt_fast.kernels.{module}")
        return getattr(kernels, (name or module) + suffix)

    norm, residual, linear = load("norm_modulate"), load("gated_residual"), load("linear")
    group, last_group = load("group_end"), load("group_end", "last_group_end")
    attention, patch_embed = load("attention"), load("patch", "patch_embed")
    tangent = load("attention_tangent")
    final_euler = load("final_layer", "final_euler")

    def split(qkv: Tensor) -> Tensor:
        return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)

    def inner(x: Tensor, y: Tensor, table: Tensor) -> Any:
        size = x.shape[2]
        return residual(x, y, table, 2 * size, table, 3 * size, 4 * size)

    def border(table: Tensor) -> tuple[Any, ...]:
        size = table.shape[1] // 6
        return table, 5 * size, table, 0, size

    return {
        "norm_modulate": lambda x, table: norm(x, table, 0, x.shape[2]),
        "gated_residual": inner,
        "group_end": lambda *tensors: group(*tensors[:-1], *border(tensors[-1])),
        "last_group_end": lambda *tensors: last_group(*tensors[:-1], *border(tensors[-1])),
        "linear_qkv": linear,
        "linear_out": linear,
        "linear_gelu": lambda x, weight, bias: linear(x, weight, bias, "gelu"),
        "linear_down": linear,
        "linear_float8": lambda x, x_scale, weight, weight_scale, bias, activation: linear(
            x, weight, bias, activation, None, None, x_scale, weight_scale, torch.bfloat16
        ),
        "attention": lambda qkv: attention(qkv, heads),
        "attention_tangent": lambda qkv, dqkv: tangent(*split(qkv), *split(dqkv)),
        "modulation": load("modulation"),
        "patch_embed": lambda *tensors: patch_embed(*tensors, patch),
        "final_euler": lambda *tensors: final_euler(*tensors, patch, 0.25),
        "combine_stages": load("solver_update", "combine_stages"),
        "quantize_rows": load("quantize", "quantize_rows"),
    }


def cases(config: DiTConfig, batch: int, dtype: torch.dtype, cuda: bool) -> Iterator[KernelCase]:
    """The kernels of a sampling step of `batch` images, then those of solvers and of float8.

    cuda: with Triton's forms, and what PyTorch has for CUDA alone.
    """
    size, heads, patch = config.hidden_size, config.num_heads, config.patch_size
    tokens = math.prod(config.grid)
    rows, element = batch * tokens, torch.finfo(dtype).bits // 8
    state_shape = (batch, *config.image_shape)
    # Bytes of (B, N, D), and of the float32 state.
    passed, state = float(rows * size * element), 4.0 * math.prod(state_shape)
    pixels = patch**2 * config.channels

    plain = operators(heads, patch, "_reference")
    triton = operators(heads, patch) if cuda else {}

    def case(
        name: str, traffic: float, flops: float, make: Any, label: str = "", **options: Any
    ) -> KernelCase:
        others = {"triton": triton[name]} if triton else {}
        others |= (kernel_peers(name, dtype) if triton else {}) | options.pop("others", {})
        options = {"plain": plain[name], "others": others, "rate": dtype, **options}
        return KernelCase(f"{name} {label or f'{rows}x{size}'}", traffic, flops, make, **options)

    # Tensors of tokens, as many as in `count`, and a modulation row for each image.
    for name, passes, count in (
        ("norm_modulate", 2, 1),
        ("gated_residual", 4, 2),
        ("group_end", 7, 4),
        ("last_group_end", 5, 3),
    ):
        shapes = [*[(batch, tokens, size)] * count, (batch, 6 * size)]
        yield case(
            name, passes * passed, 0,
            lambda draw, shapes=shapes: [draw(*shape) for shape in shapes],
        )  # fmt: skip
    for name, inner, columns in (
        ("linear_qkv", size, 3 * size),
        ("linear_out", size, size),
        ("linear_gelu", size, config.mlp_size),
        ("linear_down", config.mlp_size, size),
    ):
        # cuBLASLt's epilogue; on a CPU it is the erf form.
        others = {"addmm_activation": addmm_activation} if name == "linear_gelu" and triton else {}
        moved, flops = rows * (inner + columns), 2.0 * rows * inner * columns

        def operands(draw: Draw, inner: int = inner, columns: int = columns) -> Sequence[Tensor]:
            weight = draw(columns, inner, scale=inner**-0.5)
            return draw(batch, tokens, inner), weight, draw(columns)

        label, traffic = f"{rows}x{inner}x{columns}", float(element * (moved + inner * columns))
        yield case(name, traffic, flops, operands, label, others=others)
        if triton and dtype == torch.bfloat16:
            traffic = float(moved + rows * columns + inner * columns)
            yield float8_case(f"{name}_float8 {label}", operands, flops, traffic, triton)
    names = ("flash", "cudnn", "efficient") if triton and element == 2 else ()
    yield case(
        "attention", 4 * passed, 4.0 * rows * tokens * size,
        lambda draw: [draw(batch, tokens, 3 * size)], f"{batch}x{heads}x{tokens}",
        others={name: attention_by(name, plain["attention"]) for name in names},
    )  # fmt: skip
    yield case(  # of training's forward mode: three products each for scores and values
        "attention_tangent", 8 * passed, 12.0 * rows * tokens * size,
        lambda draw: [draw(batch, tokens, 3 * size) for _ in range(2)], f"{batch}x{heads}x{tokens}",
    )  # fmt: skip
    columns = 6 * size * config.depth
    for labels in sorted({1, min(batch, 16), batch}):
        yield case(
            "modulation", float(element * columns * size), 2.0 * labels * columns * size,
            lambda draw, n=labels: (
                draw(n, size), draw(columns, size, scale=size**-0.5), draw(columns)
            ),
            f"{labels}x{size}x{columns}",
        )  # fmt: skip
    single = {"dtype": torch.float32}
    yield case(
        "patch_embed", passed + state, 2.0 * rows * pixels * size,
        lambda draw: (
            draw(*state_shape), draw(size, pixels, scale=pixels**-0.5), draw(size),
            draw(tokens, size, **single),
        ),
    )  # fmt: skip
    yield case(
        "final_euler", passed + 2 * state, 2.0 * rows * pixels * size,
        lambda draw: (
            draw(*state_shape, **single), draw(batch, tokens, size),
            draw(pixels, size, scale=size**-0.5), draw(pixels),
        ),
    )  # fmt: skip
    shapes = [state_shape, (6, *state_shape), (6,), (1,)]
    yield case(
        "combine_stages", 8 * state, 0, lambda draw: [draw(*shape, **single) for shape in shapes],
        f"6x{batch} states",
        plain=lambda x, stages, a, h: x + h * torch.tensordot(a, stages, 1),
    )  # fmt: skip
    if triton:
        # A value beside the border of two float8 values may be rounded either way: few of them, by
        # an eighth at most.
        yield case(
            "quantize_rows", 1.5 * passed, 0, lambda draw: [draw(batch, tokens, size)],
            tolerance=1e-2,
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
