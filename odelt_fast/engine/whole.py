"""The plan "whole": all blocks of an evaluation as one launch (kernels/whole.py), for few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine import Engine, Tables
    from .plans import Setting


class Kept:
    """Of one engine: its blocks' weights in the kernel's order, the table of their addresses, and
    counters of each stream. ValueError where the kernel cannot read a weight where it lies."""

    def __init__(self, engine: Engine) -> None:
        from odelt_fast.kernels.whole import address_table
        from odelt_fast.kernels.whole_launch import most_counters

        layers = [layer for block in engine.weights.blocks for layer in block.values()]
        self.weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        with torch.inference_mode(False):
            self.table = address_table(self.weights) if self.weights else None
        self._needed = most_counters(engine.config.hidden_size, engine.dtype)
        self._counters: dict[int, Tensor] = {}

    def counters(self, engine: Engine) -> Tensor:
        """Those of the current stream, enough for all sizes: graphs go on using them."""
        stream = torch.cuda.current_stream(engine.device).cuda_stream if engine.on_gpu else 0
        if stream not in self._counters:
            with torch.inference_mode(False):
                made = torch.zeros(self._needed, dtype=torch.int32, device=engine.device)
            self._counters[stream] = made
        return self._counters[stream]


def limits(setting: Setting, samples: int, tokens: int) -> str | None:
    """Why it does not serve so many samples of so many tokens, or None."""
    from odelt_fast.kernels.whole_launch import Sizes, architectures, unsuitable

    config = setting.config
    if setting.precision is not None:
        return f"it has no form for precision {setting.precision!r}"
    if setting.attention not in ("auto", "triton"):
        return f"its attention is its own, not {setting.attention!r}"
    fits = architectures(tokens, config.hidden_size, setting.dtype)
    if 10 * max(8, min(setting.capability[0], 10)) not in fits:
        given = f"{tokens} tokens of width {config.hidden_size} in {setting.dtype}"
        return f"with {given} it is for cards of sm_{' and sm_'.join(map(str, fits))} alone"
    size, mlp = config.hidden_size, config.mlp_size
    return unsuitable(Sizes(samples, tokens, size, mlp, config.num_heads))


def hidden(engine: Engine, state: Tensor, tables: Tables, depth: int) -> Tensor:
    """h (B, N, D), as a plan makes it."""
    from odelt_fast.kernels.whole import TENSORS

    config, kept = engine.config, engine.kept["whole"]
    x = engine.ops.patch_embed(*engine.patches(state))
    return engine.ops.whole(  # type: ignore[no-any-return]
        x, *tables, kept.weights[: TENSORS * config.live_blocks(depth)], kept.table,
        config.num_heads, config.depth_group if config.has_inner_ode else 0,
        engine.weights.group_steps[depth], kept.counters(engine),
    )  # fmt: skip
