"""Other projects' kernels for what ours compute, where they are installed: flashinfer's
diffusion_ops (gate + residual + LayerNorm + modulate) and quack's products.

One that is not there, or does not take a shape (flashinfer's width is 3072), says so in its row.
Their calls were written from their sources, and have not run yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
PACKAGES = {"flashinfer": "flashinfer-python", "quack": "quack-kernels"}


def load(module: str, name: str) -> Operator:
    """A function of another package; ImportError that says how to bring it."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = PACKAGES[module.split(".")[0]]
        raise ImportError(f"{package} is not installed, or not whole: {error}") from error


def flashinfer_residual(x: Tensor, y: Tensor, table: Tensor) -> Any:
    """`gated_residual` inside a block: (x + gate y, its LayerNorm + modulate). It takes a row of
    modulation for each token, by strides, and rows of a batch of one."""
    function = load("flashinfer.diffusion_ops", "fused_dit_gate_residual_layernorm_scale_shift")
    _, _, gate, shift, scale, _ = (part[:, None].expand_as(x) for part in table.chunk(6, dim=1))
    return function(y, x, gate, scale, shift)


def flashinfer_norm(x: Tensor, table: Tensor) -> Any:
    """`norm_modulate`."""
    function = load("flashinfer.diffusion_ops", "fused_dit_residual_layernorm_scale_shift")
    shift, scale = (part[:, None].expand_as(x) for part in table.chunk(6, dim=1)[:2])
    return function(x, scale, shift)[1]


def quack_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return load("quack.gemm_interface", "gemm")(x.flatten(0, 1), weight.t(), bias=bias)


def quack_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    function = load("quack.gemm_interface", "gemm_act")
    options = {"bias": bias, "activation": "gelu_tanh_approx", "store_preact": False}
    return function(x.flatten(0, 1), weight.t(), **options)[1]


_BY_KERNEL: dict[str, dict[str, Operator]] = {
    "norm_modulate": {"flashinfer": flashinfer_norm},
    "gated_residual": {"flashinfer": flashinfer_residual},
    "linear_gelu": {"quack": quack_gelu},
    **{f"linear_{each}": {"quack": quack_linear} for each in ("qkv", "out", "down")},
}


def kernel_peers(name: str, dtype: torch.dtype) -> dict[str, Operator]:
    """Peers of a kernel of the table, by package; they take the kernel's arguments."""
    return _BY_KERNEL.get(name, {}) if dtype == torch.bfloat16 else {}
