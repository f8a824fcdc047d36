"""`odelt-fast stats`: statistics files of real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from odelt_fast.files import check_target, write_whole

from .options import Device, Text, Whole, check_counts, check_trust, plural


@dataclass(frozen=True)
class Command:
    """Write mean and covariance of the features of real images (.npz with mu and sigma), for
    odelt-fast evaluate --stats and others."""

    data: str = "digits"
    """Real images, as for training: digits, a folder, a Parquet file, a data set's id."""
    out: Path = Path("stats.npz")
    split: str = "train"
    """Part of --data."""
    image_column: Text = None
    """Column of images where --data is a table; looked for by type and name by default."""
    label_column: Text = None
    """Column of labels, as --image-column."""
    image_size: Whole = None
    """Side that images are brought to before the feature network sees them: that of the model's.
    Their own by default."""
    features: str = "inception"
    """Feature network: inception, a file, or the bundled digits, mnist, cifar10, whose distances
    are no FID."""
    inception_weights: Text = None
    """Weights of the Inception network (.pth of pytorch-fid or torch-fidelity, .safetensors);
    looked for in torch's cache by default."""
    trust_features: bool = False
    """Let --features be a TorchScript file: a program that may read and write files."""
    protocol: Literal["reference", "adm"] = "reference"
    """reference: float images, resized, then clipped. adm: 8 bits, resized as TensorFlow 1 does."""
    allow_few_samples: bool = False
    """Also with no more images than features, where distances depend on their number."""
    batch_size: int = 128
    """Images at a time."""
    device: Device = "auto"
    quiet: bool = False
    """No progress bar."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "batch_size")
    check_target("--out", options.out, (".npz",))
    check_trust(options)

    from tqdm import tqdm

    from odelt_fast.evaluation.comparison import statistics_of
    from odelt_fast.evaluation.features import load_features
    from odelt_fast.evaluation.metrics import write_statistics
    from odelt_fast.generation.processes import Processes
    from odelt_fast.images import open_source

    device = Processes.of_this_run(options.device).device
    network = load_features(
        options.features,
        device,
        inception_weights=options.inception_weights,
        trust=options.trust_features,
    )
    channels = 1 if network.channels == 1 else None
    source = open_source(
        options.data,
        image_size=options.image_size or network.image_size,
        channels=channels,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    network.check_images(source.channels, source.image_size)
    with tqdm(
        total=len(source), unit="image", leave=False, disable=True if options.quiet else None
    ) as bar:
        statistics = statistics_of(
            source,
            network,
            options.protocol,
            device,
            batch_size=options.batch_size,
            allow_few=options.allow_few_samples,
            advance=bar.update,
        )
    write_whole(options.out, lambda file: write_statistics(file, statistics))
    print(
        f"{options.out}: mean and covariance of {network.dimensions} {network.name} of"
        f" {plural(len(source), 'image')} of {options.data}"
    )
