"""What the engine launches for each part of a block: row operators, matrix products, attention.

Matrix products are cuBLAS's (through PyTorch) or our kernel's; attention is PyTorch's (by the
kernel of its own choice, or by one that is named), flash-attn's, xformers' or our kernel's.
`availability` tells which of them can run here, `tuning` which is fastest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# PyTorch's kernels of scaled_dot_product_attention; "sdpa" leaves the choice to it.
SDPA_KERNELS = MappingProxyType(
    {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
)
ATTENTIONS = ("auto", "sdpa", *SDPA_KERNELS, "flash", "xformers", "triton")
PRECISIONS = (None, "fp8")


_NAMES = {  # by module of odelt_fast.kernels
    "norm_modulate": ("norm_modulate",),
    "gated_residual": ("gated_residual",),
    "group_end": ("group_end", "last_group_end"),
    "row_float8": ("norm_modulate_float8", "gated_residual_float8", "group_end_float8"),
    "modulation": ("modulation",),
    "patch": ("patch_embed", "patch_embed_moments"),
    "final_layer": ("final_euler", "final_velocity"),
    "quantize": ("quantize_rows",),
    "linear": ("linear",),
    "block_products": (
        "norm_linear", "norm_linear_float8", "residual_linear", "group_end_linear",
        "last_group_end_linear",
    ),
    "whole": ("whole",),
    "attention": ("attention",),
    "solver_update": ("combine_stages",),
    "adaptive_step": ("adaptive_step_update", "first_attempt", "MOST_SAMPLES"),
}  # fmt: skip


def load_operators(kind: str) -> SimpleNamespace:
    """Row operators, ends of the network, products, attention and solver steps, by name.

    Args:
        kind: "kernels" (Triton) or "reference" (the same in PyTorch, on any device).
    """
    plain = ("first_attempt", "MOST_SAMPLES")  # of both kinds
    suffix = {"kernels": "", "reference": "_reference"}[kind]
    loaded = SimpleNamespace()
    for module, names in _NAMES.items():
        kernels = importlib.import_module(f"odelt_fast.kernels.{module}")
        for name in names:
            setattr(loaded, name, getattr(kernels, name + suffix * (name not in plain)))
    return loaded


def cublas_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x W^T + b) on CUDA, the bias and the GELU (tanh form) in cuBLASLt's epilogue. x (B, N,
    inner) contiguous."""
    if activation == "none":
        return F.linear(x, weight, bias)
    y = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    return y.unflatten(0, x.shape[:2])


def cublas_float8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """(x * x_scale) (W * weight_scale)^T + b in bfloat16, row-wise scales. x (B, N, inner)
    float8."""
    y = torch._scaled_mm(
        x.flatten(0, 1), weight.t(), x_scale.reshape(-1, 1), weight_scale[None], bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y.unflatten(0, x.shape[:2])


def _split(qkv: Tensor, heads: int) -> Tensor:
    """(3, B, heads, N, head_dim)."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _sdpa(qkv: Tensor, heads: int, kernel: SDPBackend | None = None) -> Tensor:
    q, k, v = _split(qkv, heads)
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1])
    return attended.transpose(1, 2).flatten(2)


def chosen_by_pytorch(qkv: Tensor, heads: int) -> str:
    """The kernel that "sdpa" runs on qkv (B, N, 3*D): one of `SDPA_KERNELS`, or "math"."""
    q, k, v = _split(qkv, heads)
    chosen = torch._fused_sdp_choice(q, k, v, scale=1.0 / q.shape[-1])
    return {int(kernel.value): name for name, kernel in SDPA_KERNELS.items()}.get(chosen, "math")


def _flash(qkv: Tensor, heads: int) -> Tensor:
    packed = qkv.unflatten(2, (3, heads, -1))
    function = importlib.import_module("flash_attn").flash_attn_qkvpacked_func
    return function(packed, softmax_scale=1.0 / packed.shape[-1]).flatten(2)


def _xformers(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)  # each (B, N, heads, head_dim)
    function = importlib.import_module("xformers.ops").memory_efficient_attention
    return function(q, k, v, scale=1.0 / q.shape[-1]).flatten(2)


def attention_function(name: str, ops: SimpleNamespace) -> Callable[[Tensor, int], Tensor]:
    """The attention of that name on packed qkv: (qkv (B, N, 3*D), heads) -> (B, N, D), logits
    scaled by 1/head_dim."""
    if name == "triton":
        return ops.attention  # type: ignore[no-any-return]
    if name in SDPA_KERNELS:
        return functools.partial(_sdpa, kernel=SDPA_KERNELS[name])
    return {"sdpa": _sdpa, "flash": _flash, "xformers": _xformers}[name]
