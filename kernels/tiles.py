"""Which launch configuration `linear` takes for a shape and card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import triton

from odelt_fast.kernels.quantize import FP8


@dataclass(frozen=True)
class Tile:
    """A launch configuration: output tile, slice of `inner`, shares of `inner` (split-K), warps,
    pipeline stages, way of loading."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    descriptors: bool = False
    group_m: int = 8
    pdl: bool = False


# By hand, from register and shared-memory counts of the compile gate; not yet chosen by timing.
TILES = MappingProxyType(
    {
        "float32": Tile(
            64, 64, 32, num_warps=4, num_stages=3
        ),  # no tensor cores: exact float32 products
        "small": Tile(
            64, 64, 64, num_warps=4, num_stages=4
        ),  # few rows: many tiles, three of them on a multiprocessor
        "large": Tile(128, 128, 32, num_warps=8, num_stages=4),
        "hopper": Tile(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),
        "hopper_narrow": Tile(
            128, 128, 64, num_warps=8, num_stages=4, descriptors=True
        ),  # where 256 columns leave processors idle
        "fp8_small": Tile(64, 64, 128, num_warps=4, num_stages=4),
        "fp8_hopper": Tile(128, 256, 128, num_warps=8, num_stages=3, descriptors=True),
        "fp8_hopper_narrow": Tile(128, 128, 128, num_warps=8, num_stages=4, descriptors=True),
    }
)
SPLITS = (4, 2)


def choose_tile(
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    arch: int,
    processors: int,
    aligned: bool,
    gated: bool,
) -> Tile:
    """The configuration for x (rows, inner) of `dtype` on a device; `aligned`: tensor descriptors
    can address the operands."""
    if dtype == torch.float32:
        return TILES["float32"]

    def count(tile: Tile) -> int:
        return triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)

    prefix = "fp8_" if dtype == FP8 else ""
    names = (
        [f"{prefix}hopper", f"{prefix}hopper_narrow"]
        if arch >= 90 and aligned
        else ["large"]
        if dtype != FP8
        else []
    )
    if arch >= 100 and gated and len(names) == 2:
        names = names[1:]  # the wider tile spills there
    for name in names:
        if count(TILES[name]) >= processors:
            return TILES[name]
    small = TILES[f"{prefix}small"]
    steps = triton.cdiv(inner, small.block_k)
    for splits in SPLITS:
        # Twice the processors: two or three small tiles run on each at once. Shorter shares would
        # not fill the load pipeline.
        if count(small) * splits <= 2 * processors and steps >= splits * small.num_stages:
            return replace(small, splits=splits)
    return small


def workspace_elements(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    """(int32 counters, float32 partial sums) that a split-K launch needs; the counters must be zero
    and are left so."""
    if tile.splits == 1:
        return 0, 0
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    return 4 * triton.cdiv(tiles, 4), tiles * tile.splits * tile.block_m * tile.block_n
