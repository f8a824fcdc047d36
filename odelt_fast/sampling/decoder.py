"""Latents to images with the decoder half of a diffusers autoencoder (extra `diffusers`), in
batches of its own."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odelt_fast.checks import dtype_of, whole
from odelt_fast.config import Latents
from odelt_fast.files import problem_in
from odelt_fast.images.encode import latents_of
from odelt_fast.model import DiT

_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Decoder:
    """Latents (B, c, h, w) -> images (B, 3, f*h, f*w) float32, data in [-1, 1], not clipped.

    Computes D(z / s + m) with the scale s and shift m of the autoencoder's configuration: s =
    0.18215, m = 0 for Stable Diffusion's AutoencoderKL. An AutoencoderTiny (previews) takes the
    scaled latents of the autoencoder that it imitates: its s is 1.

    Args:
        autoencoder: an AutoencoderKL or AutoencoderTiny; runs in its own dtype, on its own device.
            float16 overflows in some of them; bfloat16 does not.
        batch_size: latents decoded at a time, halved for good when memory runs out.
        latents: what it decodes; None: of an AutoencoderKL what it says itself, of an
            AutoencoderTiny unknown.
        any_latents: decode those of a model that was trained on others, too.

    Raises:
        ValueError: for latents of another shape, for an autoencoder whose configuration does not
            say what is needed, and for images that are not finite.
    """

    def __init__(
        self,
        autoencoder: Any,
        name: str = "",
        batch_size: int = 8,
        latents: Latents | None = None,
        any_latents: bool = False,
    ) -> None:
        self.batch_size = whole("batch_size", batch_size)
        config = dict(getattr(autoencoder, "config", None) or {})
        widths = config.get("decoder_block_out_channels") or config.get("block_out_channels")
        needed = ("latent_channels", "scaling_factor", "out_channels")
        if not widths or not all(name in config for name in needed):
            raise ValueError(
                "decoder must be an AutoencoderKL or AutoencoderTiny of diffusers, not"
                f" {type(autoencoder).__name__}"
            )
        self.autoencoder, self.name = autoencoder, name or type(autoencoder).__name__
        self.scale = float(config["scaling_factor"])
        self.shift = float(config.get("shift_factor") or 0)
        self.latent_channels = int(config["latent_channels"])
        self.channels = int(config["out_channels"])
        # Pixels of an image's side for one latent's.
        self.factor = int(config.get("upsampling_scaling_factor") or 2) ** (len(widths) - 1)
        if not math.isfinite(self.scale) or not self.scale > 0:
            raise ValueError(
                f"the decoder {self.name} has scaling_factor {self.scale}, which must be above 0"
            )
        self.any_latents = any_latents
        # An AutoencoderTiny imitates: its encoder is another, its scale 1, for the same latents.
        tells = latents is None and not any_latents and "decoder_block_out_channels" not in config
        if tells and getattr(autoencoder, "encoder", None) is not None:
            latents = latents_of(autoencoder, self.name)
        self.latents = latents

    def check_latents(self, trained: Latents | None) -> None:
        """ValueError unless it decodes the latents that a model was trained on, as far as both are
        known."""
        if self.any_latents or trained is None or self.latents is None:
            return
        if not trained.fits(self.latents):
            raise ValueError(
                f"the decoder is for latents of {self.latents}, the model was trained on those of"
                f" {trained}: take that one, or decode all the same with --any-decoder (in Python"
                " any_latents=True)"
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """Decodes on the autoencoder's device; the result stays there."""
        return self.checked(self.decode(latents))

    def checked(self, images: Tensor) -> Tensor:
        """The images; ValueError if they are not finite."""
        if not torch.isfinite(images).all():
            dtype = str(self.autoencoder.dtype).removeprefix("torch.")
            half = dtype == "float16"
            advice = ": it overflows there, load it in bfloat16 or float32" if half else ""
            raise ValueError(
                f"the autoencoder {self.name} made values that are not finite in {dtype}{advice}"
            )
        return images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """What a call does, without waiting for the device to see whether it is finite."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            wanted = f"(B, {self.latent_channels}, h, w)"
            raise ValueError(
                f"the decoder {self.name} takes latents of shape {wanted}, not"
                f" {tuple(latents.shape)}"
            )
        count, _, height, width = latents.shape
        shape = (count, self.channels, height * self.factor, width * self.factor)
        images = torch.empty(shape, dtype=torch.float32, device=self.autoencoder.device)
        done = 0
        while done < count:
            try:
                part = latents[done : done + self.batch_size].to(images.device, torch.float32)
                part = (part / self.scale + self.shift).to(self.autoencoder.dtype)
                images[done : done + len(part)] = self.autoencoder.decode(part).sample
                done += len(part)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            else:
                continue
            # Outside the handler, whose traceback keeps the tensors of the failed attempt alive.
            self.batch_size = max(1, min(self.batch_size, count) // 2)
            torch.cuda.empty_cache()
        return images


class Overlapped:
    """A decoder of batches that works while the next one is sampled: on a GPU, on a stream of its
    own.

    Called with latents it starts to decode them and returns them as they are, so it stands where a
    Sampler wants a decoder; `images()` waits, and gives the images of all calls in one tensor. On
    other devices it decodes at once.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self._images = decoder, list[Tensor]()
        device = decoder.autoencoder.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, latents: Tensor) -> Tensor:
        if self._stream is None:
            self._images.append(self.decoder.decode(latents))
            return latents
        # A copy of its own: whoever made the latents may write the next batch into the same memory
        # before these have been read.
        own = latents.clone()
        self._stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(self._stream):
            own.record_stream(self._stream)
            self._images.append(self.decoder.decode(own))
        return latents

    def check_latents(self, trained: Latents | None) -> None:
        """As its decoder's."""
        self.decoder.check_latents(trained)

    def images(self) -> Tensor:
        """Images (N, 3, H, W) float32, ready on the current stream. ValueError if nothing was
        decoded, or if they are not finite."""
        if not self._images:
            raise ValueError("there are no latents to decode")
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for images in self._images:
                images.record_stream(current)
        return self.decoder.checked(torch.cat(self._images))


def load_decoder(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    batch_size: int = 8,
    *,
    any_latents: bool = False,
) -> Decoder:
    """The decoder of an AutoencoderKL or AutoencoderTiny, from a folder or a Hub id; of a pipeline,
    its `vae` is taken. safetensors only.

    "stabilityai/sd-vae-ft-mse" is the one that DiT's latents are made for, "madebyollin/taesd" its
    small imitation, for previews. dtype None: float32. any_latents: also for models that were
    trained on the latents of another. Raises ValueError, in one line, where diffusers is missing or
    cannot load it.
    """
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "decoding latents needs diffusers: pip install 'odelt-fast[diffusers]'"
        ) from None
    kinds = ("AutoencoderKL", "AutoencoderTiny")
    computed = torch.float32 if dtype is None else dtype_of(dtype)
    read: list[Path] = []
    try:
        folder = _find_folder(str(name_or_path))
        read += [folder / name for name in _FILES]
        kind = json.loads(read[0].read_text(encoding="utf-8")).get("_class_name")
        if kind not in kinds:
            raise ValueError(f"it is a {kind}, not one of {', '.join(kinds)}")
        local = {"use_safetensors": True, "local_files_only": True}
        autoencoder = getattr(diffusers, kind).from_pretrained(folder, **local)
        latents = None if kind == "AutoencoderTiny" else latents_of(autoencoder, str(name_or_path))
        autoencoder.encoder = autoencoder.quant_conv = None
        autoencoder = autoencoder.eval().requires_grad_(False).to(device, computed)
        return Decoder(autoencoder, str(name_or_path), batch_size, latents, any_latents)
    except Exception as error:  # its errors come from many packages
        found = problem_in(read, error)
        raise ValueError(f"the decoder {str(name_or_path)!r} cannot be loaded: {found}") from None


def decoder_of(model: DiT, name: str, any_latents: bool = False) -> Decoder:
    """The decoder of a folder or a Hub id, on the model's device; ValueError if it does not fit the
    model."""
    # float16 overflows in the usual autoencoders.
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    decoder = load_decoder(name, model.device, dtype, any_latents=any_latents)
    if decoder.latent_channels != model.config.channels:
        raise ValueError(
            f"the decoder {name} takes latents of {decoder.latent_channels} channels, the model"
            f" makes {model.config.channels}"
        )
    decoder.check_latents(model.trained_on.latents)
    return decoder


def _find_folder(name: str) -> Path:
    """The local folder that holds an autoencoder: `name` (or that of its file), or its subfolder
    `vae`; downloaded if it is a Hub id."""
    if os.path.isfile(name) and os.path.basename(name) in _FILES:
        name = os.path.dirname(name) or "."
    if os.path.isdir(name):
        folder = Path(name)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name, re.ASCII):
        from huggingface_hub import snapshot_download

        wanted = [*_FILES, *(f"vae/{file}" for file in _FILES)]
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    else:
        raise ValueError("it is no folder here and no Hub id (user/repo)")
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
