"""Plans: which launches an evaluation makes. All of them compute the same.

"seven", of every block: [qkv] [attention on packed qkv] [output projection] [gate*y + residual +
LayerNorm + modulate] [MLP in + GELU] [MLP out] and, across the border to the next block, [gate*y +
residual, the group-end Euler update of xr and vr, the next LayerNorm + modulate]; with fp8 one
more, the quantisation of the MLP's hidden values. Patch embedding, the first LayerNorm and the
final layer (with unpatchify, guidance and the Euler update in time) are three more.

"five": [LayerNorm + modulate + qkv] [attention] [output projection + gate*y + residual] [LayerNorm
+ modulate + MLP in + GELU] [MLP out + gate*y + residual, or the group-end update]; all products are
our kernels, and with fp8 they quantise what they take and make. Patch embedding, the final
LayerNorm and the final layer are three more.

"gated": seven, in which the gated residual is part of the product before it (our kernel), so that
y is not written; but at the end of a group.

"whole": [patch embedding] [all blocks and the final LayerNorm, in one kernel whose programs wait
for each other between the phases of a block] [final layer]; for few rows (whole.py).

A plan is a function from a state to what the final projection sees, and what is to be known of it
beforehand. Which one runs is said by name, or by what was measured on a card (`tuning`); where
nothing was, the first of the engine's plans runs. A batch that a plan does not serve runs DEFAULT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from odelt_fast.config import DiTConfig

from . import whole
from .weights import LAYERS

if TYPE_CHECKING:
    from .engine import Engine, Tables
    from .weights import Layer

# (engine, state (B, C, H, W), modulations, depth) -> h (B, N, D): the inner ODE's vr, or the last
# block's x, after the final layer's LayerNorm + modulate. At least one block is live.
Hidden = Callable[["Engine", Tensor, "Tables", int], Tensor]


class Setting(NamedTuple):
    """What of an engine decides which plans can run: capability is that of the GPU, or Hopper's
    where there is none."""

    config: DiTConfig
    dtype: torch.dtype
    precision: str | None
    attention: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A sequence of launches.

    Args:
        hidden: makes them all but that of the final projection.
        launches: their number, that of the final projection included, by live blocks and whether
            products run on float8.
        overlapped: whether each of our kernels starts while the one before it ends (kernels/
            device.py); from Hopper on, elsewhere it is the same.
        own: layers of a block whose products have a kernel of their own; "attention", too.
        gated: layers whose products add their result to the residual.
        limits: why it leaves so many samples of so many tokens to DEFAULT, or None; None: it serves
            all.
        prepare: makes what it keeps of an engine (`Engine.kept`); ValueError where it cannot run.
    """

    hidden: Hidden
    launches: Callable[[int, bool], int]
    overlapped: bool = False
    own: Collection[str] = ()
    gated: Collection[str] = ()
    limits: Callable[[Setting, int, int], str | None] | None = None
    prepare: Callable[[Engine], Any] = lambda engine: None

    def refuses(self, setting: Setting, samples: int, tokens: int) -> str | None:
        """The reason why it does not serve such a batch, or None."""
        return self.limits(setting, samples, tokens) if self.limits else None

    def unavailable(self, setting: Setting) -> str | None:
        """The reason why it serves not even one image, or None."""
        return self.refuses(setting, 1, math.prod(setting.config.grid))


def seven(engine: Engine, state: Tensor, tables: Tables, depth: int, gated: bool = False) -> Tensor:
    """The plan of that name, or "gated"."""
    config, ops, size = engine.config, engine.ops, engine.config.hidden_size
    modulation, final_modulation = tables
    x, vr, live = ops.patch_embed(*engine.patches(state)), None, config.live_blocks(depth)
    (h,) = _rows(engine, "norm_modulate", x, modulation, 0, size)
    for index, block in enumerate(engine.weights.blocks[:live]):
        before, last = x, index + 1 == live
        # Shift, scale and gate of the attention, those of the MLP, and the next block's first.
        column = [size * (6 * index + part) for part in range(8)]
        attended = engine.attend(engine.product(h, block["qkv"]))
        add = _add_in_product if gated else _add
        columns: Any = modulation, column[2], modulation, column[3], column[4]
        x, h = add(engine, x, attended, block["attention_out"], columns)
        mlp: Any = engine.product(h, block["mlp_in"], "gelu")
        if block["mlp_out"].scale is not None:
            mlp = ops.quantize_rows(mlp)
        following = (final_modulation, 0, size) if last else (modulation, *column[6:])
        columns = modulation, column[5], *following
        if not config.ends_group(index):
            x, h = add(engine, x, mlp, block["mlp_out"], columns, last)
            continue
        mlp, step = engine.product(mlp, block["mlp_out"]), engine.weights.group_steps[depth]
        if last:
            _, h = ops.last_group_end(x, mlp, vr, *columns, step)
        else:
            x, vr, h = _rows(engine, "group_end", x, mlp, before, vr, *columns, step)
    return h


def _add(
    engine: Engine, x: Tensor, y: Any, layer: Layer, columns: Any, last: bool = False
) -> tuple[Any, ...]:
    """(x + gate * (y W^T + b), h): a product and a row kernel."""
    y = engine.product(y, layer)
    return _rows(engine, "gated_residual", x, y, *columns, last=last)


def _add_in_product(
    engine: Engine, x: Tensor, y: Any, layer: Layer, columns: Any, last: bool = False
) -> tuple[Any, ...]:
    """The same, the sum in the product's epilogue."""
    gates, column, *norm = columns
    x = engine.product(y, layer, residual=x, gate=gates[:, column : column + x.shape[2]])
    return x, *_rows(engine, "norm_modulate", x, *norm, last=last)


def _rows(engine: Engine, name: str, *arguments: Any, last: bool = False) -> tuple[Any, ...]:
    """A row operator's results. The last of them is what the next product takes: a tensor, or with
    fp8 a pair (q, scales); but a tensor for the final projection, after the last block."""
    if engine.precision is not None and not last:
        *states, q, scales = getattr(engine.ops, f"{name}_float8")(*arguments)
        return *states, (q, scales)
    results = getattr(engine.ops, name)(*arguments)
    return results if isinstance(results, tuple) else (results,)


def five(engine: Engine, state: Tensor, tables: Tables, depth: int) -> Tensor:
    """The plan of that name."""
    config, ops, size = engine.config, engine.ops, engine.config.hidden_size
    modulation, final_modulation = tables
    (x, moments), vr = ops.patch_embed_moments(*engine.patches(state)), None
    live, step = config.live_blocks(depth), engine.weights.group_steps[depth]
    space = engine.workspace()
    for index, block in enumerate(engine.weights.blocks[:live]):
        before, column = x, [size * (6 * index + part) for part in range(6)]
        normed = modulation, column[0], column[1]
        qkv = ops.norm_linear(x, moments, *normed, *block["qkv"], "none", space)
        attended, layer = engine.attend(qkv), block["attention_out"]
        x, moments = ops.residual_linear(attended, None, *layer, x, modulation, column[2], space)
        given = x, moments, modulation, column[3], column[4], *block["mlp_in"], "gelu", space
        layer = block["mlp_out"]
        float8 = layer.scale is not None
        mlp, scales = ops.norm_linear_float8(*given) if float8 else (ops.norm_linear(*given), None)
        added = mlp, scales, *layer, x, modulation, column[5]
        if not config.ends_group(index):
            x, moments = ops.residual_linear(*added, space)
        elif index + 1 < live:
            x, vr, moments = ops.group_end_linear(*added, before, vr, step, space)
        else:
            x = ops.last_group_end_linear(*added, vr, step, space)
    return ops.norm_modulate(x, final_modulation, 0, size)


def _seven_launches(live: int, float8: bool) -> int:
    return (7 + float8) * live + 3


_SEQUENCES: tuple[tuple[str, Hidden, Callable[[int, bool], int], dict[str, Any]], ...] = (
    ("seven", seven, _seven_launches, {}),
    (
        "gated", partial(seven, gated=True), _seven_launches,
        {"gated": ("attention_out", "mlp_out")},
    ),
    ("five", five, lambda live, float8: 5 * live + 3, {"own": LAYERS}),
)  # fmt: skip
# With overlapped launches: "+pdl", programmatic dependent launch.
PLANS = MappingProxyType(
    {
        name + "+pdl" * overlapped: Plan(hidden, launches, overlapped, **layers)
        for name, hidden, launches, layers in _SEQUENCES
        for overlapped in (False, True)
    }
    | {
        "whole": Plan(
            whole.hidden, lambda live, float8: 3, own=(*LAYERS, "attention"),
            limits=whole.limits, prepare=whole.Kept,
        )
    }
)  # fmt: skip
DEFAULT = "seven"
PLAN_CHOICES = ("auto", *PLANS)


def capability_of(device: torch.device, kind: str) -> tuple[int, int]:
    """Compute capability of the GPU that operators of that kind run on; Hopper's elsewhere."""
    on_gpu = kind == "kernels" and device.type == "cuda"
    return torch.cuda.get_device_capability(device) if on_gpu else (9, 0)


def require_plan(name: str, setting: Setting) -> None:
    """ValueError with the reason if it cannot run."""
    if reason := PLANS[name].unavailable(setting):
        raise ValueError(f"plan {name!r} cannot run here: {reason}")
