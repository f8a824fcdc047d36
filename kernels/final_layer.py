"""Final projection, unpatchify, guidance and Euler time update in one pass: v = unpatchify(h W^T +
b); x' = x + step*v.

h (B, N, D), normalised and modulated already (last_group_end or gated_residual); with guidance h
(2B, N, D), first the rows with labels, then those with the null label, and v = v_null +
guidance*(v_label - v_null). W (p*p*C, D), b (p*p*C,) in h's dtype, pixel order (row, column,
channel) within a patch; x, x', v (B, C, H, W). Sums, guidance and update are float32 and rounded
once. Bytes: one read of h; x and v are 1/48 of that in DiT-B/2. Sampling only: training uses the
model's own layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from odelt_fast.kernels.compile_case import CompileCase, overlap_options
from odelt_fast.kernels.device import launch_options, require_device, wait_for_inputs
from odelt_fast.kernels.rows import DTYPES, WIDTHS, check_tokens, rows

_BLOCK_OUT, _BLOCK_D, _WARPS, _STAGES = 64, 64, 4, 4
# (fewest tokens of all samples, tokens of a tile): small tiles spread a batch of one sample over
# more multiprocessors.
_TILES = ((16384, 64), (0, 16))


def final_layer_reference(
    x: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    height: int,
    width: int,
    step: float,
    guidance: float | None,
) -> Tensor:
    """The same in plain PyTorch: velocity in h's dtype, then in x's; x None returns the
    velocity."""
    patches = torch.nn.functional.linear(h, weight, bias)
    grid = patches.unflatten(1, (height // patch_size, width // patch_size)).unflatten(
        3, (patch_size, patch_size, -1)
    )
    velocity = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(h), -1, height, width)
    velocity = velocity if x is None else velocity.to(x.dtype)
    if guidance is not None:
        label, null = velocity.chunk(2)
        velocity = null + guidance * (label - null)
    return velocity if x is None else x + velocity * step


@triton.jit
def _project(
    h,
    weight,
    o_n,
    o_out,
    tokens,
    h_token,
    OUT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h W^T of a tile: (BLOCK_N, BLOCK_OUT) float32."""
    b_sum = tl.zeros((o_n.shape[0], o_out.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_h = tl.load(
            h + o_n[:, None] * h_token + o_d[None, :],
            mask=(o_n < tokens)[:, None] & m_d[None, :],
            other=0.0,
        )
        b_weight = tl.load(
            weight + o_out[None, :] * D + o_d[:, None],
            mask=m_d[:, None] & (o_out < OUT)[None, :],
            other=0.0,
        )
        b_sum = tl.dot(b_h, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def _kernel(
    x, h, weight, bias, out, batch, tokens, columns, h_batch, h_token, step, guidance,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, D: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    OUT: tl.constexpr = PATCH * PATCH * CHANNELS
    out_blocks: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    chunks = tl.cdiv(tokens, BLOCK_N)
    i_tile = tl.program_id(0) // out_blocks
    i_b = (i_tile // chunks).to(tl.int64)
    o_n = ((i_tile % chunks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_out = (tl.program_id(0) % out_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    b_v = _project(h + i_b * h_batch, weight, o_n, o_out, tokens, h_token, OUT, D, BLOCK_D)
    b_bias = tl.load(bias + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)[None, :]
    b_v += b_bias
    if GUIDED:
        b_null = (
            _project(
                h + (i_b + batch) * h_batch, weight, o_n, o_out, tokens, h_token, OUT, D, BLOCK_D
            )
            + b_bias
        )
        b_v = tl.fma(guidance, b_v - b_null, b_null)
    o_row = (o_n // columns * PATCH)[:, None] + (o_out // (PATCH * CHANNELS))[None, :]
    o_column = (o_n % columns * PATCH)[:, None] + (o_out // CHANNELS % PATCH)[None, :]
    o_channel = i_b * CHANNELS + (o_out % CHANNELS).to(tl.int64)[None, :]
    o_pixel = o_channel * tokens * (PATCH * PATCH) + o_row * columns * PATCH + o_column
    mask = (o_n < tokens)[:, None] & (o_out < OUT)[None, :]
    if x is not None:
        b_v = tl.fma(step, b_v, tl.load(x + o_pixel, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + o_pixel, b_v.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    patch_size: int,
    step: float,
    guidance: float | None,
) -> None:
    check_tokens("h", h)
    batch, channels, height, width = out.shape
    if patch_size < 1 or height % patch_size or width % patch_size or out.dtype not in DTYPES:
        raise ValueError(
            f"images must be in float16, bfloat16, float32, sides multiples of {patch_size}, not"
            f" {height} x {width} in {out.dtype}"
        )
    tokens, values = height * width // patch_size**2, channels * patch_size**2
    samples = batch if guidance is None else 2 * batch
    if h.shape[:2] != (samples, tokens):
        raise ValueError(
            f"h must be ({samples}, {tokens}, D) for {batch} images of {height} x {width}, not"
            f" {tuple(h.shape)}"
        )
    size = h.shape[2]
    if (
        weight.shape != (values, size)
        or bias.shape != (values,)
        or not weight.dtype == bias.dtype == h.dtype
    ):
        raise ValueError(
            f"weight and bias must be ({values}, {size}) and ({values},) in {h.dtype}, "
            f"not {tuple(weight.shape)} in {weight.dtype} and {tuple(bias.shape)} in {bias.dtype}"
        )
    require_device("final_layer", x, h, weight, bias)
    if not out.numel():
        return
    h, weight, bias, x = (
        rows(h),
        weight.contiguous(),
        bias.contiguous(),
        None if x is None else x.contiguous(),
    )
    block_n, block_out, block_d = _blocks(batch * tokens, values, size)
    with torch.cuda.device_of(h):
        _kernel[(batch * triton.cdiv(tokens, block_n) * triton.cdiv(values, block_out),)](
            x, h, weight, bias, out, batch, tokens, width // patch_size, h.stride(0), h.stride(1), step, guidance or 0.0,
            CHANNELS=channels, PATCH=patch_size, D=size, GUIDED=guidance is not None,
            BLOCK_N=block_n, BLOCK_OUT=block_out, BLOCK_D=block_d, **launch_options(h.device, _WARPS, _STAGES),
        )  # fmt: skip


def _blocks(total: int, values: int, size: int) -> tuple[int, int, int]:
    block_n = next(tile for least, tile in _TILES if total >= least)
    return (
        block_n,
        min(_BLOCK_OUT, max(16, triton.next_power_of_2(values))),
        min(_BLOCK_D, max(16, triton.next_power_of_2(size))),
    )


@torch.library.custom_op("odelt_fast::final_euler", mutates_args=())
def final_euler(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    step: float,
    guidance: float | None = None,
) -> Tensor:
    """x + step*v: x (B, C, H, W) float16, bfloat16 or float32 -> the same shape and dtype,
    contiguous.

    h (B, N, D), or with a guidance scale (2B, N, D), labels first; weight (p*p*C, D) and bias
    (p*p*C,) in h's dtype. Any strides. Raises ValueError for shapes, dtypes and devices that do not
    fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(x.shape)}")
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    _launch(x, h, weight, bias, out, patch_size, step, guidance)
    return out


@final_euler.register_fake
def _(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    step: float,
    guidance: float | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("odelt_fast::final_velocity", mutates_args=())
def final_velocity(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    """v (B, C, height, width) in `dtype`: the state's, so that a float32 solver gets the unrounded
    sum. For the rest see final_euler."""
    values = weight.shape[0]
    if patch_size < 1 or values % patch_size**2 or (guidance is not None and h.shape[0] % 2):
        raise ValueError(
            f"{values} values a patch of {patch_size}, {h.shape[0]} rows of h with guidance"
            f" {guidance}: these do not fit"
        )
    shape = (
        h.shape[0] if guidance is None else h.shape[0] // 2,
        values // patch_size**2,
        height,
        width,
    )
    out = torch.empty(shape, dtype=dtype, device=h.device)
    _launch(None, h, weight, bias, out, patch_size, 0.0, guidance)
    return out


@final_velocity.register_fake
def _(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    guidance: float | None = None,
) -> Tensor:
    batch = h.shape[0] if guidance is None else h.shape[0] // 2
    return h.new_empty((batch, weight.shape[0] // patch_size**2, height, width), dtype=dtype)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype, width and tile, with and without guidance, on latents of 4 channels in 2 x 2
    patches; update or velocity alone."""
    forms = {
        "euler": (False, True, False),
        "euler_guided": (True, True, False),
        "velocity_guided": (True, False, False),
    }
    for dtype, size, (least, _) in itertools.product(DTYPES.values(), WIDTHS, _TILES):
        for form, (guided, euler, pdl) in (
            forms | ({"overlapped": (False, True, True)} if dtype == "bf16" else {})
        ).items():
            block_n, block_out, block_d = _blocks(least, 16, size)
            constants: dict[str, object] = {
                "CHANNELS": 4,
                "PATCH": 2,
                "D": size,
                "GUIDED": guided,
                "PDL": pdl,
            }
            constants |= {"BLOCK_N": block_n, "BLOCK_OUT": block_out, "BLOCK_D": block_d} | (
                {} if euler else {"x": None}
            )
            kinds = {"x": "*fp32", "out": "*fp32", "step": "fp32", "guidance": "fp32"}
            kinds |= {
                **dict.fromkeys(("h", "weight", "bias"), f"*{dtype}"),
                **dict.fromkeys(constants, "constexpr"),
            }
            signature = {name: kinds.get(name, "i32") for name in _kernel.arg_names}
            aligned = ("x", "h", "weight", "bias", "out", "tokens", "columns", "h_batch", "h_token")
            divisible = tuple(
                i for i, name in enumerate(signature) if name in aligned and name not in constants
            )
            name = f"final_layer/{form}/{dtype}/{size}/{block_n}"
            yield CompileCase(
                name,
                _kernel,
                signature,
                constants,
                divisible,
                _WARPS,
                _STAGES,
                **overlap_options(pdl),
            )
