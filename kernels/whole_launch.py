"""What one launch of whole.py is: tiles of its phases, for which sizes, how many programs run at
once."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton

from .attention import head_parts

MOST_ROWS, MOST_COLUMNS, MOST_HEAD_DIM = 1024, 2048, 128
# Shared memory of a multiprocessor in bytes, of all that run on it (CUDA programming guide).
SHARED = MappingProxyType({80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 120: 102_400})
HEADER = 4  # counters before those of split-K; the first is the grid's barrier
# Tile (rows, columns), slice of the inner dimension, shares of it (split-K), pipeline stages.
Product = tuple[int, int, int, int, int]
PRODUCTS = ("qkv", "attention_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Launch:
    """The products' configurations, tile of attention (queries, keys), warps, stages of attention's
    loop, programs a multiprocessor (fewer where registers or shared memory allow no more)."""

    qkv: Product
    attention_out: Product
    mlp_in: Product
    mlp_out: Product
    attention: tuple[int, int]
    num_warps: int
    num_stages: int
    programs: int


# By hand, from register and shared-memory counts of the compile gate; not yet chosen by timing. By
# the most tokens of a sample, and the greatest width, that they serve. Slices of 32 where rows are
# normalised on the way: with 64 the kernel spills on sm_90.
LAUNCHES = MappingProxyType(
    {
        (16, MOST_COLUMNS): Launch(
            (16, 32, 32, 1, 4), (16, 32, 64, 1, 4), (16, 32, 32, 1, 4), (16, 32, 64, 2, 4),
            (16, 16), 4, 2, 1,
        ),
        (MOST_ROWS, 512): Launch(
            (32, 64, 32, 1, 6), (32, 32, 64, 1, 4), (32, 64, 32, 1, 6), (32, 32, 64, 2, 4),
            (32, 64), 4, 4, 2,
        ),
        (MOST_ROWS, 1024): Launch(
            (64, 64, 32, 1, 6), (64, 32, 64, 1, 4), (64, 64, 32, 1, 6), (64, 64, 64, 2, 4),
            (32, 64), 4, 4, 2,
        ),
        (MOST_ROWS, MOST_COLUMNS): Launch(
            (64, 64, 32, 1, 6), (64, 64, 64, 1, 4), (64, 64, 32, 1, 6), (64, 64, 64, 2, 4),
            (64, 32), 8, 4, 1,
        ),
    }
)  # fmt: skip
# Exact float32 products use no tensor cores.
FLOAT32 = MappingProxyType(
    {
        (16, MOST_COLUMNS): Launch(
            (16, 32, 32, 1, 3), (16, 32, 32, 1, 3), (16, 32, 32, 1, 3), (16, 32, 32, 2, 3),
            (16, 16), 4, 2, 1,
        ),
        (MOST_ROWS, MOST_COLUMNS): Launch(
            (32, 32, 32, 1, 3), (32, 32, 32, 1, 3), (32, 32, 32, 1, 3), (32, 32, 32, 2, 3),
            (16, 16), 4, 2, 2,
        ),
    }
)  # fmt: skip


def choose_launch(tokens: int, width: int, dtype: torch.dtype) -> Launch:
    """The launch configuration for samples of so many tokens."""
    table = FLOAT32 if dtype == torch.float32 else LAUNCHES
    return next(table[most] for most in table if tokens <= most[0] and width <= most[1])


class Sizes(NamedTuple):
    """Of an evaluation: samples, tokens of each, width, width of the MLP's hidden layer, heads."""

    samples: int
    tokens: int
    width: int
    mlp: int
    heads: int

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    def tiles(self, launch: Launch) -> dict[str, int]:
        """Tiles of each phase that is not as many as another's."""

        def product(columns: int, tile: Product) -> int:
            chunks = self.samples * triton.cdiv(self.tokens, tile[0])
            return chunks * triton.cdiv(columns, tile[1]) * tile[3]

        return {
            "qkv": product(3 * self.width, launch.qkv),
            "attention": self.samples * self.heads * triton.cdiv(self.tokens, launch.attention[0]),
            "attention_out": product(self.width, launch.attention_out),
            "mlp_in": product(self.mlp, launch.mlp_in),
            "mlp_out": product(self.width, launch.mlp_out),
        }

    def shares(self, launch: Launch) -> tuple[int, int]:
        """(int32 counters, float32 partial sums) that split-K needs at most."""
        counters = partial = 0
        for name in PRODUCTS:
            rows, columns, _, splits, _ = getattr(launch, name)
            if splits > 1:
                items = self.tiles(launch)[name]
                counters = max(counters, items // splits)
                partial = max(partial, items * rows * columns)
        return counters, partial


def unsuitable(sizes: Sizes) -> str | None:
    """Why an evaluation of these sizes is not for this kernel, in one line; None if it is."""
    head_dim = sizes.width // sizes.heads
    if sizes.rows > MOST_ROWS:
        return f"it serves at most {MOST_ROWS} rows (samples x tokens), not {sizes.rows}"
    if sizes.width > MOST_COLUMNS or sizes.mlp > 4 * MOST_COLUMNS or head_dim > MOST_HEAD_DIM:
        return (
            f"it serves widths up to {MOST_COLUMNS}, hidden layers up to {4 * MOST_COLUMNS} and"
            f" head dimensions up to {MOST_HEAD_DIM}, not {sizes.width}, {sizes.mlp} and {head_dim}"
        )
    return None


def architectures(tokens: int, width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Those of 80, 90, 100 for which the kernel compiles without spills (sm_100 stands for all
    newer ones, too)."""
    if dtype == torch.float32 and tokens > 16:
        return 80, 90
    return (80, 90, 100) if width <= 1024 else (90, 100)


def counters_needed(sizes: Sizes, dtype: torch.dtype) -> int:
    """Elements of `counters` for `whole`."""
    return HEADER + sizes.shares(choose_launch(sizes.tokens, sizes.width, dtype))[0]


def most_counters(width: int, dtype: torch.dtype) -> int:
    """The same for all sizes of that width and dtype."""
    launches = (FLOAT32 if dtype == torch.float32 else LAUNCHES).values()
    products = [getattr(each, name) for each in launches for name in PRODUCTS]
    narrowest = min(columns for _, columns, _, splits, _ in products if splits > 1)
    return HEADER + MOST_ROWS * triton.cdiv(width, narrowest)


def resident(registers: int, shared: int, num_warps: int, arch: int) -> int:
    """How many programs a multiprocessor runs at once, at least: by registers (given out to warps
    in units of 256), shared memory (1 KiB of each is the system's) and threads."""
    by_registers = 65536 // (triton.cdiv(32 * registers, 256) * 256 * num_warps)
    by_shared = SHARED[max(known for known in SHARED if known <= arch)] // (shared + 1024)
    return min(by_registers, by_shared, 1536 // (32 * num_warps))


def constants(launch: Launch, sizes: Sizes, depth_group: int) -> dict[str, Any]:
    """Those of the kernel, but PHASE."""
    head_dim = sizes.width // sizes.heads
    main, tail = head_parts(head_dim)
    return {
        "D": sizes.width, "MLP": sizes.mlp, "GROUP": depth_group,
        "HEADS": sizes.heads, "HEAD_DIM": head_dim, "MAIN": main, "TAIL": tail,
        "QKV_TILE": launch.qkv, "OUT_TILE": launch.attention_out,
        "IN_TILE": launch.mlp_in, "DOWN_TILE": launch.mlp_out,
        "QUERIES": launch.attention[0], "KEYS": launch.attention[1],
        "THREADS": 32 * launch.num_warps,
    }  # fmt: skip
