"""The end of an evaluation in one pass: projection, unpatchify, guidance, Euler update.

v = unpatchify(h W^T + b); x' = x + step*v. h (B, N, D), normalised and modulated already
(last_group_end or gated_residual); with guidance h (2B, N, D), first the rows with labels, then
those with the null label, and v = v_null + guidance*(v_label - v_null) in the first guided_channels
(None: in all; the others keep v_label). W (p*p*C, D), b (p*p*C,) in h's dtype, pixel order (row,
column, channel) within a patch; x, x', v (B, C, H, W). Sums, guidance and update are float32 and
rounded once. Bytes: one read of h; x and v are 1/48 of that in DiT-B/2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import DTYPES, WIDTHS, CompileCase, kernel_case
from .device import launch_options, require_device, wait_for_inputs
from .rows import check_layer, check_tokens, like_first, rows

_BLOCK_OUT, _BLOCK_D, _WARPS, _STAGES = 64, 64, 4, 4
# (fewest tokens of all samples, tokens of a tile): small tiles spread a batch of one sample over
# more multiprocessors.
_TILES = ((16384, 64), (0, 16))


def final_velocity_reference(
    h: Tensor, weight: Tensor, bias: Tensor, patch_size: int,
    height: int, width: int, dtype: torch.dtype, guidance: float | None = None,
    guided_channels: int | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch: the product in h's dtype, guidance in `dtype`."""
    grid = F.linear(h, weight, bias).unflatten(1, (height // patch_size, width // patch_size))
    pixels = grid.unflatten(3, (patch_size, patch_size, -1)).permute(0, 5, 1, 3, 2, 4)
    velocity = pixels.reshape(len(h), -1, height, width).to(dtype)
    if guidance is None:
        return velocity
    label, null = velocity.chunk(2)
    mixed = null + guidance * (label - null)
    return (
        mixed
        if guided_channels is None
        else torch.cat([mixed[:, :guided_channels], label[:, guided_channels:]], dim=1)
    )


def final_euler_reference(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, patch_size: int,
    step: float, guidance: float | None = None, guided_channels: int | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch."""
    height, width = x.shape[2:]
    velocity = final_velocity_reference(
        h, weight, bias, patch_size, height, width, x.dtype, guidance, guided_channels
    )
    return x + velocity * step


@triton.jit
def _project(
    h, weight, o_n, o_out, tokens, h_token,
    OUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h W^T of a tile: (BLOCK_N, BLOCK_OUT) float32."""
    b_sum = tl.zeros((o_n.shape[0], o_out.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_h = h + o_n[:, None] * h_token + o_d[None, :]
        b_h = tl.load(p_h, mask=(o_n < tokens)[:, None] & m_d[None, :], other=0.0)
        p_weight = weight + o_out[None, :] * D + o_d[:, None]
        m_weight = m_d[:, None] & (o_out < OUT)[None, :]
        b_weight = tl.load(p_weight, mask=m_weight, other=0.0)
        b_sum = tl.dot(b_h, b_weight, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def _kernel(
    x, h, weight, bias, out, batch, tokens, columns, h_batch, h_token, step, guidance,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, D: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * tiles of tokens * tiles of a patch's values,). x None: out is the velocity. GUIDED:
    how many of the channels are guided."""
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
        p_null = h + (i_b + batch) * h_batch
        b_null = _project(p_null, weight, o_n, o_out, tokens, h_token, OUT, D, BLOCK_D) + b_bias
        b_mixed = tl.fma(guidance, b_v - b_null, b_null)
        if GUIDED < CHANNELS:
            b_mixed = tl.where((o_out % CHANNELS < GUIDED)[None, :], b_mixed, b_v)
        b_v = b_mixed
    o_row = (o_n // columns * PATCH)[:, None] + (o_out // (PATCH * CHANNELS))[None, :]
    o_column = (o_n % columns * PATCH)[:, None] + (o_out // CHANNELS % PATCH)[None, :]
    o_channel = i_b * CHANNELS + (o_out % CHANNELS).to(tl.int64)[None, :]
    o_pixel = o_channel * tokens * (PATCH * PATCH) + o_row * columns * PATCH + o_column
    mask = (o_n < tokens)[:, None] & (o_out < OUT)[None, :]
    if x is not None:
        b_v = tl.fma(step, b_v, tl.load(x + o_pixel, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + o_pixel, b_v, mask=mask)


def _launch(
    x: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor, out: Tensor,
    patch_size: int, step: float, guidance: float | None, guided_channels: int | None,
) -> None:  # fmt: skip
    check_tokens("h", h)
    batch, channels, height, width = out.shape
    guided = channels if guided_channels is None else guided_channels
    if not 1 <= guided <= max(channels, 1):
        raise ValueError(f"guided_channels must be from 1 to {channels}, not {guided}")
    if patch_size < 1 or height % patch_size or width % patch_size or out.dtype not in DTYPES:
        raise ValueError(
            f"images must be in float16, bfloat16, float32, sides multiples of {patch_size}, not"
            f" {height} x {width} in {out.dtype}"
        )
    tokens, values = height * width // patch_size**2, channels * patch_size**2
    samples, size = batch if guidance is None else 2 * batch, h.shape[2]
    if h.shape[:2] != (samples, tokens):
        raise ValueError(
            f"h must be ({samples}, {tokens}, D) for {batch} images of {height} x {width}, not"
            f" {tuple(h.shape)}"
        )
    check_layer(weight, bias, values, size)
    if weight.dtype != h.dtype:
        raise ValueError(f"weight must be in {h.dtype} as h is, not in {weight.dtype}")
    require_device("final_layer", x, h, weight, bias)
    if not out.numel():
        return
    h, weight, bias = rows(h), weight.contiguous(), bias.contiguous()
    blocks = _blocks(batch * tokens, values, size)
    tiles = triton.cdiv(tokens, blocks["BLOCK_N"]) * triton.cdiv(values, blocks["BLOCK_OUT"])
    with torch.cuda.device_of(h):
        _kernel[(batch * tiles,)](
            None if x is None else x.contiguous(), h, weight, bias, out,
            batch, tokens, width // patch_size, h.stride(0), h.stride(1), step, guidance or 0.0,
            CHANNELS=channels, PATCH=patch_size, D=size, GUIDED=0 if guidance is None else guided,
            **blocks, **launch_options(h.device, _WARPS, _STAGES),
        )  # fmt: skip


def _blocks(total: int, values: int, size: int) -> dict[str, int]:
    return {
        "BLOCK_N": next(tile for least, tile in _TILES if total >= least),
        "BLOCK_OUT": min(_BLOCK_OUT, max(16, triton.next_power_of_2(values))),
        "BLOCK_D": min(_BLOCK_D, max(16, triton.next_power_of_2(size))),
    }


@torch.library.custom_op("odelt_fast::final_euler", mutates_args=())
def final_euler(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, patch_size: int,
    step: float, guidance: float | None = None, guided_channels: int | None = None,
) -> Tensor:  # fmt: skip
    """x + step*v.

    Args:
        x: (B, C, H, W) float16, bfloat16 or float32, any strides.
        h: (B, N, D) in any of these, or with a guidance scale (2B, N, D), labels first.
        weight, bias: (p*p*C, D) and (p*p*C,) in h's dtype.
        patch_size: p.
        guided_channels: guidance acts on so many first channels; None: on all.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(x.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, h, weight, bias, out, patch_size, step, guidance, guided_channels)
    return out


final_euler.register_fake(like_first)


@torch.library.custom_op("odelt_fast::final_velocity", mutates_args=())
def final_velocity(
    h: Tensor, weight: Tensor, bias: Tensor, patch_size: int,
    height: int, width: int, dtype: torch.dtype, guidance: float | None = None,
    guided_channels: int | None = None,
) -> Tensor:  # fmt: skip
    """v (B, C, height, width) in `dtype`; for the rest see final_euler.

    dtype is the state's, so that a float32 solver gets the unrounded sum.
    """
    values = weight.shape[0]
    if patch_size < 1 or values % patch_size**2 or (guidance is not None and h.shape[0] % 2):
        raise ValueError(
            f"{values} values a patch of {patch_size}, {h.shape[0]} rows of h with guidance"
            f" {guidance}: these do not fit"
        )
    batch = len(h) // (1 if guidance is None else 2)
    shape = batch, values // patch_size**2, height, width
    out = torch.empty(shape, dtype=dtype, device=h.device)
    _launch(None, h, weight, bias, out, patch_size, 0.0, guidance, guided_channels)
    return out


final_velocity.register_fake(lambda *given: final_velocity_reference(*given).contiguous())


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype, width and tile, on latents of 4 channels in 2 x 2 patches.

    With and without guidance; update or velocity alone; in bfloat16 also overlapped.
    """
    forms: dict[str, dict[str, object]] = {
        "euler": {"GUIDED": 0, "PDL": False},
        "euler_guided": {"GUIDED": 4, "PDL": False},
        "euler_three_guided": {"GUIDED": 3, "PDL": False},
        "velocity_guided": {"GUIDED": 4, "PDL": False, "x": None},
        "overlapped": {"GUIDED": 0, "PDL": True},
    }
    for kind, size, (least, tile) in itertools.product(DTYPES.values(), WIDTHS, _TILES):
        types = dict.fromkeys(("h", "weight", "bias"), f"*{kind}")
        types |= {"x": "*fp32", "out": "*fp32", "step": "fp32", "guidance": "fp32"}
        blocks = {"CHANNELS": 4, "PATCH": 2, "D": size, **_blocks(least, 16, size)}
        for form, constants in forms.items():
            if form != "overlapped" or kind == "bf16":
                yield kernel_case(
                    f"final_layer/{form}/{kind}/{size}/{tile}", _kernel, types,
                    {**blocks, **constants}, ("batch",), num_warps=_WARPS, num_stages=_STAGES,
                )  # fmt: skip
