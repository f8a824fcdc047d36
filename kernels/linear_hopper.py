"""The kernel of `linear` for Hopper, in Gluon: a warp loads, two groups of warps multiply in turn.

The equation is that of linear_tiles.py. Each program walks every programs-th tile. One warp copies
slices of x and W into a ring in shared memory (TMA), on over the ends of tiles. Two groups of four
warps take the tiles alternately and pass each other the turn to multiply (ping-pong): while one
multiplies, the other makes the epilogue of its tile and stores it.

Barriers: full and empty of each stage of the ring, turns of each group. A wait tells odd from even
phases alone: a group waits for stages in its turn only, when all that were filled before have been
waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .compile_case import CompileCase, kernel_case
from .device import wait_for_inputs
from .linear_tiles import epilogue, tile_position
from .quantize import FP8
from .tiles import SPECIALIZED

KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, FP8: gl.float8e4nv}


@gluon.jit
def load_tiles(
    x_desc, weight_desc, ring, rows, columns, inner, GROUP_M: tl.constexpr
):  # fmt: skip
    """Fills the ring with the slices of all tiles of this program."""
    x_ring, weight_ring, full, empty = ring
    STAGES: tl.constexpr = x_ring.shape[0]
    BLOCK_M: tl.constexpr = x_ring.shape[1]
    BLOCK_N: tl.constexpr = weight_ring.shape[1]
    BLOCK_K: tl.constexpr = x_ring.shape[2]
    BYTES: tl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * x_ring.dtype.primitive_bitwidth // 8
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    steps = tl.cdiv(inner, BLOCK_K)
    fill = 0
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        for step in range(steps):
            stage = fill % STAGES
            mbarrier.wait(empty.index(stage), ((fill // STAGES) & 1) ^ 1)
            ready, first = full.index(stage), step * BLOCK_K
            mbarrier.expect(ready, BYTES)
            o_x, o_w = [i_m * BLOCK_M, first], [i_n * BLOCK_N, first]
            tma.async_copy_global_to_shared(x_desc, o_x, ready, x_ring.index(stage))
            tma.async_copy_global_to_shared(weight_desc, o_w, ready, weight_ring.index(stage))
            fill += 1


@gluon.jit
def multiply_tiles(
    GROUP: tl.constexpr, ring, turns, staging, out_desc, pointers, sizes, constants: tl.constexpr
):  # fmt: skip
    """Every second tile of this program, from its first (GROUP 0) or second (GROUP 1) on.

    constants: GROUP_M, PARTS, GELU, BIAS, GATED, SCALED.
    """
    x_ring, weight_ring, full, empty = ring
    bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr = pointers
    rows, columns, inner, residual_stride, gate_stride, tokens = sizes
    STAGES: tl.constexpr = x_ring.shape[0]
    BLOCK_M: tl.constexpr = x_ring.shape[1]
    BLOCK_N: tl.constexpr = weight_ring.shape[1]
    BLOCK_K: tl.constexpr = x_ring.shape[2]
    PART_N: tl.constexpr = BLOCK_N // constants[1]
    SLICE: tl.constexpr = 256 // x_ring.dtype.primitive_bitwidth  # of K, of an instruction
    TILE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, SLICE])
    PART: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART_N, SLICE])
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    steps = tl.cdiv(inner, BLOCK_K)
    programs = tl.num_programs(0)
    out = staging.index(GROUP)
    fill = GROUP * steps
    turn = 1 - GROUP
    for tile in range(tl.program_id(0) + GROUP * programs, tiles_m * tiles_n, 2 * programs):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, TILE)
        mbarrier.wait(turns.index(GROUP), turn & 1)
        for step in range(steps):
            stage = fill % STAGES
            mbarrier.wait(full.index(stage), (fill // STAGES) & 1)
            b_w = weight_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage), b_w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The product before this one has read its stage.
            mbarrier.arrive(empty.index((fill + STAGES - 1) % STAGES), pred=step > 0)
            fill += 1
        mbarrier.arrive(turns.index(1 - GROUP))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((fill + STAGES - 1) % STAGES))
        fill += steps
        turn += 1
        i_m, i_n = tile_position(tile, tiles_m, tiles_n, constants[0])
        offs_m = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PART))
        halves = acc.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
        for i_part in tl.static_range(constants[1]):
            part = halves[i_part * 2 // constants[1]]
            if constants[1] == 4:
                part = part.reshape((BLOCK_M, 2, PART_N)).permute((0, 2, 1)).split()[i_part % 2]
            first_n = i_n * BLOCK_N + i_part * PART_N
            offs_n = first_n + gl.arange(0, PART_N, gl.SliceLayout(0, PART))
            y = epilogue(
                gl.convert_layout(part, PART), offs_m, offs_n, offs_m < rows, offs_n < columns,
                bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
                residual_stride, gate_stride, tokens,
                constants[2], constants[3], constants[4], constants[5],
            )  # fmt: skip
            tma.store_wait(0)  # what was stored before has been read
            out.store(y.to(out_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [i_m * BLOCK_M, first_n], out)
    tma.store_wait(0)


@gluon.jit
def ping_pong_kernel(
    x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
    rows, columns, inner, residual_stride, gate_stride, tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), four warps beside those that it starts; arguments as of
    `linear_tiles.descriptor_kernel`, but out_desc of (BLOCK_M, BLOCK_N // PARTS)."""
    wait_for_inputs(PDL)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weights: tl.constexpr = [STAGES, BLOCK_N, BLOCK_K]
    weight_ring = gl.allocate_shared_memory(weight_desc.dtype, weights, weight_desc.layout)
    parts: tl.constexpr = [2, BLOCK_M, BLOCK_N // PARTS]
    staging = gl.allocate_shared_memory(out_desc.dtype, parts, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in tl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in tl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    ring = (x_ring, weight_ring, full, empty)
    pointers = (bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr)
    sizes = (rows, columns, inner, residual_stride, gate_stride, tokens)
    constants: tl.constexpr = (GROUP_M, PARTS, GELU, BIAS, GATED, SCALED)
    gl.warp_specialize(
        [
            (multiply_tiles, (0, ring, turns, staging, out_desc, pointers, sizes, constants)),
            (multiply_tiles, (1, ring, turns, staging, out_desc, pointers, sizes, constants)),
            (load_tiles, (x_desc, weight_desc, ring, rows, columns, inner, GROUP_M)),
        ],
        [4, 1],  # warps of the second and of the third
        [240, 24],  # registers a thread; 240 of the first, too
    )


def layout(block: list[int], kind: Any) -> Any:
    """How a block of a matrix lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(block, kind)


def ping_pong_constants(
    constants: Mapping[str, Any], stages: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """The kernel's constants, from those that it shares with the others of `linear`, and the blocks
    of x, W and out."""
    # Registers: of a tile's columns half are finished at once, beside scales and residual a fourth.
    parts = 4 if constants["SCALED"] and constants["GATED"] else 2
    rows, columns, depth = (constants[f"BLOCK_{name}"] for name in "MNK")
    blocks = [[rows, depth], [columns, depth], [rows, columns // parts]]
    return {**constants, "STAGES": stages, "PARTS": parts}, blocks


def launch_ping_pong(
    programs: int, matrices: tuple[Tensor, Tensor, Tensor], arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """One launch: matrices x, W, out; arguments and constants as of `linear`'s other kernels."""
    constants, blocks = ping_pong_constants(constants, constants["num_stages"])
    descriptors = [
        TensorDescriptor.from_tensor(matrix, block, layout(block, KINDS[matrix.dtype]))
        for matrix, block in zip(matrices, blocks)
    ]
    ping_pong_kernel[(programs,)](*descriptors, *arguments, **constants)


def compile_cases() -> Iterator[CompileCase]:
    """Every tile, for each of its types and epilogues; overlapped and float16 the fullest alone."""
    for name, tile in SPECIALIZED[90].items():
        float8 = name.startswith("fp8")
        forms = [(name, "bf16", form) for form in ("bias", "gelu", "gated")]
        if name == "ping_pong":
            forms += [("ping_pong_pdl", "bf16", "gated"), (name, "fp16", "gated")]
        for called, out, form in forms:
            kind = "fp8e4nv" if float8 else out
            shared = {
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m, "GELU": form == "gelu", "BIAS": True,
                "GATED": form == "gated", "SCALED": float8, "PDL": called.endswith("_pdl"),
            }  # fmt: skip
            constants, blocks = ping_pong_constants(shared, tile.num_stages)
            types = dict.fromkeys(("bias_ptr", "residual_ptr", "gate_ptr"), f"*{out}")
            types |= dict.fromkeys(("x_scale_ptr", "weight_scale_ptr"), "*fp32")
            for key, each, block in zip(("x", "weight", "out"), (kind, kind, out), blocks):
                of = layout(block, gl.float8e4nv if each == "fp8e4nv" else gl.bfloat16)
                types[f"{key}_desc"] = f"tensordesc<{each}{block},{of!r}>"
            yield kernel_case(
                f"linear/{called}/{kind}/{form}", ping_pong_kernel, types, constants,
                ("rows", "tokens"), num_warps=tile.num_warps, arches=(90,),
            )  # fmt: skip
