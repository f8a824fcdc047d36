"""Forward-mode derivatives of a network: attention is what PyTorch has none of in its fast forms.

SDPA's flash and memory-efficient kernels have no forward mode. On CUDA a kernel of our own computes
attention and its tangent in one pass; elsewhere, and for what it does not take, SDPA runs in its
math form.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from odelt_fast.engine.availability import kernels_unavailable

logger = logging.getLogger(__name__)


def derivative(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """The derivative of function(*inputs) along the tangents, exact; no graph is built for
    it outside what gradients are enabled for. `function` may be a network with attention."""
    with attention_with_tangent(inputs[0].device), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        result = forward_ad.unpack_dual(function(*duals))
    return torch.zeros_like(result.primal) if result.tangent is None else result.tangent


def attention_with_tangent(device: torch.device) -> AbstractContextManager[Any]:
    """Where it is entered, scaled_dot_product_attention has a forward mode."""
    if device.type != "cuda":
        return sdpa_kernel(SDPBackend.MATH)
    reason = kernels_unavailable()
    if reason is None:
        return AttentionTangent()
    logger.info("attention takes its math form: %s", reason)
    return sdpa_kernel(SDPBackend.MATH)


class AttentionTangent(TorchFunctionMode):
    """scaled_dot_product_attention of dual tensors by `kernels.attention_tangent`; else unchanged.

    What the kernel does not take (float64, wide heads, another scale) goes to the math form.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        from odelt_fast.kernels.attention_tangent import attention_tangent, largest_head_dim
        from odelt_fast.kernels.compile_case import DTYPES

        q = args[0]
        known = options == {"scale": 1.0 / q.shape[-1]} and len(args) == 3
        fits = q.dtype in DTYPES and q.shape[-1] <= largest_head_dim(q.dtype)
        duals = [forward_ad.unpack_dual(each) for each in args] if known and fits else []
        if not duals or any(each.tangent is None for each in duals):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **options)
        y, dy = attention_tangent(*(d.primal for d in duals), *(d.tangent for d in duals))
        heads = (each.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for each in (y, dy))
        return forward_ad.make_dual(*heads)
