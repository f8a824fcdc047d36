"""Other projects' transformers, written anew from their papers and code: random state dicts under
the projects' own names, and what their networks give for them, in float64.

Angles of times are taken in float32, as all of them do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

SOURCES = ("sit", "repa", "meanflow", "dit", "diffusers")


@dataclass(frozen=True)
class PeerShape:
    """Arguments of the peers' constructors, by their own names."""

    source: str
    input_size: int = 8
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 24
    depth: int = 2
    num_heads: int = 3
    mlp_hidden: int = 96
    num_classes: int = 10
    learn_sigma: bool = True

    @property
    def out_channels(self) -> int:
        return self.in_channels * (1 + self.learn_sigma)

    def state(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights, none of them zero, by the names of the DiT family."""
        generator = torch.Generator().manual_seed(seed)
        width, patch, mlp = self.hidden_size, self.patch_size, self.mlp_hidden
        shapes: dict[str, tuple[int, ...]] = {
            "x_embedder.proj": (width, self.in_channels, patch, patch),
            "t_embedder.mlp.0": (width, 256),
            "t_embedder.mlp.2": (width, width),
            "final_layer.linear": (patch * patch * self.out_channels, width),
            "final_layer.adaLN_modulation.1": (2 * width, width),
        }
        if self.source == "meanflow":
            shapes |= {"r_embedder.mlp.0": (width, 256), "r_embedder.mlp.2": (width, width)}
        for i in range(self.depth):
            shapes |= {
                f"blocks.{i}.attn.qkv": (3 * width, width),
                f"blocks.{i}.attn.proj": (width, width),
                f"blocks.{i}.mlp.fc1": (mlp, width),
                f"blocks.{i}.mlp.fc2": (width, mlp),
                f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
            }
        state = {}
        for name, shape in shapes.items():
            scale = math.prod(shape[1:]) ** -0.5
            state[f"{name}.weight"] = scale * torch.randn(shape, generator=generator)
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
        rows = self.num_classes + 1
        state["y_embedder.embedding_table.weight"] = torch.randn(rows, width, generator=generator)
        state["pos_embed"] = position_table(self.input_size // patch, width)[None].float()
        return state

    def of_diffusers(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same by the names of diffusers, which stores no positions."""
        named: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name == "pos_embed":
                continue
            if name.startswith(("t_embedder", "y_embedder")):
                inner = name.replace("t_embedder.mlp.0", "timestep_embedder.linear_1")
                inner = inner.replace("t_embedder.mlp.2", "timestep_embedder.linear_2")
                inner = inner.replace("y_embedder", "class_embedder")
                for i in range(self.depth):
                    named[f"transformer_blocks.{i}.norm1.emb.{inner}"] = tensor.clone()
                continue
            for ours, theirs in (
                ("x_embedder.", "pos_embed."),
                ("final_layer.adaLN_modulation.1.", "proj_out_1."),
                ("final_layer.linear.", "proj_out_2."),
                ("blocks.", "transformer_blocks."),
                (".adaLN_modulation.1.", ".norm1.linear."),
                (".attn.proj.", ".attn1.to_out.0."),
                (".mlp.fc1.", ".ff.net.0.proj."),
                (".mlp.fc2.", ".ff.net.2."),
            ):
                name = name.replace(ours, theirs)
            if ".attn.qkv." in name:
                for part, values in zip("qkv", tensor.chunk(3), strict=True):
                    named[name.replace(".attn.qkv.", f".attn1.to_{part}.")] = values.clone()
            else:
                named[name] = tensor
        return named

    @property
    def configuration(self) -> dict[str, Any]:
        """What diffusers writes into config.json."""
        return {
            "_class_name": "DiTTransformer2DModel",
            "_diffusers_version": "0.42.1",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": self.hidden_size // self.num_heads,
            "dropout": 0.0,
            "in_channels": self.in_channels,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-5,
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.num_heads,
            "num_embeds_ada_norm": self.num_classes,
            "num_layers": self.depth,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "sample_size": self.input_size,
            "upcast_attention": False,
        }


def position_table(side: int, width: int) -> Tensor:
    """(side^2, width) float64, of MAE's get_2d_sincos_pos_embed: the column's half first."""
    rates = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = np.arange(side, dtype=np.float64)[:, None] * rates
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, width/2)
    column = np.broadcast_to(one[None], (side, side, width // 2))
    row = np.broadcast_to(one[:, None], (side, side, width // 2))
    return torch.from_numpy(np.concatenate([column, row], axis=2).reshape(side * side, width))


def _embedded(state: dict[str, Tensor], name: str, t: Tensor, last: int = 128) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / last)
    angles = t[:, None].float() * rates
    features = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    hidden = silu(linear(features, state[f"{name}.mlp.0.weight"], state[f"{name}.mlp.0.bias"]))
    return linear(hidden, state[f"{name}.mlp.2.weight"], state[f"{name}.mlp.2.bias"])


def peer_output(
    shape: PeerShape, state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, r: Any = None
) -> Tensor:
    """The peer's network, float64 (B, out_channels, H, W), in its own time; r: of MeanFlow."""
    w = {name: tensor.double() for name, tensor in state.items()}
    width, p = shape.hidden_size, shape.patch_size
    c = _embedded(w, "t_embedder", t, 127 if shape.source == "diffusers" else 128)
    if shape.source == "meanflow":
        c = c + _embedded(w, "r_embedder", t - r)
    c = c + w["y_embedder.embedding_table.weight"][y]
    x = conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    side = x.shape[-1]
    x = x.flatten(2).transpose(1, 2) + position_table(side, width)
    eps = 1e-5 if shape.source == "diffusers" else 1e-6

    def modulation(name: str, parts: int) -> tuple[Tensor, ...]:
        return linear(silu(c), w[f"{name}.weight"], w[f"{name}.bias"])[:, None].chunk(parts, dim=2)

    for i in range(shape.depth):
        block = f"blocks.{i}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(
            f"{block}.adaLN_modulation.1", 6
        )
        h = layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
        qkv = linear(h, w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"])
        q, k, v = qkv.unflatten(2, (3, shape.num_heads, -1)).permute(2, 0, 3, 1, 4)
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * linear(h, w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"])
        h = layer_norm(x, (width,), eps=eps) * (1 + mlp_scale) + mlp_shift
        h = gelu(linear(h, w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"]),
                 approximate="tanh")  # fmt: skip
        x = x + mlp_gate * linear(h, w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])
    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)
    x = layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
    x = linear(x, w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    x = x.unflatten(1, (side, side)).unflatten(3, (p, p, shape.out_channels))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
