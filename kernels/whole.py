"""All blocks of an evaluation as one launch: h = modulate(LN(inner ODE(x))) for the final layer.

x (B, N, D) are the embedded tokens; h (B, N, D) is what final_layer.py projects. A grid of no more
programs than the card runs at once walks through the phases of each block: [LN + modulate + qkv]
[attention] [output projection + gated residual] [LN + modulate + MLP in + GELU] [MLP out + gated
residual, at a group's end the Euler step of the inner ODE], between which all programs wait for
each other, 5*l + 1 times. While one phase runs, the weights of a later one are fetched into the L2.
Meant for few rows (batch 1), where launches and the weights' way from memory take the time. Bytes:
the weights once; activations stay in the L2. Kernel, with what each phase reads and writes:
whole_phases.py.

Triton has all that it takes: acquire-release atomics and a load that acquires (inline PTX), and
cooperative launches, which the driver refuses where the grid does not fit at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor

from odelt_fast.config import LAYER_NORM_EPS

from . import whole_phases as phases
from .attention import attention_reference
from .compile_case import DTYPES, CompileCase, kernel_case
from .device import architecture, require_device
from .gated_residual import gated_residual_reference
from .group_end import group_end_reference, last_group_end_reference
from .linear import linear_reference
from .norm_modulate import norm_modulate_reference
from .rows import check_modulation, check_tokens, row_stride
from .whole_launch import (
    HEADER,
    Launch,
    Sizes,
    architectures,
    choose_launch,
    constants,
    counters_needed,
    resident,
    unsuitable,
)

TENSORS = 8  # of a block: weight and bias of qkv, attention_out, mlp_in, mlp_out
# The bound on registers is the hardware's: without it ptxas aims at more programs than are launched
# and spills.
OPTIONS = MappingProxyType({"launch_cooperative_grid": True, "maxnreg": 255})
PROGRAMS_IN_TURN = 3  # where phases are launches of their own


def address_table(weights: Sequence[Tensor]) -> Tensor:
    """Where the weights lie, (l, 8) int64 on their device: `TENSORS` of each block.

    The kernel reads them there, without a copy: they must stay alive, and where they are.

    Raises:
        ValueError: a weight that the kernel cannot read where it is.
    """
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            raise ValueError("weights must be contiguous and begin at a multiple of 16 bytes")
    addresses = [weight.data_ptr() for weight in weights]
    return torch.tensor(addresses, dtype=torch.int64, device=weights[0].device).view(-1, TENSORS)


def whole_reference(
    x: Tensor, modulation: Tensor, final_modulation: Tensor, weights: list[Tensor], table: Tensor,
    num_heads: int, depth_group: int, steps: Tensor | None, counters: Tensor,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, in the dtype of its inputs."""
    size, vr, h = x.shape[2], None, x
    blocks = [weights[first : first + TENSORS] for first in range(0, len(weights), TENSORS)]
    for index, (qkv, qkv_bias, out, out_bias, up, up_bias, down, down_bias) in enumerate(blocks):
        before, last = x, index + 1 == len(blocks)
        column = [size * (6 * index + part) for part in range(6)]
        h = norm_modulate_reference(x, modulation, column[0], column[1])
        attended = attention_reference(linear_reference(h, qkv, qkv_bias), num_heads)
        y = linear_reference(attended, out, out_bias)
        x, h = gated_residual_reference(
            x, y, modulation, column[2], modulation, column[3], column[4]
        )
        y = linear_reference(linear_reference(h, up, up_bias, "gelu"), down, down_bias)
        columns = modulation, column[5], final_modulation, 0, size
        if not depth_group or (index + 1) % depth_group:
            x, h = gated_residual_reference(x, y, *columns)
        elif last:
            vr, h = last_group_end_reference(x, y, vr, *columns, steps)
        else:
            x, vr, h = group_end_reference(x, y, before, vr, *columns, steps)
    return h


_OCCUPANCY: dict[Any, int] = {}  # by device and specialisation


def _programs(launch: Launch, sizes: Sizes, device: torch.device, compile_it: Any) -> int:
    """The grid: as many programs as run at once, but none that never has a tile.

    compile_it: () -> Triton's compiled kernel.
    """
    arch, processors = architecture(device)
    key = device, launch, sizes
    if key not in _OCCUPANCY:
        kernel = compile_it()
        kernel._init_handles()  # n_regs is known to the driver alone
        _OCCUPANCY[key] = resident(kernel.n_regs, kernel.metadata.shared, launch.num_warps, arch)
    at_once = min(launch.programs, _OCCUPANCY[key])
    if not at_once:
        raise ValueError("whole: a multiprocessor of this card runs none of its programs")
    return min(at_once * processors, max(sizes.tiles(launch).values()))


def launch_whole(
    x: Tensor, modulation: Tensor, final_modulation: Tensor, table: Tensor, live: int,
    sizes: Sizes, depth_group: int, steps: Tensor | None, counters: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Writes out (B, N, D): on a card in one launch, in the interpreter in one a phase."""
    launch = choose_launch(sizes.tokens, sizes.width, x.dtype)
    rows, size = sizes.rows, sizes.width

    def scratch(columns: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty((rows, columns), dtype=dtype, device=x.device)

    statistics = [
        scratch(2 * triton.cdiv(size, tile[1]), torch.float32)
        for tile in (launch.mlp_out, launch.attention_out)
    ]
    partial = torch.empty(sizes.shares(launch)[1], dtype=torch.float32, device=x.device)
    tensors = (
        x, table, modulation, final_modulation, steps, out,
        scratch(size), scratch(size), scratch(size), scratch(3 * size), scratch(size),
        scratch(sizes.mlp), *statistics, partial, counters[HEADER:], counters,
        sizes.samples, sizes.tokens, row_stride(modulation), row_stride(final_modulation),
    )  # fmt: skip
    rest = live, 1.4426950408889634 / (size // sizes.heads), LAYER_NORM_EPS
    options = constants(launch, sizes, depth_group)
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = phases.whole_kernel
    with torch.cuda.device_of(x):
        if x.device.type == "cuda":
            at_once: dict[str, Any] = {"PHASE": -1, **OPTIONS, **options}
            arguments = *tensors, 0, live, *rest
            programs = _programs(
                launch,
                sizes,
                x.device,
                lambda: kernel.warmup(*arguments, grid=(1,), **at_once),
            )
            kernel[(programs,)](*arguments, **at_once)
            return
        for first, end, phase in in_turn(live):
            kernel[(PROGRAMS_IN_TURN,)](*tensors, first, end, *rest, **options, PHASE=phase)


def in_turn(live: int) -> Iterator[tuple[int, int, int]]:
    """(first block, end, phase) of each phase of `live` blocks."""
    begin, *inner, end = range(7)
    yield 0, 0, begin
    for block, phase in itertools.product(range(live), inner):
        yield block, block + 1, phase
    yield 0, 0, end


@torch.library.custom_op("odelt_fast::whole", mutates_args=("counters",))
def whole(
    x: Tensor, modulation: Tensor, final_modulation: Tensor, weights: list[Tensor], table: Tensor,
    num_heads: int, depth_group: int, steps: Tensor | None, counters: Tensor,
) -> Tensor:  # fmt: skip
    """h of the module's equation.

    Args:
        x: (B, N, D) float16, bfloat16 or float32, contiguous.
        modulation, final_modulation: (B or 1, at least l*6*D) and (B or 1, at least 2*D) in x's
            dtype: shift, scale, gate (attention), shift, scale, gate (MLP) of each block; shift,
            scale.
        weights: `TENSORS` of each of l blocks, in x's dtype.
        table: their `address_table`, or that of more blocks which begins with these.
        depth_group: blocks of an Euler step of the inner ODE, of which l is a multiple; 0: none.
        steps: (1,) float32, None: 1.
        counters: int32, zeroed once, at least `counters_needed` long, for one stream at a time.

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or it is not for these sizes.
    """
    sizes = _check(x, weights, table, num_heads, depth_group, steps)
    live = len(weights) // TENSORS
    check_modulation("modulation", modulation, x, 6 * sizes.width * live - sizes.width)
    check_modulation("final_modulation", final_modulation, x, sizes.width)
    for name, each in (("modulation", modulation), ("final_modulation", final_modulation)):
        if each.dtype != x.dtype or each.stride(1) != 1:
            raise ValueError(f"whole: {name} must be in {x.dtype} as x is, its rows contiguous")
    needed = counters_needed(sizes, x.dtype)
    if counters.dtype != torch.int32 or not counters.is_contiguous() or len(counters) < needed:
        raise ValueError(f"whole: counters must be {needed} zeroed int32 elements or more")
    require_device("whole", x, modulation, final_modulation, *weights, table, steps, counters)
    out = torch.empty_like(x)
    launch_whole(
        x, modulation, final_modulation, table, live, sizes, depth_group, steps, counters, out
    )
    return out


def _check(
    x: Tensor, weights: list[Tensor], table: Tensor, heads: int, group: int, steps: Tensor | None
) -> Sizes:
    check_tokens("x", x)
    size, live = x.shape[2], len(weights) // TENSORS
    if not x.is_contiguous() or not x.numel() or not live or len(weights) % TENSORS:
        raise ValueError(
            f"whole: x must be contiguous and not empty, weights {TENSORS} tensors a block, not"
            f" {tuple(x.shape)} of strides {x.stride()} and {len(weights)}"
        )
    if heads < 1 or size % heads or group < 0 or (group and live % group):
        raise ValueError(
            f"whole: {heads} heads and groups of {group} blocks do not fit width {size} and {live}"
            " blocks"
        )
    mlp = len(weights[4])
    shapes = [(3 * size, size), (size, size), (mlp, size), (size, mlp)]
    wanted = [each for shape in shapes for each in (shape, shape[:1])] * live
    for weight, shape in zip(weights, wanted):
        if weight.shape != shape or weight.dtype != x.dtype or not weight.is_contiguous():
            raise ValueError(
                f"whole: a weight must be contiguous {shape} in {x.dtype}, not"
                f" {tuple(weight.shape)} in {weight.dtype}"
            )
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1:] != (TENSORS,):
        raise ValueError("whole: table must be the address_table of the weights")
    if len(table) < live or not table.is_contiguous():
        raise ValueError(f"whole: table must have a row for each of {live} blocks")
    if steps is not None and (steps.shape != (1,) or steps.dtype != torch.float32):
        raise ValueError(f"whole: steps must be (1,) float32, not {tuple(steps.shape)}")
    sizes = Sizes(len(x), x.shape[1], size, mlp, heads)
    reason = unsuitable(sizes)
    if reason:
        raise ValueError(f"whole: {reason}")
    return sizes


whole.register_fake(lambda x, *_: torch.empty_like(x))


def compile_cases() -> Iterator[CompileCase]:
    """Every launch configuration, at the networks digits, S and B; float16 compiles like bfloat16.

    Cards for which one spills are left out (`architectures`), and the engine's plan refuses them.
    """
    networks = {96: (4, 16), 384: (6, 256), 768: (12, 256), 1152: (16, 256)}  # heads, tokens
    tensors = ("x", "modulation", "final_modulation", "out", "state", "middle", "vr", "qkv",
               "attended", "hidden")  # fmt: skip
    for dtype, width in [
        *((torch.bfloat16, width) for width in networks),
        (torch.float32, 96),
        (torch.float32, 768),
    ]:
        kind, (heads, tokens) = DTYPES[dtype], networks[width]
        launch = choose_launch(tokens, width, dtype)
        types = dict.fromkeys(tensors, f"*{kind}") | {"table": "*i64"}
        types |= dict.fromkeys(("counters", "barrier"), "*i32")
        floats = ("steps", "state_statistics", "middle_statistics", "partial")
        types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(("scale_log2", "eps"), "fp32")
        sizes = Sizes(1, tokens, width, 4 * width, heads)
        given = {**constants(launch, sizes, 4), "PHASE": -1}
        yield kernel_case(
            f"whole/{kind}/{width}", phases.whole_kernel, types, given,
            ("samples", "tokens", "first", "end", "live"),
            num_warps=launch.num_warps, num_stages=launch.num_stages, options={**OPTIONS},
            arches=architectures(tokens, width, dtype),
        )  # fmt: skip
