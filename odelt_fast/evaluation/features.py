"""Feature networks: images -> the vectors whose distributions are compared.

`inception-v3` gives the FID of papers and needs weights that cannot be shipped. digits-features,
mnist-features and cifar10-features are small classifiers that come with the package
(`small_features`): distances in their features rank models of those data sets, carry their name
everywhere, and are no FID.

Two protocols turn images, float32 with data in [-1, 1], into a network's input. "reference": float
images, bilinear to 299 x 299 without antialias, then clipped to [-1, 1], never rounded. "adm": 8
bits, then TensorFlow 1's bilinear resize, as the evaluator of ADM does with `.npz` files. Small
networks take images at their own size, clipped, and rounded to 8 bits under "adm".
"""

from __future__ import annotations

import hashlib
import importlib.resources
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from odelt_fast.checkpoints.errors import check_finite, refusals
from odelt_fast.checks import Size, check_size, show_size
from odelt_fast.files import one_line

from .small_features import SmallNetwork, is_small, read_configuration, weights_of

PROTOCOLS = ("reference", "adm")
BUNDLED = ("digits", "mnist", "cifar10")
INCEPTION_FILES = (
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.pth",
)  # torch-fidelity's, pytorch-fid's
_SIZE_LIMIT = 1 << 30  # bytes of a weights file


@dataclass(frozen=True)
class FeatureNetwork:
    """A network with what is known of it.

    function: prepared images -> features (B, dimensions) float32, logits (B, K) or None. name: in
    every table. distance: what the Frechet distance of its features is called. image_size,
    channels: of the images that it takes (None: it resizes; grey images are repeated to RGB where 3
    are wanted). fingerprint: hash of its weights, which ties statistics to it.
    """

    name: str
    dimensions: int
    image_size: int | None
    channels: int
    fingerprint: str
    function: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @property
    def distance(self) -> str:
        return "FID" if self.name == "inception-v3" else f"{self.name} Frechet distance"

    def record(self) -> dict[str, str | int]:
        """What results say of it."""
        return {"name": self.name, "dimensions": self.dimensions, "sha256": self.fingerprint}

    def check_images(self, channels: int, image_size: Size) -> None:
        """ValueError unless it can take such images."""
        if channels not in (1, 3) or (channels == 3 and self.channels == 1):
            raise ValueError(
                f"{self.name} takes images of {self.channels} channels, not {channels}: latents"
                " need --decoder"
            )
        if self.image_size not in (None, image_size):
            raise ValueError(
                f"{self.name} takes images of {self.image_size}x{self.image_size}, not"
                f" {show_size(image_size)}"
            )

    @torch.inference_mode()
    def __call__(self, images: Tensor, protocol: str = "reference") -> tuple[Tensor, Tensor | None]:
        """Features (B, D), and logits (B, K) or None, float32, of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: for images of other sizes.
        """
        self.check_images(images.shape[1], check_size("image_size", images.shape[2:], 2**16))
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        images, resized = images.float(), self.image_size is None
        if protocol == "adm":
            images = resize_8_bit(images) if resized else quantized(images) / 127.5 - 1
        else:
            images = resize_and_clip(images) if resized else images.clamp(-1, 1)
        features, logits = self.function(images)
        return features.float(), None if logits is None else logits.float()


def resize_and_clip(images: Tensor, size: int = 299) -> Tensor:
    """The reference's protocol: (B, C, H, W) -> (B, C, size, size), bilinear at pixel centres.

    Without antialias, then clipped to [-1, 1].
    """
    return F.interpolate(images, (size, size), mode="bilinear").clamp(-1, 1)


def quantized(images: Tensor) -> Tensor:
    """Whole numbers 0 to 255 in float32 of (B, C, H, W): `pictures.to_uint8` on the device."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def resize_8_bit(images: Tensor, size: int = 299) -> Tensor:
    """ADM's protocol: (B, C, H, W) -> (B, C, size, size), 8 bits, then (x - 128) / 128.

    TensorFlow 1's bilinear: pixel i of the output is at i * H / size of the input.
    """
    pixels = quantized(images)
    for dim in (2, 3):
        length = pixels.shape[dim]
        at = torch.arange(size, device=pixels.device, dtype=torch.float32) * (length / size)
        low = at.floor().long().clamp(max=length - 1)
        weight = (at - low).reshape((size, 1) if dim == 2 else (1, size))
        high = (low + 1).clamp(max=length - 1)
        below, above = pixels.index_select(dim, low), pixels.index_select(dim, high)
        pixels = below + (above - below) * weight
    return (pixels - 128) / 128


def load_features(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    inception_weights: str | Path | None = None,
    trust: bool = False,
) -> FeatureNetwork:
    """A feature network: digits, mnist, cifar10 (bundled), inception, or a file.

    inception: weights from `inception_weights`, else where torch-fidelity and pytorch-fid keep
    theirs (their one state dict, .pth read by torch's restricted unpickler, or .safetensors). A
    file: .safetensors of a small network (`save_features`) or of Inception's weights. With
    trust=True also TorchScript (.pt, images (B, 3, H, W) in [-1, 1] -> features (B, D)): it is a
    program, which may read and write files, so it is refused otherwise. Pickled modules are never
    read.

    Raises ValueError (CheckpointError) in one line: missing weights and where they are looked for,
    damaged or foreign files.
    """
    if inception_weights is not None and name != "inception":
        raise ValueError(f"--inception-weights are of --features inception, not of {name}")
    path = Path(name)
    if name in BUNDLED:
        path = _bundled_path(str(name))
    elif name == "inception":
        path = find_inception_weights(inception_weights)
    elif not path.is_file():
        raise ValueError(
            f"no feature network {one_line(repr(str(name)))}: give {', '.join(BUNDLED)}, inception"
            " or a file"
        )
    if path.suffix in (".safetensors", ".pth") or name == "inception":
        return _weighted(path, device)
    if not trust:
        raise ValueError(
            f"{path} is not .safetensors: a TorchScript file is a program that may read and write"
            " files; if it is yours, --trust-features"
        )
    return _torchscript(path, device)


def bundled_for(channels: int, image_size: Size) -> str | None:
    """The bundled network that takes such images, if there is one."""
    for name in BUNDLED:
        if _bundled_path(name).is_file():
            config = read_configuration(_bundled_path(name))
            if (config.channels, config.image_size) == (channels, image_size):
                return name
    return None


def _bundled_path(name: str) -> Path:
    package = Path(str(importlib.resources.files("odelt_fast")))
    return package / "models" / "features" / f"{name}.safetensors"


def find_inception_weights(given: str | Path | None = None) -> Path:
    """The file of Inception's weights: the one given, else one in torch.hub's cache.

    Raises:
        ValueError: saying where they were looked for.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"--inception-weights {given}: there is no such file")
        return Path(given)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for path in (folder / name for name in INCEPTION_FILES):
        if path.is_file():
            return path
    raise ValueError(
        f"no Inception weights: give --inception-weights FILE ({INCEPTION_FILES[1]} of pytorch-fid,"
        f" the same as torch-fidelity's {INCEPTION_FILES[0]}), or put it into {folder}"
    )


def _weighted(path: Path, device: str | torch.device) -> FeatureNetwork:
    """A small network or Inception, with the weights of a file."""
    from .inception import DIMENSIONS, InceptionV3

    config = read_configuration(path) if path.suffix == ".safetensors" and is_small(path) else None
    with refusals(path):
        with torch.device("meta"):
            network = (InceptionV3() if config is None else SmallNetwork(config)).eval()
        state = _read(path, network)
        network.load_state_dict(state, strict=False, assign=True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # only training counts, and the files leave it out
    loaded = fingerprint(state), network.requires_grad_(False).to(device)
    if config is None:
        return FeatureNetwork("inception-v3", DIMENSIONS, None, 3, *loaded)
    sizes = config.widths[-1], config.image_size, config.channels
    return FeatureNetwork(config.name, *sizes, *loaded)


def _torchscript(path: Path, device: str | torch.device) -> FeatureNetwork:
    with refusals(path):
        module = torch.jit.load(str(path), map_location=device).eval()
        out = module(torch.zeros(2, 3, 299, 299, device=device))
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise ValueError("a TorchScript feature network must turn (B, 3, 299, 299) into (B, D)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name, sizes = f"torchscript {path.stem}", (out.shape[1], None, 3)
    return FeatureNetwork(name, *sizes, digest, lambda x: (module(x), None))


def _read(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a network wants, float32, finite.

    Raises:
        ValueError: for missing ones and other shapes, found before they are read.
    """
    if path.stat().st_size > _SIZE_LIMIT:
        raise ValueError(f"is larger than {_SIZE_LIMIT >> 20} MiB")
    wanted = {name: tuple(tensor.shape) for name, tensor in weights_of(network).items()}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(wanted, shapes)
            tensors = {name: file.get_tensor(name) for name in wanted}
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"is not a file of weights: {error}") from None
        named = isinstance(tensors, dict)
        if not named or not all(isinstance(tensors.get(name), Tensor) for name in wanted):
            raise ValueError("is not the state dict of the Inception network that FID uses")
        _check_shapes(wanted, {name: tuple(tensors[name].shape) for name in wanted})
    state = {name: tensors[name].to(torch.float32, copy=True).contiguous() for name in wanted}
    for name, tensor in state.items():
        check_finite(name, tensor)
    return state


def _check_shapes(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, shape in wanted.items():
        there = found.get(name, "missing")
        if there != shape:
            raise ValueError(f"is no such feature network: {name} must be {shape}, not {there}")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
