"""Images to shards of VAE posterior moments, in the layout that `latents` reads. A killed run
continues at its last shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from odelt_fast.files import PARTIAL, locked, one_line, write_atomically
from odelt_fast.images.latents import (
    FORMAT,
    MANIFEST_NAME,
    SCALE,
    SETTINGS_NAME,
    labels_name,
    map_array,
    moments_name,
    read_json,
)
from odelt_fast.images.sources import ImageSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Encoder = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


class LatentWriter:
    """Appends moments to shards of `shard_length` samples; `completed` samples are there already,
    from a run with the same settings.

    A shard appears under its name complete or not at all, its labels before it; manifest.json,
    which makes the folder readable, comes last. facts: what else must be equal for a run to
    continue (the encoder, the labels), kept in the manifest. One writer at a time.

    ValueError if the folder holds latents of other settings, or for moments that cannot be stored;
    OSError if a file cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        channels: int,
        size: int,
        class_names: Sequence[str],
        *,
        copies: int = 2,
        scale: float = SCALE,
        shard_length: int = 2048,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if shard_length < 1:
            raise ValueError(f"shard_length must be at least 1, not {shard_length}")
        self.folder, self.shard_length, self.class_names = (
            Path(folder),
            shard_length,
            tuple(class_names),
        )
        self._shape = (copies, 2, channels, size, size)
        own = {
            "format": FORMAT,
            "version": 1,
            "channels": channels,
            "size": size,
            "copies": copies,
            "scale": scale,
        }
        settings = own | {
            "class_names": list(class_names),
            "shard_length": shard_length,
            "facts": dict(facts or {}),
        }
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{PARTIAL}*"):  # by a kill
            left.unlink()
        self.finished = (self.folder / MANIFEST_NAME).is_file()
        started = self.folder / (MANIFEST_NAME if self.finished else SETTINGS_NAME)
        self._lengths: list[int] = []
        if started.is_file():
            self._continue(started)
        else:
            self._write(SETTINGS_NAME, json.dumps(self._settings))
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []

    def _continue(self, started: Path) -> None:
        found = read_json(started)
        for name, value in self._settings.items():
            if found.get(name) != value:
                text = (
                    f"its {name} is {one_line(json.dumps(found.get(name)))}, here it is"
                    f" {one_line(json.dumps(value))}"
                )
                raise ValueError(
                    f"{self.folder} holds other latents ({text}): choose another folder or"
                    " remove it"
                )
        if self.finished:
            self._lengths = [shard["length"] for shard in found["shards"]]
            return
        # Only whole shards are trusted: a shorter last one is written again.
        while (self.folder / moments_name(len(self._lengths))).is_file():
            shard, length = len(self._lengths), self.shard_length
            try:
                map_array(self.folder / moments_name(shard), np.float16, (length, *self._shape))
                map_array(self.folder / labels_name(shard), np.int64, (length,))
            except ValueError:
                return
            self._lengths.append(length)

    @property
    def completed(self) -> int:
        return sum(self._lengths)

    @property
    def _waiting(self) -> int:
        return sum(len(labels) for _, labels in self._pending)

    def append(self, moments: np.ndarray, labels: np.ndarray) -> None:
        """Adds samples: moments (n, copies, 2, C, S, S), mean and standard deviation, stored as
        float16; labels (n,) integer."""
        if moments.shape != (len(labels), *self._shape):
            raise ValueError(
                f"moments of shape {moments.shape} for {len(labels)} labels; {('n', *self._shape)}"
                " is needed"
            )
        labels = np.asarray(labels)
        if (
            labels.dtype.kind not in "iu"
            or ((labels < 0) | (labels >= len(self.class_names))).any()
        ):
            raise ValueError(f"labels must be whole numbers from 0 to {len(self.class_names) - 1}")
        with np.errstate(over="ignore"):
            stored = moments.astype(np.float16)
        if not np.isfinite(stored).all():
            row = (
                self.completed
                + self._waiting
                + int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(1))[0])
            )
            raise ValueError(
                f"the encoder made values for image {row} that float16 cannot hold: run it in"
                " float32 or bfloat16"
            )
        self._pending.append((stored, labels.astype(np.int64)))
        while self._waiting >= self.shard_length:
            self._write_shard(self.shard_length)

    def finish(self) -> None:
        """Writes the last, shorter shard and then the manifest."""
        if self.finished:
            return
        if self._waiting:
            self._write_shard(self._waiting)
        if not self._lengths:
            raise ValueError("no latents were written")
        shards = [
            {"moments": moments_name(i), "labels": labels_name(i), "length": n}
            for i, n in enumerate(self._lengths)
        ]
        manifest = self._settings | {"count": self.completed, "shards": shards}
        self._write(MANIFEST_NAME, json.dumps(manifest, indent=1))
        (self.folder / SETTINGS_NAME).unlink(missing_ok=True)
        self.finished = True

    def _write_shard(self, length: int) -> None:
        shard = len(self._lengths)
        moments, labels = (np.concatenate(parts) for parts in zip(*self._pending))
        self._write(labels_name(shard), labels[:length])
        self._write(moments_name(shard), moments[:length])
        self._lengths.append(length)
        self._pending = [(moments[length:].copy(), labels[length:])] if len(labels) > length else []

    def _write(self, name: str, content: str | np.ndarray) -> None:
        def write(file: BinaryIO) -> None:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                np.save(file, content, allow_pickle=False)

        write_atomically(self.folder / name, write)


def encode_images(
    source: ImageSource,
    encoder: Encoder,
    folder: str | Path,
    *,
    batch_size: int = 32,
    encoder_name: str = "",
    scale: float = SCALE,
    shard_length: int = 2048,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Path:
    """Encodes every image of a source, and its mirror image if the source may be flipped, into
    `folder`; returns the folder.

    encoder: images (B, C, H, W) float32 in [-1, 1] on `device` -> mean and standard deviation (B,
    c, s, s) of the posterior. Run again after a kill, it continues at the last complete shard; on a
    finished folder it does nothing.

    ValueError for a folder with other latents, an encoder that gives something else, or files that
    cannot be written.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    folder, count = Path(folder), len(source)
    # One image tells the shape, before the folder is touched.
    _, _, channels, size, _ = _encode(source.read_many([0])[0], encoder, device, copies=1).shape[1:]
    facts = {
        "encoder": encoder_name,
        "image_size": source.image_size,
        "count": count,
        "labels_sha256": hashlib.sha256(source.labels.tobytes()).hexdigest(),
    }
    copies = 2 if source.flippable else 1
    bar = tqdm(total=count, desc="encoding", unit="image", disable=not progress, dynamic_ncols=True)
    with bar, locked(folder / ".lock"), ThreadPoolExecutor(1) as reader:
        try:
            writer = LatentWriter(
                folder,
                channels,
                size,
                source.class_names,
                copies=copies,
                scale=scale,
                shard_length=shard_length,
                facts=facts,
            )
            bar.update(writer.completed)
            batches = [
                np.arange(at, min(at + batch_size, count))
                for at in range(writer.completed, count, batch_size)
            ]
            upcoming = reader.submit(source.read_many, batches[0]) if batches else None
            for following in [*batches[1:], None]:
                if upcoming is None:
                    break
                images, labels = upcoming.result()
                upcoming = None if following is None else reader.submit(source.read_many, following)
                writer.append(_encode(images, encoder, device, copies), labels)
                bar.update(len(labels))
            writer.finish()
        except OSError as error:
            raise ValueError(
                f"the latents cannot be written to {folder}: {one_line(error)}; run again to"
                " continue"
            ) from None
    return folder


def _encode(
    images: np.ndarray, encoder: Encoder, device: str | torch.device, copies: int
) -> np.ndarray:
    """Moments (B, copies, 2, c, s, s) float32 of images (B, C, H, W)."""
    import torch

    with torch.inference_mode():
        batch = torch.from_numpy(images).to(device)
        moments = []
        for view in (batch, batch.flip(-1))[:copies]:
            mean, std = encoder(view)
            if (
                mean.shape != std.shape
                or mean.dim() != 4
                or len(mean) != len(view)
                or mean.shape[2] != mean.shape[3]
            ):
                shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
                raise ValueError(
                    f"the encoder must give mean and standard deviation ({len(view)}, c, s, s), not"
                    f" {shapes}"
                )
            moments.append(torch.stack([mean, std], dim=1).float())
        return torch.stack(moments, dim=1).cpu().numpy()


class VaeEncoder:
    """The encoder of a diffusers AutoencoderKL: images (B, 3, H, W) in [-1, 1] -> mean, standard
    deviation (B, c, H/8, W/8) float32."""

    def __init__(self, vae: Any, name: str) -> None:
        self.vae, self.name = vae, name
        self.scale = float(vae.config.scaling_factor)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] != 3:
            raise ValueError(
                f"the VAE {self.name} encodes 3 channels, the images have {images.shape[1]}: open"
                " them with 3 channels"
            )
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()


def vae_encoder(
    name: str = "stabilityai/sd-vae-ft-mse",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> VaeEncoder:
    """Loads the encoder of an AutoencoderKL from a Hub id or a folder, safetensors only; `scale` of
    the result is the scale of its latents.

    dtype None: float32. ValueError in one line where diffusers is missing or cannot load it.
    """
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "encoding with a VAE needs diffusers: pip install odelt-fast[diffusers]"
        ) from None
    try:
        autoencoder: Any = diffusers.AutoencoderKL
        vae = autoencoder.from_pretrained(str(name), torch_dtype=dtype, use_safetensors=True)
    except Exception as error:  # its errors come from many packages
        raise ValueError(f"the VAE {str(name)!r} cannot be loaded: {one_line(error)}") from None
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(
            f"the VAE {str(name)!r} shifts its latents (shift_factor), which is not supported"
        )
    vae.decoder = None
    return VaeEncoder(vae.eval().requires_grad_(False).to(device), str(name))
