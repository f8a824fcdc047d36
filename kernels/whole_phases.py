"""The kernel of whole.py: the phases of all blocks, walked through by one grid.

Each phase is a list of tiles, dealt out to the programs in turn. Between two phases every program
waits for all others, so that a phase may read what any program wrote in the phases before it, and
may overwrite what they read. Inside a phase no program reads what another one writes, but for the
shares of split-K, which pass through an acquire-release atomic (`product`).

| phase | reads | writes |
|---|---|---|
| BEGIN | x | state, its statistics |
| QKV | state, its statistics | qkv |
| ATTENTION | qkv | attended |
| OUT | attended, state | middle, its statistics |
| MLP_IN | middle, its statistics | hidden |
| MLP_OUT | hidden, middle; of state and vr what it writes | state, its statistics, vr |
| END | state, its statistics | out |

`statistics` (rows, PARTS, 2) float32 are the mean and the sum of squared deviations of each of the
PARTS pieces of BLOCK_N columns of a row, as the tile that wrote the piece saw them: every reader
puts them together (Chan, Golub and LeVeque), and no row is read twice to be normalised.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import attention_tile
from .linear_tiles import epilogue

ALL = tl.constexpr(-1)  # every phase, with barriers
BEGIN, QKV, ATTENTION, OUT, MLP_IN, MLP_OUT, END = (tl.constexpr(phase) for phase in range(7))
# What lies in a block's row of the table of addresses: weight and bias of each.
W_QKV, W_OUT, W_IN, W_DOWN, ADDRESSES = (tl.constexpr(place) for place in (0, 2, 4, 6, 8))


@triton.jit
def grid_barrier(barrier):
    """Returns when every program of the grid has come here; what they wrote before is seen after.

    barrier (1,) int32: its lower 31 bits count arrivals, and are 0 again when all have come, which
    the sign tells by its change (as cooperative groups do it): nothing has to be cleared, neither
    between two barriers nor between two launches. All programs must run at once.
    """
    programs = tl.num_programs(0)
    # Every thread has done its part of the phase before the one that counts releases it.
    tl.debug_barrier()
    share = tl.where(tl.program_id(0) == 0, -2147483648 - (programs - 1), 1)
    before = tl.atomic_add(barrier, share, sem="acq_rel", scope="gpu")
    now = before
    while (now ^ before) >= 0:
        now = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [barrier.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    # And none begins the next one before a thread has acquired it.
    tl.debug_barrier()
    return tl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch(weight, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Asks for a matrix of SIZE elements in the L2, a part of it in each program.

    By lines of 128 bytes; none beyond the end is touched.
    """
    bytes_each: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    line: tl.constexpr = 128 // bytes_each
    lines: tl.constexpr = (SIZE + line - 1) // line
    o_line = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    for first in tl.range(0, lines, tl.num_programs(0) * THREADS, num_stages=1, disable_licm=True):
        p_line = weight + tl.minimum(first + o_line, lines - 1) * line
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p_line.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def address(table, block, place, like):
    """A tensor of block number `block` by its address, as a pointer of `like`'s type."""
    pointer = tl.load(table + block * ADDRESSES + place).to(like.dtype)
    return tl.multiple_of(pointer, 16)


@triton.jit
def rows_of(tile, tokens, BLOCK_M: tl.constexpr):
    """Tile number -> (sample, rows (BLOCK_M,) of all samples' tokens, mask): no tile holds tokens
    of two samples. Offsets are int32 everywhere: whole.py has few rows."""
    chunks = tl.cdiv(tokens, BLOCK_M)
    i_b = tile // chunks
    o_n = (tile % chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return i_b, i_b * tokens + o_n, o_n < tokens


@triton.jit
def store_state(
    b_x, state, statistics, o_row, m_row, i_n, o_c, m_c,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores a tile (BLOCK_M, BLOCK_N) of piece i_n, and the statistics of what was stored."""
    mask = m_row[:, None] & m_c[None, :]
    b_x = b_x.to(state.dtype.element_ty)
    tl.store(state + o_row[:, None] * D + o_c[None, :], b_x, mask=mask)
    b_x = tl.where(mask, b_x.to(tl.float32), 0.0)
    mean = tl.sum(b_x, 1) / tl.minimum(BLOCK_N, D - i_n * BLOCK_N)
    centered = tl.where(mask, b_x - mean[:, None], 0.0)
    p_part = statistics + (o_row * PARTS + i_n) * 2
    tl.store(p_part, mean, mask=m_row)
    tl.store(p_part + 1, tl.sum(centered * centered, 1), mask=m_row)


@triton.jit
def row_statistics(
    statistics, o_row, m_row, eps, D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr
):
    """(mean, 1 / standard deviation) of rows, each (BLOCK_M,)."""
    o_t = tl.arange(0, triton.next_power_of_2(PARTS))
    mask = m_row[:, None] & (o_t < PARTS)[None, :]
    p_part = statistics + (o_row[:, None] * PARTS + o_t[None, :]) * 2
    means = tl.load(p_part, mask=mask, other=0.0)
    squares = tl.load(p_part + 1, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(BLOCK_N, D - o_t * BLOCK_N), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * count, 1) / D
    off = means - mean[:, None]
    variance = tl.sum(tl.fma(off * off, count, squares), 1) / D
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def accumulate(
    x, weight, o_row, m_row, o_c, m_c, first, steps, shift, scale, mean, deviation,
    K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """So many steps of x W^T from step `first` on, (BLOCK_M, BLOCK_N) float32.

    NORM: rows are normalised, modulated and rounded on the way; EVEN: no step reaches beyond K.
    """
    o_k = tl.arange(0, BLOCK_K)
    o_x = o_row[:, None] * K + o_k[None, :]
    o_w = o_c[None, :] * K + o_k[:, None]
    acc = tl.zeros((o_row.shape[0], o_c.shape[0]), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        start = (first + step) * BLOCK_K
        m_k = start + o_k < K
        if EVEN:
            b_x = tl.load(x + start + o_x, mask=m_row[:, None], other=0.0)
            b_w = tl.load(weight + start + o_w, mask=m_c[None, :], other=0.0)
        else:
            b_x = tl.load(x + start + o_x, mask=m_row[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(weight + start + o_w, mask=m_c[None, :] & m_k[:, None], other=0.0)
        if NORM:
            b_shift = tl.load(shift + start + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_scale = tl.load(scale + start + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_h = (b_x.to(tl.float32) - mean[:, None]) * deviation[:, None]
            b_x = tl.fma(b_h, 1.0 + b_scale[None, :], b_shift[None, :]).to(b_x.dtype)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
    return acc


@triton.jit
def finish(
    acc, bias, out, statistics, residual, gate, state, vr, steps, o_row, m_row, i_n, o_c, m_c,
    GROUP_END, FIRST_GROUP, LAST, N: tl.constexpr, BLOCK_N: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile acc of a phase's product; GROUP_END, FIRST_GROUP, LAST: of its block,
    of which only MLP_OUT asks."""
    gated: tl.constexpr = (PHASE == OUT) | (PHASE == MLP_OUT)
    b_y = epilogue(
        acc, o_row, o_c, m_row, m_c, bias, residual, gate, bias, bias, N, 0, 1,
        PHASE == MLP_IN, True, gated, False,
    )  # fmt: skip
    mask = m_row[:, None] & m_c[None, :]
    if PHASE == MLP_OUT:  # noqa: SIM102 (a constant, and a value on the device)
        if GROUP_END:
            # Algorithm 2: vr' = vr + step*y, and the block's own input, xr, + step*y; the final
            # layer sees vr'.
            o_x = o_row[:, None] * N + o_c[None, :]
            if steps is not None:
                b_y *= tl.load(steps)
            b_vr = b_y
            if not FIRST_GROUP:
                b_vr += tl.load(vr + o_x, mask=mask, other=0.0).to(tl.float32)
            if LAST:
                b_y = b_vr
            else:
                tl.store(vr + o_x, b_vr, mask=mask)
                b_y += tl.load(state + o_x, mask=mask, other=0.0).to(tl.float32)
    if gated:
        parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        store_state(b_y, out, statistics, o_row, m_row, i_n, o_c, m_c, N, BLOCK_N, parts)
    else:
        tl.store(out + o_row[:, None] * N + o_c[None, :], b_y, mask=mask)


@triton.jit
def product(
    program, block, table, x, out, statistics, residual, row, state, vr, steps, partial, counters,
    samples, tokens, row_stride, eps, GROUP_END, FIRST_GROUP, LAST,
    K: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, WEIGHT: tl.constexpr, PART: tl.constexpr,
    PIECE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A phase that is a matrix product, x W^T: TILE is (BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, stages).

    WEIGHT: its place in the table; row: the block's packed modulation of sample 0, of which shift
    and scale (QKV, MLP_IN) or gate begin at column PART; statistics: of x, in pieces of PIECE
    columns, or of what is written (OUT, MLP_OUT). With SPLITS > 1 the last to arrive at a tile
    adds up the shares in partial (SPLITS, tiles, BLOCK_M, BLOCK_N) float32 in a fixed order;
    counters (tiles,) int32 are 0 before and after.
    """
    weight, bias = address(table, block, WEIGHT, x), address(table, block, WEIGHT + 1, x)
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_K: tl.constexpr = TILE[2]
    SPLITS: tl.constexpr = TILE[3]
    norm: tl.constexpr = (PHASE == QKV) | (PHASE == MLP_IN)
    steps_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (steps_k + SPLITS - 1) // SPLITS
    # A number that the compiler does not know: else it unrolls short loops, and spills.
    steps_of_one = share + tl.minimum(tokens, 0)
    area: tl.constexpr = BLOCK_M * BLOCK_N
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = samples * tl.cdiv(tokens, BLOCK_M) * tiles_n
    for work in tl.range(
        program, tiles * SPLITS, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        tile = work // SPLITS
        i_n = tile % tiles_n
        i_b, o_row, m_row = rows_of(tile // tiles_n, tokens, BLOCK_M)
        o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_c = o_c < N
        p_part = row + i_b * row_stride + PART
        mean, deviation = 0.0, 0.0
        if norm:
            pieces: tl.constexpr = (K + PIECE - 1) // PIECE
            mean, deviation = row_statistics(statistics, o_row, m_row, eps, K, PIECE, pieces)
        acc = accumulate(
            x, weight, o_row, m_row, o_c, m_c, (work % SPLITS) * share, steps_of_one,
            p_part, p_part + K, mean, deviation,
            K, BLOCK_K, TILE[4], norm, K % (SPLITS * BLOCK_K) == 0,
        )  # fmt: skip
        arrived = SPLITS - 1
        if SPLITS > 1:
            # Of the tile's number throughout: what depends on no tile would be kept in registers
            # through all phases.
            o_area = (tile * BLOCK_M + tl.arange(0, BLOCK_M)) * BLOCK_N
            p_share = partial + o_area[:, None] + tl.arange(0, BLOCK_N)[None, :]
            tl.store(p_share + (work % SPLITS) * tiles * area, acc)
            # As in linear_tiles.py.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
            if arrived == SPLITS - 1:
                acc = tl.load(p_share, cache_modifier=".cg")
                for other in tl.range(1, SPLITS, num_stages=1, disable_licm=True):
                    p_other = p_share + other * tiles * area
                    acc += tl.load(p_other, cache_modifier=".cg")
                tl.store(counters + tile, 0)
        if arrived == SPLITS - 1:
            finish(
                acc, bias, out, statistics, residual, p_part, state, vr, steps,
                o_row, m_row, i_n, o_c, m_c, GROUP_END, FIRST_GROUP, LAST, N, BLOCK_N, PHASE,
            )  # fmt: skip


@triton.jit
def pieces_of_rows(
    program, x, out, statistics, row, samples, tokens, row_stride, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """BEGIN: a copy with its statistics; END: normalised and modulated."""
    pieces: tl.constexpr = (D + PIECE - 1) // PIECE
    tiles = samples * tl.cdiv(tokens, BLOCK_M) * pieces
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        i_n = tile % pieces
        i_b, o_row, m_row = rows_of(tile // pieces, tokens, BLOCK_M)
        o_c = i_n * PIECE + tl.arange(0, PIECE)
        m_c = o_c < D
        o_x = o_row[:, None] * D + o_c[None, :]
        mask = m_row[:, None] & m_c[None, :]
        b_x = tl.load(x + o_x, mask=mask, other=0.0)
        if PHASE == BEGIN:
            store_state(b_x, out, statistics, o_row, m_row, i_n, o_c, m_c, D, PIECE, pieces)
        else:
            mean, deviation = row_statistics(statistics, o_row, m_row, eps, D, PIECE, pieces)
            p_shift = row + i_b * row_stride + o_c
            b_shift = tl.load(p_shift, mask=m_c, other=0.0).to(tl.float32)
            b_scale = tl.load(p_shift + D, mask=m_c, other=0.0).to(tl.float32)
            b_h = (b_x.to(tl.float32) - mean[:, None]) * deviation[:, None]
            tl.store(out + o_x, tl.fma(b_h, 1.0 + b_scale[None, :], b_shift[None, :]), mask=mask)


@triton.jit
def attend(
    program, qkv, out, samples, tokens, scale_log2,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(tokens, QUERIES)
    width: tl.constexpr = 3 * HEADS * HEAD_DIM
    tiles = samples * HEADS * chunks
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        i_head = tile // chunks
        attention_tile(
            qkv, out, tile % chunks, i_head % HEADS, (i_head // HEADS).to(tl.int64),
            tokens, tokens.to(tl.int64) * width, width, scale_log2,
            HEADS, HEAD_DIM, MAIN, TAIL, QUERIES, KEYS,
        )  # fmt: skip


@triton.jit
def whole_kernel(
    x, table, modulation, final_modulation, steps, out,
    state, middle, vr, qkv, attended, hidden, state_statistics, middle_statistics,
    partial, counters, barrier,
    samples, tokens, modulation_row, final_row, first, end, live, scale_log2, eps,
    D: tl.constexpr, MLP: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    QKV_TILE: tl.constexpr, OUT_TILE: tl.constexpr, IN_TILE: tl.constexpr, DOWN_TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, THREADS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). PHASE ALL: everything, on a grid whose programs all run at once. Another
    one: that phase alone, of blocks first .. end (BEGIN, END: of none), with any grid.

    GROUP: blocks of a group, whose end is a step of the inner ODE; 0: none.
    """
    every: tl.constexpr = PHASE == ALL
    program = tl.program_id(0)
    piece: tl.constexpr = DOWN_TILE[1]  # of the state's statistics
    piece_middle: tl.constexpr = OUT_TILE[1]
    if every:
        prefetch(address(table, first, W_QKV, x), 3 * D * D, THREADS)
    if every or PHASE == BEGIN:
        pieces_of_rows(
            program, x, state, state_statistics, x, samples, tokens, 0, eps,
            D, DOWN_TILE[0], piece, BEGIN,
        )  # fmt: skip
    for block in tl.range(first, end, num_stages=1, disable_licm=True):
        row = modulation + block * (6 * D)
        if every:
            program = grid_barrier(barrier)
            prefetch(address(table, block, W_OUT, x), D * D, THREADS)
        if every or PHASE == QKV:
            product(
                program, block, table, state, qkv,
                state_statistics, state, row, state, vr, steps, partial, counters,
                samples, tokens, modulation_row, eps, False, False, False,
                D, 3 * D, QKV_TILE, W_QKV, 0, piece, QKV,
            )  # fmt: skip
        if every:
            program = grid_barrier(barrier)
            prefetch(address(table, block, W_IN, x), MLP * D, THREADS)
        if every or PHASE == ATTENTION:
            attend(
                program, qkv, attended, samples, tokens, scale_log2,
                HEADS, HEAD_DIM, MAIN, TAIL, QUERIES, KEYS,
            )  # fmt: skip
        if every:
            program = grid_barrier(barrier)
            prefetch(address(table, block, W_DOWN, x), MLP * D, THREADS)
        if every or PHASE == OUT:
            product(
                program, block, table, attended, middle,
                middle_statistics, state, row, state, vr, steps, partial, counters,
                samples, tokens, modulation_row, eps, False, False, False,
                D, D, OUT_TILE, W_OUT, 2 * D, piece_middle, OUT,
            )  # fmt: skip
        if every:
            program = grid_barrier(barrier)
            if block + 1 < end:
                prefetch(address(table, block + 1, W_QKV, x), 3 * D * D, THREADS)
        if every or PHASE == MLP_IN:
            product(
                program, block, table, middle, hidden,
                middle_statistics, state, row, state, vr, steps, partial, counters,
                samples, tokens, modulation_row, eps, False, False, False,
                D, MLP, IN_TILE, W_IN, 3 * D, piece_middle, MLP_IN,
            )  # fmt: skip
        if every:
            program = grid_barrier(barrier)
        if every or PHASE == MLP_OUT:
            group_end = False
            if GROUP:
                group_end = (block + 1) % GROUP == 0
            product(
                program, block, table, hidden, state,
                state_statistics, middle, row, state, vr, steps, partial, counters,
                samples, tokens, modulation_row, eps,
                group_end, block < GROUP, block + 1 == live,
                MLP, D, DOWN_TILE, W_DOWN, 5 * D, piece, MLP_OUT,
            )  # fmt: skip
    if every:
        program = grid_barrier(barrier)
    if every or PHASE == END:
        pieces_of_rows(
            program, state, out, state_statistics, final_modulation,
            samples, tokens, final_row, eps, D, DOWN_TILE[0], piece, END,
        )  # fmt: skip
