"""Linear layer with a fused epilogue: y = residual + gate * act(x W^T + bias), every part optional.

x (..., inner); W (columns, inner); bias (columns,); act: none or GELU (tanh form); gate (B or 1,
columns), one row per sample of x (B, N, inner); residual (B, N, columns). Types: float32, bfloat16,
float16, or float8_e4m3fn with one float32 scale a row of x and of W (x = x_q * x_scale[row], as
`quantize_rows` makes them). Accumulation float32. Bytes moved: x, W, residual and y once each, and
with split-K twice `splits` float32 tiles; the epilogue's own tensors (bias, gate, scales) are
small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from odelt_fast.kernels.compile_case import CompileCase
from odelt_fast.kernels.device import architecture, launch_options, require_device
from odelt_fast.kernels.linear_tiles import descriptor_kernel, pointer_kernel
from odelt_fast.kernels.quantize import FP8
from odelt_fast.kernels.tiles import SPLITS, TILES, Tile, choose_tile, workspace_elements

ACTIVATIONS = ("none", "gelu")


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", gate: Tensor | None = None,
    residual: Tensor | None = None, x_scale: Tensor | None = None, weight_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, in the dtype of x (float8: dequantised to float32, then rounded to
    `out_dtype` at the end)."""
    out_dtype = out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)
    if x_scale is not None and weight_scale is not None:
        x, weight = x.float() * x_scale[..., None], weight.float() * weight_scale[:, None]
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activation == "gelu":
        y = F.gelu(y, approximate="tanh")
    if gate is not None and residual is not None:
        y = torch.addcmul(residual.to(y.dtype), gate[:, None].to(y.dtype), y)
    return y.to(out_dtype)


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None, out: Tensor, workspace: Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    """Writes out (rows, columns, contiguous) with one launch. x (rows, inner), residual (rows,
    columns): last stride 1.

    workspace: int32, zeroed once, at least sum(workspace_elements(...)) long, for one stream at a
    time; None with split-K: made here.
    """
    rows, inner = x.shape
    columns = weight.shape[0]
    counters, partials = workspace_elements(rows, columns, tile)
    if workspace is None:
        workspace = torch.zeros(counters + partials, dtype=torch.int32, device=x.device)
    elif (
        workspace.dtype != torch.int32
        or not workspace.is_contiguous()
        or workspace.numel() < counters + partials
    ):
        raise ValueError(
            f"linear: workspace must be contiguous int32 of at least {counters + partials} zeroed"
            " elements"
        )
    # A part that is off gets some valid pointer: its loads are not compiled.
    extras = [
        tensor if tensor is not None else out
        for tensor in (bias, residual, gate, x_scale, weight_scale)
    ]
    residual_stride = residual.stride(0) if residual is not None else columns
    gate_stride, tokens = (
        (gate.stride(0) * (gate.shape[0] > 1), rows // gate.shape[0])
        if gate is not None
        else (columns, 1)
    )
    parts = {
        "GELU": activation == "gelu",
        "BIAS": bias is not None,
        "GATED": gate is not None,
        "SCALED": x_scale is not None,
    }
    blocks = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    options = launch_options(x.device, tile.num_warps, tile.num_stages, tile.pdl)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    with torch.cuda.device_of(x):
        if tile.descriptors:
            descriptors = (
                TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
                TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
                TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n // 2]),
            )
            programs = min(tiles, architecture(x.device)[1])
            descriptor_kernel[(programs,)](
                *descriptors,
                *extras,
                rows,
                columns,
                inner,
                residual_stride,
                gate_stride,
                tokens,
                **blocks,
                **parts,
                **options,
            )
            return
        partial = workspace[counters:].view(torch.float32) if counters else workspace
        pointer_kernel[(tiles, tile.splits)](
            x, weight, *extras, out, partial, workspace, rows, columns, inner, x.stride(0), weight.stride(0), residual_stride, gate_stride,
            tokens, SPLITS=tile.splits, EVEN_K=inner % tile.block_k == 0, **blocks, **parts, **options,
        )  # fmt: skip


def _describable(tensor: Tensor) -> bool:
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(1) == 1
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: (..., inner)"
            " and (columns, inner)"
        )
    if x.dtype != weight.dtype or x.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        FP8,
    ):
        raise ValueError(
            "linear: x and weight must share float32, bfloat16, float16 or float8_e4m3fn, not"
            f" {x.dtype} and {weight.dtype}"
        )
    if weight.stride(1) != 1:
        raise ValueError(
            f"linear: the rows of weight must be contiguous, not of strides {weight.stride()}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}"
        )
    if (x.dtype == FP8) != (x_scale is not None) or (x_scale is None) != (weight_scale is None):
        raise ValueError("linear: float8 needs x_scale and weight_scale, other types take neither")
    if (gate is None) != (residual is None):
        raise ValueError("linear: gate and residual come together")
    wanted = {
        "bias": (bias, weight.shape[:1]),
        "weight_scale": (weight_scale, weight.shape[:1]),
        "x_scale": (x_scale, x.shape[:-1]),
    }
    wanted["residual"] = (residual, x.shape[:-1] + weight.shape[:1])
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"linear: {name} must be of shape {tuple(shape)}, not {tuple(tensor.shape)}"
            )
    if gate is not None and (
        x.dim() != 3
        or gate.dim() != 2
        or gate.shape[0] not in (1, x.shape[0])
        or gate.shape[1] != weight.shape[0]
    ):
        raise ValueError(
            f"linear: gate {tuple(gate.shape)} does not fit x {tuple(x.shape)}: (B or 1,"
            f" {weight.shape[0]}) for (B, N, inner)"
        )
    for name, scale in (("x_scale", x_scale), ("weight_scale", weight_scale)):
        if scale is not None and scale.dtype != torch.float32:
            raise ValueError(f"linear: {name} must be float32, not {scale.dtype}")


@torch.library.custom_op("odelt_fast::linear", mutates_args=("workspace",))
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """y (..., columns) of the module's equation, in the dtype of x, or `out_dtype` (float8:
    bfloat16 unless it says otherwise).

    gate may be a slice of a packed modulation row. x and residual of any layout (copied where rows
    are not contiguous); weight with contiguous rows. workspace: see `launch_linear`; the engine
    passes one so that a launch allocates and clears nothing. Raises ValueError for shapes, dtypes,
    layouts and devices that do not fit.
    """
    _check(x, weight, bias, activation, gate, residual, x_scale, weight_scale)
    require_device("linear", x, weight, bias, gate, residual, x_scale, weight_scale, workspace)
    columns = weight.shape[0]
    out = torch.empty((*x.shape[:-1], columns), dtype=_out_dtype(x, out_dtype), device=x.device)
    if not x.numel():
        return out
    x_rows, out_rows = _rows(x), out.view(-1, columns)
    x_scale = None if x_scale is None else x_scale.reshape(-1)
    extras = {
        "bias": bias,
        "gate": gate,
        "residual": residual,
        "x_scale": x_scale,
        "weight_scale": weight_scale,
    }
    extras = {name: None if tensor is None else _rows(tensor) for name, tensor in extras.items()}
    aligned = all(map(_describable, (x_rows, weight, out_rows)))
    tile = choose_tile(
        len(x_rows),
        columns,
        x.shape[-1],
        x.dtype,
        *architecture(x.device),
        aligned,
        gate is not None,
    )
    launch_linear(
        x_rows,
        weight,
        activation=activation,
        out=out_rows,
        workspace=workspace,
        tile=tile,
        **extras,
    )
    return out


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) -> (rows, n) with contiguous rows, a view where the layout allows; vectors stay
    vectors."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _out_dtype(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    return out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)


@linear.register_fake
def _(
    x,
    weight,
    bias=None,
    activation="none",
    gate=None,
    residual=None,
    x_scale=None,
    weight_scale=None,
    out_dtype=None,
    workspace=None,
):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=_out_dtype(x, out_dtype))


def compile_cases() -> Iterator[CompileCase]:
    """Every shipped tile, for each of its types and epilogues."""
    epilogues = {"bias": (False, False), "gelu": (True, False), "gated": (False, True)}
    small = TILES["small"]
    variants = {f"small_split{splits}": replace(small, splits=splits) for splits in SPLITS} | {
        "small_pdl": replace(small, pdl=True)
    }
    for (name, tile), kind in itertools.product(
        {**TILES, **variants}.items(), ("bf16", "fp16", "fp32", "fp8e4nv")
    ):
        if (kind == "fp32") != (name == "float32") or (kind == "fp8e4nv") != name.startswith("fp8"):
            continue
        out = "bf16" if kind == "fp8e4nv" else kind
        for epilogue, (gelu, gated) in epilogues.items():
            # float16 compiles like bfloat16, and variants like each other: there the fullest
            # epilogue stands for all.
            if (kind == "fp16" or name in variants) and (
                epilogue != "gated" or (kind == "fp16" and name in variants)
            ):
                continue
            parts: dict[str, object] = {
                "GELU": gelu,
                "BIAS": True,
                "GATED": gated,
                "SCALED": kind == "fp8e4nv",
                "PDL": tile.pdl,
            }
            blocks = {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
            }
            constexprs = (
                blocks
                | parts
                | ({} if tile.descriptors else {"SPLITS": tile.splits, "EVEN_K": True})
            )
            kernel = descriptor_kernel if tile.descriptors else pointer_kernel
            types = {
                "x_desc": f"tensordesc<{kind}[{tile.block_m}, {tile.block_k}]>",
                "weight_desc": f"tensordesc<{kind}[{tile.block_n}, {tile.block_k}]>",
                "out_desc": f"tensordesc<{out}[{tile.block_m}, {tile.block_n // 2}]>",
                "x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "x_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "partial_ptr": "*fp32",
                "counter_ptr": "*i32",
            }  # fmt: skip
            signature = {
                argument: (
                    "constexpr"
                    if argument in constexprs
                    else types.get(argument, f"*{out}" if argument.endswith("_ptr") else "i32")
                )
                for argument in kernel.arg_names
            }
            free = ("rows", "tokens")  # numbers of samples and tokens may be odd
            divisible = tuple(
                index
                for index, (argument, kind_) in enumerate(signature.items())
                if kind_.startswith("*") or (kind_ == "i32" and argument not in free)
            )
            arches: tuple[int, ...] = (
                (90, 100) if tile.descriptors or tile.pdl or kind == "fp8e4nv" else (80, 90, 100)
            )
            if name in ("hopper", "fp8_hopper") and epilogue == "gated":
                arches = (90,)  # as in choose_tile
            yield CompileCase(
                f"linear/{name}/{kind}/{epilogue}", kernel, signature, constexprs, divisible, tile.num_warps, tile.num_stages,
                {"launch_pdl": tile.pdl}, arches,
            )  # fmt: skip
