"""Native CPU row operators against PyTorch and Inductor: GB/s of the bytes that an operator must
read and write once, the variants in turn. Whole evaluations: benchmarks.cpu_rate.

    python -m benchmarks.native_ops [--dtype float32 bfloat16] [--seconds 5] [--no-inductor]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS, PRESETS, DiTConfig
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load
from odelt_fast.engine.native.cpu_ops import InnerState, Modulation

from .ceilings import token_count
from .measure import command_parser, host_timer, summary, take_turns
from .tables import spread, table

Call = Callable[[], object]


def operators(
    config: DiTConfig, batch: int, dtype: torch.dtype, inductor: bool
) -> Iterator[tuple[str, int, dict[str, Call]]]:
    """(name, bytes that it moves, variants) of every operator, on one set of inputs."""
    tokens, size, hidden = token_count(config), config.hidden_size, config.mlp_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, y, xr, vr, a, b, c = (draw(batch, tokens, size) for _ in range(7))
    table, bias = draw(batch, 6 * size), draw(size)
    wide, long = draw(batch * tokens, hidden), draw(hidden)
    gate, shift, scale = table[:, None].split(size, 2)[:3]
    columns = Modulation(table, 0, table, size, 2 * size)

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, (size,), eps=LAYER_NORM_EPS), 1 + scale)

    def gated(x: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        bias, gate, shift, scale = rest
        total = torch.addcmul(x, gate, y + bias)
        return total, norm(total, shift, scale)

    def end(x: Tensor, y: Tensor, xr: Tensor, vr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        bias, gate, shift, scale = rest
        v = torch.addcmul(x, gate, y + bias)
        return xr + v, vr + v, norm(xr + v, shift, scale)

    def gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    def variants(native: Call, form: Callable[..., object], *inputs: Tensor) -> dict[str, Call]:
        found = {"pytorch": form, "native": native}
        if inductor:
            found["inductor"] = torch.compile(form, dynamic=False)
        return {name: partial(call, *inputs * (name != "native")) for name, call in found.items()}

    rest, state = (bias, gate, shift, scale), InnerState(xr, vr)
    ours = partial(cpu_ops.gated_residual, x, y, bias, columns, out_x=a, out=b)
    yield "gated_residual", 4 * x.nbytes, variants(ours, gated, x, y, *rest)
    ours = partial(cpu_ops.group_end, x, y, bias, state, columns, (a, b, c))
    yield "group_end", 7 * x.nbytes, variants(ours, end, x, y, xr, vr, *rest)
    ours = partial(cpu_ops.bias_gelu_, wide, long)
    yield "bias_gelu", 2 * wide.nbytes, variants(ours, gelu, wide, long)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("native_ops", __doc__)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--seconds", type=float, default=5, help="of each operator")
    parser.add_argument("--no-inductor", action="store_true")
    options = parser.parse_args(arguments)
    if reason := load("cpu"):
        raise SystemExit(f"error: the native operators are not there: {reason}")
    rows, cpu = [], torch.device("cpu")
    for dtype in options.dtype:
        cases = operators(PRESETS["DiT-B/2"], 8, getattr(torch, dtype), not options.no_inductor)
        for operator, traffic, variants in cases:
            timers = {name: host_timer(call, cpu) for name, call in variants.items()}
            for name, samples in take_turns(timers, options.seconds).items():
                row = summary(samples)
                rate = f"{traffic / row['median_s'] / 1e9:.1f}"
                rows.append((f"{operator} {dtype}", name, spread(row), rate))
    print(table("operator | variant | time | GB/s", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
