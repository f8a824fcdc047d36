"""The network on a CPU with native operators (csrc/cpu): the model's weights and results, with
fewer passes over memory.

Between matrix products the model reads and writes every activation many times, into fresh memory
that the system has to hand out page by page. Here each gap is one pass over memory that is used
again: bias + gated residual + LayerNorm + modulate, at a group's end with the Euler update of the
inner ODE. Where the processor has the instructions (`native.has_products`), matrix products with
bias and GELU and attention are native too, from packed copies of the weights; elsewhere they are
PyTorch's. What passes between the operators lies in tiles where those take them (`native.tiled`),
else in rows.

A block's layers run on a few samples at a time, so that what they pass on to each other stays in
the caches: writing a result over memory that has left them takes up to half as long again as the
product itself.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.engine.native import build as native
from odelt_fast.engine.weights import LAYERS, Watched
from odelt_fast.model import DiT, position_table

ROWS_AT_ONCE = (
    512  # tokens of a thread that go through a block together: the weights are read once for them
)


@dataclass(frozen=True)
class Workspace:
    """Memory of one batch: x, h, vr (B, N, D). And of the n samples that are at work together:
    middle, y (n, N, D), qkv (n, N, 3*D), and hidden (n, N, M) where PyTorch does the products. h, y
    and qkv are in tiles where the operators take them. positions and rest (1, N, D): the position
    table of the grid of patches and what it loses by rounding; ones (1, D)."""

    x: Tensor
    vr: Tensor
    h: Tensor
    middle: Tensor
    y: Tensor
    qkv: Tensor
    hidden: Tensor | None
    grid: tuple[int, int]
    positions: Tensor
    rest: Tensor
    ones: Tensor


class CpuNetwork:
    """`network(x, t, log2_steps, y, depth)` is `model(x, t, log2_steps, y, depth)`, for sampling:
    no gradients, no dropout.

    Calls that it has no path for (gradients, depths of each sample, a length without a whole group)
    go to the model itself. Threads take turns. The packed weights are a second copy of the blocks'
    matrices, made anew when those change. Raises ValueError with the reason where it cannot run
    (`why_not`).
    """

    def __init__(self, model: DiT) -> None:
        reason = why_not(model)
        if reason:
            raise ValueError(f"the native operators cannot run this model: {reason}")
        self.model = model
        self.products = native.has_products(model.dtype) and all(
            size % 2 == 0
            for size in (
                model.config.hidden_size,
                model.config.mlp_size,
                model.config.hidden_size // model.config.num_heads,
            )
        )
        self._packed: list[
            dict[str, Tensor]
        ] = []  # weights of the blocks, where the products are native
        self._biases: list[dict[str, Tensor]] = []  # float32, as the operators want them
        self._watched: Watched | None = None
        self._workspace: Workspace | None = None
        self._lock = threading.Lock()

    def __call__(
        self, x: Tensor, t: float | Tensor, log2_steps: int | Tensor, y: Tensor, depth: Any = None
    ) -> Tensor:
        model = self.model
        patch = model.config.patch_size
        fits = (
            x.dim() == 4
            and x.shape[1] == model.config.channels
            and x.numel() > 0
            and x.shape[2] % patch == x.shape[3] % patch == 0
        )
        usual = fits and (depth is None or isinstance(depth, int))
        if (
            torch.is_grad_enabled()
            or model.training
            or not usual
            or not model.config.live_blocks(model.check_depth(depth))
        ):
            return model(x, t, log2_steps, y, depth)
        length = model.check_depth(depth)
        with self._lock:
            work = self._memory(x)
            final = model.condition(t, log2_steps, y)
            condition = (
                final + model.length_embed.weight[length]
                if model.config.length_conditioned
                else final
            )
            self._hidden(
                x, work, F.silu(condition).to(model.dtype), F.silu(final).to(model.dtype), length
            )
            return model.unpatchify(model.final_layer.out(work.x), x.shape[2], x.shape[3])

    def _embed(self, x: Tensor, work: Workspace, modulation: Tensor) -> None:
        """work.x = the model's `embed_patches` of x, work.h = its norm + modulate. A product is
        twice as fast as the convolution."""
        layer, patch = self.model.patch_embed, self.model.config.patch_size
        patches = (
            x.to(work.x.dtype)
            .unflatten(3, (-1, patch))
            .unflatten(2, (-1, patch))
            .permute(0, 2, 4, 1, 3, 5)
        )
        patches = patches.reshape(-1, layer.weight[0].numel())
        torch.addmm(layer.bias, patches, layer.weight.flatten(1).t(), out=work.x.flatten(0, 1))  # type: ignore[arg-type]
        # The positions are added in float32, as in the model: positions + 1*(patches + 1*rest), in
        # the pass that makes the norm.
        rest, positions = work.rest.expand_as(work.x), work.positions.expand_as(work.x)
        columns = (work.ones, 0, modulation, 0, work.x.shape[2])
        native.group_end(
            work.x, rest, None, positions, None, *columns, out_xr=work.x, out_vr=work.vr, out=work.h
        )

    def _hidden(
        self, x: Tensor, work: Workspace, condition: Tensor, final: Tensor, length: int
    ) -> None:
        """From the image to what the final projection sees, in work.x: vr after the last norm +
        modulate."""
        model, config, size = self.model, self.model.config, self.model.config.hidden_size
        blocks: list[Any] = list(model.blocks[: config.live_blocks(length)])
        self._pack(blocks)
        modulations = [self._modulation(index, condition) for index in range(len(blocks))] + [
            model.final_layer.modulation(final).float()
        ]
        self._embed(x, work, modulations[0])
        x, h = work.x, work.h
        steps = None
        if config.inner_step == "inverse_depth":
            steps = (config.depth_group / torch.tensor([length], dtype=x.dtype)).float()
        ends_group = [
            config.length_conditioned and index % config.depth_group == 0
            for index in range(1, len(blocks) + 1)
        ]
        for index in range(len(blocks)):
            biases = self._biases[index]
            first, last = True not in ends_group[:index], index + 1 == len(blocks)
            for start in range(0, len(x), len(work.y)):
                part = slice(start, start + len(work.y))
                modulation, following = (
                    row if len(row) == 1 else row[part] for row in modulations[index : index + 2]
                )
                px, ph = x[part], h[part]
                ending = px if last else ph  # in rows
                middle, y, qkv = (memory[: len(px)] for memory in (work.middle, work.y, work.qkv))
                self._linear(index, "qkv", ph, biases["qkv"], out=qkv)
                attended = ph if qkv.dim() == 5 else ph.view_as(px)
                self._attend(qkv, out=attended)
                self._linear(index, "attention_out", attended, None, out=y)
                columns = (modulation, 2 * size, modulation, 3 * size, 4 * size)
                native.gated_residual(
                    px, y, biases["attention_out"], *columns, out_x=middle, out=ph
                )
                self._mlp(index, ph, work.hidden, out=y)
                columns = (modulation, 5 * size, following, 0, size)
                if not ends_group[index]:
                    native.gated_residual(
                        middle,
                        y,
                        biases["mlp_out"],
                        *columns,
                        out_x=middle if last else px,
                        out=ending,
                    )
                else:
                    xr, out_vr = None if last else px, work.vr[part]
                    vr = None if first else out_vr
                    native.group_end(
                        middle,
                        y,
                        biases["mlp_out"],
                        xr,
                        vr,
                        *columns,
                        steps,
                        out_xr=xr,
                        out_vr=out_vr,
                        out=ending,
                    )

    def _linear(
        self, index: int, name: str, x: Tensor, bias: Tensor | None, *, out: Tensor
    ) -> None:
        """out = x W^T + bias; W is that of a layer of block `index`, x and out (n, N, columns) or
        in tiles."""
        x, out = x.flatten(0, 1), out.flatten(0, 1)
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
        """out is what the two layers make of x without the second bias; x and out (n, N, D) or in
        tiles."""
        bias = self._biases[index]["mlp_in"]
        if hidden is None:
            packed = self._packed[index]
            return native.mlp(
                x.flatten(0, 1), packed["mlp_in"], bias, packed["mlp_out"], out=out.flatten(0, 1)
            )
        hidden = hidden[: len(x)]
        self._linear(index, "mlp_in", x, None, out=hidden)
        native.bias_gelu_(hidden, bias)
        self._linear(index, "mlp_out", hidden, None, out=out)

    def _attend(self, qkv: Tensor, *, out: Tensor) -> None:
        """Attention of packed qkv (B, N, 3*D) into out (B, N, D), or both in tiles."""
        heads = self.model.config.num_heads
        dim = self.model.config.hidden_size // heads
        if qkv.dim() == 5 or (
            self.products and qkv.shape[1] <= native.MAX_TOKENS and dim <= native.MAX_HEAD_DIM
        ):
            return native.attention(qkv, heads, 1.0 / dim, out=out)
        q, k, v = qkv.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        out.unflatten(2, (heads, dim)).copy_(
            F.scaled_dot_product_attention(q, k, v, scale=1.0 / dim).transpose(1, 2)
        )

    def _pack(self, blocks: list[Any]) -> None:
        """Prepares what is not prepared yet of these blocks, and everything anew that has
        changed."""
        if self._watched is None or not self._watched.unchanged():
            self._packed, self._biases = [], []
            self._watched = Watched(list(self.model.blocks.parameters()))
        with torch.inference_mode(False), torch.no_grad():
            for block in blocks[len(self._biases) :]:
                if self.products:
                    weights = {
                        name: getattr(block, name).weight.detach()
                        for name in (*LAYERS, "modulation")
                    }
                    self._packed.append(
                        {name: native.pack_weight(weight) for name, weight in weights.items()}
                    )
                self._biases.append(
                    {name: getattr(block, name).bias.detach().float() for name in LAYERS}
                )

    def _memory(self, x: Tensor) -> Workspace:
        """The workspace for x (B, C, H, W): the last one where it fits."""
        config, dtype = self.model.config, self.model.dtype
        patch, size, dim = (
            config.patch_size,
            config.hidden_size,
            config.hidden_size // config.num_heads,
        )
        grid = x.shape[2] // patch, x.shape[3] // patch
        batch, tokens = len(x), grid[0] * grid[1]
        parts = max(1, -(-batch * tokens // (ROWS_AT_ONCE * torch.get_num_threads())))
        few = -(-batch // parts)
        found = self._workspace
        if found is None or (found.x.shape, len(found.y), found.x.dtype, found.grid) != (
            (batch, tokens, size),
            few,
            dtype,
            grid,
        ):
            found = self._workspace = None  # before its successor takes memory
            tiles = (
                self.products
                and native.has_tiles(dtype)
                and tokens % native.TILE == size % native.TILE == 0
            )
            heads = (
                tiles
                and dim % native.TILE == 0
                and tokens <= native.MAX_TOKENS
                and dim <= native.MAX_HEAD_DIM
            )

            def memory(rows: int, width: int, tiled: bool = False) -> Tensor:
                return torch.empty(
                    native.tiled(rows, tokens, width) if tiled else (rows, tokens, width),
                    dtype=dtype,
                )

            with torch.inference_mode(
                False
            ):  # what is made in inference mode cannot be written outside it
                table = (
                    self.model.positions
                    if grid == (config.image_size // patch,) * 2
                    else position_table(*grid, size)
                )
                positions = table.to(dtype)[None]
                found = self._workspace = Workspace(
                    x=memory(batch, size),
                    vr=memory(batch, size),
                    h=memory(batch, size, tiles),
                    middle=memory(few, size),
                    y=memory(few, size, tiles),
                    qkv=memory(few, 3 * size, heads),
                    hidden=None if self.products else memory(few, config.mlp_size),
                    grid=grid,
                    positions=positions,
                    rest=(table - positions.float()).to(dtype),
                    ones=torch.ones(1, size),
                )
        return found


def why_not(model: DiT, build_it: bool = True) -> str | None:
    """Why `CpuNetwork` cannot run this model, in one line; None if it can. build_it: whether the
    operators may be built for it."""
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {model.dtype}"
    if model.config.hidden_size > 8192:
        return "its rows are wider than 8192"
    return native.load("cpu", build_it)


def choose(model: DiT) -> DiT | CpuNetwork:
    """What `auto` runs on a CPU: the native operators where they have been built (`odelt-fast
    build-ops`), else the model."""
    return model if why_not(model, build_it=False) else CpuNetwork(model)
