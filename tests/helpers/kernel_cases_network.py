"""The row kernels around the model's own products, as an engine calls them, against the model."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.kernels.final_layer import final_velocity
from odelt_fast.kernels.gated_residual import gated_residual
from odelt_fast.kernels.group_end import group_end, last_group_end
from odelt_fast.kernels.modulation import modulation
from odelt_fast.kernels.norm_modulate import norm_modulate
from odelt_fast.kernels.patch import patch_embed
from odelt_fast.model import DiT
from tests.helpers.kernel_checks import ORDERS, check_error, guarded


def network_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The row kernels around the model's own products make the model's velocity, at every depth."""
    group, heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    config = DiTConfig(
        image_size=8, channels=rng.choice([1, 3]), patch_size=2, hidden_size=8 * heads,
        num_heads=heads, depth=2 * group + 1, depth_min=group + 1, depth_group=group,
        num_classes=3, inner_step=rng.choice(["unit", "inverse_depth"]),
    )  # fmt: skip
    model = DiT(config).to(device)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    model = model.to(dtype)
    exact_model = DiT(config).to(device).double()
    exact_model.load_state_dict(model.state_dict())
    batch, depth = rng.randint(3, 6), rng.choice(config.depths)
    x = guarded(rng, (batch, config.channels, 8, 8), dtype, device)
    labels = torch.tensor([rng.randrange(4) for _ in range(batch)], device=device)
    with torch.no_grad():
        got = fused_velocity(model, x, labels, depth)
        exact = exact_model(x.double(), 0.25, 2, labels, depth)
        plain = [model(x, 0.25, 2, labels, depth)]
        # A row of little variance lies near or far by luck: its error is drawn at neighbouring
        # states too.
        for _ in range(ORDERS):
            last_bits = torch.randint(-1, 2, x.shape, generator=generator).to(x)
            near = x * (1 + torch.finfo(dtype).eps * last_bits)
            error = model(near, 0.25, 2, labels, depth) - exact_model(
                near.double(), 0.25, 2, labels, depth
            )
            plain.append(exact + error)
    check_error("velocity", got, plain, exact)
    return got


def fused_velocity(model: DiT, x: Tensor, labels: Tensor, depth: int) -> Tensor:
    """What an engine does with these kernels: model(x, 0.25, 2, labels, depth)."""
    config, size = model.config, model.config.hidden_size
    layers = [block.modulation for block in model.blocks]
    weight, bias = (torch.cat([getattr(m, name) for m in layers]) for name in ("weight", "bias"))
    condition = model.condition(0.25, 2, labels)
    table = modulation(condition + model.length_embed.weight[depth], weight, bias)
    end, patch, out = model.final_layer.modulation, model.patch_embed, model.final_layer.out
    last = modulation(condition, end.weight, end.bias)
    tokens = patch_embed(x, patch.weight.flatten(1), patch.bias, model.positions, config.patch_size)
    steps = (
        torch.full((1,), config.depth_group / depth, device=x.device)
        if config.inner_step == "inverse_depth"
        else None
    )
    vr = None
    blocks = config.live_blocks(depth)
    h = norm_modulate(tokens, table, 0, size)
    for index, block in enumerate(model.blocks[:blocks]):
        first = 6 * size * index
        before = tokens
        columns = first + 2 * size, table, first + 3 * size, first + 4 * size
        attended, h = gated_residual(tokens, block.attention(h), table, *columns)
        y, gate, following = block.mlp(h), first + 5 * size, first + 6 * size
        if (index + 1) % config.depth_group:
            tokens, h = gated_residual(attended, y, table, gate, table, following, following + size)
        elif index + 1 < blocks:
            tokens, vr, h = group_end(
                attended, y, before, vr, table, gate, table, following, following + size, steps
            )
        else:
            vr, h = last_group_end(attended, y, vr, table, gate, last, 0, size, steps)
    return final_velocity(h, out.weight, out.bias, config.patch_size, *x.shape[2:], x.dtype)


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("row_kernels_as_network", network_case)
]
