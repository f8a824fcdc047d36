"""What the machine can do at most, measured: matrix products, memory traffic. What a network needs
at least: arithmetic, bytes.

The floor of a piece of work is the larger of (operations / rate of products) and (bytes /
bandwidth); its share is floor over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.measure import Timer, graph_timer, summary, take_turns
from odelt_fast.config import DiTConfig

CPU_PRODUCT = (2048, 768, 3072)  # rows, inner, columns: the first MLP product of DiT-B/2 at batch 8
GPU_PRODUCT = (8192, 8192, 8192)
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def product_timer(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    clock: Timer = time.perf_counter,
) -> Timer:
    """Seconds of x W^T, x (rows, inner) and W (columns, inner) of random values in `dtype`,
    operands rotated."""
    rows, inner, columns = shape
    sets = 2
    generator = torch.Generator(device).manual_seed(0)
    pairs = [
        tuple(
            torch.randn(size, inner, generator=generator, device=device).to(dtype)
            for size in (rows, columns)
        )
        for _ in range(sets)
    ]
    call: Callable[[int], object] = lambda index: torch.nn.functional.linear(*pairs[index])  # noqa: E731
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        call = lambda index: torch._scaled_mm(  # noqa: E731
            pairs[index][0],
            pairs[index][1].t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return graph_timer(call, sets, device, clock)


def copy_timer(device: torch.device, count: int) -> Timer:
    """Seconds of a copy of `count` float32 values."""
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    return graph_timer(lambda _: target.copy_(source), 1, device)


def measure_ceilings(device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """{"float32", "bfloat16", and on cards that have it "float8_e4m3fn": operations/s; "bandwidth":
    bytes/s, read and written}."""
    cuda = device.type == "cuda"
    shape = GPU_PRODUCT if cuda else CPU_PRODUCT
    dtypes = [torch.float32, torch.bfloat16]
    if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        dtypes.append(torch.float8_e4m3fn)
    count = 2**30 if cuda else 2**25
    found = {}
    for dtype in dtypes:
        samples = take_turns(
            {"product": product_timer(dtype, device, shape)}, seconds / (len(dtypes) + 1)
        )["product"]
        found[str(dtype).removeprefix("torch.")] = (
            2.0 * shape[0] * shape[1] * shape[2] / summary(samples)["median_s"]
        )
    samples = take_turns({"copy": copy_timer(device, count)}, seconds / (len(dtypes) + 1))["copy"]
    return found | {"bandwidth": 8.0 * count / summary(samples)["median_s"]}


def evaluation_flops(config: DiTConfig, depth: int, batch: int, rows: int | None = None) -> float:
    """Operations of the matrix products of one evaluation of `batch` images at `depth`; a
    multiplication and an addition are two.

    Projections, attention (q k^T and the weighted values), patch embedding, final layer, and the
    modulation of `rows` different rows of conditioning (None: one for each image), time and step
    embeddings counted once.
    """
    size, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2
    pixels, live = config.patch_size**2 * config.channels, config.live_blocks(depth)
    block = tokens * (2 * size * (4 * size + 2 * config.mlp_size) + 4 * tokens * size)
    ends = tokens * 4 * pixels * size
    modulation = 2 * size * (6 * size * live + 2 * size) * (batch if rows is None else rows)
    return float(batch * (live * block + ends) + modulation + 2 * 2 * (256 * size + size * size))


def evaluation_bytes(
    config: DiTConfig, depth: int, batch: int, dtype: torch.dtype, modulation: bool = False
) -> float:
    """Bytes that one evaluation must move at least: the live blocks' weights once, the state in and
    out in float32.

    modulation: also the modulation weights, which a planned unconditional trajectory reads only
    once for all its steps.
    """
    size, live = config.hidden_size, config.live_blocks(depth)
    weights = live * size * (4 * size + 2 * config.mlp_size + (6 * size if modulation else 0))
    return float(weights * BYTES[dtype] + 2 * 4 * batch * config.channels * config.image_size**2)


def floor_seconds(
    operations: float, traffic: float, dtype: torch.dtype, ceilings: dict[str, float]
) -> float:
    """The larger of the two times that the measured ceilings allow."""
    return max(
        operations / ceilings[str(dtype).removeprefix("torch.")], traffic / ceilings["bandwidth"]
    )
