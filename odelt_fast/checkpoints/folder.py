"""Model folders: config.json + model.safetensors, written atomically, read with suspicion.

A folder may come from anywhere: loading it ends in a model or in a CheckpointError of one line.
Nothing in it is executed, and memory stays bounded by the size of its files: names, shapes and
dtypes in the safetensors headers are compared with what config.json implies before anything is
allocated; the model is built without storage first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from odelt_fast.checks import dtype_of
from odelt_fast.config import DiTConfig, TrainedOn
from odelt_fast.files import flush, locked, one_line, parse_object, read_bytes
from odelt_fast.model import DiT

from .errors import CheckpointError, check_finite, refusals
from .lookup import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, find_folder

_PARTIAL = ".partial"  # the folder, in the model's folder, of files that are being written
_JSON_LIMIT = 1 << 20  # bytes of config.json and of the shard index
_HEADER_LIMIT = 16 << 20  # bytes; 1024 blocks need 2 MiB
# Bytes of position table that any model may have; above it, 4 times the size of its weights.
_TABLE_FLOOR = 16 << 20
_STORED_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Name -> (dtype, shape); the hash of the configuration, if recorded.
Header = tuple[dict[str, tuple[str, tuple[int, ...]]], str | None]


def save_model(
    model: DiT,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes config.json and model.safetensors into a folder.

    A kill at any moment leaves a folder that loads either the old model or the new one, never a
    mixture. Both files are written to a folder `.partial` inside and flushed; the rename of the
    weights, which carry the hash of their configuration, is the commit; the configuration follows.
    `load_model` takes the configuration in `.partial` if the weights are its own, so that the
    moment between is safe too. One writer at a time: others wait for the folder's lock.

    Args:
        folder: made if missing.
        dtype: storage dtype of the weights (None: the model's own).
        metadata: strings kept in the safetensors header (weights=ema, step=...).

    Returns:
        The folder.

    Raises:
        ValueError: a truncated model, a bad dtype or metadata.
        CheckpointError: weights that are not finite, files that cannot be written; the folder's
            model stays as it was.
    """
    stored = None if dtype is None else dtype_of(dtype)
    if model.max_depth < model.config.depth or len(model.blocks) < model.config.depth:
        raise ValueError(
            f"a truncated model cannot be saved: {len(model.blocks)} of its {model.config.depth}"
            " blocks are loaded"
        )
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise ValueError(f"metadata must map strings to strings, not {one_line(metadata)}")
    tensors = {
        name: tensor.detach().to("cpu", stored).contiguous()
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    values = model.config.to_dict() | model.trained_on.to_dict()
    text = json.dumps(values, indent=2).encode() + b"\n"
    if len(text) > _JSON_LIMIT:
        count = len(model.trained_on.class_names)
        warnings.warn(
            f"the names of {count} classes take more than 1 MiB: not stored", stacklevel=2
        )
        del values["id2label"]
        text = json.dumps(values, indent=2).encode() + b"\n"
    header = {**(metadata or {}), "format": "pt", "config_sha256": hashlib.sha256(text).hexdigest()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _finish_interrupted_save(folder)
            partial = folder / _PARTIAL
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                (partial / CONFIG_NAME).write_bytes(text)
                save_file(tensors, partial / WEIGHTS_NAME, header)
                # The writer of safetensors leaves files that only their owner can read.
                (partial / WEIGHTS_NAME).chmod((partial / CONFIG_NAME).stat().st_mode)
                for path in (partial / CONFIG_NAME, partial / WEIGHTS_NAME, partial, folder):
                    flush(path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.replace(partial / WEIGHTS_NAME, folder / WEIGHTS_NAME)
            flush(folder)
            os.replace(partial / CONFIG_NAME, folder / CONFIG_NAME)
            flush(folder)
            partial.rmdir()
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the model to {one_line(repr(str(folder)))}: {one_line(error)}"
        ) from None
    return folder


def _finish_interrupted_save(folder: Path) -> None:
    """Puts the weights' configuration in its place, where a kill came between the two renames."""
    pending = folder / _PARTIAL / CONFIG_NAME
    with contextlib.suppress(CheckpointError):
        if pending.is_file() and read_header(folder / WEIGHTS_NAME)[1] == _read_config(pending)[1]:
            os.replace(pending, folder / CONFIG_NAME)


def load_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    depth: int | None = None,
    *,
    download: Mapping[str, Any] | None = None,
) -> DiT:
    """Loads a model, in eval mode.

    Args:
        name: a local folder, a bundled name, or a Hub id ("user/repo"); the first that fits. A
            folder holds config.json and either model.safetensors or, for shards,
            model.safetensors.index.json; of a saved pipeline, its subfolder `transformer` is taken.
        dtype: of the weights, or its name; float32 if None whatever the file stores (what saves
            space on disk is not what to compute in); "auto": what the file stores.
        depth: run at most at this length: only the blocks that it uses are read from disk, longer
            lengths raise ValueError afterwards.
        download: how to get a Hub id: revision, token, cache_dir, force_download,
            local_files_only, as in huggingface_hub.

    Raises:
        CheckpointError: in one line: a name that is nothing of these; files that are missing,
            damaged, hostile or not finite.
        ValueError: a depth, dtype or device that cannot be.
    """
    wanted = None if dtype in (None, "auto") else dtype_of(dtype)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {one_line(error)}") from None
    folder = find_folder(name, download)
    shards = _shards(folder)
    headers = {path: read_header(path) for path in shards}
    config, trained_on = _folder_config(folder, {digest for _, digest in headers.values()})
    config.check_depth(depth)
    allowed = _TABLE_FLOOR + 4 * sum(path.stat().st_size for path in shards)
    if math.prod(config.grid) * config.hidden_size * 4 > allowed:
        raise CheckpointError(
            f"{one_line(repr(str(folder)))}: image_size {config.image_size} is out of all"
            " proportion to the weights"
        )
    with WithoutStorage():
        model = DiT(config)
    model.trained_on = trained_on
    _check_shapes(model, headers)
    if depth is not None:
        model.truncate(depth)
    if dtype == "auto":
        wanted = _widest(headers)
    shapes = model.state_dict()
    state: dict[str, Tensor] = {}
    for path, (entries, _) in headers.items():
        with refusals(path), safe_open(path, "pt") as file:
            for key in sorted(shapes.keys() & entries.keys()):
                # A copy: views of the mapped file would change, or crash, with the file.
                tensor = file.get_tensor(key).to(wanted or torch.float32, copy=True)
                if tensor.shape != shapes[key].shape:
                    raise ValueError(f"{key} changed while it was read")
                check_finite(key, tensor)
                state[key] = tensor
    model.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, assign=True)
    model.positions = model.positions.to(device)
    return model.eval()


class WithoutStorage(TorchFunctionMode):
    """Parameters made inside have no storage and no values; other tensors (positions) are real.

    Unlike `torch.device("meta")`, this never runs an operation on a tensor without storage: those
    cost a second of imports at first use.
    """

    _RANDOM = frozenset({"normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif getattr(func, "__name__", "") in self._RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_config(name: str | Path) -> DiTConfig:
    """The configuration of the model that `load_model` would load; it raises as that does."""
    folder = find_folder(name)
    return _folder_config(folder, {read_header(path)[1] for path in _shards(folder)})[0]


def stored_dtype(name: str | Path) -> torch.dtype:
    """What the files of a model store its weights in, at most; it raises as `load_model` does."""
    return _widest({path: read_header(path) for path in _shards(find_folder(name))})


def _widest(headers: Mapping[Path, Header]) -> torch.dtype:
    kinds = {kind for entries, _ in headers.values() for kind, _ in entries.values()}
    found = [_STORED_DTYPES[kind] for kind in kinds if kind in _STORED_DTYPES]
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def read_trained_on(name: str | Path) -> TrainedOn:
    """What is known of the data of the model that `load_model` would load; it raises as that
    does."""
    folder = find_folder(name)
    return _folder_config(folder, {read_header(path)[1] for path in _shards(folder)})[1]


def read_metadata(name: str | Path) -> dict[str, str]:
    """What `save_model` was given as metadata; it raises as `load_model` does."""
    path = _shards(find_folder(name))[0]
    with refusals(path), safe_open(path, "pt") as file:
        return {key: one_line(text, 300) for key, text in (file.metadata() or {}).items()}


def _member(folder: Path, name: str) -> Path:
    """The path of a regular file of the folder. Links leave it only within the Hub's own cache, and
    for files of the same kind, by their ending."""
    path = folder / name
    if not os.path.isfile(path):
        problem = f"a model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}"
        others = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
        found = sorted(file.name for ending in others for file in folder.glob(ending))
        if found:
            problem += (
                f"; odelt-fast convert makes one of a checkpoint such as {one_line(found[0])}"
            )
        if os.path.exists(path):
            problem = "it is not a regular file"
        raise CheckpointError(f"no {name!r} in {one_line(repr(str(folder)))}: {problem}")
    root, target = (Path(os.path.realpath(place)) for place in (folder, path))
    snapshot = root.parent if root.name == "transformer" else root
    cache = snapshot.parent.parent / "blobs" if snapshot.parent.name == "snapshots" else root
    same_kind = target.suffix == path.suffix
    if not (same_kind or target.is_relative_to(root) or target.is_relative_to(cache)):
        raise CheckpointError(
            f"{one_line(repr(str(path)))} is a link that leaves its folder, to a file whose name"
            f" does not end in {path.suffix}: copy the file here, or give it that ending"
        )
    return path


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file of at most 1 MiB, and the SHA-256 of the file."""
    with refusals(path):
        data = read_bytes(path, _JSON_LIMIT)
        return parse_object(data), hashlib.sha256(data).hexdigest()


def _read_config(path: Path) -> tuple[tuple[DiTConfig, TrainedOn], str]:
    """A configuration with what is known of the data, and the SHA-256 of its file."""
    values, digest = _read_json(path)
    with refusals(path):
        classes = values.get("num_classes", DiTConfig.num_classes)
        trained_on = TrainedOn.taken_from(values, classes)
        return (DiTConfig.from_dict(values), trained_on), digest


def _folder_config(folder: Path, digests: set[str | None]) -> tuple[DiTConfig, TrainedOn]:
    """What config.json says, or that of an interrupted save that the weights belong to.

    digests: of their configurations, which the weights carry.
    """
    if None not in digests and os.path.isfile(folder / _PARTIAL / CONFIG_NAME):
        with contextlib.suppress(CheckpointError):
            config, digest = _read_config(_member(folder, f"{_PARTIAL}/{CONFIG_NAME}"))
            if digests == {digest}:
                return config
    return _read_config(_member(folder, CONFIG_NAME))[0]


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those of its index, by plain names only."""
    if os.path.exists(folder / WEIGHTS_NAME) or not os.path.exists(folder / INDEX_NAME):
        return [_member(folder, WEIGHTS_NAME)]
    path = _member(folder, INDEX_NAME)
    weight_map = _read_json(path)[0].get("weight_map")
    with refusals(path):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map must map the tensors' names to file names")
        for name in weight_map.values():
            plain = r"\w[\w.-]{0,199}\.safetensors"
            if not isinstance(name, str) or not re.fullmatch(plain, name, re.ASCII):
                raise ValueError(
                    f"{one_line(repr(name))} is no name of a .safetensors file in the folder"
                )
    return [_member(folder, name) for name in sorted(set(weight_map.values()))]


def read_header(path: Path) -> Header:
    """The tensors in a safetensors file, and the hash of the configuration that it has."""
    with refusals(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"header of {length} bytes, more than the {_HEADER_LIMIT} allowed")
        with safe_open(path, "pt") as tensors:
            parts = ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118
            entries = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts}
            return entries, (tensors.metadata() or {}).get("config_sha256")


def _check_shapes(model: DiT, headers: Mapping[Path, Header]) -> None:
    """CheckpointError that names the first tensor that does not belong, or that is missing."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    seen: set[str] = set()
    for path, (entries, _) in headers.items():
        with refusals(path):
            for key, (dtype, shape) in sorted(entries.items()):
                if key not in expected:
                    raise ValueError(
                        f"tensor {one_line(repr(key))} is none of this model's: it has"
                        f" {model.config.depth} blocks"
                    )
                if key in seen:
                    raise ValueError(f"tensor {key} is in another shard too")
                if shape != expected[key]:
                    raise ValueError(
                        f"{key} has shape {one_line(shape)}, the configuration implies"
                        f" {expected[key]}"
                    )
                if dtype not in _STORED_DTYPES:
                    raise ValueError(
                        f"{key} is stored as {dtype}, not as one of {', '.join(_STORED_DTYPES)}"
                    )
            seen |= entries.keys()
            if path == list(headers)[-1] and seen != expected.keys():
                raise ValueError(f"tensor {min(expected.keys() - seen)} is missing")
