"""Reference checkpoints (JAX, pickled) -> DiT.

The file is parsed, never unpickled: nothing that it names is imported or called.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import HEADS, DiTConfig
from odelt_fast.files import one_line
from odelt_fast.model import DiT

from .errors import CheckpointError, check_finite, refusals
from .folder import WithoutStorage
from .pickle_records import as_array, as_mapping, read_records

_UNUSED = "Embed_0/embedding"  # 256 x 1, written by the reference and read by nothing
_TREES = {"ema": "params_ema", "raw": "params"}
_NESTING = 8  # of the parameters' dicts; the reference has 4
_NODES = 65_536  # dicts and parameters; 1024 blocks have 22 each
_BLOCK = {
    "modulation": ["Dense_0"],
    "qkv": ["Dense_2", "Dense_1", "Dense_3"],
    "attention_out": ["Dense_4"],
    "mlp_in": ["MlpBlock_0/Dense_0"],
    "mlp_out": ["MlpBlock_0/Dense_1"],
}


def convert_reference_checkpoint(
    path: str | Path,
    num_heads: int | None = 12,
    depth_min: int = 4,
    depth_group: int = 4,
    image_size: int = 32,
    step_conditioned: bool = True,
    weights: str = "ema",
) -> DiT:
    """The model of a checkpoint that the reference implementation wrote (a pickle).

    Shapes in the file give channels, patch_size, hidden_size, depth, mlp_ratio, num_classes and
    whether there is a length table; what the file does not say is an argument. Arrays may be
    NumPy's or JAX's in float16, bfloat16, float32 or float64. Only the chosen weights are read; the
    optimizer's state stays on disk. Memory is bounded by a small multiple of the file's size plus
    64 MiB.

    Args:
        num_heads: None: what the width says (`config.HEADS`), else 12.
        image_size: of what the network sees (latents: 32 for 256 pixels).
        step_conditioned: False for models trained with ignore_dt.
        weights: "ema" (params_ema) or "raw" (params).

    Returns:
        The model in float32, on the CPU, in eval mode.

    Raises:
        CheckpointError: in one line: a file that is damaged, hostile or of another network, values
            that are not finite, arguments that do not fit the file.
        ValueError: `weights` that are neither.
    """
    if weights not in _TREES:
        raise ValueError(f"weights must be 'ema' or 'raw', not {one_line(repr(weights))}")
    path = Path(path)
    with refusals(path):
        if not path.is_file():
            raise ValueError("no such file" if not path.exists() else "not a file")
        with path.open("rb") as file:
            # The mapping lives as long as views of it do: closing it is left to them.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        parameters = _parameters(read_records(data), weights, 2 * len(data))
        config = config_from_parameters(
            parameters, num_heads, depth_min, depth_group, image_size, step_conditioned
        )
        state = rename_parameters(parameters, config)
        with WithoutStorage():
            model = DiT(config)
        model.load_state_dict(state, assign=True)
        return model.eval()


def _parameters(root: Any, weights: str, limit: int) -> dict[str, np.ndarray]:
    """Flax path -> array of the chosen tree, views where possible.

    limit: bytes of float32 that they may have together, shared parts counted each time.
    """
    values = as_mapping(root)
    if values is not None and "train_state" in values:
        values = as_mapping(values["train_state"])
    if values is None:
        raise ValueError("holds no dict of parameters")
    tree = _TREES[weights]
    if values.get(tree) is None:
        there = one_line(", ".join(sorted(map(repr, values))[:8]) or "nothing")
        others = [name for name, key in _TREES.items() if values.get(key) is not None]
        hint = f"; pass weights={others[0]!r}" if others else ""
        raise ValueError(f"no {tree!r} in the file, only {there}{hint}")
    parameters: dict[str, np.ndarray] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), values[tree])]
    seen = 0
    while pending:
        parts, record = pending.pop()
        seen += 1
        name = one_line("/".join(parts)) or tree
        mapping = as_mapping(record)
        if mapping is None:
            if name in parameters:
                raise ValueError(f"{name} is there twice")
            try:
                parameters[name] = as_array(record)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
            limit -= 4 * parameters[name].size
        elif len(parts) == _NESTING:
            raise ValueError(f"{name}: dicts are nested deeper than {_NESTING}")
        else:
            pending += [((*parts, key), value) for key, value in mapping.items()]
        if limit < 0 or seen + len(pending) > _NODES:
            raise ValueError("more parameters than the file can hold")
    return parameters


def config_from_parameters(
    parameters: Mapping[str, np.ndarray],
    num_heads: int | None,
    depth_min: int,
    depth_group: int,
    image_size: int,
    step_conditioned: bool,
) -> DiTConfig:
    """The configuration that the reference's parameters, by flax path, imply.

    Completed by the other arguments, which they do not tell.

    Raises:
        CheckpointError: they are of no such network.
    """
    kernel = _shape(parameters, "PatchEmbed_0/Conv_0/kernel", 4)
    mlp = _shape(parameters, "DiTBlock_0/MlpBlock_0/Dense_0/kernel", 2)
    classes = _shape(parameters, "LabelEmbedder_0/Embed_0/embedding", 2)[0] - 1
    if kernel[0] != kernel[1]:
        raise CheckpointError(
            f"PatchEmbed_0/Conv_0/kernel has shape {kernel}: patches must be square"
        )
    hidden = kernel[3]
    block = re.compile(r"DiTBlock_\d{1,4}/")
    depth = len({match[0] for match in map(block.match, parameters) if match})
    ratio = mlp[1] / max(hidden, 1)
    if int(hidden * ratio) < mlp[1]:
        ratio = math.nextafter(ratio, math.inf)
    length_conditioned = "BlockEmbedder_0/Embed_0/embedding" in parameters
    if length_conditioned:
        rows = _shape(parameters, "BlockEmbedder_0/Embed_0/embedding", 2)[0]
        if rows != depth + 1:
            raise CheckpointError(
                f"BlockEmbedder_0/Embed_0/embedding has {rows} rows, {depth} blocks need"
                f" {depth + 1}"
            )
    try:
        return DiTConfig(
            image_size=image_size,
            channels=kernel[2],
            patch_size=kernel[0],
            hidden_size=hidden,
            depth=depth,
            depth_min=depth_min,
            depth_group=depth_group,
            num_heads=HEADS.get(hidden, 12) if num_heads is None else num_heads,
            mlp_ratio=ratio,
            num_classes=classes,
            length_conditioned=length_conditioned,
            step_conditioned=step_conditioned,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(one_line(error)) from None


def _shape(parameters: Mapping[str, np.ndarray], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in parameters:
        raise CheckpointError(
            f"{name} is missing: these are not the parameters of the reference's DiT"
        )
    shape = parameters[name].shape
    if len(shape) != dimensions:
        raise CheckpointError(f"{name} has shape {shape}, not {dimensions} dimensions")
    return shape


def _linear(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    leaves = {"weight": "kernel", "bias": "bias"}
    return {
        f"{ours}.{kind}": tuple(f"{name}/{leaf}" for name in theirs)
        for kind, leaf in leaves.items()
    }


def parameter_names(config: DiTConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the reference's flax paths that make it.

    Several are stacked: Dense_2, 1, 3 are q, k, v.
    """
    names = {
        **_linear("patch_embed", "PatchEmbed_0/Conv_0"),
        **_linear("time_embed.linear_in", "TimestepEmbedder_0/Dense_0"),
        **_linear("time_embed.linear_out", "TimestepEmbedder_0/Dense_1"),
        **_linear("step_embed.linear_in", "TimestepEmbedder_1/Dense_0"),
        **_linear("step_embed.linear_out", "TimestepEmbedder_1/Dense_1"),
        "label_embed.weight": ("LabelEmbedder_0/Embed_0/embedding",),
        **_linear("final_layer.modulation", "FinalLayer_0/Dense_0"),
        **_linear("final_layer.out", "FinalLayer_0/Dense_1"),
    }
    if config.length_conditioned:
        names["length_embed.weight"] = ("BlockEmbedder_0/Embed_0/embedding",)
    for i in range(config.depth):
        for ours, theirs in _BLOCK.items():
            names |= _linear(f"blocks.{i}.{ours}", *(f"DiTBlock_{i}/{name}" for name in theirs))
    return names


def rename_parameters(parameters: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, Tensor]:
    """The reference's parameters, by flax path, as a float32 state dict of DiT(config), copied.

    Dense kernels (in, out) are transposed, the convolution's (p, p, in, out) becomes (out, in, p,
    p), q, k, v are stacked; others stay.

    Raises:
        CheckpointError: names the first key that is missing, unknown, of the wrong shape or not
            finite.
    """
    with WithoutStorage():  # the smallest image: no large position table
        model = DiT(dataclasses.replace(config, image_size=config.patch_size))
    shapes = {ours: tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    names = parameter_names(config)
    known = {theirs for sources in names.values() for theirs in sources}
    unknown = sorted(parameters.keys() - known - {_UNUSED})
    if unknown:
        raise CheckpointError(
            f"{one_line(unknown[0])} is no parameter of this network ({config.depth} blocks)"
        )
    for ours, sources in names.items():
        rows, *rest = shapes[ours]
        shape = _kernel_shape(sources[0], (rows // len(sources), *rest))
        for theirs in sources:
            if theirs not in parameters:
                raise CheckpointError(f"{theirs} is missing")
            if parameters[theirs].shape != shape:
                raise CheckpointError(
                    f"{theirs} has shape {parameters[theirs].shape}, the other parameters imply"
                    f" {shape}"
                )
    state: dict[str, Tensor] = {}
    for ours, sources in names.items():
        parts = [parameters[theirs] for theirs in sources]
        if sources[0].endswith("kernel"):
            parts = [part.transpose(3, 2, 0, 1) if part.ndim == 4 else part.T for part in parts]
        with np.errstate(over="ignore"):  # what overflows is refused by name
            tensor = torch.from_numpy(np.concatenate(parts, dtype=np.float32, casting="unsafe"))
        check_finite(" or ".join(sources), tensor)
        state[ours] = tensor
    return state


def _kernel_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the reference of a parameter that has `shape` here."""
    if not name.endswith("kernel"):
        return shape
    return (*shape[2:], shape[1], shape[0])
