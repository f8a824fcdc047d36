"""Patch embedding + position in one pass: tokens[n] = W patch(n) + b + position[n].

x (B, C, H, W): state, in any of the dtypes, rounded to W's first; W (D, C*p*p), the flattened
convolution kernel; b (D,); positions (N, D) float32; tokens (B, N, D) in W's dtype, row-major over
the H/p x W/p patches, accumulated in float32 and rounded once. Bytes: x read D/64 times from cache
(16 values a patch), positions once a sample from cache, (B, N, D) written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, WIDTHS, CompileCase, kernel_case
from .device import launch_options, require_device, wait_for_inputs
from .moments import moments_reference, store_moments
from .rows import check_layer

_BLOCK_D, _WARPS = 64, 4


def patch_embed_reference(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    """The same in plain PyTorch: convolution in the weights' dtype, position added in its own."""
    kernel = weight.unflatten(1, (x.shape[1], patch_size, patch_size))
    tokens = F.conv2d(x.to(weight.dtype), kernel, bias, patch_size).flatten(2).transpose(1, 2)
    return (tokens + positions).to(weight.dtype)


@triton.jit
def _kernel(
    x, weight, bias, positions, out, moments,
    total, tokens, columns, x_batch, x_channel, x_row, x_column, K, D,
    PATCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all samples' tokens * tiles of D,)."""
    wait_for_inputs(PDL)
    blocks = tl.cdiv(D, BLOCK_D)
    o_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = o_m < total
    m_d = o_d < D
    i_n = (o_m % tokens).to(tl.int32)
    p_patch = x + (o_m // tokens) * x_batch + (i_n // columns).to(tl.int64) * PATCH * x_row
    p_patch += (i_n % columns).to(tl.int64) * PATCH * x_column
    b_out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_pixel = (o_k // (PATCH * PATCH)).to(tl.int64) * x_channel
        o_pixel += (o_k // PATCH % PATCH).to(tl.int64) * x_row
        o_pixel += (o_k % PATCH).to(tl.int64) * x_column
        p_x = p_patch[:, None] + o_pixel[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
        p_weight = weight + o_d.to(tl.int64)[None, :] * K + o_k[:, None]
        b_weight = tl.load(p_weight, mask=m_k[:, None] & m_d[None, :], other=0.0)
        b_out = tl.dot(b_x.to(b_weight.dtype), b_weight, b_out, input_precision="ieee")
    mask = m_m[:, None] & m_d[None, :]
    b_out += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_out += tl.load(positions + i_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=mask, other=0.0)
    b_out = b_out.to(out.dtype.element_ty)
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_out, mask=mask)
    if moments is not None:
        store_moments(moments, b_out, o_m, m_m, total, o_d, tl.program_id(0) % blocks, D)


def patch_embed_moments_reference(*given: Any) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    tokens = patch_embed_reference(*given)
    return tokens, moments_reference(tokens)


@torch.library.custom_op("odelt_fast::patch_embed", mutates_args=())
def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    """Tokens of the patches of x.

    Args:
        x: (B, C, H, W) float16, bfloat16 or float32, any strides.
        weight, bias: (D, C*p*p) and (D,) of one of these dtypes.
        positions: (H*W/p^2, D) float32.
        patch_size: p.

    Returns:
        (B, H*W/p^2, D) in the dtype of weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _launch(x, weight, bias, positions, patch_size)[0]


@torch.library.custom_op("odelt_fast::patch_embed_moments", mutates_args=())
def patch_embed_moments(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    """The same tokens, and their moments (2, B*N, parts) float32 (moments.py)."""
    tokens, moments = _launch(x, weight, bias, positions, patch_size, True)
    assert moments is not None
    return tokens, moments


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int,
    moments: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    whole = x.dim() == 4 and patch_size >= 1 and 0 not in x.shape[1:]
    if not whole or x.shape[2] % patch_size or x.shape[3] % patch_size or x.dtype not in DTYPES:
        raise ValueError(
            "x must be (B, C, H, W) in float16, bfloat16 or float32, H and W multiples of"
            f" {patch_size}, not {tuple(x.shape)} in {x.dtype}"
        )
    batch, channels, height, width = x.shape
    tokens, values = height * width // patch_size**2, channels * patch_size**2
    size = len(weight)
    check_layer(weight, bias, "D", values)
    if positions.shape != (tokens, size) or positions.dtype != torch.float32:
        raise ValueError(
            f"positions must be ({tokens}, {size}) float32, not {tuple(positions.shape)} in"
            f" {positions.dtype}"
        )
    require_device("patch_embed", x, weight, bias, positions)
    weight, bias, positions = weight.contiguous(), bias.contiguous(), positions.contiguous()
    out = torch.empty((batch, tokens, size), dtype=weight.dtype, device=x.device)
    parts = 2, batch * tokens, triton.cdiv(size, _BLOCK_D)
    kept = torch.empty(parts, dtype=torch.float32, device=x.device) if moments else None
    if not out.numel():
        return out, kept
    blocks = _blocks(weight.dtype, patch_size, values)
    tiles = triton.cdiv(batch * tokens, blocks["BLOCK_N"]) * triton.cdiv(size, _BLOCK_D)
    with torch.cuda.device_of(x):
        _kernel[(tiles,)](
            x, weight, bias, positions, out, kept,
            batch * tokens, tokens, width // patch_size, *x.stride(), values, size,
            **blocks, **launch_options(x.device, _WARPS),
        )  # fmt: skip
    return out, kept


def _blocks(dtype: torch.dtype, patch_size: int, values: int) -> dict[str, int]:
    block_n = 32 if dtype == torch.float32 else 64  # 64 rows spill in float32 on sm_80 (Triton 3.8)
    block_k = min(64, max(16, triton.next_power_of_2(values)))
    return {"PATCH": patch_size, "BLOCK_N": block_n, "BLOCK_D": _BLOCK_D, "BLOCK_K": block_k}


def _fake_moments(*given: Any) -> tuple[Tensor, Tensor]:
    tokens = patch_embed_reference(*given).contiguous()
    parts = 2, tokens.shape[0] * tokens.shape[1], -(-tokens.shape[2] // _BLOCK_D)
    return tokens, tokens.new_empty(parts, dtype=torch.float32)


patch_embed.register_fake(lambda *given: patch_embed_reference(*given).contiguous())
patch_embed_moments.register_fake(_fake_moments)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and width, latents of 4 channels in 2 x 2 patches.

    The state is float32 or in the weights' dtype.
    """
    calls = [(dtype, state) for dtype in DTYPES for state in sorted({DTYPES[dtype], "fp32"})]
    forms = {"": {"PDL": False, "moments": None}, "overlapped/": {"PDL": True, "moments": None}}
    forms["moments/"] = {"PDL": False}
    alone = [(torch.bfloat16, "fp32", form) for form in ("overlapped/", "moments/")]
    for dtype, state, form in (*((*call, "") for call in calls), *alone):
        kind = DTYPES[dtype]
        types = dict.fromkeys(("weight", "bias", "out"), f"*{kind}")
        types |= {"x": f"*{state}", "positions": "*fp32", "moments": "*fp32"}
        for size in WIDTHS:
            yield kernel_case(
                f"patch_embed/{form}{kind}/{state}/{size}", _kernel, types,
                {**_blocks(dtype, 2, 16), **forms[form]}, ("x_column", "columns"), num_warps=_WARPS,
            )  # fmt: skip
