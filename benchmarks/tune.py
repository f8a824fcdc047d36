"""Measures the matrix products and attentions that the engine can choose from on this GPU.

    python -m benchmarks.tune

Writes odelt_fast/tuning/DEVICE.json, which the engine reads from then on (`tuning.read_tuning`);
until then it takes cuBLAS and PyTorch's attention. About two minutes a network on an H200.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import token_count
from benchmarks.measure import (
    command_parser,
    device_record,
    dtype_name,
    graph_timer,
    take_turns,
    write_json,
)
from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.engine import availability, operators, tuning
from odelt_fast.files import one_line
from odelt_fast.kernels.quantize import quantize_rows_reference

SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
COLD_BYTES = 256 * 2**20  # of the inputs of all calls of a round: several times the last cache
Variants = dict[str, Callable[[int], object]]


def layers(config: DiTConfig) -> Iterator[tuple[int, int, str]]:
    """(columns, inner, activation) of a block's products."""
    size, hidden = config.hidden_size, config.mlp_size
    yield from ((3 * size, size, "none"), (size, size, "none"))
    yield from ((hidden, size, "gelu"), (size, hidden, "none"))


@dataclass(frozen=True)
class Tuner:
    """What every measurement needs. seconds: of measuring for each shape."""

    dtype: torch.dtype
    device: torch.device
    ops: SimpleNamespace
    seconds: float

    def draw(self, sets: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
        return [
            (scale * torch.randn(shape, device=self.device)).to(self.dtype) for _ in range(sets)
        ]

    def sets(self, values: int) -> int:
        """Sets of inputs for calls that move so many values: all of them leave the cache."""
        return min(64, max(2, math.ceil(COLD_BYTES / (values * self.dtype.itemsize))))

    def linear_times(
        self, rows: int, layer: tuple[int, int, str], float8: bool
    ) -> dict[str, float]:
        """Of a product of `layer`: (columns, inner, activation)."""
        columns, inner, activation = layer
        ops, scale = self.ops, 1 / math.sqrt(inner)
        sets = self.sets(rows * inner + columns * inner + rows * columns)
        x = self.draw(sets, 1, rows, inner, scale=scale)
        weight = self.draw(sets, columns, inner, scale=scale)
        bias = self.draw(sets, columns, scale=scale)

        def cublas(i: int) -> Tensor:
            return operators.cublas_linear(x[i], weight[i], bias[i], activation)

        def triton(i: int) -> Tensor:
            return ops.linear(x[i], weight[i], bias[i], activation, workspace=ops.workspace)

        if not float8:
            return self.measure({"cublas": cublas, "triton": triton}, sets)
        xs, weights = ([quantize_rows_reference(each) for each in every] for every in (x, weight))

        def cublas8(i: int) -> Tensor:
            return operators.cublas_float8(*xs[i], *weights[i], bias[i])

        def triton8(i: int) -> Tensor:
            scales = {"x_scale": xs[i][1], "weight_scale": weights[i][1], "out_dtype": self.dtype}
            arguments = xs[i][0], weights[i][0], bias[i], activation
            return ops.linear(*arguments, **scales, workspace=ops.workspace)

        variants: Variants = {"triton": triton8}
        if activation == "none":
            variants["cublas"] = cublas8
        return self.measure(variants, sets)

    def attention_times(self, config: DiTConfig, samples: int) -> dict[str, float]:
        size, heads, tokens = config.hidden_size, config.num_heads, token_count(config)
        sets = self.sets(4 * samples * tokens * size)
        qkv, variants = self.draw(sets, samples, tokens, 3 * size), Variants()

        def call(function: Callable[..., Tensor], i: int) -> Tensor:
            return function(qkv[i], heads)

        for name in operators.ATTENTIONS[1:]:
            function = operators.attention_function(name, self.ops)
            reason = availability.attention_unavailable(
                name, self.device, self.dtype, size // heads
            ) or availability.try_attention(name, function, qkv[0], heads)
            if reason is None:
                variants[name] = partial(call, function)
        return self.measure(variants, sets)

    def measure(self, variants: Variants, sets: int) -> dict[str, float]:
        """Median microseconds of each variant; those that cannot run are left out."""
        timers = {}
        for name, call in variants.items():
            try:
                timers[name] = graph_timer(call, sets, self.device)
            except (RuntimeError, ValueError) as error:
                print(f"  {name} cannot run: {one_line(error, 150)}", file=sys.stderr)
        samples = take_turns(timers, self.seconds, warm_seconds=0.05)
        return {name: 1e6 * statistics.median(taken) for name, taken in samples.items()}

    def entries(self, config: DiTConfig) -> Iterator[dict[str, Any]]:
        tokens, heads, dtype = token_count(config), config.num_heads, dtype_name(self.dtype)
        for samples in SAMPLES:
            yield {
                "operator": "attention",
                "dtype": dtype,
                "heads": heads,
                "head_dim": config.hidden_size // heads,
                "tokens": tokens,
                "amount": samples,
                "microseconds": self.attention_times(config, samples),
            }
            for layer in layers(config):
                columns, inner, activation = layer
                for float8 in (False, True):
                    if float8 and columns == inner:
                        continue  # the engine keeps the output projection in 16 bits
                    yield {
                        "operator": "linear",
                        "dtype": "float8_e4m3fn" if float8 else dtype,
                        "activation": activation,
                        "columns": columns,
                        "inner": inner,
                        "amount": samples * tokens,
                        "microseconds": self.linear_times(samples * tokens, layer, float8),
                    }


def main() -> int:
    parser = command_parser("tune", __doc__)
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
    # Split-K launches then allocate and clear nothing.
    ops.workspace = torch.zeros(2**22, dtype=torch.int32, device=device)
    tuner = Tuner(torch.bfloat16, device, ops, arguments.seconds)
    for network in arguments.network or ("DiT-B/2", "DiT-XL/2"):
        for entry in tuner.entries(PRESETS[network]):
            found.append(entry)
            *shape, times = entry.values()
            rounded = {name: round(time, 2) for name, time in times.items()}
            print(network, *shape, rounded, flush=True)
    out = arguments.out or tuning.tuning_path(torch.cuda.get_device_name(device))
    write_json(out, {"device": device_record(), "entries": found})
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
