"""Self-attention of short sequences on packed qkv: y = softmax(q k^T / head_dim) v for every head.

qkv (B, N, 3*D) with q, k, v each (heads, head_dim) and D = heads * head_dim -> y (B, N, D). The
logits' scale is 1/head_dim, as the reference network has it. One pass over the keys; scores,
softmax statistics and the output accumulator are float32; probabilities are rounded to the type of
v for the second product. Bytes moved: qkv once (keys and values of a head are read again by each
tile of queries, from the L2), y once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, CompileCase, kernel_case
from .device import launch_options, require_device, wait_for_inputs
from .rows import rows

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Launch:
    """Tile of queries, tile of keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By hand, from register and shared-memory counts of the compile gate; not yet chosen by timing.
# Keyed by the widest head dim they serve.
LAUNCHES = MappingProxyType(
    {
        64: Launch(64, 64, 4, 3),
        96: Launch(64, 64, 4, 2),
        128: Launch(64, 32, 4, 2),  # 64 keys spill on sm_80
        256: Launch(64, 32, 8, 2),
    }
)
# Exact float32 products run on the ordinary units and hold whole operands in registers: small
# tiles.
FLOAT32_LAUNCHES = MappingProxyType(
    {64: Launch(32, 32, 4, 2), 128: Launch(32, 16, 4, 2), 256: Launch(16, 16, 4, 2)}
)


def attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The same in plain PyTorch, in the dtype of qkv."""
    heads = qkv.unflatten(2, (3, num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
    y = F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1])
    return y.transpose(1, 2).flatten(2)


def head_parts(head_dim: int) -> tuple[int, int]:
    """(main, tail): powers of two of at least 16 that cover head_dim. 72 -> (64, 16), not 128.

    tail is 0 where main is enough.
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@triton.jit
def attention_tile(
    qkv_ptr, out_ptr, i_m, i_head, i_batch, tokens, batch_stride, token_stride, scale_log2,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile i_m of the queries of one head of sample i_batch (int64). HEAD_DIM columns are MAIN +
    TAIL, masked beyond HEAD_DIM."""
    width: tl.constexpr = HEADS * HEAD_DIM
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, MAIN)
    mask_m = offs_m < tokens
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    p_head = qkv_ptr + i_batch * batch_stride + i_head * HEAD_DIM
    p_q = p_head + offs_m.to(tl.int64)[:, None] * token_stride
    p_k = p_head + width + offs_n.to(tl.int64)[:, None] * token_stride
    p_v = p_k + width
    q = tl.load(p_q + offs_d[None, :], mask=mask_q, other=0.0)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL > 0:
        offs_t = MAIN + tl.arange(0, TAIL)
        mask_q_tail = mask_m[:, None] & (offs_t < HEAD_DIM)[None, :]
        q_tail = tl.load(p_q + offs_t[None, :], mask=mask_q_tail, other=0.0)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        mask_n = start + offs_n < tokens
        mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(p_k + offs_d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        if TAIL > 0:
            mask_tail = mask_n[:, None] & (offs_t < HEAD_DIM)[None, :]
            k_tail = tl.load(p_k + offs_t[None, :], mask=mask_tail, other=0.0)
            # Two dots into one accumulator are miscompiled on sm_103 (triton-lang/triton#10821),
            # and Triton makes one of a sum of dots: therefore scaled first.
            tail = tl.dot(q_tail, k_tail.T, input_precision="ieee")
            scores = tl.fma(tail, scale_log2, scores)
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        # Every tile of keys holds at least one real key, so the new peak is finite and no
        # difference of infinities arises.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(p_v + offs_d[None, :], mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        if TAIL > 0:
            v_tail = tl.load(p_v + offs_t[None, :], mask=mask_tail, other=0.0)
            acc_tail *= shrink[:, None]
            acc_tail = tl.dot(weights.to(v.dtype), v_tail, acc_tail, input_precision="ieee")
        peak = new_peak
        p_k += BLOCK_N * token_stride
        p_v += BLOCK_N * token_stride
    p_out = out_ptr + ((i_batch * tokens + offs_m) * width + i_head * HEAD_DIM)[:, None]
    tl.store(p_out + offs_d[None, :], acc / total[:, None], mask=mask_q)
    if TAIL > 0:
        tl.store(p_out + offs_t[None, :], acc_tail / total[:, None], mask=mask_q_tail)


@triton.jit
def attention_kernel(
    qkv_ptr, out_ptr, tokens, batch_stride, token_stride, scale_log2,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * heads)."""
    wait_for_inputs(PDL)
    i_head = tl.program_id(1) % HEADS
    i_batch = (tl.program_id(1) // HEADS).to(tl.int64)
    attention_tile(
        qkv_ptr, out_ptr, tl.program_id(0), i_head, i_batch,
        tokens, batch_stride, token_stride, scale_log2,
        HEADS, HEAD_DIM, MAIN, TAIL, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def choose_launch(head_dim: int, dtype: torch.dtype) -> Launch:
    """The launch configuration for a head dimension of at most MAX_HEAD_DIM."""
    table = FLOAT32_LAUNCHES if dtype == torch.float32 else LAUNCHES
    return table[min(width for width in table if head_dim <= width)]


def _constants(num_heads: int, head_dim: int, launch: Launch) -> dict[str, int]:
    main, tail = head_parts(head_dim)
    heads = {"HEADS": num_heads, "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail}
    return heads | {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}


def _launch(qkv: Tensor, out: Tensor, num_heads: int) -> None:
    """Writes out (B, N, D, contiguous). qkv (B, N, 3*D) with last stride 1."""
    batch, tokens, width = out.shape
    head_dim = width // num_heads
    launch = choose_launch(head_dim, qkv.dtype)
    constants = _constants(num_heads, head_dim, launch)
    options = launch_options(qkv.device, launch.num_warps, launch.num_stages)
    per_launch = 65535 // num_heads  # samples: the second grid dimension is that of CUDA
    with torch.cuda.device_of(qkv):
        for first in range(0, batch, per_launch):
            part, part_out = qkv[first : first + per_launch], out[first : first + per_launch]
            attention_kernel[(triton.cdiv(tokens, launch.block_m), len(part) * num_heads)](
                part, part_out, tokens, qkv.stride(0), qkv.stride(1),
                1.4426950408889634 / head_dim, **constants, **options,
            )  # fmt: skip


@torch.library.custom_op("odelt_fast::attention", mutates_args=())
def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """y of the module's equation.

    Args:
        qkv: (B, N, 3*D) float32, bfloat16 or float16, any strides; copied where the last is not 1.
        num_heads: heads; D / heads is at most 256.

    Returns:
        (B, N, D) in the dtype of qkv, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(
            f"attention: qkv {tuple(qkv.shape)} does not fit {num_heads} heads:"
            " (B, N, 3 * heads * head_dim)"
        )
    if qkv.dtype not in DTYPES:
        raise ValueError(f"attention: qkv must be float32, bfloat16 or float16, not {qkv.dtype}")
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim > MAX_HEAD_DIM or num_heads > 65535:
        raise ValueError(
            f"attention: head dimensions up to {MAX_HEAD_DIM} and 65535 heads, not {head_dim} and"
            f" {num_heads}"
        )
    require_device("attention", qkv)
    out = torch.empty((*qkv.shape[:2], qkv.shape[2] // 3), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        _launch(rows(qkv), out, num_heads)
    return out


attention.register_fake(lambda qkv, heads: attention_reference(qkv, heads).contiguous())


def compile_cases() -> Iterator[CompileCase]:
    """The presets' head dimensions (24 digits, 32, 64, 72) and the widest of each launch."""
    for head_dim, dtype, pdl in itertools.product(
        (24, 32, 64, 72, 128, 256), DTYPES, (False, True)
    ):
        kind = DTYPES[dtype]
        if (kind == "fp16" or pdl) and (head_dim not in (64, 72) or (pdl and kind != "bf16")):
            continue
        launch = choose_launch(head_dim, dtype)
        types = {"qkv_ptr": f"*{kind}", "out_ptr": f"*{kind}", "scale_log2": "fp32"}
        yield kernel_case(
            f"attention/{head_dim}/{kind}{'/pdl' * pdl}", attention_kernel, types,
            {**_constants(12, head_dim, launch), "PDL": pdl}, ("tokens",),
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
