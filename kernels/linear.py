"""Linear layer with a fused epilogue: y = residual + gate * act(x W^T + bias), all parts optional.

x (..., inner); W (columns, inner); bias (columns,); act: none or GELU (tanh form); gate (B or 1,
columns), one row per sample of x (B, N, inner); residual (B, N, columns). Types: float32, bfloat16,
float16, or float8_e4m3fn with one float32 scale a row of x and of W (x = x_q * x_scale[row], as
`quantize_rows` makes them). Accumulation float32. Bytes moved: x, W, residual and y once each, and
with split-K twice `splits` float32 tiles; the epilogue's own tensors (bias, gate, scales) are
small. Kernels: linear_tiles.py, linear_hopper.py; their launch table: tiles.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .compile_case import DTYPES, CompileCase, kernel_case
from .device import architecture, launch_options, require_device
from .linear_tiles import descriptor_kernel, pointer_kernel
from .quantize import FP8
from .tiles import (
    SPECIALIZED,
    SPLITS,
    TILES,
    Tile,
    choose_tile,
    specialized_tiles,
    workspace_elements,
)

ACTIVATIONS = ("none", "gelu")


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none",
    gate: Tensor | None = None, residual: Tensor | None = None,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None, workspace: Tensor | None = None,
    configuration: str | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, in the dtype of x; float8 in float32, rounded at the end."""
    out_dtype = out_dtype or _default_dtype(x)
    if x_scale is not None and weight_scale is not None:
        x, weight = x.float() * x_scale[..., None], weight.float() * weight_scale[:, None]
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if gate is not None and residual is not None:
        y = torch.addcmul(residual.to(y.dtype), gate[:, None].to(y.dtype), y)
    return y.to(out_dtype)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product: see the module's equation. A part that is None is off."""

    bias: Tensor | None = None
    activation: str = "none"
    gate: Tensor | None = None
    residual: Tensor | None = None
    x_scale: Tensor | None = None
    weight_scale: Tensor | None = None


def launch_linear(
    x: Tensor, weight: Tensor, epilogue: Epilogue, out: Tensor, tile: Tile,
    workspace: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes out (rows, columns), contiguous, with one launch; x (rows, inner) with last stride 1.

    workspace: int32, zeroed once, at least sum(workspace_elements(...)) long, for one stream at a
    time; None with split-K: made here.
    """
    (rows, inner), columns = x.shape, weight.shape[0]
    counters, partials = workspace_elements(rows, columns, tile)
    needed = counters + partials
    if workspace is None:
        workspace = torch.zeros(needed, dtype=torch.int32, device=x.device)
    whole = workspace.dtype == torch.int32 and workspace.is_contiguous()
    if not whole or workspace.numel() < needed:
        raise ValueError(
            f"linear: workspace must be contiguous int32 of at least {needed} zeroed elements"
        )
    x_scale = None if epilogue.x_scale is None else epilogue.x_scale.reshape(-1)
    parts = epilogue.bias, epilogue.residual, epilogue.gate, x_scale, epilogue.weight_scale
    # A part that is off is some tensor with valid memory: its loads are not compiled.
    pointers = [out if part is None else _rows(part) for part in parts]
    _, residual, gate, _, _ = pointers
    strides = residual.stride(0), gate.stride(0) if len(gate) > 1 else 0, rows // len(gate)
    parts_on = (part is not None for part in (epilogue.bias, epilogue.gate, x_scale))
    constants = _constants(tile, epilogue.activation == "gelu", *parts_on)
    constants |= launch_options(x.device, tile.num_warps, tile.num_stages)
    tiles, sizes = tile.count(rows, columns), (rows, columns, inner, *strides)
    programs = min(tiles, architecture(x.device)[1])
    with torch.cuda.device_of(x):
        if tile.specialized == 90:
            from .linear_hopper import launch_ping_pong  # Gluon is an experiment of Triton's

            launch_ping_pong(programs, (x, weight, out), (*pointers, *sizes), constants)
        elif tile.descriptors:
            descriptor_kernel[(programs,)](
                TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
                TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
                TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n // 2]),
                *pointers, *sizes, SPECIALIZED=tile.specialized > 0, **constants,
            )  # fmt: skip
        else:
            partial = workspace[counters:].view(torch.float32) if counters else workspace
            pointer_kernel[(tiles, tile.splits)](
                x, weight, *pointers, out, partial, workspace,
                rows, columns, inner, x.stride(0), weight.stride(0), *strides,
                SPLITS=tile.splits, EVEN_K=inner % tile.block_k == 0, **constants,
            )  # fmt: skip


def _constants(tile: Tile, gelu: bool, bias: bool, gated: bool, scaled: bool) -> dict[str, Any]:
    parts = {"GELU": gelu, "BIAS": bias, "GATED": gated, "SCALED": scaled}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return parts | blocks | {"GROUP_M": tile.group_m}


def _describable(tensor: Tensor) -> bool:
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and tensor.stride(1) == 1


def _check(x: Tensor, weight: Tensor, epilogue: Epilogue) -> None:
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: (..., inner)"
            " and (columns, inner)"
        )
    if x.dtype != weight.dtype or x.dtype not in (*DTYPES, FP8):
        raise ValueError(
            "linear: x and weight must share float32, bfloat16, float16 or float8_e4m3fn, not"
            f" {x.dtype} and {weight.dtype}"
        )
    if weight.stride(1) != 1:
        raise ValueError(
            f"linear: the rows of weight must be contiguous, not of strides {weight.stride()}"
        )
    if epilogue.activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: activation must be one of {', '.join(ACTIVATIONS)}, not"
            f" {epilogue.activation!r}"
        )
    gate, scales = epilogue.gate, (epilogue.x_scale, epilogue.weight_scale)
    if {scale is not None for scale in scales} != {x.dtype == FP8}:
        raise ValueError("linear: float8 needs x_scale and weight_scale, other types take neither")
    if (gate is None) != (epilogue.residual is None):
        raise ValueError("linear: gate and residual come together")
    columns = weight.shape[:1]
    for name, shape in (
        ("bias", columns),
        ("weight_scale", columns),
        ("x_scale", x.shape[:-1]),
        ("residual", x.shape[:-1] + columns),
    ):
        part = getattr(epilogue, name)
        if part is not None and part.shape != shape:
            raise ValueError(
                f"linear: {name} must be of shape {tuple(shape)}, not {tuple(part.shape)}"
            )
        if part is not None and name.endswith("scale") and part.dtype != torch.float32:
            raise ValueError(f"linear: {name} must be float32, not {part.dtype}")
    if gate is not None and (
        x.dim() != 3 or gate.dim() != 2 or len(gate) not in (1, len(x)) or gate.shape[1:] != columns
    ):
        raise ValueError(
            f"linear: gate {tuple(gate.shape)} does not fit x {tuple(x.shape)}: (B or 1,"
            f" {weight.shape[0]}) for (B, N, inner)"
        )


# Without defaults: torch 2.11 drops an argument that is mutated and left at its default.
@torch.library.custom_op("odelt_fast::linear", mutates_args=("workspace",))
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str,
    gate: Tensor | None, residual: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None,
    out_dtype: torch.dtype | None, workspace: Tensor | None, configuration: str | None,
) -> Tensor:  # fmt: skip
    epilogue = Epilogue(bias, activation, gate, residual, x_scale, weight_scale)
    _check(x, weight, epilogue)
    require_device("linear", x, weight, bias, gate, residual, x_scale, weight_scale, workspace)
    columns = weight.shape[0]
    dtype = out_dtype or _default_dtype(x)
    out = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    if not x.numel():
        return out
    x_rows, out_rows = _rows(x), out.view(-1, columns)
    aligned = all(map(_describable, (x_rows, weight, out_rows)))
    if configuration is None:
        tile = choose_tile(
            len(x_rows), columns, x.shape[-1], x.dtype,
            *architecture(x.device), aligned, gate is not None,
        )  # fmt: skip
    else:
        tile = _specialized(configuration, x, aligned, gate is not None)
    launch_linear(x_rows, weight, epilogue, out_rows, tile, workspace)
    return out


def _specialized(name: str, x: Tensor, aligned: bool, gated: bool) -> Tile:
    tiles = specialized_tiles(architecture(x.device)[0], x.dtype, gated)
    if name not in tiles:
        raise ValueError(
            f"linear: for {x.dtype}{' with a gate' * gated} the configuration must be one of"
            f" {', '.join(tiles) or 'none'}, not {name!r}"
        )
    if not aligned:
        raise ValueError(f"linear: {name!r} needs rows of x, weight and y on 16-byte borders")
    return tiles[name]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none",
    gate: Tensor | None = None, residual: Tensor | None = None,
    x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None, workspace: Tensor | None = None,
    configuration: str | None = None,
) -> Tensor:  # fmt: skip
    """y of the module's equation, which has shapes and dtypes.

    Args:
        x, residual: any layout; copied where rows are not contiguous.
        weight: with contiguous rows.
        gate: may be a slice of a packed modulation row.
        out_dtype: None: the dtype of x, bfloat16 for float8.
        workspace: see `launch_linear`; with one, a launch allocates and clears nothing.
        configuration: of `tiles.specialized_tiles`; None: `tiles.choose_tile` takes one.

    Returns:
        (..., columns), contiguous.

    Raises:
        ValueError: shapes, dtypes, layouts, devices or configuration do not fit.
    """
    parts = bias, activation, gate, residual, x_scale, weight_scale
    return _linear(x, weight, *parts, out_dtype, workspace, configuration)


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) -> (rows, n) with contiguous rows, a view where possible; vectors stay vectors."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _default_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == FP8 else x.dtype


_linear.register_fake(lambda *given: linear_reference(*given).contiguous())


def compile_cases() -> Iterator[CompileCase]:
    """Every shipped tile, for each of its types and epilogues."""
    epilogues = {"bias": (False, False), "gelu": (True, False), "gated": (False, True)}
    small = TILES["small"]
    variants = {f"small_split{splits}": replace(small, splits=splits) for splits in SPLITS}
    variants["small_pdl"] = small
    for (name, tile), kind, (epilogue, (gelu, gated)) in itertools.product(
        {**TILES, **variants, **SPECIALIZED[100]}.items(),
        (*DTYPES.values(), "fp8e4nv"),
        epilogues.items(),
    ):
        if (kind == "fp32") != (name == "float32") or (kind == "fp8e4nv") != name.startswith("fp8"):
            continue
        # float16 compiles like bfloat16, and variants like each other: there the fullest epilogue
        # stands for all.
        alike = (kind == "fp16") + (name in variants)
        if alike == 2 or (alike and epilogue != "gated"):
            continue
        if name == "overlapped_wide" and epilogue == "gated":
            continue  # as in specialized_tiles
        out = "bf16" if kind == "fp8e4nv" else kind
        types = {
            "x_desc": f"tensordesc<{kind}[{tile.block_m}, {tile.block_k}]>",
            "weight_desc": f"tensordesc<{kind}[{tile.block_n}, {tile.block_k}]>",
            "out_desc": f"tensordesc<{out}[{tile.block_m}, {tile.block_n // 2}]>",
            "x_ptr": f"*{kind}",
            "weight_ptr": f"*{kind}",
            **dict.fromkeys(("x_scale_ptr", "weight_scale_ptr", "partial_ptr"), "*fp32"),
            **dict.fromkeys(("bias_ptr", "residual_ptr", "gate_ptr", "out_ptr"), f"*{out}"),
            "counter_ptr": "*i32",
        }
        constants = _constants(tile, gelu, True, gated, kind == "fp8e4nv")
        constants["PDL"] = name == "small_pdl"
        if tile.descriptors:
            constants["SPECIALIZED"] = tile.specialized > 0
        else:
            constants |= {"SPLITS": tile.splits, "EVEN_K": True}
        options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if name in ("hopper", "fp8_hopper") and epilogue == "gated":
            options["arches"] = (90,)  # as in choose_tile
        elif tile.specialized:
            options["arches"] = (tile.specialized,)
        elif tile.descriptors or kind == "fp8e4nv":
            options["arches"] = (90, 100)
        kernel = descriptor_kernel if tile.descriptors else pointer_kernel
        # Numbers of samples and tokens may be odd.
        name = f"linear/{name}/{kind}/{epilogue}"
        yield kernel_case(name, kernel, types, constants, ("rows", "tokens"), **options)
