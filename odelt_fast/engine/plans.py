"""Plans: which launches an evaluation makes. All of them compute the same.

"seven", of every block: [qkv] [attention on packed qkv] [output projection] [gate*y + residual +
LayerNorm + modulate] [MLP in + GELU] [MLP out] and, across the border to the next block, [gate*y +
residual, the group-end Euler update of xr and vr, the next LayerNorm + modulate]; with fp8 one
more, the quantisation of the MLP's hidden values. Patch embedding, the first LayerNorm and the
final layer (with unpatchify, guidance and the Euler update in time) are three more.

A plan is a function from a state to what the final projection sees, and what is to be known of it
beforehand. Which one runs is said by name, or by what was measured on a card (`tuning`); where
nothing was, the first of the engine's plans runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .engine import Engine, Tables

# (engine, state (B, C, H, W), modulations, depth) -> h (B, N, D): the inner ODE's vr, or the last
# block's x, after the final layer's LayerNorm + modulate. At least one block is live.
Hidden = Callable[["Engine", Tensor, "Tables", int], Tensor]


@dataclass(frozen=True)
class Plan:
    """A sequence of launches.

    Args:
        hidden: makes them all but that of the final projection.
        launches: their number, that of the final projection included, by live blocks and whether
            products run on float8.
        unavailable: the reason why an engine cannot run it, or None.
    """

    hidden: Hidden
    launches: Callable[[int, bool], int]
    unavailable: Callable[[Engine], str | None] = lambda engine: None


def seven(engine: Engine, state: Tensor, tables: Tables, depth: int) -> Tensor:
    """The plan of that name."""
    config, ops, size = engine.config, engine.ops, engine.config.hidden_size
    modulation, final_modulation = tables
    x, vr, live = engine.embed(state), None, config.live_blocks(depth)
    (h,) = _rows(engine, "norm_modulate", x, modulation, 0, size)
    for index, block in enumerate(engine.weights.blocks[:live]):
        before, last = x, index + 1 == live
        # Shift, scale and gate of the attention, those of the MLP, and the next block's first.
        column = [size * (6 * index + part) for part in range(8)]
        attended = engine.attend(engine.product(h, block["qkv"]))
        y = engine.product(attended, block["attention_out"])
        columns: Any = modulation, column[2], modulation, column[3], column[4]
        x, h = _rows(engine, "gated_residual", x, y, *columns)
        mlp = engine.product(h, block["mlp_in"], "gelu")
        if block["mlp_out"].scale is not None:
            mlp = ops.quantize_rows(mlp)
        mlp = engine.product(mlp, block["mlp_out"])
        following = (final_modulation, 0, size) if last else (modulation, *column[6:])
        columns = modulation, column[5], *following
        if not config.ends_group(index):
            x, h = _rows(engine, "gated_residual", x, mlp, *columns, last=last)
        elif last:
            _, h = ops.last_group_end(x, mlp, vr, *columns, engine.weights.group_steps[depth])
        else:
            step = engine.weights.group_steps[depth]
            x, vr, h = _rows(engine, "group_end", x, mlp, before, vr, *columns, step)
    return h


def _rows(engine: Engine, name: str, *arguments: Any, last: bool = False) -> tuple[Any, ...]:
    """A row operator's results. The last of them is what the next product takes: a tensor, or with
    fp8 a pair (q, scales); but a tensor for the final projection, after the last block."""
    if engine.precision is not None and not last:
        *states, q, scales = getattr(engine.ops, f"{name}_float8")(*arguments)
        return *states, (q, scales)
    results = getattr(engine.ops, name)(*arguments)
    return results if isinstance(results, tuple) else (results,)


PLANS = MappingProxyType({"seven": Plan(seven, lambda live, float8: (7 + float8) * live + 3)})
DEFAULT = "seven"
PLAN_CHOICES = ("auto", *PLANS)
