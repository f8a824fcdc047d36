"""What the engine launches for each part of a block, and whether it can run here: row operators,
matrix products, attention.

Matrix products: cuBLAS (through PyTorch) or our kernel; attention: PyTorch's, cuDNN's, flash-attn,
xformers or our kernel. Which of them is faster depends on the card and the shape: a table of
measured times per card decides (`tuning/NAME.json`); without one for this card, cuBLAS and
PyTorch's attention do. An attention that is asked for by name is taken, or refused with the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odelt_fast.model import Block, DiT, FinalLayer, ScalarEmbedding

ATTENTIONS = ("auto", "sdpa", "cudnn", "flash", "xformers", "triton")
PRECISIONS = (None, "fp8")
UNTESTED = {
    "flash": "flash-attn",
    "xformers": "xformers",
}  # never yet run on a card by this project's tests
_MODULES = (
    DiT,
    Block,
    FinalLayer,
    ScalarEmbedding,
    nn.Linear,
    nn.Conv2d,
    nn.Embedding,
    nn.ModuleList,
)
_LEAST_CAPABILITY = (8, 0)
_BROKEN = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
)  # what importing a package built for another torch raises


def why_not_fused(model: DiT) -> str | None:
    """The reason why the fused backend cannot run this model where it is; None if it can."""
    if model.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model is on {model.device}"
    return why_not_device(model.device) or why_not_prepared(model)


def why_not_device(device: torch.device) -> str | None:
    """The reason why the fused backend runs no model on this GPU; None if it may."""
    if torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"it needs a GPU of compute capability 8.0 (Ampere) or newer, and {name} has"
            f" {capability[0]}.{capability[1]}"
        )
    return why_no_kernels()


def why_no_kernels() -> str | None:
    """The reason why our Triton kernels cannot be loaded; None if they can."""
    try:
        importlib.import_module("odelt_fast.kernels.linear")
    except _BROKEN as error:
        return (
            "it needs Triton 3.6 or newer (pip install 'odelt-fast[cuda]'), which cannot be"
            f" loaded: {_one_line(error)}"
        )
    return None


def why_not_prepared(model: DiT) -> str | None:
    """The reason why the engine has no form of this model (on any device); None if it has one."""
    config = model.config
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 or float16, and the model is in {model.dtype}".replace(
            "torch.", ""
        )
    if config.hidden_size > 8192 or config.hidden_size // config.num_heads > 256:
        head = config.hidden_size // config.num_heads
        return (
            "its kernels go up to hidden size 8192 and head dimension 256, and the model has"
            f" {config.hidden_size} and {head}"
        )
    for name, module in model.named_modules():
        if type(module) not in _MODULES:
            return f"it knows no {type(module).__name__} (module {name}): it would be left out"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"module {name or 'DiT'} has a forward hook, which would be left out"
    return None


def operators(kind: str) -> SimpleNamespace:
    """Row operators, ends of the network, solver steps by name: "kernels" (Triton) or "reference"
    (the same in PyTorch, any device)."""
    names = {
        "norm_modulate": ("norm_modulate",),
        "gated_residual": ("gated_residual",),
        "group_end": ("group_end", "last_group_end"),
        "row_float8": ("norm_modulate_float8", "gated_residual_float8", "group_end_float8"),
        "modulation": ("modulation",),
        "patch": ("patch_embed",),
        "final_layer": ("final_euler", "final_velocity"),
        "quantize": ("quantize_rows",),
        "linear": ("linear",),
        "attention": ("attention",),
        "solver_update": ("combine_stages",),
        "adaptive_step": ("adaptive_step_update", "first_attempt", "MOST_SAMPLES"),
    }
    modules = {name: importlib.import_module(f"odelt_fast.kernels.{name}") for name in names}
    if kind == "kernels":
        return SimpleNamespace(
            **{
                name: getattr(modules[module], name)
                for module, each in names.items()
                for name in each
            }
        )
    norm, gated, group = (
        modules[name] for name in ("norm_modulate", "gated_residual", "group_end")
    )
    quantize, final = (
        modules["quantize"].quantize_rows_reference,
        modules["final_layer"].final_layer_reference,
    )

    def last_group_end(
        x: Tensor, y: Tensor, vr: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        return group.group_end_reference(x, y, None, vr, *rest)[1:]

    def final_velocity(
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        patch: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        guidance: float | None = None,
    ) -> Tensor:
        return final(
            torch.zeros((), dtype=dtype, device=h.device),
            h,
            weight,
            bias,
            patch,
            height,
            width,
            1.0,
            guidance,
        )

    def adaptive_step_update(
        x: Tensor, x_new: Tensor, stages: Tensor, control: Tensor, counters: Tensor, *others: Any
    ) -> None:
        step, times, running, *rest = others
        results = modules["adaptive_step"].adaptive_step_update_reference(
            x, x_new, stages, control, counters, step, *rest
        )
        for target, result in zip(
            (x, stages[0], control, counters, step, times, running), results, strict=True
        ):
            target.copy_(result)

    return SimpleNamespace(
        norm_modulate=norm.norm_modulate_reference,
        gated_residual=gated.gated_residual_reference,
        group_end=group.group_end_reference,
        last_group_end=last_group_end,
        norm_modulate_float8=lambda *a: quantize(norm.norm_modulate_reference(*a)),
        gated_residual_float8=lambda *a: _quantize_last(
            gated.gated_residual_reference(*a), quantize
        ),
        group_end_float8=lambda *a: _quantize_last(group.group_end_reference(*a), quantize),
        modulation=modules["modulation"].modulation_reference,
        patch_embed=modules["patch"].patch_embed_reference,
        final_euler=lambda x, h, w, b, patch, step, guidance=None: final(
            x, h, w, b, patch, *x.shape[2:], step, guidance
        ),
        final_velocity=final_velocity,
        quantize_rows=quantize,
        linear=lambda *a, workspace=None, **k: modules["linear"].linear_reference(*a, **k),
        attention=modules["attention"].attention_reference,
        combine_stages=modules["solver_update"].combine_stages_reference,
        adaptive_step_update=adaptive_step_update,
        **{name: getattr(modules["adaptive_step"], name) for name in names["adaptive_step"][1:]},
    )


def _quantize_last(
    results: tuple[Any, ...], quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Any, ...]:
    return *results[:-1], *quantize(results[-1])


def cublas_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x W^T + b) on CUDA, the bias and the GELU (tanh form) in cuBLASLt's epilogue. x (B, N,
    inner) contiguous."""
    if activation == "none":
        return F.linear(x, weight, bias)
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(
        0, x.shape[:2]
    )


def cublas_float8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """(x * x_scale) (W * weight_scale)^T + b in bfloat16, row-wise scales. x (B, N, inner)
    float8."""
    scales = {"scale_a": x_scale.reshape(-1, 1), "scale_b": weight_scale[None]}
    y = torch._scaled_mm(
        x.flatten(0, 1),
        weight.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        **scales,
    )
    return y.unflatten(0, x.shape[:2])


def _sdpa(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(
        2, 0, 3, 1, 4
    )  # each (B, heads, N, head_dim)
    return (
        F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1]).transpose(1, 2).flatten(2)
    )


def _cudnn(qkv: Tensor, heads: int) -> Tensor:
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.CUDNN_ATTENTION):
        return _sdpa(qkv, heads)


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
    return {
        "sdpa": _sdpa,
        "cudnn": _cudnn,
        "flash": _flash,
        "xformers": _xformers,
        "triton": ops.attention,
    }[name]


def why_not_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """The reason why this attention cannot run, by its constraints alone; None if it may (a trial
    on the card tells)."""
    if name == "sdpa":
        return None
    if name == "triton":
        return why_no_kernels()
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, not {device}"
    if name in UNTESTED:
        try:
            importlib.import_module("flash_attn" if name == "flash" else "xformers.ops")
        except _BROKEN as error:
            return f"{UNTESTED[name]} cannot be loaded: {_one_line(error)}"
    if dtype not in (torch.bfloat16, torch.float16) and name != "xformers":
        return f"it computes in bfloat16 or float16, not {dtype}".replace("torch.", "")
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "cuDNN cannot be loaded"
    most = 128 if name == "cudnn" else 256
    if head_dim % 8 or head_dim > most:
        return (
            f"it needs head dimensions that are multiples of 8 and at most {most}, not {head_dim}"
        )
    return None


def try_attention(
    name: str, function: Callable[[Tensor, int], Tensor], qkv: Tensor, heads: int
) -> str | None:
    """Runs it once on `qkv`: the reason why it cannot run, or None."""
    try:
        function(qkv, heads)
    except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError) as error:
        return f"a trial failed: {_one_line(error)}"
    return None


def describe_attentions(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Each attention and what there is to say about it: available, or why it is not; and that it is
    untested where it is."""
    told = {}
    for name in ATTENTIONS[1:]:
        reason = why_not_attention(name, device, dtype, head_dim) or "available"
        told[name] = f"{describe_package(UNTESTED[name])}: {reason}" if name in UNTESTED else reason
    return told


def describe_package(name: str) -> str:
    """A package with its version, or that it is not installed; and that it is untested here where
    it is."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"{name} {version}{' (untested here)' if name in UNTESTED.values() else ''}"


Measured = Sequence[dict[str, Any]]


def read_tuning(device: torch.device) -> Measured:
    """Measured times of this card: entries {"operator", "dtype", ..., "amount", "microseconds":
    {name: time}}; empty if there are none.

    linear: "activation", "columns", "inner", amount = rows. attention: "heads", "head_dim",
    "tokens", amount = samples.
    """
    if device.type != "cuda":
        return ()
    path = tuning_path(torch.cuda.get_device_name(device))
    return json.loads(path.read_text())["entries"] if path.is_file() else ()


def tuning_path(device_name: str) -> Path:
    return (
        Path(__file__).parents[1]
        / "tuning"
        / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")
    )


def fastest(
    measured: Measured, available: Collection[str], amount: int, **exact: object
) -> str | None:
    """The fastest of `available` at the measured shape nearest to `amount` (at most a factor 2
    away) that agrees in all of `exact`."""

    def distance(entry: dict[str, Any]) -> float:
        return abs(math.log2(entry["amount"] / amount))

    near = [
        entry
        for entry in measured
        if all(entry.get(key) == value for key, value in exact.items()) and distance(entry) <= 1
    ]
    if not near:
        return None
    times = min(near, key=distance)["microseconds"]
    return min((name for name in times if name in available), key=times.__getitem__, default=None)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
