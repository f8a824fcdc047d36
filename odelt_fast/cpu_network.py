"""The network on a CPU with native operators (csrc/cpu): the model's weights and results, with fewer passes over memory.

Between matrix products the model reads and writes every activation many times, into fresh memory that the system has to hand out page by
page. Here each gap is one pass over memory that is used again: bias + GELU in place; bias + gated residual + LayerNorm + modulate, at a
group's end with the Euler update of the inner ODE. Matrix products and attention are PyTorch's.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast import native
from odelt_fast.model import DiT


@dataclass(frozen=True)
class Workspace:
    """Memory of one batch. x, middle, vr, y, h (B, N, D); qkv (B*N, 3*D); hidden (B*N, M)."""

    x: Tensor
    middle: Tensor
    vr: Tensor
    y: Tensor
    h: Tensor
    qkv: Tensor
    hidden: Tensor


class CpuNetwork:
    """`network(x, t, log2_steps, y, depth)` is `model(x, t, log2_steps, y, depth)`, for sampling: no gradients, no dropout.

    Calls that it has no path for (gradients, depths of each sample, a length without a whole group) go to the model itself. Threads take
    turns. Raises ValueError with the reason where it cannot run (`why_not`).
    """

    def __init__(self, model: DiT) -> None:
        reason = why_not(model)
        if reason:
            raise ValueError(f"the native operators cannot run this model: {reason}")
        self.model = model
        self._workspace: Workspace | None = None
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, t: float | Tensor, log2_steps: int | Tensor, y: Tensor, depth: Any = None) -> Tensor:
        model = self.model
        one_depth = depth is None or isinstance(depth, int)
        if torch.is_grad_enabled() or model.training or not one_depth or not model.config.live_blocks(model.check_depth(depth)):
            return model(x, t, log2_steps, y, depth)
        length = model.check_depth(depth)
        with self._lock:
            tokens = model.embed_patches(x)
            final = model.condition(t, log2_steps, y)
            condition = final + model.length_embed.weight[length] if model.config.length_conditioned else final
            h = self._hidden(tokens, F.silu(condition).to(model.dtype), F.silu(final).to(model.dtype), length)
            return model.unpatchify(model.final_layer.out(h), x.shape[2], x.shape[3])

    def _hidden(self, tokens: Tensor, condition: Tensor, final: Tensor, length: int) -> Tensor:
        """What the final projection sees (B, N, D): the inner ODE's vr after the final layer's LayerNorm + modulate."""
        model, config, size = self.model, self.model.config, self.model.config.hidden_size
        work, rows = self._memory(tokens), tokens.shape[0] * tokens.shape[1]
        x, middle, y, h = work.x, work.middle, work.y, work.h
        flat_h, flat_y = h.view(rows, size), y.view(rows, size)
        steps = None
        if config.inner_step == "inverse_depth":
            steps = (config.depth_group / torch.tensor([length], dtype=model.dtype)).float()
        blocks: list[Any] = list(model.blocks[: config.live_blocks(length)])
        final_modulation = model.final_layer.modulation(final)
        modulation = blocks[0].modulation(condition)
        x.copy_(tokens)
        native.norm_modulate(x, modulation, 0, size, out=h)
        vr = None
        for index, block in enumerate(blocks, 1):
            torch.addmm(block.qkv.bias, flat_h, block.qkv.weight.t(), out=work.qkv)
            q, k, v = work.qkv.view(*tokens.shape[:2], 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1])
            torch.mm(attended.transpose(1, 2).reshape(rows, size), block.attention_out.weight.t(), out=flat_y)
            columns = (modulation, 2 * size, modulation, 3 * size, 4 * size)
            native.gated_residual(x, y, block.attention_out.bias, *columns, out_x=middle, out=h)
            torch.mm(flat_h, block.mlp_in.weight.t(), out=work.hidden)
            native.bias_gelu_(work.hidden, block.mlp_in.bias)
            torch.mm(work.hidden, block.mlp_out.weight.t(), out=flat_y)
            last = index == len(blocks)
            following = final_modulation if last else blocks[index].modulation(condition)
            columns = (modulation, 5 * size, following, 0, size)
            if not config.length_conditioned or index % config.depth_group:
                native.gated_residual(middle, y, block.mlp_out.bias, *columns, out_x=x, out=h)
            else:
                xr = None if last else x
                native.group_end(middle, y, block.mlp_out.bias, xr, vr, *columns, steps, out_xr=xr, out_vr=work.vr, out=h)
                vr = work.vr
            modulation = following
        return h

    def _memory(self, tokens: Tensor) -> Workspace:
        """The workspace for tokens (B, N, D): the last one where it fits."""
        if self._workspace is None or self._workspace.x.shape != tokens.shape or self._workspace.x.dtype != tokens.dtype:
            self._workspace = None  # before its successor takes memory
            rows, size = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
            wide = 3 * size, self.model.config.mlp_size
            with torch.inference_mode(False):  # what is made in inference mode cannot be written outside it
                shapes = [tuple(tokens.shape)] * 5 + [(rows, columns) for columns in wide]
                self._workspace = Workspace(*(torch.empty(shape, dtype=tokens.dtype) for shape in shapes))
        return self._workspace


def why_not(model: DiT, build_it: bool = True) -> str | None:
    """Why `CpuNetwork` cannot run this model, in one line; None if it can. build_it: whether the operators may be built for it."""
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {model.dtype}"
    if model.config.hidden_size > 8192:
        return "its rows are wider than 8192"
    return native.load("cpu", build_it)


def choose(model: DiT) -> DiT | CpuNetwork:
    """What `auto` runs on a CPU: the native operators where they have been built (`odelt-fast build-ops`), else the model."""
    return model if why_not(model, build_it=False) else CpuNetwork(model)
