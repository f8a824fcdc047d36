"""The kernels of kernels/ at the shapes of a network: what each moves and computes at least, its
plain-PyTorch form, its inputs.

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

from odelt_fast.config import DiTConfig

Operator = Callable[..., Any]
Draw = Callable[..., Tensor]  # (*shape, scale=1.0, dtype=the case's) -> normal values
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class KernelCase:
    """name; bytes and operations at least; make(draw) -> arguments; plain(*arguments), the PyTorch
    form; other variants by name.

    exact: the form for float64 arguments where `plain` cannot take them. rate: the dtype whose
    measured rate is the ceiling of `flops`. tolerance: relative error that is allowed whatever
    PyTorch's own. compiled: whether Inductor compiles the plain form.
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
    from odelt_fast.kernels.ema import ema_update
    from odelt_fast.kernels.final_layer import final_euler
    from odelt_fast.kernels.gated_residual import gated_residual
    from odelt_fast.kernels.group_end import group_end, last_group_end
    from odelt_fast.kernels.linear import linear
    from odelt_fast.kernels.modulation import modulation
    from odelt_fast.kernels.norm_modulate import norm_modulate
    from odelt_fast.kernels.patch import patch_embed
    from odelt_fast.kernels.quantize import quantize_rows
    from odelt_fast.kernels.solver_update import combine_stages

    def in_place(ema: Tensor, live: Tensor) -> Tensor:
        ema_update([ema], [live], 0.999)
        return ema

    return {
        "norm_modulate": lambda x, table: norm_modulate(x, table, 0, x.shape[2]),
        "gated_residual": lambda x, y, t: gated_residual(
            x, y, t, 2 * x.shape[2], t, 3 * x.shape[2], 4 * x.shape[2]
        ),
        "group_end": lambda x, y, xr, vr, table: group_end(
            x, y, xr, vr, table, 5 * x.shape[2], table, 0, x.shape[2]
        ),
        "last_group_end": lambda x, y, vr, table: last_group_end(
            x, y, vr, table, 5 * x.shape[2], table, 0, x.shape[2]
        ),
        "linear_qkv": linear,
        "linear_out": linear,
        "linear_gelu": lambda x, weight, bias: linear(x, weight, bias, "gelu"),
        "linear_down": linear,
        "linear_float8": lambda x, x_scale, weight, weight_scale, bias, activation: linear(
            x, weight, bias, activation, None, None, x_scale, weight_scale, torch.bfloat16
        ),
        "attention": lambda qkv: attention(qkv, heads),
        "modulation": modulation,
        "patch_embed": lambda x, weight, bias, positions: patch_embed(
            x, weight, bias, positions, patch
        ),
        "final_euler": lambda x, h, weight, bias: final_euler(x, h, weight, bias, patch, 0.25),
        "combine_stages": combine_stages,
        "quantize_rows": quantize_rows,
        "ema_update": in_place,
    }


def norm(x: Tensor, table: Tensor, shift: int) -> Tensor:
    """LayerNorm and modulation with the shift and scale from column shift*D on."""
    first, second = (
        table[:, None, part * x.shape[2] : (part + 1) * x.shape[2]] for part in (shift, shift + 1)
    )
    return torch.addcmul(first, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + second)


def residual(x: Tensor, y: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.addcmul(x, table[:, None, 2 * x.shape[2] : 3 * x.shape[2]], y)
    return total, norm(total, table, 3)


def group(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    v = torch.addcmul(x, table[:, None, 5 * x.shape[2] :], y)
    return xr + v, vr + v, norm(xr + v, table, 0)


def last_group(x: Tensor, y: Tensor, vr: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    total = vr + torch.addcmul(x, table[:, None, 5 * x.shape[2] :], y)
    return total, norm(total, table, 0)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gradients(forward: Operator) -> Operator:
    """Forward and backward: the gradients of all arguments, the outputs standing for their own
    gradients."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        found = forward(*leaves)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs])

    return run


def cases(
    config: DiTConfig, batch: int, dtype: torch.dtype, triton: dict[str, Operator]
) -> Iterator[KernelCase]:
    """The kernels of a sampling step of `batch` images, then those of training and solvers;
    `triton`: what `operators` gave, or none."""
    size, heads = config.hidden_size, config.num_heads
    tokens = (config.image_size // config.patch_size) ** 2
    rows, element = batch * tokens, torch.finfo(dtype).bits // 8
    state_shape = (batch, config.channels, config.image_size, config.image_size)
    passed, state = (
        float(rows * size * element),
        4.0 * math.prod(state_shape),
    )  # bytes of (B, N, D), and of the float32 state
    pixels, patch = config.patch_size**2 * config.channels, config.patch_size

    def case(
        name: str,
        traffic: float,
        flops: float,
        make: Any,
        plain: Operator,
        label: str = "",
        **options: Any,
    ) -> KernelCase:
        others = {
            **({"triton": triton[name]} if name in triton else {}),
            **options.pop("others", {}),
        }
        return KernelCase(
            f"{name} {label or f'{rows}x{size}'}",
            traffic,
            flops,
            make,
            plain,
            others,
            rate=dtype,
            **options,
        )

    def tensors(count: int) -> Callable[[Draw], Sequence[Tensor]]:
        """`count` tensors of tokens and a modulation row for each image."""
        return lambda draw: [
            *(draw(batch, tokens, size) for _ in range(count)),
            draw(batch, 6 * size),
        ]

    def first_norm(x: Tensor, table: Tensor) -> Tensor:
        return norm(x, table, 0)

    yield case("norm_modulate", 2 * passed, 0, tensors(1), first_norm)
    yield case("gated_residual", 4 * passed, 0, tensors(2), residual)
    yield case("group_end", 7 * passed, 0, tensors(4), group)
    yield case("last_group_end", 5 * passed, 0, tensors(3), last_group)
    for name, forward, units, count in (
        ("norm_modulate", first_norm, 5, 1),
        ("gated_residual", residual, 10, 2),
    ):
        others = {"triton": gradients(triton[name])} if triton else {}
        yield case(
            f"{name}_training",
            units * passed,
            0,
            tensors(count),
            gradients(forward),
            others=others,
            compiled=False,
        )
    for name, inner, columns in (
        ("linear_qkv", size, 3 * size),
        ("linear_out", size, size),
        ("linear_gelu", size, config.mlp_size),
        ("linear_down", config.mlp_size, size),
    ):
        plain, others = (gelu_linear, {}) if name == "linear_gelu" else (F.linear, {})
        if name == "linear_gelu" and triton:  # cuBLASLt's epilogue; on a CPU it is the erf form
            others = {
                "addmm_activation": lambda x, w, b: torch._addmm_activation(
                    b, x.flatten(0, 1), w.t(), use_gelu=True
                )
            }
        traffic, flops = (
            float(element * (rows * (inner + columns) + inner * columns)),
            2.0 * rows * inner * columns,
        )

        def operands(draw: Draw, inner: int = inner, columns: int = columns) -> Sequence[Tensor]:
            return (
                draw(batch, tokens, inner),
                draw(columns, inner, scale=inner**-0.5),
                draw(columns),
            )

        label = f"{rows}x{inner}x{columns}"
        yield case(name, traffic, flops, operands, plain, label, others=others)
        if triton and dtype == torch.bfloat16:
            yield float8_case(
                f"{name}_float8 {label}",
                operands,
                flops,
                float(rows * inner + inner * columns + 2 * rows * columns),
                triton,
            )

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return (
            F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1])
            .transpose(1, 2)
            .flatten(2)
        )

    others = (
        {name: attention_by(name, attend) for name in ("flash", "cudnn", "efficient")}
        if triton and element == 2
        else {}
    )
    packed = (batch, tokens, 3 * size)
    yield case(
        "attention",
        4 * passed,
        4.0 * rows * tokens * size,
        lambda draw: [draw(*packed)],
        attend,
        f"{batch}x{heads}x{tokens}",
        others=others,
    )
    columns = 6 * size * config.depth
    for labels in sorted({1, min(batch, 16), batch}):
        yield case(
            "modulation", float(element * columns * size), 2.0 * labels * columns * size,
            lambda draw, n=labels: (draw(n, size), draw(columns, size, scale=size**-0.5), draw(columns)),
            lambda c, w, b: F.linear(F.silu(c), w, b), f"{labels}x{size}x{columns}",
        )  # fmt: skip
    yield case(
        "patch_embed", passed + state, 2.0 * rows * pixels * size,
        lambda draw: (draw(*state_shape), draw(size, pixels, scale=pixels**-0.5), draw(size), draw(tokens, size, dtype=torch.float32)),
        lambda x, w, b, p: (F.conv2d(x, w.unflatten(1, (config.channels, patch, patch)), b, patch).flatten(2).mT + p).to(w.dtype),
    )  # fmt: skip

    def final(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grid = (
            F.linear(h, weight, bias)
            .unflatten(1, (config.image_size // patch, -1))
            .unflatten(3, (patch, patch, config.channels))
        )
        return x + 0.25 * grid.permute(0, 5, 1, 3, 2, 4).reshape(state_shape).to(x.dtype)

    single = {"dtype": torch.float32}
    yield case(
        "final_euler", passed + 2 * state, 2.0 * rows * pixels * size,
        lambda draw: (draw(*state_shape, **single), draw(batch, tokens, size), draw(pixels, size, scale=size**-0.5), draw(pixels)), final,
    )  # fmt: skip
    yield case(
        "combine_stages", 8 * state, 0,
        lambda draw: [draw(*shape, **single) for shape in (state_shape, (6, *state_shape), (6,), (1,))],
        lambda x, stages, a, h: x + h * torch.tensordot(a, stages, 1), f"6x{batch} states",
    )  # fmt: skip
    block = 18 * size * size
    yield case(
        "ema_update", 12.0 * block, 0, lambda draw: (draw(block, **single), draw(block, **single)),
        lambda ema, live: ema.lerp_(live, 0.001), f"{block}", compiled=False,
    )  # fmt: skip
    if triton:
        from odelt_fast.kernels.quantize import quantize_rows_reference

        # A value beside the border of two float8 values may be rounded either way: few of them, by
        # an eighth at most.
        yield case(
            "quantize_rows",
            1.5 * passed,
            0,
            lambda draw: [draw(batch, tokens, size)],
            quantize_rows_reference,
            tolerance=1e-2,
        )


def float8_case(
    name: str,
    operands: Callable[[Draw], Sequence[Tensor]],
    flops: float,
    traffic: float,
    triton: dict[str, Operator],
) -> KernelCase:
    """The product of float8 operands that are there already, one scale a row: PyTorch's _scaled_mm
    beside Triton."""
    activation = "gelu" if "gelu" in name else "none"

    def make(draw: Draw) -> Sequence[Tensor]:
        from odelt_fast.kernels.quantize import quantize_rows_reference

        x, weight, bias = operands(draw)
        return *quantize_rows_reference(x), *quantize_rows_reference(weight), bias

    def plain(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> Tensor:
        scales: dict[str, Any] = {"scale_a": x_scale.reshape(-1, 1), "scale_b": weight_scale[None]}
        y = torch._scaled_mm(
            x.flatten(0, 1), weight.t(), bias=bias, out_dtype=torch.bfloat16, **scales
        )
        return F.gelu(y, approximate="tanh") if activation == "gelu" else y

    def exact(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> Tensor:
        y = F.linear(x * x_scale[..., None], weight * weight_scale[:, None], bias)
        return F.gelu(y, approximate="tanh") if activation == "gelu" else y

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
