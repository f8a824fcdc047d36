"""A block's matrix products with what lies beside them, so that a block is five launches:

    norm_linear       y = act(h W^T + b), h = LN(x)*(1 + scale) + shift
    residual_linear   x' = x + gate*(y W^T + b)
    group_end_linear  v = (x + gate*(y W^T + b)) * steps; vr' = vr + v; xr' = xr + v

x, y (B, N, ...) in one dtype with W (columns, inner) and b; modulation and gates packed (B or 1,
K); the rest as in gated_residual.py and group_end.py. LayerNorm needs whole rows, and a product's
tile has a part of one: whoever makes x also makes its `moments` (2, B*N, parts) float32, mean and
sum of squares about it of each part of a row, which the next product adds up without cancellation.
They are those of the rounded x, as PyTorch's are.

Float8 (weights e4m3 with a float32 scale a row): h is quantised while it is loaded, and the MLP's
hidden values by the product that makes them, in blocks of 128 values of a row with a scale each
(finer than a scale a row: no further from h). Bytes: each operand once (tiles read them again from
the L2); h is never written. Kernel: block_kernel.py; launch table: tiles.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .block_kernel import (
    BLOCK,
    Layer,
    Operand,
    Residual,
    block_constants,
    block_kernel,
    block_tile,
    launch_block,
)
from .compile_case import CompileCase, kernel_case
from .group_end import group_end_reference, last_group_end_reference
from .linear import linear_reference
from .moments import moments_reference
from .norm_modulate import norm_modulate_reference
from .quantize import quantize_rows_reference
from .residual_rows import GroupEnd
from .rows import like_first
from .tiles import BLOCK_TILES, split_block_tile


def quantize_blocks_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, N, D) -> float8 (B, N, D), scales (B, N, blocks of 128) float32."""
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    q, scales = quantize_rows_reference(padded)
    return q.flatten(-2)[..., :size].contiguous(), scales


def _operand(x: Tensor, scales: Tensor | None, layer: Layer) -> tuple[Tensor, Tensor]:
    """x and W as plain PyTorch multiplies them: of float8 in float32."""
    if layer.scale is None:
        return x, layer.weight
    if scales is None:
        x, scales = quantize_blocks_reference(x)
    wide = scales.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]
    return x.float() * wide, layer.weight.float() * layer.scale[:, None]


def norm_linear_reference(
    x: Tensor, moments: Tensor, modulation: Tensor, shift_column: int, scale_column: int,
    weight: Tensor, bias: Tensor, weight_scale: Tensor | None, activation: str,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, in the dtype of x; float8 in float32, rounded at the end."""
    h = norm_modulate_reference(x, modulation, shift_column, scale_column)
    operands = _operand(h, None, Layer(weight, bias, weight_scale))
    return linear_reference(*operands, bias, activation).to(x.dtype)


def norm_linear_float8_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    return quantize_blocks_reference(norm_linear_reference(*arguments))


def _added(y: Tensor, scales: Tensor | None, layer: Layer, dtype: torch.dtype) -> Tensor:
    return linear_reference(*_operand(y, scales, layer), layer.bias).to(dtype)


def residual_linear_reference(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch."""
    added = _added(y, y_scales, Layer(weight, bias, weight_scale), x.dtype)
    made = torch.addcmul(x, gates[:, None, gate_column : gate_column + x.shape[2]], added)
    return made, moments_reference(made)


def group_end_linear_reference(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, xr: Tensor, vr: Tensor | None,
    steps: Tensor | None, workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch."""
    added = _added(y, y_scales, Layer(weight, bias, weight_scale), x.dtype)
    columns = gates, gate_column, gates, 0, 0
    xr, vr, _ = group_end_reference(x, added, xr, vr, *columns, steps)
    return xr, vr, moments_reference(xr)


def last_group_end_linear_reference(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, vr: Tensor | None, steps: Tensor | None,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch."""
    added = _added(y, y_scales, Layer(weight, bias, weight_scale), x.dtype)
    columns = gates, gate_column, gates, 0, 0
    return last_group_end_reference(x, added, vr, *columns, steps)[0]


# Without defaults: torch 2.11 drops an argument that is mutated and left at its default.
@torch.library.custom_op("odelt_fast::norm_linear", mutates_args=("workspace",))
def norm_linear(
    x: Tensor, moments: Tensor, modulation: Tensor, shift_column: int, scale_column: int,
    weight: Tensor, bias: Tensor, weight_scale: Tensor | None, activation: str,
    workspace: Tensor | None,
) -> Tensor:  # fmt: skip
    """y of the module's equation.

    Args:
        x: (B, N, inner) float16, bfloat16 or float32, with its moments.
        modulation: (B or 1, K), of which shift and scale are `inner` columns each.
        weight, bias: (columns, inner) in x's dtype, or float8 with weight_scale (columns,) float32;
            (columns,) in x's dtype.
        activation: "none" or "gelu" (tanh form).
        workspace: see `linear.launch_linear`.

    Returns:
        (B, N, columns) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    operand = Operand(x, None, moments, modulation, shift_column, scale_column)
    layer = Layer(weight, bias, weight_scale)
    (y,) = launch_block(operand, layer, activation, workspace=workspace)
    return y


@torch.library.custom_op("odelt_fast::norm_linear_float8", mutates_args=("workspace",))
def norm_linear_float8(
    x: Tensor, moments: Tensor, modulation: Tensor, shift_column: int, scale_column: int,
    weight: Tensor, bias: Tensor, weight_scale: Tensor | None, activation: str,
    workspace: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y of norm_linear in float8, and its scales (B, N, blocks of 128 columns) float32."""
    operand = Operand(x, None, moments, modulation, shift_column, scale_column)
    layer = Layer(weight, bias, weight_scale)
    q, scales = launch_block(operand, layer, activation, workspace=workspace, float8=True)
    return q, scales


@torch.library.custom_op("odelt_fast::residual_linear", mutates_args=("workspace",))
def residual_linear(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, workspace: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', its moments).

    Args:
        y: (B, N, inner) in x's dtype, or float8 with y_scales (B, N, blocks of 128) float32.
        weight, bias, weight_scale: as in norm_linear.
        x: (B, N, columns), to which is added.
        gates: (B or 1, K), of which gate is `columns` columns from gate_column on.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    operand, layer = Operand(y, y_scales), Layer(weight, bias, weight_scale)
    residual = Residual(x, gates, gate_column)
    made, moments = launch_block(operand, layer, residual=residual, workspace=workspace)
    return made, moments


@torch.library.custom_op("odelt_fast::group_end_linear", mutates_args=("workspace",))
def group_end_linear(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, xr: Tensor, vr: Tensor | None,
    steps: Tensor | None, workspace: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', moments of xr'); xr, vr like x, vr None is zero; steps (B or 1,) float32, None: 1.

    The rest as in residual_linear.
    """
    operand, layer = Operand(y, y_scales), Layer(weight, bias, weight_scale)
    residual = Residual(x, gates, gate_column, GroupEnd(xr, vr, steps))
    made = launch_block(operand, layer, residual=residual, workspace=workspace)
    return made[0], made[2], made[1]


@torch.library.custom_op("odelt_fast::last_group_end_linear", mutates_args=("workspace",))
def last_group_end_linear(
    y: Tensor, y_scales: Tensor | None, weight: Tensor, bias: Tensor, weight_scale: Tensor | None,
    x: Tensor, gates: Tensor, gate_column: int, vr: Tensor | None, steps: Tensor | None,
    workspace: Tensor | None,
) -> Tensor:  # fmt: skip
    """vr' alone; the rest as in group_end_linear."""
    operand, layer = Operand(y, y_scales), Layer(weight, bias, weight_scale)
    residual = Residual(x, gates, gate_column, GroupEnd(None, vr, steps))
    return launch_block(operand, layer, residual=residual, workspace=workspace)[0]


def _fake_linear(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty((*x.shape[:2], len(given[4])))


def _fake_residual(y: Tensor, scales: Any, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    x, (batch, tokens) = given[2], y.shape[:2]
    parts = -(-len(weight) // block_tile(batch, tokens, weight).block_n)
    return like_first(x), x.new_empty((2, batch * tokens, parts), dtype=torch.float32)


norm_linear.register_fake(_fake_linear)
norm_linear_float8.register_fake(lambda *given: quantize_blocks_reference(_fake_linear(*given)))
residual_linear.register_fake(_fake_residual)
group_end_linear.register_fake(lambda y, *given: (like_first(given[4]), *_fake_residual(y, *given)))
last_group_end_linear.register_fake(lambda y, *given: like_first(given[4]))


# What is there of a product, beside x, weight, bias and out: in its forms.
_FORMS = MappingProxyType(
    {
        "norm": ("moments", "modulation"),
        "norm_float8": ("moments", "modulation", "out_scales"),
        "residual": ("x_scales", "residual", "gates", "out_moments"),
        "group_end": (
            "x_scales", "residual", "gates", "xr", "vr", "steps", "out_vr", "out_moments",
        ),
    }
)  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Every tile in every form; with split-K, overlapped, and in float16, the fullest alone."""
    tiles = {**BLOCK_TILES, "small_pdl": BLOCK_TILES["small"], "small_fp16": BLOCK_TILES["small"]}
    tiles |= {f"{each}_split": split_block_tile(tiles[each], 4) for each in ("small", "fp8_small")}
    scales = {"x_scales", "moments", "steps", "weight_scale", "out_scales", "out_moments"}
    for (name, tile), (form, needed) in itertools.product(tiles.items(), _FORMS.items()):
        float8, few = name.startswith("fp8"), name not in BLOCK_TILES
        fullest = form == "group_end" or (form == "norm" and name == "small_pdl")
        if (form == "norm_float8" and not float8) or (few and not fullest):
            continue
        kind = {"float32": "fp32", "small_fp16": "fp16"}.get(name, "bf16")
        types = dict.fromkeys(block_kernel.arg_names[:18], f"*{kind}")
        types |= dict.fromkeys(scales | {"partial"}, "*fp32") | {"counter": "*i32", "eps": "fp32"}
        there = {*needed, "weight_scale"} if float8 else {*needed} - {"x_scales"}
        if float8:
            types["weight"] = "*fp8e4nv"
            types |= {"x": "*fp8e4nv"} if "x_scales" in there else {}
            types |= {"out": "*fp8e4nv"} if "out_scales" in there else {}
        optional = scales.union(*_FORMS.values()) - there
        constants = dict.fromkeys(optional) | block_constants(tile, 768, 12)
        constants |= {"GELU": "moments" in there, "GROUP_END": form == "group_end"}
        constants["PDL"] = name == "small_pdl"
        options = {"arches": (90, 100)} if float8 else {}
        yield kernel_case(
            f"block/{name}/{form}", block_kernel, types, constants, ("batch", "tokens"),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
        )  # fmt: skip
