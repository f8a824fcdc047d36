"""DiT with an inner ODE over its length: the one definition of the network, differentiable.

The arithmetic is that of the paper's reference implementation (github.com/gudovskiy/odelt), so that
its checkpoints keep their meaning: attention logits are scaled by 1/head_dim, t is not scaled by
1000, blocks see the length embedding and the final layer does not.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odelt_fast.config import LAYER_NORM_EPS, DiTConfig, TrainedOn

Number = float | Tensor  # one, or of each sample (B,)
FREQUENCIES = 128  # of the time and step-size embeddings: 256 features


def _checkpoints(module: str) -> Any:
    """A module of the room above, looked up by name: the network imports nothing from above it."""
    return importlib.import_module(f"odelt_fast.checkpoints.{module}")


def position_table(height: int, width: int, size: int) -> Tensor:
    """2-D positions (height*width, size), float32: halves of column and row, each [sin, cos]."""
    omega = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float32) / (size // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x)*(1 + scale) + shift: x (B, N, D); shift, scale (B or 1, D); LN without parameters."""
    normalized = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(shift[:, None], normalized, 1 + scale[:, None])


class ScalarEmbedding(nn.Module):
    """(B,) s -> (B, D): [cos, sin] of scale*s*period^(-k/128), k < 128; Linear, SiLU, Linear."""

    def __init__(self, size: int, scale: float = 1.0, period: float = 10000.0) -> None:
        super().__init__()
        self.scale, self.period = scale, period
        self.linear_in = nn.Linear(2 * FREQUENCIES, size)
        self.linear_out = nn.Linear(size, size)

    def forward(self, scalar: Tensor) -> Tensor:
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=scalar.device)
        frequencies = torch.exp(-math.log(self.period) * (k / FREQUENCIES))
        angles = self.scale * scalar.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


class Block(nn.Module):
    """adaLN-Zero transformer block: x (B, N, D), condition (B, D) -> (B, N, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.modulation = nn.Linear(size, 6 * size)
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.mlp_in = nn.Linear(size, config.mlp_size)
        self.mlp_out = nn.Linear(config.mlp_size, size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(
            F.silu(condition).to(x.dtype)
        ).chunk(6, dim=1)
        x = torch.addcmul(x, gate_a[:, None], self.attention(modulate(x, shift_a, scale_a)))
        return torch.addcmul(x, gate_m[:, None], self.mlp(modulate(x, shift_m, scale_m)))

    def attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0 / q.shape[-1])
        return self.attention_out(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.mlp_in(x), approximate="tanh"), self.dropout, self.training)
        return F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a projection to the pixels of each patch.

    x (B, N, D), condition (B, D) -> (B, N, p*p*C).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.patch_size**2 * config.channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition).to(x.dtype)).chunk(2, dim=1)
        return self.out(modulate(x, shift, scale))


class DiT(nn.Module):
    """Velocity field v(x, t) of an ODE_t(ODE_l) model, at any allowed number of active blocks.

    >>> model = DiT(DiTConfig(image_size=8, channels=1, hidden_size=96, num_heads=4))
    >>> model(torch.randn(2, 1, 8, 8), 0.0, 0, torch.tensor([3, 10]), depth=4).shape
    torch.Size([2, 1, 8, 8])
    """

    positions: Tensor  # (N, D) float32: the position table at the configuration's image size

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.trained_on = TrainedOn()  # what is known of its data; stored with it
        self.max_depth = config.depth
        # Whether blocks that no row needs are called too: sharded weights are gathered by all.
        self.calls_every_block = False
        size = config.hidden_size
        self.patch_embed = nn.Conv2d(config.channels, size, config.patch_size, config.patch_size)
        self.time_embed = ScalarEmbedding(size, config.time_scale, config.time_period)
        self.step_embed = ScalarEmbedding(size)
        self.label_embed = nn.Embedding(config.num_classes + 1, size)  # last row: the null label
        if config.guidance_max is not None:
            self.guidance_embed = ScalarEmbedding(size)
        if config.length_conditioned:
            self.length_embed = nn.Embedding(config.depth + 1, size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("positions", position_table(*config.grid, size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices (q, k, v each), normal(0.02) embeddings, zero final layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith("qkv.weight"):
                for part in weight.chunk(3):
                    nn.init.xavier_uniform_(part)
        for embed in (self.time_embed, self.step_embed):
            nn.init.normal_(embed.linear_in.weight, std=0.02)
            nn.init.normal_(embed.linear_out.weight, std=0.02)
        silent = [self.final_layer.modulation, self.final_layer.out]
        if self.config.guidance_max is not None:
            nn.init.normal_(self.guidance_embed.linear_in.weight, std=0.02)
            silent.append(self.guidance_embed.linear_out)
        for linear in silent:
            nn.init.zeros_(linear.weight)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        table = self.positions
        super()._apply(fn, recurse)
        # Added in float32 whatever the weights' dtype: its rounding would gain nothing.
        if self.positions.dtype != torch.float32:
            self.positions = table.to(self.positions.device)
        return self

    def truncate(self, depth: int) -> DiT:
        """Drops, in place, the blocks that no length up to `depth` uses, which None then means."""
        self.blocks = self.blocks[: self.config.live_blocks(depth)]
        self.max_depth = depth
        return self

    def check_depth(self, depth: int | None) -> int:
        """The length l that `depth` asks for (None: the longest loaded); else ValueError."""
        length = self.config.check_depth(self.max_depth if depth is None else depth)
        if length > self.max_depth:
            raise ValueError(
                f"depth {length} needs blocks that are not loaded: this model was loaded for depth"
                f" {self.max_depth}"
            )
        return length

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        depth: int | None = None,
        **download: Any,
    ) -> DiT:
        """The model of a folder, a bundled name or a Hub id, in eval mode on the device
        `map_location`. dtype, depth, errors: of `load_model`.

        download: how a Hub id is downloaded, as everywhere in huggingface_hub: revision, token,
        cache_dir, force_download, local_files_only; TypeError for another keyword.
        """
        return _checkpoints("folder").load_model(
            pretrained_model_name_or_path, map_location, dtype, depth, download=download
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: DiTConfig | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the model as `save_model` does, and a model card unless the folder has one;
        returns the commit's URL if it was pushed. model_card_kwargs: of `model_card`, and picture,
        a PNG file. repo_id: where push_to_hub=True pushes it, by default the folder's name. Errors:
        of `save_model`; ValueError for another config or an unknown option.
        """
        if config is not None and config != self.config:
            raise ValueError("config must be the model's own: the weights belong to it")
        repo = repo_id or Path(save_directory).name
        unused = () if push_to_hub else tuple(push_to_hub_kwargs)
        _checkpoints("hub").save_with_card(self, save_directory, repo, model_card_kwargs, unused)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes, to a new repository if there is none; returns the
        commit's URL. options: those of PyTorchModelHubMixin.push_to_hub."""
        return _checkpoints("hub").push(self, repo_id, **options)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embed.weight.device

    def forward(
        self,
        x: Tensor,
        t: Number,
        log2_steps: Number,
        y: Tensor,
        depth: int | Sequence[int] | Tensor | None = None,
        guidance: Number | None = None,
    ) -> Tensor:
        """Velocity at x. Rows of mixed depths are sorted by depth and run as shrinking prefixes: no
        block is computed for a row that does not use it.

        Args:
            x: (B, C, H, W) state; H and W are multiples of the patch size (the position table
                follows them).
            t: time in [0, 1] (0 = noise, 1 = data), a number or (B,).
            log2_steps: step index, log2 of the number of time steps, 0 (one step) to 7 (128 steps;
                also plain flow matching), a number or (B,).
            y: (B,) integer labels; num_classes is the null label.
            depth: number of active blocks l; None (all), a number, or one per sample (a list, or a
                (B,) integer tensor, best on the CPU).
            guidance: guidance scale from 1 (None) to `config.guidance_max`, a number or (B,), of
                networks that are told it; rows with the null label have none.

        Returns:
            (B, C, H, W) in the dtype of the weights.

        Raises:
            ValueError: a shape that does not fit, a depth that is not one of `config.depths`.
        """
        tokens = self.embed_patches(x)
        condition = self.condition(t, log2_steps, y, guidance)
        if not self.config.length_conditioned:
            if depth is not None and not isinstance(depth, int):
                raise ValueError(
                    "a conventional DiT (length_conditioned=False) has one depth: pass None"
                )
            for block in self.blocks[: self.config.live_blocks(self.check_depth(depth))]:
                tokens = block(tokens, condition)
            velocity = tokens
        elif depth is None or isinstance(depth, int):
            length = self.check_depth(depth)
            inner = condition + self.length_embed.weight[length]
            velocity = self.inner_ode(tokens, inner, [length] * len(x))
            condition = condition if self.config.has_inner_ode else inner
        else:
            wanted = depth.tolist() if isinstance(depth, Tensor) else depth
            lengths = [self.check_depth(length) for length in wanted]
            if len(lengths) != len(x):
                raise ValueError(f"{len(lengths)} depths for a batch of {len(x)}")
            # A stable order, longest first, and its inverse: the host needs the prefixes.
            order = sorted(range(len(x)), key=lambda row: -lengths[row])
            inverse = sorted(range(len(x)), key=order.__getitem__)
            lengths = [lengths[row] for row in order]
            # From pinned memory: else the host would wait for the copy in every training step.
            table = torch.tensor([order, inverse, lengths], pin_memory=x.is_cuda)
            rows, back, row_lengths = table.to(x.device, non_blocking=True)
            inner = condition.expand(len(x), -1)[rows] + self.length_embed(row_lengths)
            velocity = self.inner_ode(tokens[rows], inner, lengths)[back]
            condition = condition if self.config.has_inner_ode else inner[back]
        return self.unpatchify(self.final_layer(velocity, condition), x.shape[2], x.shape[3])

    def inner_ode(self, tokens: Tensor, condition: Tensor, lengths: Sequence[int]) -> Tensor:
        """Euler steps over the groups of blocks (Algorithm 2), or in residual wiring the blocks.

        Args:
            tokens: (B, N, D).
            condition: (B or 1, D), with the length embedding.
            lengths: the depth of each row, longest first.

        Returns:
            vr (B, N, D), the sum of the groups' increments; in residual wiring the tokens.
        """
        config = self.config
        live = [config.live_blocks(length) for length in lengths]
        group = config.depth_group if config.has_inner_ode else 1
        scale: Tensor | None = None  # G/l of each row
        if config.inner_step == "inverse_depth":
            scale = config.depth_group / torch.tensor(lengths, dtype=tokens.dtype)
            scale = scale.to(tokens.device)[:, None, None]
        xr, vr = tokens, torch.zeros_like(tokens)
        finished: list[Tensor] = []
        for start in range(0, live[0], group):
            rows = sum(count > start for count in live)
            if rows < len(vr):
                finished.append(vr[rows:])
                xr, vr = xr[:rows], vr[:rows]
                condition = condition[:rows]
            *inner, last = self.blocks[start : start + group]
            for block in inner:
                xr = block(xr, condition)
            increment = last(xr, condition)  # holds the last block's own residual already
            if not config.has_inner_ode:
                xr = vr = increment
                continue
            if scale is not None:
                increment = increment * scale[:rows]
            xr, vr = xr + increment, vr + increment
        velocity = torch.cat([vr, *reversed(finished)]) if finished else vr
        if self.calls_every_block and live[0] < config.live_blocks():
            idle = xr[:1]
            for block in self.blocks[live[0] : config.live_blocks()]:
                idle = block(idle, condition[:1])
            velocity = velocity + 0 * idle.sum()
        return velocity

    def embed_patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens (B, H*W/p^2, D), row-major; positions are added in float32."""
        config, patch = self.config, self.config.patch_size
        height, width = x.shape[2:] if x.dim() == 4 else (0, 0)
        if not height * width or x.shape[1] != config.channels or height % patch or width % patch:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit: (B, {config.channels}, H, W), H and W"
                f" multiples of {patch}"
            )
        tokens = self.patch_embed(x.to(self.dtype)).flatten(2).transpose(1, 2)
        positions = self.positions
        if (height, width) != config.image_shape[1:]:
            table = position_table(height // patch, width // patch, config.hidden_size)
            positions = table.to(x.device)
        return (tokens + positions).to(self.dtype)

    def condition(
        self, t: Number, log2_steps: Number, y: Tensor, guidance: Number | None = None
    ) -> Tensor:
        """Time + label + step-size (+ guidance) embedding (B, D); blocks see it plus the length
        embedding."""
        index = log2_steps if self.config.step_conditioned else 0
        time, step = (as_vector(value, y.device) for value in (t, index))
        # Summed in float32 at least, as in the reference: rounding shifts all tokens of a sample.
        wide = torch.promote_types(self.dtype, torch.float32)
        known = self.time_embed(time).to(wide) + self.label_embed(y) + self.step_embed(step)
        if self.config.guidance_max is None:
            return known
        return known + self.guidance_embed(guidance_share(guidance, y == self.config.num_classes))

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, N, p*p*C) -> (B, C, H, W); each patch holds its pixels row by row, channels last."""
        patch, channels = self.config.patch_size, self.config.channels
        grid = patches.unflatten(1, (height // patch, width // patch))
        grid = grid.unflatten(3, (patch, patch, channels))  # (B, h, w, p, q, C)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, height, width)


def guidance_share(scale: Number | None, null: Tensor) -> Tensor:
    """What a network is told of the guidance scale w, 1 - 1/w as improved MeanFlow tells it, and 0
    in rows with the null label: float32, of both arguments' shape."""
    vector = scale if isinstance(scale, Tensor) else as_vector(scale or 1.0, null.device)
    return torch.where(null, 0.0, 1 - 1 / vector.float())


def as_vector(value: float | Tensor, device: torch.device) -> Tensor:
    """A number or (B,) tensor as (1,) or (B,) float32; numbers are filled in on the device, without
    a copy from the host."""
    if isinstance(value, Tensor):
        return value.reshape(-1).to(device, torch.float32)
    return torch.full((1,), value, dtype=torch.float32, device=device)
