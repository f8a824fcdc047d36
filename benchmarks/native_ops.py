"""Native CPU operators against PyTorch and Inductor in GB/s, and what they change in a whole
evaluation of the network.

    python -m benchmarks.native_ops [--model DiT-B/2] [--batch 8] [--depth 4] [--dtypes float32
    bfloat16] [--seconds 5] [--no-inductor]
        [--output benchmarks/results/native-ops-cpu.json]

Bytes are those that an operator must read and write once; the variants take turns. `gemm_share`:
the matrix products of an evaluation, timed alone into memory of their own, as a share of the
evaluation. `native rows`: with PyTorch's products and attention. `faster`: its slowest tenth beats
the others' fastest tenth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from odelt_fast import DiT
from odelt_fast.config import PRESETS
from odelt_fast.engine.cpu import CpuNetwork
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load
from odelt_fast.engine.native.cpu_ops import InnerState, Modulation

CPU = torch.device("cpu")
Variants = dict[str, Callable[[], object]]


def operators(
    batch: int, tokens: int, size: int, hidden: int, dtype: torch.dtype, inductor: bool
) -> dict[str, tuple[int, Variants]]:
    """Per operator the bytes it moves and its variants, on one set of inputs."""
    x, y, xr, vr, a, b, c = (torch.randn(batch, tokens, size).to(dtype) for _ in range(7))
    table, wide, bias = (
        torch.randn(batch, 6 * size).to(dtype),
        torch.randn(batch * tokens, hidden).to(dtype),
        torch.randn(size).to(dtype),
    )
    long = torch.randn(hidden).to(dtype)
    gate, shift, scale = (table[:, None, first * size : (first + 1) * size] for first in (0, 1, 2))
    columns = Modulation(table, 0, table, size, 2 * size)

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, (size,), eps=cpu_ops.EPS), 1 + scale)

    def gated(
        x: Tensor, y: Tensor, bias: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = torch.addcmul(x, gate, y + bias)
        return total, norm(total, shift, scale)

    def end(
        x: Tensor,
        y: Tensor,
        bias: Tensor,
        xr: Tensor,
        vr: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = torch.addcmul(x, gate, y + bias)
        return xr + v, vr + v, norm(xr + v, shift, scale)

    def gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    plain: dict[str, tuple[int, Callable[..., object], tuple[Tensor, ...], Callable[[], None]]] = {
        "gated_residual": (
            4 * x.nbytes, gated, (x, y, bias, gate, shift, scale), lambda: cpu_ops.gated_residual(x, y, bias, columns, out_x=a, out=b)
        ),
        "group_end": (
            7 * x.nbytes, end, (x, y, bias, xr, vr, gate, shift, scale),
            lambda: cpu_ops.group_end(x, y, bias, InnerState(xr, vr), columns, (a, b, c)),
        ),
        "bias_gelu": (2 * wide.nbytes, gelu, (wide, long), lambda: cpu_ops.bias_gelu_(wide, long)),
    }  # fmt: skip
    table_of: dict[str, tuple[int, Variants]] = {}
    for name, (size_in_bytes, function, inputs, ours) in plain.items():
        variants: Variants = {"pytorch": partial(function, *inputs), "native": ours}
        if inductor:
            variants["inductor"] = partial(torch.compile(function, dynamic=False), *inputs)
        table_of[name] = size_in_bytes, variants
    return table_of


def products(model: DiT, batch: int, depth: int) -> Callable[[], None]:
    """The matrix products of the blocks of one evaluation, into memory that is used again."""
    config, dtype = model.config, model.dtype
    rows = batch * (config.image_size // config.patch_size) ** 2
    wide = {
        columns: torch.randn(rows, columns).to(dtype)
        for columns in (config.hidden_size, 3 * config.hidden_size, config.mlp_size)
    }
    blocks = model.blocks[: config.live_blocks(depth)]

    def run() -> None:
        for block in blocks:
            for linear in (block.qkv, block.attention_out, block.mlp_in, block.mlp_out):
                torch.mm(
                    wide[linear.in_features],
                    linear.weight.t(),
                    out=_apart(wide, linear.out_features, linear.in_features),
                )

    return run


_SPARE: dict[tuple[int, int, torch.dtype], Tensor] = {}


def _apart(wide: dict[int, Tensor], columns: int, inner: int) -> Tensor:
    """Memory for a result of that many columns, which is not the input's."""
    like = wide[columns]
    return (
        like
        if columns != inner
        else _SPARE.setdefault((like.shape[0], columns, like.dtype), torch.empty_like(like))
    )


def report(samples: dict[str, list[float]], size_in_bytes: int) -> dict[str, Any]:
    """Medians, spread and GB/s of each variant, and whether the native one is faster beyond the
    spread."""
    rows: dict[str, Any] = {}
    for name, values in samples.items():
        rows[name] = measure.summary(values)
        rows[name]["gb_per_s"] = size_in_bytes / rows[name]["median_s"] / 1e9
    others = min(row["low_s"] for name, row in rows.items() if name != "native")
    return {"bytes": size_in_bytes, **rows, "faster": rows["native"]["high_s"] < others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="DiT-B/2", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="for each operator, and ten times that for the whole network",
    )
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    reason = load("cpu")
    if reason:
        parser.error(f"the native operators are not there: {reason}")
    config = PRESETS[options.model]
    tokens = (config.image_size // config.patch_size) ** 2
    record: dict[str, Any] = {
        **measure.device_record(),
        "model": options.model,
        "batch": options.batch,
        "depth": options.depth,
    }
    record["vector_floats"] = torch.ops.odelt_native.cpu_width()
    with torch.no_grad():
        for name in options.dtypes:
            dtype = getattr(torch, name)
            rows = {}
            sizes = options.batch, tokens, config.hidden_size, config.mlp_size
            for operator, (size_in_bytes, variants) in operators(
                *sizes, dtype, not options.no_inductor
            ).items():
                timers = {
                    variant: measure.host_timer(call, CPU) for variant, call in variants.items()
                }
                rows[operator] = report(measure.take_turns(timers, options.seconds), size_in_bytes)
                speeds = ", ".join(
                    f"{variant} {rows[operator][variant]['gb_per_s']:.1f}" for variant in variants
                )
                print(
                    f"{name} {operator}: {speeds}"
                    f" GB/s{', native is faster' if rows[operator]['faster'] else ''}",
                    flush=True,
                )
            model = DiT(config).truncate(options.depth).to(dtype).eval()
            x, y = (
                torch.randn(options.batch, config.channels, config.image_size, config.image_size),
                torch.arange(options.batch),
            )
            networks: dict[str, Callable[..., object]] = {
                "model": model,
                "native": CpuNetwork(model),
            }
            if networks["native"].products:  # type: ignore[attr-defined]
                networks["native rows"] = rows_alone = CpuNetwork(model)
                rows_alone.products = False
            calls: Variants = {
                key: partial(run, x, 0.5, 2, y, depth=options.depth)
                for key, run in networks.items()
            }
            calls["gemm"] = products(model, options.batch, options.depth)
            timers = {key: measure.host_timer(call, CPU) for key, call in calls.items()}
            whole = {
                key: measure.summary(values)
                for key, values in measure.take_turns(timers, 10 * options.seconds).items()
            }
            shares = {key: whole["gemm"]["median_s"] / whole[key]["median_s"] for key in networks}
            speedup = whole["model"]["median_s"] / whole["native"]["median_s"]
            record[name] = {
                "operators": rows,
                "evaluation": whole,
                "gemm_share": shares,
                "speedup": speedup,
            }
            print(
                f"{name} evaluation: GEMM share {shares['model']:.0%} -> {shares['native']:.0%},"
                f" {speedup:.2f}x",
                flush=True,
            )
            print(
                ", ".join(f"{key} {row['median_s'] * 1e3:.0f} ms" for key, row in whole.items()),
                flush=True,
            )
    if options.output:
        measure.write_json(options.output, record)


if __name__ == "__main__":
    main()
