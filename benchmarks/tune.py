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

from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.engine import availability, operators, tuning
from odelt_fast.files import one_line
from odelt_fast.kernels.quantize import quantize_rows_reference

from .ceilings import token_count
from .measure import (
    command_parser,
    device_record,
    dtype_name,
    graph_timer,
    take_turns,
    write_json,
)

SECONDS = 0.15  # of measuring for each shape
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
COLD_BYTES = 256 * 2**20  # of the inputs of all calls of a round: several times the last cache
Variants = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class Tuner:
    """What every measurement needs."""

    dtype: torch.dtype
    device: torch.device
    ops: SimpleNamespace

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

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
        x, weight, bias = (
            [self.draw(*shape, scale=scale) for _ in range(sets)]
            for shape in ((1, rows, inner), (columns, inner), (columns,))
        )

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
            (x, x_scale), (weight, weight_scale) = xs[i], weights[i]
            scales = None, None, x_scale, weight_scale, self.dtype
            return ops.linear(x, weight, bias[i], activation, *scales, workspace=ops.workspace)

        variants: Variants = {"triton": triton8}
        if activation == "none":
            variants["cublas"] = cublas8
        return self.measure(variants, sets)

    def attention_times(self, config: DiTConfig, samples: int) -> dict[str, float]:
        size, heads, tokens = config.hidden_size, config.num_heads, token_count(config)
        sets = self.sets(4 * samples * tokens * size)
        qkv, variants = [self.draw(samples, tokens, 3 * size) for _ in range(sets)], Variants()

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
        samples = take_turns(timers, SECONDS, warm_seconds=0.05)
        return {name: 1e6 * statistics.median(taken) for name, taken in samples.items()}

    def entries(self, config: DiTConfig) -> Iterator[dict[str, Any]]:
        tokens, heads, dtype = token_count(config), config.num_heads, dtype_name(self.dtype)
        size, hidden = config.hidden_size, config.mlp_size
        layers = ((3 * size, size, "none"), (size, size, "none"), (hidden, size, "gelu"))
        for samples in SAMPLES:
            yield {
                "operator": "attention",
                "dtype": dtype,
                "heads": heads,
                "head_dim": size // heads,
                "tokens": tokens,
                "amount": samples,
                "microseconds": self.attention_times(config, samples),
            }
            for layer in (*layers, (size, hidden, "none")):
                columns, inner, activation = layer
                # The engine keeps the output projection in 16 bits.
                for float8 in (False,) if columns == inner else (False, True):
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
    text = "may be given again; DiT-B/2 and DiT-XL/2 by default"
    parser.add_argument("--network", action="append", choices=sorted(PRESETS), help=text)
    parser.add_argument("--out", type=Path, help="default: odelt_fast/tuning/DEVICE.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to measure")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := availability.device_unavailable(device):
        parser.error(reason)
    ops, found = operators.load_operators("kernels"), []
    # Split-K launches then allocate and clear nothing.
    ops.workspace = torch.zeros(2**22, dtype=torch.int32, device=device)
    tuner = Tuner(torch.bfloat16, device, ops)
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
