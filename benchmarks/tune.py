"""Measures the matrix products, attentions and plans that the engine can choose from on this GPU.

    python -m benchmarks.tune

Writes odelt_fast/tuning/DEVICE.json, which the engine reads from then on (`tuning.read_tuning`);
until then it takes cuBLAS, PyTorch's attention and the plan "seven". About two minutes a network on
an H200. The file is written after each shape, and what it holds of this card is not measured again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.engine import availability, operators, tuning
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.plans import PLANS
from odelt_fast.engine.trial import Way, random_model

from .ceilings import token_count
from .cost import CARDS, Card, worth_measuring, worth_timing
from .measure import (
    Record,
    command_parser,
    device_record,
    dtype_name,
    graph_timer,
    reason_in,
    take_turns,
    write_json,
)

SECONDS = 0.15  # of measuring for each shape
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
COLD_BYTES = 256 * 2**20  # of the inputs of all calls of a round: several times the last cache
Variants = dict[str, Callable[[int], object]]
Shape = tuple[Record, Callable[[], dict[str, float]]]


@dataclass(frozen=True)
class Tuner:
    """What every measurement needs."""

    dtype: torch.dtype
    device: torch.device
    ops: SimpleNamespace
    refused: Mapping[str, str]  # "linear triton", "specialized" ... -> why it is not measured

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

    def sets(self, values: int) -> int:
        """Sets of inputs for calls that move so many values: all of them leave the cache."""
        return min(64, max(2, math.ceil(COLD_BYTES / (values * self.dtype.itemsize))))

    def linear_times(
        self, rows: int, layer: tuple[int, int, str], float8: bool
    ) -> dict[str, float]:
        """Of a product of `layer`: (columns, inner, activation), "gated" with a residual and a gate
        of one sample."""
        columns, inner, activation = layer
        ops, scale, gated = self.ops, 1 / math.sqrt(inner), activation == "gated"
        sets = self.sets(rows * inner + columns * inner + (1 + gated) * rows * columns)
        x, weight, bias, gate, residual = (
            [self.draw(*shape, scale=scale) for _ in range(sets)]
            for shape in (
                (1, rows, inner), (columns, inner), (columns,), (1, columns),
                (1, rows * gated, columns),
            )
        )  # fmt: skip
        added = [pair if gated else (None, None) for pair in zip(gate, residual)]
        function = "none" if gated else activation
        from odelt_fast.kernels.quantize import FP8, quantize_rows_reference

        def quantize(each: Tensor) -> tuple[Tensor, Any]:
            return quantize_rows_reference(each) if float8 else (each, None)

        xs, weights = ([quantize(each) for each in every] for every in (x, weight))

        def cublas(i: int) -> Tensor:
            if float8:
                (q, q_scale), (w, w_scale) = xs[i], weights[i]
                return operators.cublas_float8(q, q_scale, w, w_scale, bias[i])
            return operators.cublas_linear(x[i], weight[i], bias[i], activation)

        def triton(configuration: str | None, i: int) -> Tensor:
            (x, x_scale), (weight, weight_scale) = xs[i], weights[i]
            return ops.linear(
                x, weight, bias[i], function, *added[i], x_scale, weight_scale, self.dtype,
                workspace=ops.workspace, configuration=configuration,
            )  # fmt: skip

        cublas_has = activation == "none" or not (float8 or gated)
        variants: Variants = {"cublas": cublas} if cublas_has else {}
        tiles = self.specialized(FP8 if float8 else self.dtype, gated)
        names, size = list(tiles), (rows, columns, inner)
        for card in self.known_cards():
            names = worth_timing(card, size, tiles, float8)
        variants |= {"triton": partial(triton, None)}
        variants |= {name: partial(triton, name) for name in names}
        return self.measure(variants, sets, "float8 " if float8 else "linear ", agree=True)

    def specialized(self, dtype: torch.dtype, gated: bool) -> dict[str, Any]:
        """Configurations of products that this card can take, none where their check has failed."""
        from odelt_fast.kernels.tiles import specialized_tiles

        if self.device.type != "cuda" or "specialized" in self.refused:
            return {}
        major, minor = torch.cuda.get_device_capability(self.device)
        return specialized_tiles(10 * major + minor, dtype, gated)

    def known_cards(self) -> list[Card]:
        """The model of this card, if there is one."""
        device = str(device_record()["device"])
        return [card for name, card in CARDS.items() if name in device]

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
        return self.measure(variants, sets, "attention ")

    def plan_times(
        self, config: DiTConfig, samples: int, precision: str | None
    ) -> dict[str, float]:
        """Of an evaluation at the longest depth."""
        model = random_model(Way.of(config, self.device, self.dtype))
        kind = "kernels" if self.device.type == "cuda" else "reference"
        x, depth = self.draw(samples, *config.image_shape), config.depth
        condition, engines = self.draw(samples, config.hidden_size), dict[str, Any]()

        def call(name: str, _: int) -> Tensor:
            if name not in engines:
                engine = Engine(model, "auto", precision, kind, (name,))
                reason = PLANS[name].refuses(engine.setting, samples, token_count(config))
                if reason:
                    raise ValueError(f"plan {name!r}: {reason}")
                engines[name] = engine, engine.modulations(condition, condition, depth)
            engine, tables = engines[name]
            return engine.velocity(x, tables, depth)

        names = tuple(PLANS)
        for card in self.known_cards():
            names = tuple(worth_measuring(card, config, samples, names, precision == "fp8"))
        return self.measure({name: partial(call, name) for name in names}, 1, "plan ")

    def measure(
        self, variants: Variants, sets: int, operator: str, agree: bool = False
    ) -> dict[str, float]:
        """Median microseconds of each variant; those that cannot run are left out, with `agree`
        also those that differ from the first by more than a rounding or two."""
        timers, known = {}, None
        for name, call in variants.items():
            row: Record = {}
            with reason_in(row):
                if operator + name in self.refused:
                    raise ValueError(self.refused[operator + name])
                found = call(0)  # what cannot run says so here
                if agree:
                    known = agreeing(found, known)
                timers[name] = graph_timer(call, sets, self.device)
            if row:
                print(f"  {operator}{name} cannot run: {row['reason'][:150]}", file=sys.stderr)
        samples = take_turns(timers, SECONDS, warm_seconds=0.05)
        return {name: 1e6 * statistics.median(taken) for name, taken in samples.items()}

    def shapes(self, config: DiTConfig, counts: Sequence[int]) -> Iterator[Shape]:
        """What is measured: an entry but for its times, and what measures these."""
        tokens, heads, dtype = token_count(config), config.num_heads, dtype_name(self.dtype)
        size, hidden = config.hidden_size, config.mlp_size
        layers = ((3 * size, size, "none"), (size, size, "none"), (hidden, size, "gelu"))
        for samples in counts:
            entry = {
                "operator": "attention",
                "dtype": dtype,
                "heads": heads,
                "head_dim": size // heads,
                "tokens": tokens,
                "amount": samples,
            }
            yield entry, partial(self.attention_times, config, samples)
            for precision in (None, "fp8"):
                entry = entry | {"operator": "plan", "dtype": precision or dtype}
                yield entry, partial(self.plan_times, config, samples, precision)
            rows = samples * tokens
            gated = (size, size, "gated"), (size, hidden, "gated")
            for layer in (*layers, (size, hidden, "none"), *gated):
                columns, inner, activation = layer
                # The engine keeps the output projection in 16 bits.
                for float8 in (False,) if columns == inner else (False, True):
                    entry = {
                        "operator": "linear",
                        "dtype": "float8_e4m3fn" if float8 else dtype,
                        "activation": activation,
                        "columns": columns,
                        "inner": inner,
                        "amount": rows,
                    }
                    yield entry, partial(self.linear_times, rows, layer, float8)


def agreeing(found: Any, known: Tensor | None) -> Tensor:
    """`known`, or what was found first; ValueError where that is far from it."""
    found = found.float()
    if known is None:
        return found
    far, size = float((found - known).abs().max()), float(known.abs().max())
    if not far <= size / 64:  # bfloat16 rounds by 1/256 at most, each of both
        raise ValueError(f"it differs by {far:.3g} where the largest value is {size:.3g}")
    return known


def tune(
    tuner: Tuner, config: DiTConfig, out: Path, counts: Sequence[int] = SAMPLES
) -> Iterator[Record]:
    """Measures what `out` does not hold yet of a network, and gives each entry once it is written.

    counts: of samples; the smallest and the largest are likeliest to be asked for, and come first.
    """
    device, entries = device_record(), []
    if out.exists():
        known = json.loads(out.read_text())
        if known["device"]["device"] == device["device"]:
            entries = known["entries"]
    measured = [{**entry, "microseconds": None} for entry in entries]
    ends = [each for pair in zip(counts, reversed(counts)) for each in pair]
    for entry, times in tuner.shapes(config, list(dict.fromkeys(ends))):
        if {**entry, "microseconds": None} in measured:
            continue
        found = {name: round(time, 2) for name, time in times().items()}
        entries.append({**entry, "microseconds": found})
        write_json(out, {"device": device, "entries": entries})
        yield entries[-1]


def make_tuner(device: torch.device, refused: Mapping[str, str]) -> Tuner:
    """In bfloat16 on a GPU; in float32, with the kernels' plain forms, elsewhere."""
    cuda = device.type == "cuda"
    ops = operators.load_operators("kernels" if cuda else "reference")
    # Split-K launches then allocate and clear nothing.
    ops.workspace = torch.zeros(2**22, dtype=torch.int32, device=device)
    return Tuner(torch.bfloat16 if cuda else torch.float32, device, ops, refused)


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
    out = arguments.out or tuning.tuning_path(torch.cuda.get_device_name(device))
    tuner = make_tuner(device, {})
    for network in arguments.network or ("DiT-B/2", "DiT-XL/2"):
        for entry in tune(tuner, PRESETS[network], out):
            print(network, *entry.values(), flush=True)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
