"""The network on a CPU with native operators (csrc/cpu): the model's weights and results, with
fewer passes over memory.

Between matrix products the model reads and writes every activation many times, into fresh memory
that the system has to hand out page by page. Here each gap is one pass over memory that is used
again: bias + gated residual + LayerNorm + modulate, at a group's end with the Euler update of the
inner ODE. Where the processor has the instructions (`cpu_ops.has_products`), matrix products with
bias and GELU and attention are native too, from packed copies of the weights; elsewhere they are
PyTorch's. What passes between the operators lies in tiles where those take them (`cpu_ops.tiled`),
else in rows.

A block's layers run on a few samples at a time, so that what they pass on to each other stays in
the caches: writing a result over memory that has left them takes up to half as long again as the
product itself.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.model import DiT, position_table

from .native import cpu_ops
from .native.build import load
from .native.cpu_ops import InnerState, Modulation
from .weights import LAYERS, ParameterVersions

logger = logging.getLogger(__name__)

# Tokens of a thread that go through a block together: the weights are read once for them.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Workspace:
    """Memory of one batch of B samples, of which n go through a block together. h, y and qkv are in
    tiles where the operators take them."""

    x: Tensor  # (B, N, D)
    vr: Tensor  # (B, N, D)
    h: Tensor  # (B, N, D)
    middle: Tensor  # (n, N, D)
    y: Tensor  # (n, N, D)
    qkv: Tensor  # (n, N, 3*D)
    hidden: Tensor | None  # (n, N, M), where PyTorch does the products
    positions: Tensor  # (1, N, D), the position table of the grid of patches
    rest: Tensor  # (1, N, D), what it loses by rounding
    ones: Tensor  # (1, D)


class CpuNetwork:
    """`network(x, t, log2_steps, y, depth)` is `model(x, t, log2_steps, y, depth)`, for sampling:
    no gradients, no dropout.

    Calls that it has no path for (gradients, depths of each sample, a length without a whole group)
    go to the model itself. Threads take turns. The packed weights are a second copy of the blocks'
    matrices, made anew when those change.

    Raises:
        ValueError: it cannot run, with the reason (`native_unavailable`).
    """

    def __init__(self, model: DiT) -> None:
        reason = native_unavailable(model)
        if reason:
            raise ValueError(f"the native operators cannot run this model: {reason}")
        self.model, config = model, model.config
        self.dim = config.hidden_size // config.num_heads
        sizes = config.hidden_size, config.mlp_size, self.dim
        self.products = cpu_ops.has_products(model.dtype) and not any(size % 2 for size in sizes)
        # Of the blocks: weights, where the products are native; biases in float32.
        self._packed: list[dict[str, Tensor]] = []
        self._biases: list[dict[str, Tensor]] = []
        self._versions: ParameterVersions | None = None
        self._workspace: tuple[object, Workspace] | None = None  # what it is for, and itself
        self._lock = threading.Lock()

    def __call__(
        self,
        x: Tensor,
        t: float | Tensor,
        log2_steps: float | Tensor,
        y: Tensor,
        depth: Any = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        model = self.model
        patch = model.config.patch_size
        fits = (
            x.dim() == 4
            and x.shape[1] == model.config.channels
            and x.numel() > 0
            and x.shape[2] % patch == x.shape[3] % patch == 0
        )
        usual = isinstance(depth, int | None) and not torch.is_grad_enabled() and not model.training
        length = model.check_depth(depth) if usual else 0
        if not usual or not fits or not model.config.live_blocks(length):
            return model(x, t, log2_steps, y, depth, guidance)
        with self._lock:
            work = self._memory(x)
            final = condition = model.condition(t, log2_steps, y, guidance)
            if model.config.length_conditioned:
                condition = final + model.length_embed.weight[length]
            if not model.config.has_inner_ode:
                final = condition
            condition, final = (F.silu(each).to(model.dtype) for each in (condition, final))
            self._hidden(x, work, condition, final, length)
            return model.unpatchify(model.final_layer.out(work.x), x.shape[2], x.shape[3])

    def _embed(self, x: Tensor, work: Workspace, modulation: Tensor) -> None:
        """work.x = the model's `embed_patches` of x, work.h = its norm + modulate."""
        layer, patch = self.model.patch_embed, self.model.config.patch_size
        patches = x.to(work.x.dtype).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, layer.weight[0].numel())
        # A product is twice as fast as the convolution.
        weight = layer.weight.flatten(1).t()
        torch.addmm(layer.bias, patches, weight, out=work.x.flatten(0, 1))  # type: ignore[arg-type]
        # The positions are added in float32, as in the model: positions + 1*(patches + 1*rest), in
        # the pass that makes the norm.
        inner = InnerState(work.positions.expand_as(work.x), None)
        columns = Modulation(work.ones, 0, modulation, 0, work.x.shape[2])
        rest, results = work.rest.expand_as(work.x), (work.x, work.vr, work.h)
        cpu_ops.group_end(work.x, rest, None, inner, columns, results)

    def _hidden(
        self, x: Tensor, work: Workspace, condition: Tensor, final: Tensor, length: int
    ) -> None:
        """From the image to what the final projection sees, in work.x: vr after the last norm +
        modulate."""
        model, config, size = self.model, self.model.config, self.model.config.hidden_size
        blocks: list[Any] = list(model.blocks[: config.live_blocks(length)])
        self._pack(blocks)
        modulations = [self._modulation(index, condition) for index in range(len(blocks))]
        modulations.append(model.final_layer.modulation(final).float())
        self._embed(x, work, modulations[0])
        x, h = work.x, work.h
        step = None
        if config.inner_step == "inverse_depth":
            step = (config.depth_group / torch.tensor([length], dtype=x.dtype)).float()
        for index in range(len(blocks)):
            biases, last = self._biases[index], index + 1 == len(blocks)
            ends_group = config.ends_group(index)
            for start in range(0, len(x), len(work.y)):
                part = slice(start, start + len(work.y))
                modulation, following = (
                    row if len(row) == 1 else row[part] for row in modulations[index : index + 2]
                )
                px, ph = x[part], h[part]
                ending = px if last else ph  # in rows
                middle, y, qkv = (memory[: len(px)] for memory in (work.middle, work.y, work.qkv))
                self._linear(index, "qkv", ph, qkv, biases["qkv"])
                attended = ph if qkv.dim() == 5 else ph.view_as(px)
                self._attend(qkv, attended)
                self._linear(index, "attention_out", attended, y)
                columns = Modulation(modulation, 2 * size, modulation, 3 * size, 4 * size)
                states = px, y, biases["attention_out"]
                cpu_ops.gated_residual(*states, columns, out_x=middle, out=ph)
                self._mlp(index, ph, work.hidden, y)
                columns = Modulation(modulation, 5 * size, following, 0, size)
                states = middle, y, biases["mlp_out"]
                if not ends_group:
                    out_x = middle if last else px
                    cpu_ops.gated_residual(*states, columns, out_x=out_x, out=ending)
                else:
                    xr, vr = None if last else px, work.vr[part]
                    inner = InnerState(xr, vr if index >= config.depth_group else None, step)
                    cpu_ops.group_end(*states, inner, columns, (xr, vr, ending))

    def _linear(
        self, index: int, name: str, x: Tensor, out: Tensor, bias: Tensor | None = None
    ) -> None:
        """out = x W^T + bias; W is that of a layer of block `index`, x and out (n, N, columns) or
        in tiles."""
        x, out = x.flatten(0, 1), out.flatten(0, 1)
        if self.products:
            return cpu_ops.linear(x, self._packed[index][name], bias, out=out)
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
        cpu_ops.linear(condition, self._packed[index]["modulation"], layer.bias, out=out)
        return out.float()

    def _mlp(self, index: int, x: Tensor, hidden: Tensor | None, out: Tensor) -> None:
        """out is what the two layers make of x without the second bias; x and out (n, N, D) or in
        tiles."""
        bias = self._biases[index]["mlp_in"]
        if hidden is None:
            first, second = (self._packed[index][name] for name in ("mlp_in", "mlp_out"))
            return cpu_ops.mlp(x.flatten(0, 1), first, bias, second, out=out.flatten(0, 1))
        hidden = hidden[: len(x)]
        self._linear(index, "mlp_in", x, hidden)
        cpu_ops.bias_gelu_(hidden, bias)
        self._linear(index, "mlp_out", hidden, out)

    def _attend(self, qkv: Tensor, out: Tensor) -> None:
        """Attention of packed qkv (B, N, 3*D) into out (B, N, D), or both in tiles."""
        heads, dim = self.model.config.num_heads, self.dim
        if qkv.dim() == 5 or self._attends(qkv.shape[1]):
            return cpu_ops.attention(qkv, heads, 1.0 / dim, out=out)
        q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0 / dim)
        out.unflatten(2, (heads, dim)).copy_(attended.transpose(1, 2))

    def _attends(self, tokens: int) -> bool:
        """Whether attention of that many tokens is native."""
        fits = tokens <= cpu_ops.MAX_TOKENS and self.dim <= cpu_ops.MAX_HEAD_DIM
        return self.products and fits

    def _pack(self, blocks: list[Any]) -> None:
        """Prepares what is not prepared yet of these blocks, and everything anew that has
        changed."""
        if self._versions is None or not self._versions.unchanged():
            self._packed, self._biases = [], []
            self._versions = ParameterVersions(self.model.blocks.parameters())
        with torch.inference_mode(False), torch.no_grad():
            for block in blocks[len(self._biases) :]:
                layers = {name: getattr(block, name) for name in (*LAYERS, "modulation")}
                if self.products:
                    self._packed.append(
                        {name: cpu_ops.pack_weight(each.weight) for name, each in layers.items()}
                    )
                self._biases.append({name: layers[name].bias.float() for name in LAYERS})

    def _memory(self, x: Tensor) -> Workspace:
        """The workspace for x (B, C, H, W): the last one where it fits."""
        config, dtype = self.model.config, self.model.dtype
        patch, size, dim = config.patch_size, config.hidden_size, self.dim
        grid = x.shape[2] // patch, x.shape[3] // patch
        batch, tokens = len(x), grid[0] * grid[1]
        parts = max(1, -(-batch * tokens // (ROWS_AT_ONCE * torch.get_num_threads())))
        few = -(-batch // parts)
        key = batch, few, grid, dtype
        if self._workspace and self._workspace[0] == key:
            return self._workspace[1]
        self._workspace = None  # before its successor takes memory
        tiles = self.products and cpu_ops.has_tiles(dtype)
        tiles = tiles and tokens % cpu_ops.TILE == size % cpu_ops.TILE == 0
        heads = tiles and dim % cpu_ops.TILE == 0 and self._attends(tokens)

        def memory(rows: int, width: int, tiled: bool = False) -> Tensor:
            shape = cpu_ops.tiled(rows, tokens, width) if tiled else (rows, tokens, width)
            return torch.empty(shape, dtype=dtype)

        # What is made in inference mode cannot be written outside it.
        with torch.inference_mode(False):
            table = self.model.positions
            if grid != config.grid:
                table = position_table(*grid, size)
            positions = table.to(dtype)[None]
            work = Workspace(
                x=memory(batch, size),
                vr=memory(batch, size),
                h=memory(batch, size, tiles),
                middle=memory(few, size),
                y=memory(few, size, tiles),
                qkv=memory(few, 3 * size, heads),
                hidden=None if self.products else memory(few, config.mlp_size),
                positions=positions,
                rest=(table - positions.float()).to(dtype),
                ones=torch.ones(1, size),
            )
        self._workspace = key, work
        return work


def native_unavailable(model: DiT, build_it: bool = True) -> str | None:
    """Why `CpuNetwork` cannot run this model, in one line; None if it can. build_it: whether the
    operators may be built for it."""
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {model.dtype}"
    if model.config.hidden_size > 8192:
        return "its rows are wider than 8192"
    return load("cpu", build_it)


def choose(model: DiT) -> DiT | CpuNetwork:
    """What `auto` runs on a CPU: the native operators where they have been built (`odelt-fast
    build-ops`), else the model."""
    reason = native_unavailable(model, build_it=False)
    if reason is not None:
        logger.info("the native operators are not used: %s", reason)
    return model if reason else CpuNetwork(model)
