"""Which launch configuration the matrix products take for a shape and card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import triton

from .quantize import FP8


@dataclass(frozen=True)
class Tile:
    """A launch configuration.

    Output tile, slice of `inner`, warps, pipeline stages, shares of `inner` (split-K), whether by
    tensor descriptors, row tiles that share the weights of a column in the L2; the generation of
    cards for which it gives loads, products and epilogues warps of their own (90 Hopper, 100
    Blackwell; 0: no).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    descriptors: bool = False
    group_m: int = 8
    specialized: int = 0

    def count(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.block_m) * triton.cdiv(columns, self.block_n)


# By hand, from register and shared-memory counts of the compile gate; not yet chosen by timing.
TILES = MappingProxyType(
    {  # block_m, block_n, block_k, num_warps, num_stages
        # no tensor cores: exact float32 products
        "float32": Tile(64, 64, 32, 4, 3),
        # few rows: many tiles, three of them on a multiprocessor
        "small": Tile(64, 64, 64, 4, 4),
        "large": Tile(128, 128, 32, 8, 4),
        "hopper": Tile(128, 256, 64, 8, 3, descriptors=True),
        # where 256 columns leave processors idle
        "hopper_narrow": Tile(128, 128, 64, 8, 4, descriptors=True),
        "fp8_small": Tile(64, 64, 128, 4, 4),
        "fp8_hopper": Tile(128, 256, 128, 8, 3, descriptors=True),
        "fp8_hopper_narrow": Tile(128, 128, 128, 8, 4, descriptors=True),
    }
)
# Large products whose loads, products and epilogues have warps of their own, by the generation of
# cards. Measurement alone chooses them (engine/tuning.py). Hopper (linear_hopper.py): a tile for
# each of two groups of four warps, stages of a ring that both share.
SPECIALIZED = MappingProxyType(
    {
        90: MappingProxyType(
            {
                "ping_pong": Tile(128, 128, 64, 4, 6, descriptors=True, specialized=90),
                "ping_pong_wide": Tile(64, 256, 64, 4, 4, descriptors=True, specialized=90),
                "fp8_ping_pong": Tile(128, 128, 128, 4, 6, descriptors=True, specialized=90),
            }
        ),
        100: MappingProxyType(
            {
                "overlapped": Tile(128, 128, 64, 8, 4, descriptors=True, specialized=100),
                "overlapped_wide": Tile(128, 256, 64, 8, 3, descriptors=True, specialized=100),
                "fp8_overlapped": Tile(128, 128, 128, 8, 4, descriptors=True, specialized=100),
            }
        ),
    }
)
SPLITS = (4, 2)
# The partial sums of every launch lie behind so many counters, more than any choice below has
# tiles: those of one with few tiles must leave the counters of one with many at zero.
COUNTERS = 512


def choose_tile(
    rows: int, columns: int, inner: int, dtype: torch.dtype,
    arch: int, processors: int, aligned: bool, gated: bool,
) -> Tile:  # fmt: skip
    """The configuration for x (rows, inner) of `dtype` on a device.

    Args:
        arch, processors: compute capability as a number, multiprocessors.
        aligned: tensor descriptors can address the operands.
        gated: the epilogue adds a gated residual.
    """
    if dtype == torch.float32:
        return TILES["float32"]
    prefix = "fp8_" if dtype == FP8 else ""
    if arch >= 90 and aligned:
        # The wider tile spills with a residual and gate on sm_100.
        wide = [] if arch >= 100 and gated else [f"{prefix}hopper"]
        names = [*wide, f"{prefix}hopper_narrow"]
    else:
        names = [] if dtype == FP8 else ["large"]
    for name in names:
        if TILES[name].count(rows, columns) >= processors:
            return TILES[name]
    small = TILES[f"{prefix}small"]
    steps = triton.cdiv(inner, small.block_k)
    for splits in SPLITS:
        # Twice the processors: two or three small tiles run on each at once. Shorter shares would
        # not fill the load pipeline.
        fits = small.count(rows, columns) * splits <= 2 * processors
        if fits and steps >= splits * small.num_stages:
            return replace(small, splits=splits)
    return small


def specialized_tiles(arch: int, dtype: torch.dtype, gated: bool) -> dict[str, Tile]:
    """Those of `SPECIALIZED` that a card can take, by name; arguments as of `choose_tile`."""
    tiles: Mapping[str, Tile] = SPECIALIZED.get(100 if arch in (100, 103) else arch, {})
    if dtype == torch.float32:
        return {}
    return {
        name: tile
        for name, tile in tiles.items()
        # The widest spills with a residual and gate (Triton 3.8).
        if name.startswith("fp8") == (dtype == FP8) and not (gated and name == "overlapped_wide")
    }


# Of the products of a block with what lies beside them (block_products.py): a tile of rows lies in
# one sample. Tiles that are split have at most 64 * 64 values, for which an engine keeps room.
BLOCK_TILES = MappingProxyType(
    {
        "float32": Tile(32, 32, 32, 4, 3),
        "large": Tile(128, 64, 64, 8, 3),
        "small": Tile(64, 64, 64, 4, 4),
        # few rows: more tiles, each with less to do
        "short": Tile(32, 64, 64, 4, 4),
        # A block of scales is 128 values wide, in both dimensions.
        "fp8_large": Tile(64, 128, 128, 8, 3),
        "fp8_small": Tile(32, 128, 128, 4, 3),
    }
)


def choose_block_tile(
    batch: int, tokens: int, columns: int, inner: int, dtype: torch.dtype, processors: int
) -> Tile:
    """The configuration of a block's product: the largest tile of which there is one for each
    processor, else one that is split or short; `dtype` is that of the weights."""
    if dtype == torch.float32:
        return BLOCK_TILES["float32"]
    prefix = "fp8_" if dtype == FP8 else ""
    large, small = (BLOCK_TILES[prefix + name] for name in ("large", "small"))

    def count(tile: Tile) -> int:
        return batch * tile.count(tokens, columns)

    if count(large) >= processors:
        return large
    steps = triton.cdiv(inner, small.block_k)
    for splits in SPLITS if count(small) < processors else ():
        fits = count(small) * splits <= 2 * processors
        if fits and steps >= splits * small.num_stages:
            return split_block_tile(small, splits)
    return BLOCK_TILES["short"] if not prefix and count(small) < processors else small


def split_block_tile(tile: Tile, splits: int) -> Tile:
    """A tile with split-K: the end of a group spills with four warps on sm_80 (Triton 3.6)."""
    return replace(tile, splits=splits, num_warps=8)


def workspace_elements(rows: int, columns: int, tile: Tile, batch: int = 1) -> tuple[int, int]:
    """(int32 counters, float32 partial sums) that a split-K launch needs; rows of each sample.

    The counters must be zero and are left so.
    """
    if tile.splits == 1:
        return 0, 0
    tiles = batch * tile.count(rows, columns)
    return max(
        COUNTERS, 4 * triton.cdiv(tiles, 4)
    ), tiles * tile.splits * tile.block_m * tile.block_n
