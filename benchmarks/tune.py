"""Measures the matrix products and attentions that the engine can choose from on this GPU: `python
-m benchmarks.tune`.

Writes odelt_fast/tuning/DEVICE.json, which the engine reads from then on (`tuning.read_tuning`);
until then it takes cuBLAS and PyTorch's attention. About two minutes a network on an H200.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import device_record, graph_timer, take_turns
from odelt_fast import PRESETS, DiTConfig
from odelt_fast.engine import availability, operators, tuning
from odelt_fast.kernels.quantize import quantize_rows_reference

SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
COLD_BYTES = 256 * 2**20  # of the inputs of all calls of a round: several times the last cache
Variants = Mapping[str, Callable[[int], object]]


def layers(config: DiTConfig) -> Iterator[tuple[int, int, str]]:
    """(columns, inner, activation) of a block's products."""
    size = config.hidden_size
    yield from (
        (3 * size, size, "none"),
        (size, size, "none"),
        (config.mlp_size, size, "gelu"),
        (size, config.mlp_size, "none"),
    )


def linear_variants(
    rows: int,
    columns: int,
    inner: int,
    activation: str,
    dtype: torch.dtype,
    float8: bool,
    device: torch.device,
    ops: SimpleNamespace,
) -> tuple[Variants, int]:
    """The products by name as functions of the input set, and the number of sets."""
    sets = min(
        64,
        max(
            2,
            math.ceil(
                COLD_BYTES / ((rows * inner + columns * inner + rows * columns) * dtype.itemsize)
            ),
        ),
    )

    def draw(*shape: int) -> list[Tensor]:
        return [
            (torch.randn(shape, device=device) / math.sqrt(inner)).to(dtype) for _ in range(sets)
        ]

    x, weight, bias = draw(1, rows, inner), draw(columns, inner), draw(columns)
    if not float8:
        return {
            "cublas": lambda i: operators.cublas_linear(x[i], weight[i], bias[i], activation),
            "triton": lambda i: ops.linear(
                x[i], weight[i], bias[i], activation, workspace=ops.workspace
            ),
        }, sets
    xs, weights = ([quantize_rows_reference(each) for each in tensors] for tensors in (x, weight))

    def triton(i: int) -> Tensor:
        scales = {"x_scale": xs[i][1], "weight_scale": weights[i][1], "out_dtype": dtype}
        return ops.linear(
            xs[i][0], weights[i][0], bias[i], activation, **scales, workspace=ops.workspace
        )

    variants: dict[str, Callable[[int], object]] = {"triton": triton}
    if activation == "none":
        variants["cublas"] = lambda i: operators.cublas_float8(*xs[i], *weights[i], bias[i])
    return variants, sets


def attention_variants(
    config: DiTConfig, samples: int, dtype: torch.dtype, device: torch.device, ops: SimpleNamespace
) -> tuple[Variants, int]:
    size, heads, tokens = (
        config.hidden_size,
        config.num_heads,
        (config.image_size // config.patch_size) ** 2,
    )
    sets = min(64, max(2, math.ceil(COLD_BYTES / (4 * samples * tokens * size * dtype.itemsize))))
    qkv = [torch.randn(samples, tokens, 3 * size, device=device).to(dtype) for _ in range(sets)]
    variants: dict[str, Callable[[int], object]] = {}
    for name in operators.ATTENTIONS[1:]:
        function = operators.attention_function(name, ops)
        reason = availability.attention_unavailable(
            name, device, dtype, size // heads
        ) or availability.try_attention(name, function, qkv[0], heads)
        if reason is None:
            variants[name] = lambda i, function=function: function(qkv[i], heads)  # type: ignore[misc]
    return variants, sets


def measure(
    variants: Variants, sets: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Median microseconds of each variant; those that cannot run are left out."""
    timers = {}
    for name, call in variants.items():
        try:
            timers[name] = graph_timer(call, sets, device)
        except (RuntimeError, ValueError) as error:
            print(f"  {name} cannot run: {' '.join(str(error).split())[:150]}", file=sys.stderr)
    return {
        name: 1e6 * statistics.median(taken)
        for name, taken in take_turns(timers, seconds, warm_seconds=0.05).items()
    }


def entries(
    config: DiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    ops: SimpleNamespace,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    tokens, heads = (config.image_size // config.patch_size) ** 2, config.num_heads
    for samples in SAMPLES:
        variants, sets = attention_variants(config, samples, dtype, device, ops)
        shape = {
            "heads": heads,
            "head_dim": config.hidden_size // heads,
            "tokens": tokens,
            "amount": samples,
        }
        times = measure(variants, sets, device, seconds)
        yield {
            "operator": "attention",
            "dtype": str(dtype).removeprefix("torch."),
            **shape,
            "microseconds": times,
        }
        for columns, inner, activation in layers(config):
            for float8 in (False, True):
                if float8 and columns == inner:
                    continue  # the engine keeps the output projection in 16 bits
                variants, sets = linear_variants(
                    samples * tokens, columns, inner, activation, dtype, float8, device, ops
                )
                kind = "float8_e4m3fn" if float8 else str(dtype).removeprefix("torch.")
                shape = {
                    "activation": activation,
                    "columns": columns,
                    "inner": inner,
                    "amount": samples * tokens,
                }
                yield {
                    "operator": "linear",
                    "dtype": kind,
                    **shape,
                    "microseconds": measure(variants, sets, device, seconds),
                }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network",
        action="append",
        choices=sorted(PRESETS),
        help="may be given again; DiT-B/2 and DiT-XL/2 by default",
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="of measuring for each shape")
    parser.add_argument("--out", type=Path, help="default: odelt_fast/tuning/DEVICE.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = availability.device_unavailable(device)
    if reason:
        parser.error(reason)
    ops, found = operators.load_operators("kernels"), []
    ops.workspace = torch.zeros(
        2**22, dtype=torch.int32, device=device
    )  # split-K launches then allocate and clear nothing
    for network in arguments.network or ("DiT-B/2", "DiT-XL/2"):
        for entry in entries(PRESETS[network], torch.bfloat16, device, ops, arguments.seconds):
            found.append(entry)
            shape = {name: value for name, value in entry.items() if name != "microseconds"}
            print(
                network,
                *shape.values(),
                {name: round(time, 2) for name, time in entry["microseconds"].items()},
                flush=True,
            )
    out = arguments.out or tuning.tuning_path(torch.cuda.get_device_name(device))
    out.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=out.parent, delete=False) as file:
        json.dump({"device": device_record(), "entries": found}, file, indent=1)
    Path(file.name).replace(out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
