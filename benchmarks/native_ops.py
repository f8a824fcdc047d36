"""Native CPU operators against PyTorch and Inductor, and what they change in an evaluation.

    python -m benchmarks.native_ops [--model DiT-B/2] [--batch 8] [--depth 4]
        [--dtypes float32 bfloat16] [--seconds 5] [--no-inductor] [--output FILE.json]

GB/s are of the bytes that an operator must read and write once; the variants take turns.
`gemm_share`: the matrix products of an evaluation, timed alone into memory of their own, as a share
of the evaluation. `native rows`: with PyTorch's products and attention. `faster`: its slowest tenth
beats the others' fastest tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS, PRESETS, DiTConfig
from odelt_fast.engine.cpu import CpuNetwork
from odelt_fast.engine.native import cpu_ops
from odelt_fast.engine.native.build import load
from odelt_fast.engine.native.cpu_ops import InnerState, Modulation
from odelt_fast.model import DiT

from . import measure
from .ceilings import token_count
from .measure import Record

CPU = torch.device("cpu")
Call = Callable[[], object]
Variants = dict[str, Call]


@dataclass(frozen=True)
class Options:
    model: Literal["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"] = "DiT-B/2"
    batch: int = 8
    depth: int = 4
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    seconds: float = 5.0
    """For each operator, and ten times that for the whole network."""
    inductor: bool = True
    output: Path | None = None


def operators(
    config: DiTConfig, batch: int, dtype: torch.dtype, inductor: bool
) -> Iterator[tuple[str, int, Variants]]:
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

    def variants(native: Call, form: Callable[..., object], *inputs: Tensor) -> Variants:
        found: Variants = {"pytorch": partial(form, *inputs), "native": native}
        if inductor:
            found["inductor"] = partial(torch.compile(form, dynamic=False), *inputs)
        return found

    rest, state = (bias, gate, shift, scale), InnerState(xr, vr)
    ours = partial(cpu_ops.gated_residual, x, y, bias, columns, out_x=a, out=b)
    yield "gated_residual", 4 * x.nbytes, variants(ours, gated, x, y, *rest)
    ours = partial(cpu_ops.group_end, x, y, bias, state, columns, (a, b, c))
    yield "group_end", 7 * x.nbytes, variants(ours, end, x, y, xr, vr, *rest)
    ours = partial(cpu_ops.bias_gelu_, wide, long)
    yield "bias_gelu", 2 * wide.nbytes, variants(ours, gelu, wide, long)


def networks(config: DiTConfig, batch: int, depth: int, dtype: torch.dtype) -> Variants:
    """One evaluation by the model, by the native network and with native rows alone.

    The last is there where native products are; "gemm": the matrix products alone.
    """
    model = DiT(config).truncate(depth).to(dtype).eval()
    forms: dict[str, Callable[..., object]] = {"model": model, "native": CpuNetwork(model)}
    if (rows := CpuNetwork(model)).products:
        rows.products = False
        forms["native rows"] = rows
    x = torch.randn(batch, config.channels, config.image_size, config.image_size)
    y = torch.arange(batch)
    calls = {name: partial(form, x, 0.5, 2, y, depth=depth) for name, form in forms.items()}
    return {**calls, "gemm": products(model, batch, depth)}


def products(model: DiT, batch: int, depth: int) -> Callable[[], None]:
    """The matrix products of the blocks of one evaluation, into memory that is used again."""
    rows, spare = batch * token_count(model.config), dict[tuple[int, bool], Tensor]()

    def memory(columns: int, other: bool = False) -> Tensor:
        return spare.setdefault((columns, other), torch.randn(rows, columns).to(model.dtype))

    calls = []
    for block in model.blocks[: model.config.live_blocks(depth)]:
        for name in ("qkv", "attention_out", "mlp_in", "mlp_out"):
            weight = block.get_parameter(f"{name}.weight")
            columns, inner = weight.shape
            # A result does not lie where its input does.
            calls.append((memory(inner), weight.t(), memory(columns, columns == inner)))

    def run() -> None:
        for x, weight, out in calls:
            torch.mm(x, weight, out=out)

    return run


def take_samples(variants: Variants, seconds: float) -> dict[str, dict[str, float]]:
    timers = {name: measure.host_timer(call, CPU) for name, call in variants.items()}
    samples = measure.take_turns(timers, seconds)
    return {name: measure.summary(values) for name, values in samples.items()}


def report(rows: dict[str, dict[str, float]], traffic: int) -> Record:
    """Medians, spread and GB/s of each variant; whether ours is faster beyond the spread."""
    for row in rows.values():
        row["gb_per_s"] = traffic / row["median_s"] / 1e9
    others = min(row["low_s"] for name, row in rows.items() if name != "native")
    return {"bytes": traffic, **rows, "faster": rows["native"]["high_s"] < others}


def measure_dtype(name: str, options: Options) -> Record:
    """Times operators and evaluations in a dtype, and prints them."""
    config, dtype, rows = PRESETS[options.model], getattr(torch, name), {}
    for operator, traffic, variants in operators(config, options.batch, dtype, options.inductor):
        row = rows[operator] = report(take_samples(variants, options.seconds), traffic)
        speeds = ", ".join(f"{each} {row[each]['gb_per_s']:.1f}" for each in variants)
        faster = ", native is faster" if row["faster"] else ""
        print(f"{name} {operator}: {speeds} GB/s{faster}", flush=True)
    variants = networks(config, options.batch, options.depth, dtype)
    whole = take_samples(variants, 10 * options.seconds)
    median = {key: row["median_s"] for key, row in whole.items()}
    shares = {key: median["gemm"] / value for key, value in median.items() if key != "gemm"}
    speedup = median["model"] / median["native"]
    print(
        f"{name} evaluation: GEMM share {shares['model']:.0%} -> {shares['native']:.0%},"
        f" {speedup:.2f}x\n" + ", ".join(f"{key} {t * 1e3:.0f} ms" for key, t in median.items()),
        flush=True,
    )
    return {"operators": rows, "evaluation": whole, "gemm_share": shares, "speedup": speedup}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if reason := load("cpu"):
        raise SystemExit(f"error: the native operators are not there: {reason}")
    settings = {name: getattr(options, name) for name in ("model", "batch", "depth")}
    record: Record = {**measure.device_record(), **settings}
    record["vector_floats"] = torch.ops.odelt_native.cpu_width()
    with torch.no_grad():
        record |= {name: measure_dtype(name, options) for name in options.dtypes}
    if options.output:
        measure.write_json(options.output, record)


if __name__ == "__main__":
    main()
