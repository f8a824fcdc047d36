"""The network on a CPU with native operators (csrc/cpu): the model's weights and results, with fewer passes over memory.

Between matrix products the model reads and writes every activation many times, into fresh memory that the system has to hand out page by
page. Here each gap is one pass over memory that is used again: bias + gated residual + LayerNorm + modulate, at a group's end with the
Euler update of the inner ODE. Where the processor has the instructions (`native.has_products`), matrix products with bias and GELU and
attention are native too, from packed copies of the weights. Elsewhere they are PyTorch's.

A block's layers run on a few samples at a time, so that what they pass on to each other stays in the caches: writing a result over memory
that has left them takes up to half as long again as the product itself.
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
from odelt_fast.prepared import LAYERS, Watched

ROWS_AT_ONCE = 512  # tokens of a thread that go through a block together: the weights are read once for them


@dataclass(frozen=True)
class Workspace:
    """Memory of one batch: x, h, vr (B, N, D). And of the n samples that are at work together: middle, y (n, N, D), qkv (n, N, 3*D), and
    hidden (n, N, M) where PyTorch does the products."""

    x: Tensor
    h: Tensor
    vr: Tensor
    middle: Tensor
    y: Tensor
    qkv: Tensor
    hidden: Tensor | None


class CpuNetwork:
    """`network(x, t, log2_steps, y, depth)` is `model(x, t, log2_steps, y, depth)`, for sampling: no gradients, no dropout.

    Calls that it has no path for (gradients, depths of each sample, a length without a whole group) go to the model itself. Threads take
    turns. The packed weights are a second copy of the blocks' matrices, made anew when those change. Raises ValueError with the reason
    where it cannot run (`why_not`).
    """

    def __init__(self, model: DiT) -> None:
        reason = why_not(model)
        if reason:
            raise ValueError(f"the native operators cannot run this model: {reason}")
        self.model = model
        self.products = native.has_products(model.dtype) and all(
            size % 2 == 0 for size in (model.config.hidden_size, model.config.mlp_size, model.config.hidden_size // model.config.num_heads)
        )
        self._packed: list[dict[str, Tensor]] = []  # weights of the blocks, where the products are native
        self._biases: list[dict[str, Tensor]] = []  # float32, as the operators want them
        self._watched: Watched | None = None
        self._workspace: Workspace | None = None
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, t: float | Tensor, log2_steps: int | Tensor, y: Tensor, depth: Any = None) -> Tensor:
        model = self.model
        usual = x.dim() == 4 and x.numel() > 0 and (depth is None or isinstance(depth, int))
        if torch.is_grad_enabled() or model.training or not usual or not model.config.live_blocks(model.check_depth(depth)):
            return model(x, t, log2_steps, y, depth)
        length = model.check_depth(depth)
        with self._lock:
            work = self._memory(x)
            self._embed(x, work.x)
            final = model.condition(t, log2_steps, y)
            condition = final + model.length_embed.weight[length] if model.config.length_conditioned else final
            self._hidden(work, F.silu(condition).to(model.dtype), F.silu(final).to(model.dtype), length)
            return model.unpatchify(model.final_layer.out(work.h), x.shape[2], x.shape[3])

    def _embed(self, x: Tensor, tokens: Tensor) -> None:
        """The model's `embed_patches`. As a matrix product of the patches it is less than half the time of the convolution."""
        layer, patch = self.model.patch_embed, self.model.config.patch_size
        if x.shape[2:] != (self.model.config.image_size,) * 2 or x.shape[1] != self.model.config.channels:
            tokens.copy_(self.model.embed_patches(x))
            return
        patches = x.to(tokens.dtype).unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        torch.mm(patches.reshape(-1, layer.weight[0].numel()), layer.weight.flatten(1).t(), out=tokens.flatten(0, 1))
        positions = self.model.positions if layer.bias is None else self.model.positions + layer.bias  # one pass for both
        if tokens.dtype == torch.float32:
            tokens.add_(positions)
            return
        wide = torch.empty_like(positions)  # those of one sample stay in the cache
        for sample in tokens:
            sample.copy_(torch.add(sample, positions, out=wide))

    def _hidden(self, work: Workspace, condition: Tensor, final: Tensor, length: int) -> None:
        """From work.x, the embedded patches, to work.h, what the final projection sees: vr after the last norm + modulate."""
        model, config, size = self.model, self.model.config, self.model.config.hidden_size
        blocks: list[Any] = list(model.blocks[: config.live_blocks(length)])
        self._pack(blocks)
        modulations = [self._modulation(index, condition) for index in range(len(blocks))] + [model.final_layer.modulation(final).float()]
        x, h = work.x, work.h
        steps = None
        if config.inner_step == "inverse_depth":
            steps = (config.depth_group / torch.tensor([length], dtype=x.dtype)).float()
        native.norm_modulate(x, modulations[0], 0, size, out=h)
        ends_group = [config.length_conditioned and index % config.depth_group == 0 for index in range(1, len(blocks) + 1)]
        for index in range(len(blocks)):
            biases = self._biases[index]
            first, last = True not in ends_group[:index], index + 1 == len(blocks)
            for start in range(0, len(x), len(work.y)):
                part = slice(start, start + len(work.y))
                modulation, following = (row if len(row) == 1 else row[part] for row in modulations[index : index + 2])
                px, ph = x[part], h[part]
                middle, y, qkv = (memory[: len(px)] for memory in (work.middle, work.y, work.qkv))
                self._linear(index, "qkv", ph, biases["qkv"], out=qkv)
                self._attend(qkv, out=ph)
                self._linear(index, "attention_out", ph, None, out=y)
                columns = (modulation, 2 * size, modulation, 3 * size, 4 * size)
                native.gated_residual(px, y, biases["attention_out"], *columns, out_x=middle, out=ph)
                self._mlp(index, ph, work.hidden, out=y)
                columns = (modulation, 5 * size, following, 0, size)
                if not ends_group[index]:
                    native.gated_residual(middle, y, biases["mlp_out"], *columns, out_x=px, out=ph)
                else:
                    xr, vr = None if last else px, work.vr[part]
                    native.group_end(middle, y, biases["mlp_out"], xr, None if first else vr, *columns, steps, out_xr=xr, out_vr=vr, out=ph)

    def _linear(self, index: int, name: str, x: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
        """out = x W^T + bias; W is that of a layer of block `index`, x and out (n, N, columns)."""
        x, out = x.flatten(0, 1), out.view(-1, out.shape[2])
        if self.products:
            return native.linear(x, self._packed[index][name], bias, out=out)
        weight: Tensor = getattr(self.model.blocks[index], name).weight.t()
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias.to(x.dtype), x, weight, out=out)

    def _modulation(self, index: int, condition: Tensor) -> Tensor:
        """Shifts, scales and gates of a block (B, 6*D) in float32; condition (B, D)."""
        layer: Any = self.model.blocks[index].modulation
        if not self.products:
            return layer(condition).float()  # type: ignore[no-any-return]
        out = torch.empty(len(condition), layer.out_features, dtype=condition.dtype)
        native.linear(condition, self._packed[index]["modulation"], layer.bias, out=out)
        return out.float()

    def _mlp(self, index: int, x: Tensor, hidden: Tensor | None, *, out: Tensor) -> None:
        """out is what the two layers make of x without the second bias; x and out (n, N, D)."""
        bias = self._biases[index]["mlp_in"]
        if hidden is None:
            packed = self._packed[index]
            return native.mlp(x.flatten(0, 1), packed["mlp_in"], bias, packed["mlp_out"], out=out.view(-1, out.shape[2]))
        hidden = hidden[: len(x)]
        self._linear(index, "mlp_in", x, None, out=hidden)
        native.bias_gelu_(hidden, bias)
        self._linear(index, "mlp_out", hidden, None, out=out)

    def _attend(self, qkv: Tensor, *, out: Tensor) -> None:
        """Attention of packed qkv (B, N, 3*D) into out (B, N, D)."""
        heads = self.model.config.num_heads
        dim = out.shape[2] // heads
        if self.products and qkv.shape[1] <= native.MAX_TOKENS and dim <= native.MAX_HEAD_DIM:
            return native.attention(qkv, heads, 1.0 / dim, out=out)
        q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        out.unflatten(2, (heads, dim)).copy_(F.scaled_dot_product_attention(q, k, v, scale=1.0 / dim).transpose(1, 2))

    def _pack(self, blocks: list[Any]) -> None:
        """Prepares what is not prepared yet of these blocks, and everything anew that has changed."""
        if self._watched is None or not self._watched.unchanged():
            self._packed, self._biases = [], []
            self._watched = Watched(list(self.model.blocks.parameters()))
        with torch.inference_mode(False), torch.no_grad():
            for block in blocks[len(self._biases) :]:
                if self.products:
                    weights = {name: getattr(block, name).weight.detach() for name in (*LAYERS, "modulation")}
                    self._packed.append({name: native.pack_weight(weight) for name, weight in weights.items()})
                self._biases.append({name: getattr(block, name).bias.detach().float() for name in LAYERS})

    def _memory(self, x: Tensor) -> Workspace:
        """The workspace for x (B, C, H, W): the last one where it fits."""
        config, dtype = self.model.config, self.model.dtype
        batch, tokens, size = x.shape[0], x.shape[2] // config.patch_size * (x.shape[3] // config.patch_size), config.hidden_size
        parts = max(1, -(-batch * tokens // (ROWS_AT_ONCE * torch.get_num_threads())))
        few = -(-batch // parts)
        found = self._workspace
        if found is None or (found.x.shape, len(found.y), found.x.dtype) != ((batch, tokens, size), few, dtype):
            found = self._workspace = None  # before its successor takes memory
            shapes = [(batch, tokens, size)] * 3 + [(few, tokens, width) for width in (size, size, 3 * size, config.mlp_size)]
            with torch.inference_mode(False):  # what is made in inference mode cannot be written outside it
                memory = [torch.empty(shape, dtype=dtype) for shape in shapes[: 6 if self.products else 7]]
            found = self._workspace = Workspace(*memory, *([None] if self.products else []))
        return found


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
