"""`odelt-fast encode`: images to VAE latents, for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from odelt_fast.checks import whole
from odelt_fast.config import describe_classes
from odelt_fast.storage.places import is_url

from .options import Device, Dtype, Text, Whole, choose_dtype, device_of


@dataclass(frozen=True)
class Command:
    """Encode images, and their mirror images, into shards of VAE latents
    that `odelt-fast train --data` reads. A killed run continues."""

    data: str
    """Images: a folder of class folders, a Parquet file or a folder of them, or the id of a Hugging
    Face data set."""
    out: str
    """Folder of the shards and their manifest; or a Lance table, whose name or URL ends in .lance
    (extra lance)."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """AutoencoderKL of diffusers: a Hub id or a folder."""
    image_size: Whole = 256
    """Side in pixels to which the centred square of each image is resized."""
    split: str = "train"
    """Part of the data, where they have parts."""
    image_column: Text = None
    """Column of images of a table; looked for by type and name by default."""
    label_column: Text = None
    """Column of labels, as --image-column: fine_label or coarse_label of CIFAR-100."""
    batch_size: int = 32
    """Images that the VAE encodes at once."""
    shard_length: int = 2048
    """Images in a shard; a killed run continues at the first shard that is not complete."""
    device: Device = "auto"
    """auto: a CUDA GPU if there is one, else the CPU."""
    dtype: Dtype = "float32"
    """Arithmetic of the VAE; auto: bfloat16 where the device computes in it. Latents are stored in
    float16."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    whole("--batch-size", options.batch_size)
    path = Path(options.out)
    if is_url(options.out) and not options.out.endswith(".lance"):
        raise ValueError(
            f"--out {options.out}: behind a URL latents are a Lance table: let it end in .lance"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"--out {options.out} is not a folder: give a new folder, or one of an earlier run"
        )

    from odelt_fast.images import open_source
    from odelt_fast.images.encode import encode_images, vae_encoder

    device = device_of(options.device)
    source = open_source(
        options.data,
        image_size=options.image_size,
        channels=3,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    print(f"{source.name}: {describe_classes(source.class_names)}")
    encoder = vae_encoder(options.vae, device, choose_dtype(options.dtype, device.type))
    encode_images(
        source,
        encoder,
        options.out,
        batch_size=options.batch_size,
        shard_length=options.shard_length,
    )
    print(
        f"{options.out}: {len(source)} images of {source.num_classes} classes: odelt-fast train"
        f" --data {options.out}"
    )
