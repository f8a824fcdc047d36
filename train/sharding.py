"""Networks whose weights are sharded over processes (FSDP2, through accelerate): shards, and whole
tensors where they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odelt_fast.model import DiT

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate was launched to shard the weights; ValueError for FSDP version 1, whose
    flat parameters have no names."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise ValueError(
            "weights are sharded by FSDP version 2: launch with --use_fsdp --fsdp_version 2"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # accelerate's policy would hand the network bfloat16 times and residuals: autocast alone
    # computes what one process does.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.activation_checkpointing = False  # `memory.checkpoint_blocks` does it
    return True


def shard(accelerator: Accelerator, model: DiT) -> DiT:
    """Shards a second network as `Accelerator.prepare` shards the trained one, of which it allows
    one only."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    sharded: DiT = fsdp2_prepare_model(accelerator, model)
    return sharded


def refresh(model: Any) -> None:
    """Has the next forward pass gather weights that were changed in their shards. FSDP keeps the
    root's gathered until a backward pass."""
    if hasattr(model, "reshard"):
        model.reshard()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, sharing its memory; whole tensors as they are."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU, in the processes that `keep` them (the others get none). Every
    process must call it."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            whole[name] = full.detach().cpu()
    return whole


@torch.no_grad()
def scatter(whole: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> None:
    """Copies whole tensors into `tensors`, each process its part. Every process must call it."""
    for name, tensor in tensors.items():
        value = whole[name].to(tensor.device)
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
