"""What of the fused backend can run here: each function gives the reason why something cannot, in
one line, or None if it can."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from odelt_fast.files import one_line
from odelt_fast.model import Block, DiT, FinalLayer, ScalarEmbedding

from .operators import ATTENTIONS

logger = logging.getLogger(__name__)

# Attentions of other packages, never yet run on a card by this project's tests: (package, module).
UNTESTED = {"flash": ("flash-attn", "flash_attn"), "xformers": ("xformers", "xformers.ops")}
_MODULES = (
    DiT, Block, FinalLayer, ScalarEmbedding, nn.Linear, nn.Conv2d, nn.Embedding, nn.ModuleList
)  # fmt: skip
_LEAST_CAPABILITY = (8, 0)
# What importing or calling something that was built for another torch, card or Triton raises. The
# last two are raised by other packages only: from our own code they are bugs.
_BROKEN = (ImportError, OSError, RuntimeError, ValueError)
_BROKEN_PACKAGE = (*_BROKEN, AttributeError, TypeError)


class ContextLostError(RuntimeError):
    """Nothing runs on the GPU any more in this process."""


def check_context(device: torch.device, error: BaseException) -> None:
    """Raises `ContextLostError` if `error` has ended this process's use of the GPU, as an illegal
    access does: it comes back at every call, and nothing may fall back inside a dead context."""
    if device.type != "cuda":
        return
    for _ in range(2):  # other errors are told once
        try:
            torch.cuda.current_stream(device).synchronize()
        except RuntimeError:
            continue
        return
    raise ContextLostError(
        f"the GPU context is lost ({one_line(error)}): restart; backend='eager' avoids it"
    ) from error


def fused_unavailable(model: DiT) -> str | None:
    """The reason why the fused backend cannot run this model where it is; None if it can."""
    if model.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model is on {model.device}"
    return device_unavailable(model.device) or model_unsupported(model)


def device_unavailable(device: torch.device) -> str | None:
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
    return kernels_unavailable()


def kernels_unavailable() -> str | None:
    """The reason why our Triton kernels cannot be loaded; None if they can."""
    try:
        importlib.import_module("odelt_fast.kernels.linear")
    except _BROKEN as error:
        logger.info("the Triton kernels cannot be loaded", exc_info=True)
        return (
            "it needs Triton 3.6 or newer (pip install 'odelt-fast[cuda]'), which cannot be"
            f" loaded: {one_line(error)}"
        )
    return None


def model_unsupported(model: DiT) -> str | None:
    """The reason why the engine has no form of this model (on any device); None if it has one."""
    config = model.config
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = str(model.dtype).removeprefix("torch.")
        return f"it computes in float32, bfloat16 or float16, and the model is in {dtype}"
    head = config.hidden_size // config.num_heads
    if config.hidden_size > 8192 or head > 256:
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


def attention_unavailable(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """The reason why this attention cannot run, by its constraints alone; None if it may (a trial
    on the card tells)."""
    if name == "sdpa":
        return None
    if name == "triton":
        return kernels_unavailable()
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, not {device}"
    if name in UNTESTED:
        try:
            importlib.import_module(UNTESTED[name][1])
        except _BROKEN_PACKAGE as error:
            logger.info("attention %s cannot be loaded", name, exc_info=True)
            return f"{UNTESTED[name][0]} cannot be loaded: {one_line(error)}"
    if dtype not in (torch.bfloat16, torch.float16) and name not in ("xformers", "sdpa_efficient"):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
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
    errors = _BROKEN_PACKAGE if name in UNTESTED else _BROKEN
    try:
        function(qkv, heads)
    except errors as error:
        logger.info("attention %s cannot run", name, exc_info=True)
        return f"a trial failed: {one_line(error)}"
    return None


def describe_attentions(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    """Each attention: available, or why it is not; with its package where that is untested."""
    described = {}
    for name in ATTENTIONS[1:]:
        reason = attention_unavailable(name, device, dtype, head_dim) or "available"
        package = f"{describe_package(UNTESTED[name][0])}: " if name in UNTESTED else ""
        described[name] = package + reason
    return described


def describe_package(name: str) -> str:
    """A package with its version or "not installed", and whether it is untested here."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    untested = any(name == package for package, _ in UNTESTED.values())
    return f"{name} {version}{' (untested here)' if untested else ''}"
