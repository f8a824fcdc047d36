"""End of a depth group in one pass: v = step*(x + gate*y); xr' = xr + v; vr' = vr + v.

Algorithm 2 of the paper, across the block border: x + gate*y is the last block's output; xr is that
block's input. Then h = LN(b)*(1 + scale) + shift with the next layer's modulation: b = xr' before
the next block (group_end), b = vr' before the final layer (last_group_end, which has no use for
xr). All tensors (B, N, D) in one dtype; gates and modulation packed (B or 1, K). vr None is the
first group's zero. steps (B or 1,) float32 are G/l of each row for inner_step="inverse_depth", None
is the reference's 1. Kernel: residual_rows.py. Bytes: group_end four reads (three in the first
group) and three writes of (B, N, D), last_group_end three reads and two writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .compile_case import CompileCase
from .norm_modulate import norm_modulate_reference
from .residual_rows import Columns, GroupEnd, launch_residual, residual_kernel
from .rows import likes_first, row_cases


def group_end_reference(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int, steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, in the dtype of its inputs."""
    velocity = _velocity(x, y, gates, gate_column, steps)
    xr, vr = xr + velocity, velocity if vr is None else vr + velocity
    return xr, vr, norm_modulate_reference(xr, modulation, shift_column, scale_column)


def last_group_end_reference(
    x: Tensor, y: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int, steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, in the dtype of its inputs."""
    velocity = _velocity(x, y, gates, gate_column, steps)
    vr = velocity if vr is None else vr + velocity
    return vr, norm_modulate_reference(vr, modulation, shift_column, scale_column)


def _velocity(x: Tensor, y: Tensor, gates: Tensor, column: int, steps: Tensor | None) -> Tensor:
    velocity = torch.addcmul(x, gates[:, None, column : column + x.shape[2]], y)
    return velocity if steps is None else velocity * steps[:, None, None].to(x.dtype)


@torch.library.custom_op("odelt_fast::group_end", mutates_args=())
def group_end(
    x: Tensor, y: Tensor, xr: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int, steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(xr', vr', h) of the module's equations.

    Args:
        x, y, xr, vr: (B, N, D) float16, bfloat16 or float32, of one dtype and any strides; vr None
            is zero.
        gates: (B or 1, K), of which gate is D columns from gate_column on.
        modulation: (B or 1, K'), of which shift and scale are D columns each likewise.
        steps: (B or 1,) float32, None: 1.

    Returns:
        Three (B, N, D) in x's dtype, new and contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or D is above 8192.
    """
    columns = Columns(gates, gate_column, modulation, shift_column, scale_column)
    xr, out_vr, h = launch_residual(x, y, columns, GroupEnd(xr, vr, steps))
    return xr, out_vr, h


group_end.register_fake(likes_first(3))


@torch.library.custom_op("odelt_fast::last_group_end", mutates_args=())
def last_group_end(
    x: Tensor, y: Tensor, vr: Tensor | None, gates: Tensor, gate_column: int,
    modulation: Tensor, shift_column: int, scale_column: int, steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(vr', h), h = LN(vr')*(1 + scale) + shift for the final layer; the rest as in group_end."""
    columns = Columns(gates, gate_column, modulation, shift_column, scale_column)
    out_vr, h = launch_residual(x, y, columns, GroupEnd(None, vr, steps))
    return out_vr, h


last_group_end.register_fake(likes_first(2))


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and network width: first, middle and last group, float8, steps, overlapped."""
    plain = {"steps": None, "scales": None}
    for name, constants in (
        ("forward", plain),
        ("first", {**plain, "vr": None}),
        ("steps", {"scales": None}),
        ("float8", {"steps": None}),
        ("last", {**plain, "xr": None, "out_x": None}),
        ("overlapped", {**plain, "PDL": True}),
    ):
        yield from row_cases(f"group_end/{name}", residual_kernel, GROUP_END=True, **constants)
