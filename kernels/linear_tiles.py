"""The kernels of `linear`: by pointers with split-K, and persistent with tensor descriptors.

Both compute acc = x W^T in float32 over x (rows, inner) and W (columns, inner), then the epilogue
    y = acc * x_scale[row] * weight_scale[column] + bias[column]
    y = gelu_tanh(y)
    y = residual + gate[row // tokens, column] * y
of which every part is optional, and write y (rows, columns) once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import wait_for_inputs


@triton.jit
def gelu(y):
    """The tanh form: y (1 + tanh u) / 2 = y / (1 + exp(-2 u)), u = sqrt(2/pi) (y + 0.044715 y^3).

    So there is no cancellation where tanh u is near -1.
    """
    return y / (1.0 + tl.exp(-y * tl.fma(y * y, 0.07135481627260025, 1.5957691216057308)))


@triton.jit
def epilogue(
    acc, offs_m, offs_n, mask_m, mask_n,
    bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
    residual_stride, gate_stride, tokens,
    GELU: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_M, BLOCK_N) float32 -> y, float32; parts that are off are not compiled."""
    if SCALED:
        x_scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + offs_n, mask=mask_n, other=0.0)
        acc = acc * x_scale[:, None] * weight_scale[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = gelu(acc)
    if GATED:
        mask = mask_m[:, None] & mask_n[None, :]
        o_gate = (offs_m // tokens).to(tl.int64) * gate_stride
        o_residual = offs_m.to(tl.int64) * residual_stride
        p_gate = gate_ptr + o_gate[:, None] + offs_n[None, :]
        gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
        p_residual = residual_ptr + o_residual[:, None] + offs_n[None, :]
        residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        acc = tl.fma(gate, acc, residual)
    return acc


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row tile, column tile).

    GROUP_M row tiles at a time, so that the weights of a column stay in the L2.
    """
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    size_m = min(tiles_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return first_m + inside % size_m, inside // size_m


@triton.jit
def put_share(acc, partial_ptr, counter_ptr, tile, split, tiles, SPLITS: tl.constexpr):
    """Adds this program's share of a tile to the others' -> whether it was the last to arrive.

    Into partial (SPLITS, tiles, BLOCK_M, BLOCK_N) float32; counter (tiles,) int32 is zero before,
    and to be made zero by the last.
    """
    p_part = share_pointers(acc, partial_ptr, tile)
    tl.store(p_part + split.to(tl.int64) * tiles * acc.shape[0] * acc.shape[1], acc)
    # Every thread's share must be written before the one thread that counts releases it to the
    # other programs.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1


@triton.jit
def take_shares(acc, partial_ptr, tile, tiles, SPLITS: tl.constexpr):
    """The sum of all shares like acc, added in a fixed order, so that bits never change."""
    p_part = share_pointers(acc, partial_ptr, tile)
    total = tl.load(p_part, cache_modifier=".cg")
    for other in tl.range(1, SPLITS, num_stages=1):
        p_other = p_part + other * tiles.to(tl.int64) * (acc.shape[0] * acc.shape[1])
        total += tl.load(p_other, cache_modifier=".cg")
    return total


@triton.jit
def share_pointers(acc, partial_ptr, tile):
    """Of the first share of a tile."""
    p_part = partial_ptr + tile.to(tl.int64) * (acc.shape[0] * acc.shape[1])
    p_part += tl.arange(0, acc.shape[0])[:, None] * acc.shape[1]
    return p_part + tl.arange(0, acc.shape[1])[None, :]


@triton.jit
def pointer_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
    out_ptr, partial_ptr, counter_ptr,
    rows, columns, inner, x_stride, weight_stride, residual_stride, gate_stride, tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLITS): with SPLITS > 1 see `put_share`."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    wait_for_inputs(PDL)
    tiles = tl.num_programs(0)
    i_m, i_n = tile_position(tile, tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_M)
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < rows
    mask_n = offs_n < columns
    steps = tl.cdiv(inner, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    first = split * share
    p_x = x_ptr + offs_m.to(tl.int64)[:, None] * x_stride + (first * BLOCK_K + offs_k)[None, :]
    p_w = weight_ptr + offs_n.to(tl.int64)[None, :] * weight_stride
    p_w += (first * BLOCK_K + offs_k)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, min(first + share, steps)):
        if EVEN_K:
            b_x = tl.load(p_x, mask=mask_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = step * BLOCK_K + offs_k < inner
            b_x = tl.load(p_x, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        p_x += BLOCK_K
        p_w += BLOCK_K

    p_out = out_ptr + offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    if SPLITS == 1:
        y = epilogue(
            acc, offs_m, offs_n, mask_m, mask_n,
            bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
            residual_stride, gate_stride, tokens, GELU, BIAS, GATED, SCALED,
        )  # fmt: skip
        tl.store(p_out, y, mask=mask_m[:, None] & mask_n[None, :])
    elif put_share(acc, partial_ptr, counter_ptr, tile, split, tiles, SPLITS):
        y = epilogue(
            take_shares(acc, partial_ptr, tile, tiles, SPLITS), offs_m, offs_n, mask_m, mask_n,
            bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
            residual_stride, gate_stride, tokens, GELU, BIAS, GATED, SCALED,
        )  # fmt: skip
        tl.store(p_out, y, mask=mask_m[:, None] & mask_n[None, :])
        tl.store(counter_ptr + tile, 0)


@triton.jit
def descriptor_kernel(
    x_desc, weight_desc, out_desc, bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
    rows, columns, inner, residual_stride, gate_stride, tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    SPECIALIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): each program walks every programs-th tile.

    So the loads of the next tile overlap the epilogue of this one. x_desc (BLOCK_M, BLOCK_K),
    weight_desc (BLOCK_N, BLOCK_K), out_desc (BLOCK_M, BLOCK_N // 2): outside the tensors, loads
    give 0 and stores do nothing. SPECIALIZED: on Blackwell a warp loads, one multiplies into one of
    two tiles in tensor memory, and the others make the epilogue of the other.
    """
    wait_for_inputs(PDL)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    steps = tl.cdiv(inner, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
        flatten=True, warp_specialize=SPECIALIZED,
    ):  # fmt: skip
        i_m, i_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            b_x = x_desc.load([i_m * BLOCK_M, step * BLOCK_K])
            b_w = weight_desc.load([i_n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(b_x, b_w.T, acc)
        offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        # In two halves of columns: a whole tile beside its residual and gate does not fit the
        # registers.
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            first_n = i_n * BLOCK_N + half * (BLOCK_N // 2)
            offs_n = first_n + tl.arange(0, BLOCK_N // 2)
            y = epilogue(
                left if half == 0 else right, offs_m, offs_n, offs_m < rows, offs_n < columns,
                bias_ptr, residual_ptr, gate_ptr, x_scale_ptr, weight_scale_ptr,
                residual_stride, gate_stride, tokens, GELU, BIAS, GATED, SCALED,
            )  # fmt: skip
            out_desc.store([i_m * BLOCK_M, first_n], y.to(out_desc.dtype))
