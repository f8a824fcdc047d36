"""The tensors of a checkpoint by name, whoever wrote it: torch.save, safetensors or flax.

Files are hostile until read: nothing in them is executed.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odelt_fast.files import one_line, problem_of

from .folder import read_header
from .pickle_records import as_array, as_mapping, read_records
from .torch_files import TorchFile

# Where trainers keep weights: moving averages, or the weights that are trained; in order of trust.
_TREES = {
    "ema": ("ema", "ema_params", "params_ema", "ema_state_dict", "model_ema"),
    "raw": ("model", "state_dict", "params", "model_state_dict"),
}
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_NESTING, _TENSORS = 12, 65_536


def read_tensors(path: Path, weights: str) -> tuple[dict[str, np.ndarray], str, int | None]:
    """The tensors of a file, by name; which weights they are: "ema", "raw", or "unnamed" where the
    file holds nothing else; the number of classes that the trainer's options in it tell, if any.

    Names of nested dicts are joined by dots, `module.` and `_orig_mod.` in front are dropped. They
    are float16, float32 or float64, views of the file where possible; bfloat16 is widened.

    Args:
        weights: "ema" or "raw", of a file that holds more than one.

    Raises:
        ValueError, OSError: it is damaged, hostile, or not of such a format.
    """
    if not path.is_file():
        raise ValueError("no such file" if not path.exists() else "not a file")
    if problem := problem_of(path, ""):
        raise ValueError(problem)
    if path.suffix == ".safetensors":
        return _unwrapped(_safetensors(path)), "unnamed", None
    with path.open("rb") as file:
        # The mapping lives as long as views of it do: closing it is left to them.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = bytes(data[:2])
    if start == b"PK":
        archive = TorchFile(data)
        root, array = archive.root, archive.array
    elif start.startswith(b"\x80") and len(start) > 1 and 2 <= start[1] <= 5:
        root, array = read_records(data), as_array
    else:
        root, array = _msgpack(data), _plain_array
    tree, kind = _chosen(root, weights)
    classes = (as_mapping((as_mapping(root) or {}).get("args")) or {}).get("num_classes")
    told = classes if type(classes) is int else None
    return _unwrapped(_flattened(tree, array, 4 * len(data))), kind, told


def _chosen(root: Any, weights: str) -> tuple[Any, str]:
    """The tree of the wanted weights in a trainer's checkpoint; a dict of tensors as it is."""
    values = as_mapping(root)
    if values is None:
        raise ValueError("holds no dict of tensors")
    if "train_state" in values:
        values = as_mapping(values["train_state"]) or {}
    there = {
        kind: next((name for name in names if as_mapping(values.get(name)) is not None), None)
        for kind, names in _TREES.items()
    }
    if not any(there.values()):
        return values, "unnamed"
    name = there[weights]
    if name is None:
        other = "raw" if weights == "ema" else "ema"
        listed = one_line(", ".join(sorted(map(repr, values))[:8]))
        raise ValueError(
            f"no {weights} weights in the file, only {listed}: ask for weights {other}"
        )
    tree = values[name]
    inner = as_mapping(tree) or {}
    return (inner["params"] if list(inner) == ["params"] else tree), weights


def _flattened(tree: Any, array: Any, limit: int) -> dict[str, np.ndarray]:
    """Name -> array; limit: bytes of float32 that they may have together, shared parts counted each
    time."""
    tensors: dict[str, np.ndarray] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    seen = 0
    while pending:
        parts, record = pending.pop()
        seen += 1
        name, mapping = ".".join(parts), as_mapping(record)
        if mapping is not None:
            if len(parts) == _NESTING:
                raise ValueError(f"{one_line(name)}: dicts are nested deeper than {_NESTING}")
            pending += [((*parts, key), value) for key, value in mapping.items()]
        else:
            try:
                tensors[name] = array(record)
            except ValueError as error:
                raise ValueError(f"{one_line(name)} {error}") from None
            limit -= 4 * tensors[name].size
        if limit < 0 or seen + len(pending) > _TENSORS:
            raise ValueError("more tensors than the file can hold")
    return tensors


def _unwrapped(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what DistributedDataParallel and torch.compile put before the names."""
    plain: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        short = re.sub(rf"^({'|'.join(map(re.escape, _WRAPPERS))})+", "", name)
        if short in plain:
            raise ValueError(f"{one_line(short)} is there twice")
        plain[short] = tensor
    return plain


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    tensors: dict[str, np.ndarray] = {}
    entries, _ = read_header(path)
    with safe_open(path, "pt") as file:
        for name, (dtype, _) in entries.items():
            if dtype not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(f"{one_line(name)} is stored as {dtype}, not in floating point")
            tensor = file.get_tensor(name)
            tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return tensors


def _msgpack(data: memoryview) -> Any:
    """What flax.serialization writes: nested dicts of arrays, which are extension type 1."""
    try:
        import msgpack
    except ImportError:
        raise ValueError(
            "neither torch.save's format nor a pickle; files of flax need the package msgpack:"
            " pip install msgpack"
        ) from None
    try:
        return msgpack.unpackb(data, ext_hook=_extension, strict_map_key=True, raw=False)
    except (msgpack.UnpackException, ValueError, RecursionError) as error:
        raise ValueError(
            f"neither torch.save's format, a pickle, nor flax's msgpack ({one_line(error)})"
        ) from None


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code not in (1, 3):  # arrays and NumPy's scalars
        raise ValueError(f"extension type {code}, which no array has")
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    return _Stored(tuple(shape), dtype, content)


class _Stored:
    """An array in flax's msgpack: shape, NumPy's name of the dtype, bytes."""

    def __init__(self, shape: tuple[Any, ...], dtype: Any, content: Any) -> None:
        self.shape, self.dtype, self.content = shape, dtype, content


def _plain_array(record: Any) -> np.ndarray:
    if not isinstance(record, _Stored) or not isinstance(record.content, bytes):
        raise ValueError("is not an array")
    names = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}
    if record.dtype not in names:
        raise ValueError("is not of float16, bfloat16, float32 or float64")
    if not all(type(length) is int and length >= 0 for length in record.shape):
        raise ValueError("has a shape that cannot be")
    flat = np.frombuffer(record.content, names[record.dtype])
    if record.dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(record.shape)
