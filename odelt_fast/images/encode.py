"""Images to shards of VAE posterior moments. A killed run continues at its last shard."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odelt_fast.checks import whole
from odelt_fast.config import Latents
from odelt_fast.files import locked, one_line, problem_in
from odelt_fast.storage.places import is_url

from .lance_latents import LanceLatentWriter
from .latents import SCALE
from .shards import LatentWriter
from .sources import Batch, ImageSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Encoder = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


def encode_images(
    source: ImageSource,
    encoder: Encoder,
    folder: str | Path,
    *,
    batch_size: int = 32,
    encoder_name: str = "",
    shard_length: int = 2048,
    progress: bool = True,
) -> str | Path:
    """Encodes every image of a source, and its mirror image if the source may be flipped.

    Run again after a kill, it continues at the last complete shard; on a finished folder it does
    nothing.

    Args:
        encoder: images (B, C, H, W) float32 in [-1, 1], on the CPU -> mean and standard deviation
            (B, c, s, s) of the posterior.
        folder: where the shards are written, or a Lance table by its ending .lance, a URL too.
        encoder_name: of an encoder without the attribute `latents`. Both are kept in the manifest;
            another encoder does not continue a folder.

    Returns:
        The folder.

    Raises:
        ValueError: a folder with other latents, an encoder that gives something else, files that
            cannot be written.
    """
    from tqdm import tqdm

    whole("batch_size", batch_size)
    table, count = str(folder).endswith(".lance"), len(source)
    # One image tells the shape, before the folder is touched.
    _, _, channels, size, _ = _encode(source.read_many([0])[0], encoder, copies=1).shape[1:]
    facts = {
        "image_size": source.image_size,
        "count": count,
        "labels_sha256": hashlib.sha256(source.labels.tobytes()).hexdigest(),
    }
    copies = 2 if source.flippable else 1
    bar = tqdm(total=count, desc="encoding", unit="image", disable=not progress, dynamic_ncols=True)
    lock = Path(f"{folder}.lock") if table else Path(folder) / ".lock"
    alone = contextlib.nullcontext() if is_url(str(folder)) else locked(lock)
    with bar, alone, ThreadPoolExecutor(1) as reader:
        try:
            writer = (LanceLatentWriter if table else LatentWriter)(
                folder,
                channels,
                size,
                source.class_names,
                copies=copies,
                latents=getattr(encoder, "latents", Latents(SCALE, encoder=encoder_name)),
                shard_length=shard_length,
                facts=facts,
            )
            bar.update(writer.completed)
            starts = range(writer.completed, count, batch_size)
            reading: Future[Batch] | None = None
            for start in (*starts, None):  # a batch is read while the one before is encoded
                ready, reading = reading, None
                if start is not None:
                    rows = np.arange(start, min(start + batch_size, count))
                    reading = reader.submit(source.read_many, rows)
                if ready is not None:
                    images, labels = ready.result()
                    writer.append(_encode(images, encoder, copies), labels)
                    bar.update(len(labels))
            writer.finish()
        except OSError as error:
            raise ValueError(
                f"the latents cannot be written to {folder}: {one_line(error)}; run again to"
                " continue"
            ) from None
    return folder


def _encode(images: np.ndarray, encoder: Encoder, copies: int) -> np.ndarray:
    """Moments (B, copies, 2, c, s, s) float32 of images (B, C, H, W)."""
    import torch

    with torch.inference_mode():
        batch = torch.from_numpy(images)
        moments = []
        for view in (batch, batch.flip(-1))[:copies]:
            mean, std = encoder(view)
            count, _, height, width = mean.shape if mean.dim() == 4 else (0, 0, 0, 1)
            if mean.shape != std.shape or count != len(view) or height != width:
                raise ValueError(
                    f"the encoder must give mean and standard deviation ({len(view)}, c, s, s), not"
                    f" {tuple(mean.shape)} and {tuple(std.shape)}"
                )
            moments.append(torch.stack([mean, std], dim=1).float())
        return torch.stack(moments, dim=1).cpu().numpy()


class VaeEncoder:
    """The encoder of a diffusers AutoencoderKL.

    Images (B, 3, H, W) in [-1, 1] -> mean, standard deviation (B, c, H/8, W/8) float32. `latents`
    says what becomes of them.
    """

    def __init__(self, vae: Any, latents: Latents) -> None:
        self.vae, self.latents = vae, latents

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] != 3:
            raise ValueError(
                f"the VAE {self.latents.encoder} encodes 3 channels, the images have"
                f" {images.shape[1]}: open them with 3 channels"
            )
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()


def vae_encoder(
    name: str = "stabilityai/sd-vae-ft-mse",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> VaeEncoder:
    """Loads the encoder of an AutoencoderKL from a Hub id or a folder, safetensors only.

    Args:
        dtype: None: float32.

    Returns:
        An encoder.

    Raises:
        ValueError: in one line, where diffusers is missing or cannot load it.
    """
    try:
        import diffusers
        import torch
    except ImportError:
        raise ValueError(
            "encoding with a VAE needs diffusers: pip install odelt-fast[diffusers]"
        ) from None
    try:
        autoencoder: Any = diffusers.AutoencoderKL
        vae = autoencoder.from_pretrained(str(name), use_safetensors=True)
        latents = latents_of(vae, str(name))
    except Exception as error:  # its errors come from many packages
        files = (
            Path(name) / each for each in ("config.json", "diffusion_pytorch_model.safetensors")
        )
        problem = problem_in(files, error)
        raise ValueError(f"the VAE {str(name)!r} cannot be loaded: {problem}") from None
    vae.decoder = None
    vae = vae.eval().requires_grad_(False).to(device, dtype or torch.float32)
    return VaeEncoder(vae, latents)


def latents_of(vae: Any, name: str) -> Latents:
    """What the latents of a diffusers AutoencoderKL are, by its configuration and weights.

    The hash is over the encoder's weights rounded to float16: the decoders of a family differ
    (those of Stable Diffusion's VAE), and copies in half precision are the same encoder.
    """
    import torch

    config, digest = vae.config, hashlib.sha256()
    for module in filter(None, (vae.encoder, getattr(vae, "quant_conv", None))):
        for key, tensor in sorted(module.state_dict().items()):
            half = tensor.detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{key}{tuple(half.shape)}".encode() + half.numpy().tobytes())
    scale, shift = float(config.scaling_factor), float(getattr(config, "shift_factor", 0) or 0)
    return Latents(scale, shift, name, digest.hexdigest())
