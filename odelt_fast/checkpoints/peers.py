"""Other projects' transformers -> DiT: SiT, REPA, MeanFlow, DiT and diffusers' DiT.

They are this network up to folds of the weights, which are computed in float64:

- logits scaled by 1/sqrt(head_dim), not 1/head_dim: q's rows times sqrt(head_dim);
- a second half of output channels (the variance) that sampling by an ODE does not use: dropped;
- time that runs from data to noise: cos and sin of w (a - b t) are rotations of those of w b t, so
  the rows of the time embedder's first layer are rotated, and a velocity changes sign;
- no step sizes: a step embedder of zeros. MeanFlow's embedder of the duration d, at the durations
  2^-k of shortcut models, becomes ours of k: a shortcut model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from odelt_fast.checks import one_of
from odelt_fast.config import (
    HEADS,
    NUM_STEP_INDICES,
    SD_CHANNELS,
    SD_SCALE,
    DiTConfig,
    Latents,
    TrainedOn,
)
from odelt_fast.files import one_line
from odelt_fast.model import FREQUENCIES, DiT, position_table

from .diffusers_folder import DiffusersFolder
from .errors import check_finite, refusals
from .folder import WithoutStorage
from .peer_names import BLOCK, ENDS, Tensors, check_names, detected_source, family_names
from .tensor_files import read_tensors

DIFFUSERS_PERIOD = 10000.0 ** (FREQUENCIES / (FREQUENCIES - 1))
TIME_FREQUENCIES = ("diffusers", "original")
_BUMPS = 3  # the frequency, 0.81, at which k = 0..7 nearly fill a turn


@dataclass(frozen=True)
class Peer:
    """How a project's network differs from ours.

    `origin` a and `scale` b: its embedder is given a - b t of our time t (origin None: t itself).
    `decoder`: what its code decodes latents of four channels with.
    """

    title: str
    sampling: str
    origin: float | None = None
    scale: float = 1.0
    period: float = 10000.0
    negated: bool = False
    guided_channels: int | None = None
    decoder: str = "stabilityai/sd-vae-ft-ema"


PEERS = {
    "sit": Peer("SiT (github.com/willisma/SiT)", "flow", guided_channels=3),
    "repa": Peer("REPA (github.com/sihyun-yu/REPA)", "flow", origin=1.0, negated=True),
    "meanflow": Peer(
        "MeanFlow (github.com/zhuyu-cs/MeanFlow, Gsunshine/meanflow)",
        "shortcut",
        origin=1.0,
        negated=True,
        decoder="stabilityai/sd-vae-ft-mse",
    ),
    "dit": Peer(
        "DiT (github.com/facebookresearch/DiT)", "diffusion", 999.0, 1000.0, guided_channels=3
    ),
    "diffusers": Peer("DiT of diffusers", "diffusion", 999.0, 1000.0, DIFFUSERS_PERIOD),
}
SOURCES = ("auto", "reference", *PEERS)
FOLDERS = ("auto", "diffusers")


def convert_peer_checkpoint(
    path: str | Path,
    source: str = "auto",
    *,
    num_heads: int | None = None,
    image_size: int | None = None,
    weights: str = "ema",
    time_frequencies: str | None = None,
) -> tuple[DiT, dict[str, str]]:
    """The model of another project's checkpoint, a conventional DiT, and where it came from.

    Args:
        path: a file of torch.save (.pt, .pth, .bin), .safetensors or flax's; or a folder of
            diffusers (its pipeline's, or the transformer's).
        source: "sit", "repa", "meanflow", "dit", "diffusers", or "auto" where the tensors' names
            tell.
        num_heads: None: what the file or its width (384, 768, 1024, 1152) says.
        image_size: None: what the position table says, else 32.
        weights: "ema" or "raw", of a file that holds both.
        time_frequencies: of diffusers: "diffusers", 10000^(-k/127), what that library computes
            (the default), or "original", 10000^(-k/128), what its checkpoint was trained with.

    Returns:
        The model in float32 on the CPU, in eval mode; metadata for `save_model`.

    Raises:
        CheckpointError: in one line: a file that is damaged, hostile or of another network, values
            that are not finite, arguments that do not fit.
        ValueError: `source`, `weights` or `time_frequencies` that are none.
    """
    one_of("source", source, SOURCES)
    one_of("weights", weights, ("ema", "raw"))
    one_of("time_frequencies", time_frequencies, (None, *TIME_FREQUENCIES))
    path = Path(path)
    with refusals(path):
        folder = None
        if path.is_dir():
            folder, source = DiffusersFolder(path), one_of("source of a folder", source, FOLDERS)
            num_heads, image_size = folder.checked(num_heads, image_size)
        named, kind, classes = read_tensors(folder.weights if folder else path, weights)
        tensors = family_names(named)
        source = detected_source(named) if source == "auto" else source
        if time_frequencies and source != "diffusers":
            raise ValueError(f"time_frequencies are a choice for diffusers, not for {source}")
        peer = PEERS[source]
        check_names(tensors, source)
        original = time_frequencies == "original"
        _check_null_label(tensors, folder.classes if folder else classes)
        config = _config(tensors, peer, num_heads, image_size, original)
        model = _converted(tensors, peer, config)
        latents = Latents(SD_SCALE) if config.channels == SD_CHANNELS else None
        model.trained_on = folder.trained_on(latents) if folder else TrainedOn(latents=latents)
    origin = {
        "weights": kind,
        "converted_from": peer.title,
        "converted_file": one_line(path.name, 100),
    }
    usual = model.trained_on.latents == Latents(SD_SCALE)
    return model, origin | ({"decoder": peer.decoder} if usual else {})


def _values(tensors: Tensors, name: str, *shape: int | None) -> np.ndarray:
    """The tensor of that name, of that shape (None: any length)."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    own, values = tensors[name]
    if len(values.shape) != len(shape) or any(
        length is not None and length != has for length, has in zip(shape, values.shape)
    ):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{one_line(own)} has shape {values.shape}, wanted is ({wanted})")
    return values


def _check_null_label(tensors: Tensors, classes: int | None) -> None:
    """classes: that the file tells, if it does."""
    name = "y_embedder.embedding_table.weight"
    rows = _values(tensors, name, None, None).shape[0]
    if rows in (1, classes or 1000):
        raise ValueError(
            f"{one_line(tensors[name][0])} has {rows} rows, and none for the null label: it was"
            " trained without label dropout"
        )


def _config(
    tensors: Tensors, peer: Peer, num_heads: int | None, image_size: int | None, original: bool
) -> DiTConfig:
    size, channels, patch, other = _values(
        tensors, "x_embedder.proj.weight", None, None, None, None
    ).shape
    if patch != other:
        raise ValueError(f"patches of {patch} x {other}: they must be square")
    rows = _values(tensors, "y_embedder.embedding_table.weight", None, size).shape[0]
    hidden = _values(tensors, "blocks.0.mlp.fc1.weight", None, size).shape[0]
    ratio = hidden / max(size, 1)
    if int(size * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    if "pos_embed" in tensors:
        tokens = _values(tensors, "pos_embed", 1, None, size).shape[1]
        grid = math.isqrt(tokens)
        if grid * grid != tokens or image_size not in (None, grid * patch):
            raise ValueError(
                f"{one_line(tensors['pos_embed'][0])} has {tokens} positions, images of"
                f" {image_size or 'square sides'} in patches of {patch} need others"
            )
        image_size = grid * patch
    if num_heads is None and size not in HEADS:
        raise ValueError(f"width {size} is none of {', '.join(map(str, HEADS))}: give num_heads")
    numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    return DiTConfig(
        image_size=image_size or 32,
        channels=channels,
        patch_size=patch,
        hidden_size=size,
        depth=max(numbers) + 1,
        num_heads=HEADS[size] if num_heads is None else num_heads,
        mlp_ratio=ratio,
        num_classes=rows - 1,
        length_conditioned=False,
        step_conditioned=peer.sampling == "shortcut",
        sampling=peer.sampling,
        time_scale=peer.scale,
        time_period=10000.0 if original else peer.period,
        guided_channels=min(peer.guided_channels, channels) if peer.guided_channels else None,
    )


def _converted(tensors: Tensors, peer: Peer, config: DiTConfig) -> DiT:
    with WithoutStorage():
        model = DiT(config)
    _check_positions(tensors, config)
    size, values = config.hidden_size, config.patch_size**2
    names = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in ENDS.items()
             for leaf in ("weight", "bias")}  # fmt: skip
    names |= {
        f"blocks.{i}.{ours}.{leaf}": f"blocks.{i}.{theirs}.{leaf}"
        for i in range(config.depth)
        for ours, theirs in BLOCK.items()
        for leaf in ("weight", "bias")
    }
    names["label_embed.weight"] = "y_embedder.embedding_table.weight"
    doubled = len(_values(tensors, "final_layer.linear.weight", None, size))
    channels = doubled // values
    if doubled % values or channels not in (config.channels, 2 * config.channels):
        raise ValueError(
            f"{one_line(tensors['final_layer.linear.weight'][0])} has {doubled} rows, no"
            f" {config.channels} channels in patches of {config.patch_size}"
        )
    state: dict[str, Tensor] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for ours, theirs in names.items():
        shape = shapes[ours]
        if ours.startswith("final_layer.out."):
            shape = (values * channels, *shape[1:])
        wide = _values(tensors, theirs, *shape).astype(np.float64)
        if ours.startswith("final_layer.out."):
            wide = wide.reshape(values, channels, -1)[:, : config.channels]
            wide = (-wide if peer.negated else wide).reshape(shapes[ours])
        elif ".qkv." in ours:
            wide[:size] *= math.sqrt(size // config.num_heads)
        elif ours == "time_embed.linear_in.weight" and peer.origin is not None:
            wide = _turned(wide, peer.origin, config.time_period)
        state[ours] = _stored(tensors[theirs][0], wide)
    durations = peer.sampling == "shortcut"
    for ours, wide in _step_embedder(tensors, size, durations).items():
        state[f"step_embed.{ours}"] = _stored(f"the embedder made for step_embed.{ours}", wide)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _stored(name: str, values: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # what overflows is refused by name
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    check_finite(one_line(name), tensor)
    return tensor


def _check_positions(tensors: Tensors, config: DiTConfig) -> None:
    if "pos_embed" not in tensors:
        return
    own, table = tensors["pos_embed"]
    ours = position_table(*config.grid, config.hidden_size).numpy()
    rounding = 1e-4 if table.dtype.itemsize >= 4 else 1e-3
    if not np.abs(table[0].astype(np.float64) - ours).max() <= max(
        rounding, 4e-3 * _is_bf16(table)
    ):
        raise ValueError(
            f"{one_line(own)} is not the table of sines and cosines in two dimensions that this"
            " network adds"
        )


def _is_bf16(values: np.ndarray) -> bool:
    """Whether float32 values have no more digits than bfloat16."""
    wide = np.ascontiguousarray(values, np.float32)
    return not (wide.view(np.uint32) & 0xFFFF).any()


def _frequencies(period: float) -> np.ndarray:
    """The time features' frequencies as the model computes them, in float32."""
    k = torch.arange(FREQUENCIES, dtype=torch.float32)
    return torch.exp(-math.log(period) * (k / FREQUENCIES)).double().numpy()


def _turned(weight: np.ndarray, origin: float, period: float) -> np.ndarray:
    """Rows (D, 256) on [cos, sin] of w (a - u) -> rows on [cos, sin] of w u: a rotation of each
    pair."""
    angles = origin * _frequencies(period)
    cosines, sines = weight[:, :FREQUENCIES], weight[:, FREQUENCIES:]
    return np.concatenate(
        [
            cosines * np.cos(angles) + sines * np.sin(angles),
            cosines * np.sin(angles) - sines * np.cos(angles),
        ],
        axis=1,
    )


def _step_embedder(tensors: Tensors, size: int, durations: bool) -> dict[str, np.ndarray]:
    """The step embedder's parameters: zeros, or one whose value at k = 0..7 is that of MeanFlow's
    embedder of durations at 2^-k."""
    made = {
        "linear_in.weight": np.zeros((size, 2 * FREQUENCIES)),
        "linear_in.bias": np.zeros(size),
        "linear_out.weight": np.zeros((size, size)),
        "linear_out.bias": np.zeros(size),
    }
    if not durations:
        return made
    if size < NUM_STEP_INDICES:
        raise ValueError(f"width {size} is too small for {NUM_STEP_INDICES} step sizes")
    theirs = {
        name: _values(tensors, f"r_embedder.mlp.{name}", *shape).astype(np.float64)
        for name, shape in {
            "0.weight": (size, 2 * FREQUENCIES), "0.bias": (size,),
            "2.weight": (size, size), "2.bias": (size,),
        }.items()
    }  # fmt: skip

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-np.clip(x, -700, 700)))

    def hidden(scalars: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        angles = scalars.astype(np.float32)[:, None] * _frequencies(10000.0).astype(np.float32)
        wide = angles.astype(np.float64)
        return silu(np.concatenate([np.cos(wide), np.sin(wide)], axis=1) @ weight.T + bias)

    indices = np.arange(NUM_STEP_INDICES)
    first = hidden(2.0**-indices, theirs["0.weight"], theirs["0.bias"])
    wanted = first @ theirs["2.weight"].T + theirs["2.bias"]  # (8, D)
    # Eight hidden values, SiLU of 5 (cos w (k - j) - 0.7): their table over k is well conditioned,
    # so that what rounding does to them, in bfloat16 too, is not amplified.
    weight, bias = made["linear_in.weight"], made["linear_in.bias"]
    angles = _frequencies(10000.0)[_BUMPS] * indices
    weight[indices, _BUMPS] = 5 * np.cos(angles)
    weight[indices, FREQUENCIES + _BUMPS] = 5 * np.sin(angles)
    bias[indices] = -3.5
    stored = weight.astype(np.float32).astype(np.float64)
    mean = wanted.mean(axis=0)  # as the bias: what the hidden values carry stays small
    table = hidden(indices, stored, bias)[:, indices]
    made["linear_out.weight"][:, indices] = np.linalg.solve(table, wanted - mean).T
    made["linear_out.bias"] = mean
    return made
