"""Self-attention and its forward-mode tangent in one pass, without gradient.

With S = q k^T / head_dim, P = softmax(S): y = P v and dy = P (dS o v + dv) - m o y, where dS =
(dq k^T + q dk^T) / head_dim, "o" scales rows of v by each of dS, and m = sum(P o dS) over the keys.
q, k, v and dq, dk, dv (B, heads, N, head_dim) -> y, dy (B, N, heads * head_dim). One pass over the
keys with running sums of exp(S), exp(S) dS, exp(S) v, exp(S) dS v and exp(S) dv; all float32, with
products of the inputs' type. dS and m are counted from the mean of dS over the first tile of keys:
what all keys share falls out of dy, and would drown the rest when exp(S) dS is rounded. Bytes
moved: the six inputs once (keys and values again by each tile of queries, from the L2), y and dy
once; plain PyTorch's forward mode writes and reads N x N scores a head a dozen times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Launch, head_parts
from .compile_case import DTYPES, CompileCase, kernel_case
from .device import require_device

# By hand, from register and shared-memory counts of the compile gate; not yet chosen by timing.
# Three accumulators in place of one: half the queries of `attention`. Keyed by the widest head dim.
LAUNCHES = MappingProxyType(
    {
        32: Launch(64, 32, 4, 2),
        64: Launch(32, 32, 4, 2),
        96: Launch(64, 16, 8, 2),  # others spill on sm_90 and sm_100
        128: Launch(32, 32, 8, 1),
        256: Launch(16, 16, 8, 1),
    }
)
FLOAT32_LAUNCHES = MappingProxyType(
    {
        32: Launch(32, 32, 4, 2),
        64: Launch(16, 16, 4, 1),
        128: Launch(16, 16, 8, 1),  # wider heads spill in every tile
    }
)


def attention_tangent_reference(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of q."""
    scale = 1.0 / q.shape[-1]
    p = torch.softmax((q @ k.mT) * scale, dim=-1)
    ds = (dq @ k.mT + q @ dk.mT) * scale
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    y, dy = p @ v, dp @ v + p @ dv
    return y.transpose(1, 2).flatten(2), dy.transpose(1, 2).flatten(2)


@triton.jit
def _tile(p_rows, offs, mask, HEAD_DIM: tl.constexpr):
    return tl.load(
        p_rows + offs[None, :], mask=mask[:, None] & (offs < HEAD_DIM)[None, :], other=0.0
    )


@triton.jit
def attention_tangent_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, y_ptr, dy_ptr, tokens,
    batch_stride, head_stride, token_stride, dbatch_stride, dhead_stride, dtoken_stride, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * heads). HEAD_DIM columns are MAIN + TAIL, masked beyond HEAD_DIM.

    Sums of two products are scaled between them: two dots into one accumulator are miscompiled on
    sm_103 (triton-lang/triton#10821), and Triton makes one of a sum of dots. Therefore exp(S) dv
    has an accumulator of its own, too.
    """
    i_head = tl.program_id(1) % HEADS
    i_batch = (tl.program_id(1) // HEADS).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, MAIN)
    mask_m = offs_m < tokens
    o_head = i_batch * batch_stride + i_head * head_stride
    o_dhead = i_batch * dbatch_stride + i_head * dhead_stride
    o_q = o_head + offs_m.to(tl.int64)[:, None] * token_stride
    o_dq = o_dhead + offs_m.to(tl.int64)[:, None] * dtoken_stride
    o_k = o_head + offs_n.to(tl.int64)[:, None] * token_stride
    o_dk = o_dhead + offs_n.to(tl.int64)[:, None] * dtoken_stride
    q = _tile(q_ptr + o_q, offs_d, mask_m, HEAD_DIM)
    dq = _tile(dq_ptr + o_dq, offs_d, mask_m, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_ds = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_dv = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL > 0:
        offs_t = MAIN + tl.arange(0, TAIL)
        q_tail = _tile(q_ptr + o_q, offs_t, mask_m, HEAD_DIM)
        dq_tail = _tile(dq_ptr + o_dq, offs_t, mask_m, HEAD_DIM)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
        acc_ds_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
        acc_dv_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    total_ds = tl.zeros((BLOCK_M,), tl.float32)
    centre = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        mask_n = start + offs_n < tokens
        k = _tile(k_ptr + o_k, offs_d, mask_n, HEAD_DIM)
        dk = _tile(dk_ptr + o_dk, offs_d, mask_n, HEAD_DIM)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        ds = tl.dot(dq, k.T, input_precision="ieee") * scale
        ds = tl.fma(tl.dot(q, dk.T, input_precision="ieee"), scale, ds)
        if TAIL > 0:
            k_tail = _tile(k_ptr + o_k, offs_t, mask_n, HEAD_DIM)
            dk_tail = _tile(dk_ptr + o_dk, offs_t, mask_n, HEAD_DIM)
            scores = tl.fma(tl.dot(q_tail, k_tail.T, input_precision="ieee"), scale, scores)
            ds = tl.fma(tl.dot(dq_tail, k_tail.T, input_precision="ieee"), scale, ds)
            ds = tl.fma(tl.dot(q_tail, dk_tail.T, input_precision="ieee"), scale, ds)
        scores = tl.where(mask_n[None, :], scores * 1.4426950408889634, float("-inf"))
        # Every tile holds a real key: the new peak is finite.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        first = tl.sum(weights * ds, 1) / tl.sum(weights, 1)
        centre = tl.where(start == 0, first, centre)
        changes = weights * (ds - centre[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        total_ds = total_ds * shrink + tl.sum(changes, 1)
        v = _tile(v_ptr + o_k, offs_d, mask_n, HEAD_DIM)
        dv = _tile(dv_ptr + o_dk, offs_d, mask_n, HEAD_DIM)
        weights, changes = weights.to(v.dtype), changes.to(v.dtype)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
        acc_ds = tl.dot(changes, v, acc_ds * shrink[:, None], input_precision="ieee")
        acc_dv = tl.dot(weights, dv, acc_dv * shrink[:, None], input_precision="ieee")
        if TAIL > 0:
            v_tail = _tile(v_ptr + o_k, offs_t, mask_n, HEAD_DIM)
            dv_tail = _tile(dv_ptr + o_dk, offs_t, mask_n, HEAD_DIM)
            acc_tail = tl.dot(weights, v_tail, acc_tail * shrink[:, None], input_precision="ieee")
            acc_ds_tail *= shrink[:, None]
            acc_ds_tail = tl.dot(changes, v_tail, acc_ds_tail, input_precision="ieee")
            acc_dv_tail *= shrink[:, None]
            acc_dv_tail = tl.dot(weights, dv_tail, acc_dv_tail, input_precision="ieee")
        peak = new_peak
        o_k += BLOCK_N * token_stride
        o_dk += BLOCK_N * dtoken_stride
    inverse = 1.0 / total[:, None]
    mean = total_ds[:, None] * inverse
    o_y = ((i_batch * tokens + offs_m) * (HEADS * HEAD_DIM) + i_head * HEAD_DIM)[:, None]
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    y = acc * inverse
    tl.store(y_ptr + o_y + offs_d[None, :], y, mask=mask)
    tl.store(dy_ptr + o_y + offs_d[None, :], (acc_ds + acc_dv) * inverse - mean * y, mask=mask)
    if TAIL > 0:
        mask = mask_m[:, None] & (offs_t < HEAD_DIM)[None, :]
        y_tail = acc_tail * inverse
        tl.store(y_ptr + o_y + offs_t[None, :], y_tail, mask=mask)
        dy_tail = (acc_ds_tail + acc_dv_tail) * inverse - mean * y_tail
        tl.store(dy_ptr + o_y + offs_t[None, :], dy_tail, mask=mask)


def _launches(dtype: torch.dtype) -> Mapping[int, Launch]:
    return FLOAT32_LAUNCHES if dtype == torch.float32 else LAUNCHES


def largest_head_dim(dtype: torch.dtype) -> int:
    """The widest heads that the kernel takes: 256, of float32 128."""
    return max(_launches(dtype))


def choose_launch(head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch configuration for a head dimension of at most `largest_head_dim`."""
    table = _launches(dtype)
    return table[min(width for width in table if head_dim <= width)]


def _constants(num_heads: int, head_dim: int, launch: Launch) -> dict[str, int]:
    main, tail = head_parts(head_dim)
    heads = {"HEADS": num_heads, "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail}
    return heads | {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors with one layout, whose last dimension is contiguous; copied where they differ."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(3) == 1:
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("odelt_fast::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """y and dy of the module's equations.

    Args:
        q, k, v, dq, dk, dv: (B, heads, N, head_dim) of one dtype, float32, bfloat16 or float16, any
            strides; copied where those of q, k, v differ, or of dq, dk, dv, or the last is not 1.
            head_dim is at most 256, of float32 128.

    Returns:
        Two (B, N, heads * head_dim) of that dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    inputs = (q, k, v, dq, dk, dv)
    shapes, dtypes = ({getattr(each, name) for each in inputs} for name in ("shape", "dtype"))
    if q.dim() != 4 or len(shapes) > 1 or not q.shape[3]:
        raise ValueError(
            "attention_tangent: q, k, v and their tangents must be of one shape (B, heads, N,"
            f" head_dim), not {', '.join(str(tuple(each.shape)) for each in inputs)}"
        )
    if len(dtypes) > 1 or q.dtype not in DTYPES:
        raise ValueError(
            "attention_tangent: all must be float32, bfloat16 or float16, not"
            f" {', '.join(sorted(map(str, dtypes)))}"
        )
    batch, heads, tokens, head_dim = q.shape
    if head_dim > largest_head_dim(q.dtype) or heads > 65535:
        raise ValueError(
            f"attention_tangent: head dimensions up to {largest_head_dim(q.dtype)} in {q.dtype} and"
            f" 65535 heads, not {head_dim} and {heads}"
        )
    require_device("attention_tangent", *inputs)
    shape = batch, tokens, heads * head_dim
    y, dy = (torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if not y.numel():
        return y, dy
    values, changes = _alike(q, k, v), _alike(dq, dk, dv)
    launch, per_launch = choose_launch(head_dim, q.dtype), 65535 // heads
    constants = _constants(heads, head_dim, launch)
    with torch.cuda.device_of(q):
        for first in range(0, batch, per_launch):  # the second grid dimension is that of CUDA
            rows = slice(first, first + per_launch)
            parts = [each[rows] for each in (*values, *changes, y, dy)]
            attention_tangent_kernel[(triton.cdiv(tokens, launch.block_m), len(parts[0]) * heads)](
                *parts, tokens, *values[0].stride()[:3], *changes[0].stride()[:3], 1 / head_dim,
                **constants, num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
    return y, dy


def _fake(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    y = q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    return y, torch.empty_like(y)


attention_tangent.register_fake(_fake)


def compile_cases() -> Iterator[CompileCase]:
    """The presets' head dimensions and the widest of each launch."""
    for head_dim in (24, 32, 64, 72, 128, 256):
        for dtype, kind in DTYPES.items():
            if head_dim > largest_head_dim(dtype) or (kind == "fp16" and head_dim not in (64, 72)):
                continue
            launch = choose_launch(head_dim, dtype)
            names = [name + "_ptr" for name in ("q", "k", "v", "dq", "dk", "dv", "y", "dy")]
            types = dict.fromkeys(names, f"*{kind}") | {"scale": "fp32"}
            yield kernel_case(
                f"attention_tangent/{head_dim}/{kind}", attention_tangent_kernel, types,
                _constants(12, head_dim, launch), ("tokens",),
                num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
