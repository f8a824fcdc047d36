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
from torch.nn.grad import conv2d_weight

from odelt_fast.kernels.compile_case import CompileCase, overlap_options
from odelt_fast.kernels.device import launch_options, require_device, wait_for_inputs
from odelt_fast.kernels.rows import DTYPES, WIDTHS

_BLOCK_D, _WARPS = 64, 4


def patch_embed_reference(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    """The same in plain PyTorch, as the model does it: convolution in the weights' dtype, position
    added in positions' dtype."""
    kernel = weight.unflatten(1, (x.shape[1], patch_size, patch_size))
    tokens = F.conv2d(x.to(weight.dtype), kernel, bias, patch_size).flatten(2).transpose(1, 2)
    return (tokens + positions).to(weight.dtype)


@triton.jit
def _kernel(
    x, weight, bias, positions, out, total, tokens, columns, x_batch, x_channel, x_row, x_column, K, D,
    PATCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    blocks = tl.cdiv(D, BLOCK_D)
    o_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_N + tl.arange(
        0, BLOCK_N
    )  # row of all samples' tokens
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
        o_pixel += (o_k // PATCH % PATCH).to(tl.int64) * x_row + (o_k % PATCH).to(
            tl.int64
        ) * x_column
        b_x = tl.load(
            p_patch[:, None] + o_pixel[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0
        )
        b_weight = tl.load(
            weight + o_d.to(tl.int64)[None, :] * K + o_k[:, None],
            mask=m_k[:, None] & m_d[None, :],
            other=0.0,
        )
        b_out = tl.dot(b_x.to(b_weight.dtype), b_weight, b_out, input_precision="ieee")
    mask = m_m[:, None] & m_d[None, :]
    b_out += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_out += tl.load(positions + i_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=mask, other=0.0)
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("odelt_fast::patch_embed", mutates_args=())
def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int
) -> Tensor:
    """Tokens (B, H*W/p^2, D) in weight's dtype, of x (B, C, H, W); differentiable, but not in
    positions.

    x float16, bfloat16 or float32, any strides; weight (D, C*p*p) and bias (D,) of one dtype among
    these, positions (H*W/p^2, D) float32. Raises ValueError for shapes, dtypes and devices that do
    not fit.
    """
    whole = (
        x.dim() == 4
        and patch_size >= 1
        and 0 not in x.shape[1:]
        and not x.shape[2] % patch_size
        and not x.shape[3] % patch_size
    )
    if not whole or x.dtype not in DTYPES:
        raise ValueError(
            "x must be (B, C, H, W) in float16, bfloat16 or float32, H and W multiples of"
            f" {patch_size}, not {tuple(x.shape)} in {x.dtype}"
        )
    batch, channels, height, width = x.shape
    tokens, values = height * width // patch_size**2, channels * patch_size**2
    size = len(weight)
    if (
        weight.shape != (size, values)
        or bias.shape != (size,)
        or weight.dtype not in DTYPES
        or bias.dtype != weight.dtype
    ):
        raise ValueError(
            f"weight and bias must be (D, {values}) and (D,) in float16, bfloat16 or float32, "
            f"not {tuple(weight.shape)} in {weight.dtype} and {tuple(bias.shape)} in {bias.dtype}"
        )
    if positions.shape != (tokens, size) or positions.dtype != torch.float32:
        raise ValueError(
            f"positions must be ({tokens}, {size}) float32, not {tuple(positions.shape)} in"
            f" {positions.dtype}"
        )
    require_device("patch_embed", x, weight, bias, positions)
    weight, bias, positions = weight.contiguous(), bias.contiguous(), positions.contiguous()
    out = torch.empty((batch, tokens, size), dtype=weight.dtype, device=x.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(batch * tokens, _block_n(weight.dtype)) * triton.cdiv(size, _BLOCK_D),)](
            x, weight, bias, positions, out, batch * tokens, tokens, width // patch_size, *x.stride(), values, size,
            PATCH=patch_size, BLOCK_N=_block_n(weight.dtype), BLOCK_D=_BLOCK_D, BLOCK_K=_block_k(values),
            **launch_options(x.device, _WARPS),
        )  # fmt: skip
    return out


def _block_n(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64  # 64 rows spill in float32 on sm_80 (Triton 3.8)


def _block_k(values: int) -> int:
    return min(64, max(16, triton.next_power_of_2(values)))


@patch_embed.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, patch_size: int) -> Tensor:
    return weight.new_empty(
        (x.shape[0], (x.shape[2] // patch_size) * (x.shape[3] // patch_size), weight.shape[0])
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.patch = inputs[4]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Small products, left to cuBLAS: patches (B, N, K) are 1/48 of the tokens in DiT-B/2.
    x, weight = ctx.saved_tensors[0], ctx.saved_tensors[1].contiguous()  # see modulation.py
    patch, (batch, channels, height, width) = ctx.patch, x.shape
    grid = (batch, channels, height // patch, patch, width // patch, patch)
    patches = (
        x.reshape(grid).permute(0, 2, 4, 1, 3, 5).reshape(-1, weight.shape[1]).to(weight.dtype)
    )
    flat = grad.reshape(-1, grad.shape[2]).contiguous()
    pixels = (flat @ weight).reshape(batch, grid[2], grid[4], channels, patch, patch)
    grad_x = pixels.permute(0, 3, 1, 4, 2, 5).reshape(x.shape).to(x.dtype)
    if (
        weight.dtype == torch.float32
    ):  # a product's one sum over B*N terms can have twice the error of the convolution's sums
        image = grad.transpose(1, 2).unflatten(2, (grid[2], grid[4]))
        kernel = (weight.shape[0], channels, patch, patch)
        grad_weight = conv2d_weight(x.to(weight.dtype), kernel, image, patch).flatten(1)
    else:
        grad_weight = flat.t() @ patches
    return grad_x, grad_weight, flat.sum(0), None, None


patch_embed.register_autograd(_gradients, setup_context=_save)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype and network width, on latents of 4 channels in 2 x 2 patches; the state is
    float32 or the weights' dtype."""
    kinds_of_call = [
        (dtype, state, False) for dtype in DTYPES for state in sorted({DTYPES[dtype], "fp32"})
    ]
    for weights, state, pdl in [*kinds_of_call, (torch.bfloat16, "fp32", True)]:
        dtype = DTYPES[weights]
        for size in WIDTHS:
            constants: dict[str, object] = {
                "PATCH": 2,
                "BLOCK_N": _block_n(weights),
                "BLOCK_D": _BLOCK_D,
                "BLOCK_K": _block_k(16),
                "PDL": pdl,
            }
            kinds = {
                "x": f"*{state}",
                "positions": "*fp32",
                **dict.fromkeys(("weight", "bias", "out"), f"*{dtype}"),
            }
            kinds |= dict.fromkeys(constants, "constexpr")
            signature = {name: kinds.get(name, "i32") for name in _kernel.arg_names}
            unaligned = ("x_column", "columns", *constants)
            divisible = tuple(i for i, name in enumerate(signature) if name not in unaligned)
            name = f"patch_embed/{'overlapped/' * pdl}{dtype}/{state}/{size}"
            yield CompileCase(
                name, _kernel, signature, constants, divisible, _WARPS, **overlap_options(pdl)
            )
