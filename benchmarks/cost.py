"""A model of cost: what an evaluation should take, by bytes, operations, launches, waves, barriers.

A launch takes what its slower side takes, the arithmetic of its waves of tiles or its traffic, and
a fixed time to begin and end. Fixed times and efficiencies of tiles are estimates, of no card; what
they stand for is said beside them. `benchmarks.predict` holds them against what a card measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from odelt_fast.config import DiTConfig

from .ceilings import token_count

if TYPE_CHECKING:
    from odelt_fast.kernels.tiles import Tile

PLANS = ("seven", "five", "whole")
WHOLE_ROWS = 1024  # that "whole" serves at most
FAR = 1.6  # times the best prediction: the model's error is expected to be smaller
MEBI = 2**20

# Share of a processor's matrix rate that a tile of (rows, columns) reaches in its main loop: small
# tiles read more of shared memory for an operation.
TILES = {(128, 256): 0.85, (128, 128): 0.75, (64, 128): 0.65, (64, 64): 0.5, (64, 32): 0.35}
# The same where the epilogue of a tile runs beside the next one's products.
OVERLAPPED = {(128, 256): 0.92, (128, 128): 0.87, (64, 256): 0.82}
SPLITS = 1, 2, 4, 8  # of K
ATTENTION = 0.4  # of the matrix rate: softmax between two products of head dimension 64
PROLOGUE = 0.93  # of a product's rate where it normalises its rows itself


@dataclass(frozen=True)
class Card:
    """A card's ceilings, and what a launch costs on it.

    rates: operations/s by precision ("bfloat16", "float8_e4m3fn"); bandwidth, cache_bandwidth:
    bytes/s; cache_bytes: of the last cache.
    """

    name: str
    processors: int
    rates: Mapping[str, float]
    bandwidth: float
    cache_bytes: int
    cache_bandwidth: float
    gap_s: float = 0.9e-6  # between two launches of a graph
    overlapped_gap_s: float = 0.3e-6  # with programmatic dependent launch
    product_s: float = 1.3e-6  # a product's first loads and last stores, when nothing overlaps them
    rows_s: float = 1.8e-6  # of a row kernel: read, reduce, read, write
    split_s: float = 1.5e-6  # the sum over the parts of K
    barrier_s: float = 1.2e-6  # of a whole grid, on a counter in the last cache
    phase_s: float = 0.5e-6  # a phase's first loads, whose weights are fetched before the barrier


def datasheet(name: str, processors: int, peak: float, bandwidth: float, cache: int) -> Card:
    """80 % of the peak rates and 90 % of the bandwidth, which an H200 was seen to reach."""
    rates = {"bfloat16": 0.8 * peak, "float8_e4m3fn": 1.6 * peak}
    return Card(name, processors, rates, 0.9 * bandwidth, cache, 2.5 * bandwidth)


CARDS = {
    "H100": datasheet("H100", 132, 989e12, 3.35e12, 50 * MEBI),
    "H200": datasheet("H200", 132, 989e12, 4.8e12, 50 * MEBI),
    "B200": datasheet("B200", 148, 2250e12, 8e12, 126 * MEBI),
}


def measured_card(run: Mapping[str, Any]) -> Card:
    """The card of a run of `benchmarks.card`: its measured ceilings, the rest by its name."""
    device, ceilings = str(run["device"]), run["ceilings"]
    known = next((card for name, card in CARDS.items() if name in device), CARDS["H200"])
    rates = {name: ceilings[name] for name in known.rates if name in ceilings}
    processors = int(run.get("processors", known.processors))
    return replace(
        known, name=device, processors=processors, rates={**known.rates, **rates},
        bandwidth=ceilings["bandwidth"],
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, or a phase of one: its arithmetic, its traffic, and the fixed time around both.

    flops, memory (bytes), cached (bytes that the last cache gives); compute_s: of the waves.
    """

    name: str
    flops: float
    memory: float
    cached: float
    compute_s: float
    fixed_s: float
    waves: float = 1.0


@dataclass(frozen=True)
class Cost:
    """A plan's evaluation: its launches, and how they follow each other."""

    launches: list[Launch]
    kernels: int
    barriers: int
    seconds: float

    @property
    def flops(self) -> float:
        return sum(each.flops for each in self.launches)

    @property
    def memory(self) -> float:
        return sum(each.memory for each in self.launches)


@dataclass(frozen=True)
class Shape:
    """What the model of cost needs to know of an evaluation.

    rows: of tokens; live: blocks; ends: group ends among them; element, weight: bytes of a value
    and of a weight.
    """

    config: DiTConfig
    batch: int
    depth: int
    float8: bool = False
    element: int = 2

    @property
    def rows(self) -> int:
        return self.batch * token_count(self.config)

    @property
    def live(self) -> int:
        return self.config.live_blocks(self.depth)

    def passed(self, card: Card, passes: float) -> tuple[float, float]:
        """(bytes of memory, bytes of the cache) of so many passes over the (rows, D) values: what a
        launch has just written is still in the cache if it fits."""
        size = self.rows * self.config.hidden_size * self.element
        moved = passes * size
        return (0.0, moved) if 4 * size < card.cache_bytes else (moved, 0.0)


def product(
    card: Card,
    shape: Shape,
    name: str,
    columns: int,
    inner: int,
    passes: float = 0.0,
    *,
    normalised: bool = False,
    phase: bool = False,
) -> Launch:
    """(rows, inner) x (inner, columns), in the tiles and parts of K that take least.

    passes: over (rows, D) that its epilogue makes besides; normalised: LayerNorm and modulation in
    its prologue; phase: inside a kernel that goes on.
    """
    float8 = shape.float8 and name != "output"
    rate = card.rates["float8_e4m3fn" if float8 else "bfloat16"] / card.processors
    size, weight = shape.config.hidden_size, 1 if float8 else shape.element
    best, waves = math.inf, 0.0
    for (rows, width), efficiency in TILES.items():
        for parts in SPLITS if inner >= 2 * size else SPLITS[:1]:
            tiles = math.ceil(shape.rows / rows) * math.ceil(columns / width) * parts
            turns = math.ceil(tiles / card.processors)
            efficiency = TILES[rows, width] * (PROLOGUE if normalised else 1)
            taken = turns * 2 * rows * width * inner / parts / (rate * efficiency)
            taken += card.split_s * (parts > 1)
            if taken < best:
                best, waves = taken, tiles / card.processors
    memory, cached = shape.passed(card, (inner + columns) / size + passes)
    memory += columns * inner * weight
    flops = 2.0 * shape.rows * columns * inner
    fixed = card.phase_s if phase else card.product_s
    return Launch(name, flops, memory, cached, best, fixed, waves)


def attention(card: Card, shape: Shape, phase: bool = False) -> Launch:
    """Of packed q, k, v: 128 queries of a head a program."""
    config, tokens = shape.config, token_count(shape.config)
    programs = shape.batch * config.num_heads * math.ceil(tokens / 128)
    flops = 4.0 * shape.rows * tokens * config.hidden_size
    rate = ATTENTION * card.rates["bfloat16"] / card.processors
    turns = math.ceil(programs / card.processors)
    memory, cached = shape.passed(card, 4)
    fixed = card.phase_s if phase else card.product_s
    compute = turns * flops / programs / rate
    return Launch("attention", flops, memory, cached, compute, fixed, programs / card.processors)


def rows_kernel(card: Card, shape: Shape, name: str, passes: float) -> Launch:
    memory, cached = shape.passed(card, passes)
    return Launch(name, 0.0, memory, cached, 0.0, card.rows_s)


def block(card: Card, shape: Shape, plan: str, index: int) -> Iterator[Launch]:
    """The launches of a block, or its phases."""
    config, phase = shape.config, plan == "whole"
    size, hidden = config.hidden_size, config.mlp_size
    ends, fused = config.ends_group(index), plan != "seven"
    yield product(card, shape, "qkv", 3 * size, size, normalised=fused, phase=phase)
    yield attention(card, shape, phase)
    # x read and written beside y, which is then not written: one pass more.
    yield product(card, shape, "output", size, size, float(fused), phase=phase)
    if not fused:
        yield rows_kernel(card, shape, "residual + norm", 4)
    yield product(card, shape, "MLP in", hidden, size, normalised=fused, phase=phase)
    if shape.float8 and not fused:
        yield rows_kernel(card, shape, "quantise", 1.5 * hidden / size)
    yield product(card, shape, "MLP out", size, hidden, fused * (4 if ends else 1), phase=phase)
    if not fused:
        yield rows_kernel(card, shape, "border", 7 if ends else 4)


def evaluation(card: Card, shape: Shape, plan: str, overlapped: bool = False) -> Cost:
    """An evaluation inside a trajectory, whose modulation was made before.

    overlapped: with programmatic dependent launch, which starts a kernel while the one before ends.
    """
    passes = 2 if plan == "seven" else 1
    whole, norm = plan == "whole", rows_kernel(card, shape, "norm", passes)
    launches = [
        rows_kernel(card, shape, "patch embedding", 1),
        *(each for index in range(shape.live) for each in block(card, shape, plan, index)),
        replace(norm, fixed_s=card.phase_s) if whole else norm,
        rows_kernel(card, shape, "final layer", 1),
    ]
    # Of "whole" all but the first and the last are phases of one kernel, with a barrier between two
    # of them, and after the copy that it begins with.
    kernels = 3 if whole else len(launches)
    barriers = len(launches) - 2 if whole else 0
    gap = card.overlapped_gap_s if overlapped else card.gap_s
    # Half of what a launch needs to begin is then done while the one before still runs.
    hidden = 0.5 if overlapped and not whole else 0.0
    taken = sum(_seconds(card, each, hidden) for each in launches)
    return Cost(launches, kernels, barriers, taken + kernels * gap + barriers * card.barrier_s)


def _seconds(card: Card, launch: Launch, hidden: float) -> float:
    traffic = launch.memory / card.bandwidth + launch.cached / card.cache_bandwidth
    return max(launch.compute_s, traffic) + (1 - hidden) * launch.fixed_s


def serves(plan: str, shape: Shape) -> bool:
    """Whether a plan runs evaluations of this shape."""
    return plan != "whole" or (shape.rows <= WHOLE_ROWS and not shape.float8)


def worth_measuring(
    card: Card, config: DiTConfig, batch: int, plans: Sequence[str], float8: bool = False
) -> list[str]:
    """Those of `plans` that are not predicted FAR behind the best of them, in their order; ones
    that are not modelled stay. A name may end in "+pdl"."""
    shape = Shape(config, batch, config.depth, float8)
    plans = [name for name in plans if serves(name, shape)]
    times: dict[str, float] = {}
    for name in plans:
        plan, _, suffix = name.partition("+")
        if plan in PLANS:
            times[name] = evaluation(card, shape, plan, bool(suffix)).seconds
    most = FAR * min(times.values(), default=math.inf)
    return [name for name in plans if times.get(name, 0.0) <= most]


def worth_timing(
    card: Card, size: tuple[int, int, int], tiles: Mapping[str, Tile], float8: bool = False
) -> list[str]:
    """Names of the specialised configurations of a product of size (rows, columns, inner) that are
    not predicted FAR behind the best tile."""
    rows, columns, inner = size
    rate = card.rates["float8_e4m3fn" if float8 else "bfloat16"] / card.processors

    def seconds(block: tuple[int, int], efficiency: float) -> float:
        count = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
        return math.ceil(count / card.processors) * 2 * math.prod(block) * inner / rate / efficiency

    blocks = {name: (tile.block_m, tile.block_n) for name, tile in tiles.items()}
    taken = {name: seconds(block, OVERLAPPED[block]) for name, block in blocks.items()}
    best = min((seconds(*each) for each in (*TILES.items(), *OVERLAPPED.items())), default=math.inf)
    return [name for name, time in taken.items() if time <= FAR * best]
