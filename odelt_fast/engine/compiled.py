"""The network as torch.compile makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelt_fast.files import one_line
from odelt_fast.model import DiT


def compiled(model: DiT, compiler: str = "inductor") -> Callable[..., Tensor]:
    """torch.compile form of the model, which takes what the model takes; it raises ValueError where
    it cannot run, and never falls back to the model."""
    fast: Callable[..., Tensor] = torch.compile(model, fullgraph=True, backend=compiler)

    def network(*args: Any, **kwargs: Any) -> Tensor:
        import torch._dynamo.exc

        try:
            # Samplers of several depths and batch sizes share one cache, whose default limit of 8
            # entries would be an error here.
            with torch._dynamo.config.patch(recompile_limit=256):
                return fast(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"backend 'compile' cannot run here: {one_line(error)}") from error

    return network
