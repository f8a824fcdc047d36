"""What the machine can do at most, measured, and what a network needs at least.

The floor of a piece of work is the larger of (operations / rate of products) and (bytes /
bandwidth); its share is floor over time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from odelt_fast.config import DiTConfig

from .measure import Timer, dtype_name, graph_timer, take_turns

CPU_PRODUCT = (2048, 768, 3072)  # rows, inner, columns: the first MLP product of DiT-B/2 at batch 8
GPU_PRODUCT = (8192, 8192, 8192)


def product_timer(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    clock: Timer = time.perf_counter,
) -> Timer:
    """Seconds of x W^T of random values in `dtype`, operands rotated.

    Args:
        shape: rows, inner, columns: x is (rows, inner), W (columns, inner).
    """
    rows, inner, columns = shape
    generator, one = torch.Generator(device).manual_seed(0), torch.ones((), device=device)

    def draw(size: int) -> Tensor:
        return torch.randn(size, inner, generator=generator, device=device).to(dtype)

    pairs = [(draw(rows), draw(columns)) for _ in range(2)]

    def call(index: int) -> Tensor:
        x, weight = pairs[index]
        if dtype != torch.float8_e4m3fn:
            return F.linear(x, weight)
        return torch._scaled_mm(
            x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return graph_timer(call, len(pairs), device, clock)


def copy_timer(device: torch.device, count: int) -> Timer:
    """Seconds of a copy of `count` float32 values."""
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    return graph_timer(lambda _: target.copy_(source), 1, device)


def measure_ceilings(device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """{dtype: operations/s of a product, "bandwidth": bytes/s, read and written}.

    The dtypes are float32, bfloat16 and, on cards that have it, float8_e4m3fn.
    """
    cuda = device.type == "cuda"
    shape = GPU_PRODUCT if cuda else CPU_PRODUCT
    dtypes = [torch.float32, torch.bfloat16]
    if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        dtypes.append(torch.float8_e4m3fn)
    flops, count = 2.0 * math.prod(shape), 2**30 if cuda else 2**25
    timers = {dtype_name(dtype): product_timer(dtype, device, shape) for dtype in dtypes}
    timers["bandwidth"] = copy_timer(device, count)
    rates = {}
    for name, timer in timers.items():
        work = 8.0 * count if name == "bandwidth" else flops
        taken = take_turns({name: timer}, seconds / len(timers))[name]
        rates[name] = work / statistics.median(taken)
    return rates


def token_count(config: DiTConfig) -> int:
    """Tokens of an image."""
    return math.prod(config.grid)


def evaluation_flops(config: DiTConfig, depth: int, batch: int) -> float:
    """Operations of the matrix products of one evaluation; multiply and add are two.

    Projections, attention (q k^T and the weighted values), patch embedding, final layer, and one
    row of modulation for each image; time and step embeddings counted once.
    """
    size, tokens = config.hidden_size, token_count(config)
    pixels, live = config.patch_size**2 * config.channels, config.live_blocks(depth)
    block = tokens * (2 * size * (4 * size + 2 * config.mlp_size) + 4 * tokens * size)
    ends = tokens * 4 * pixels * size
    modulation = 2 * size * (6 * size * live + 2 * size)
    embeddings = 2 * 2 * (256 * size + size * size)
    return float(batch * (live * block + ends + modulation) + embeddings)


def evaluation_bytes(config: DiTConfig, depth: int, batch: int, dtype: torch.dtype) -> float:
    """Bytes that one evaluation must move at least.

    The live blocks' weights once, the state in and out in float32; not the modulation's weights,
    which a planned trajectory reads only once for all its steps.
    """
    size, live = config.hidden_size, config.live_blocks(depth)
    weights = live * size * (4 * size + 2 * config.mlp_size)
    return float(weights * dtype.itemsize + 2 * 4 * batch * math.prod(config.image_shape))


def floor_seconds(
    operations: float, traffic: float, dtype: torch.dtype, ceilings: Mapping[str, float]
) -> float:
    """The larger of the two times that the measured ceilings allow."""
    return max(operations / ceilings[dtype_name(dtype)], traffic / ceilings["bandwidth"])
