"""What an evaluation measures: its settings, validated, without loading torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from odelt_fast.checks import one_of
from odelt_fast.operation import Schedule, check_interval, show_schedule

from .arguments import Floats, Interval, Ints, Names

METRICS = ("frechet", "kid", "precision_recall", "inception_score", "recognised")
COMPARING = frozenset(("frechet", "kid", "precision_recall"))  # with real images


@dataclass(frozen=True)
class Evaluation:
    """Measure quality, latency and memory of a model over depths, time steps and solvers."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    data: str | None = None
    """Real images to compare with, as for training: digits, a folder, a Parquet file, a data set's
    id."""
    split: str = "train"
    """Part of --data."""
    image_column: str | None = None
    """Column of images where --data is a table; looked for by type and name by default."""
    label_column: str | None = None
    """Column of labels, as --image-column."""
    stats: str | None = None
    """In place of --data: statistics file (.npz with mu and sigma) of the same feature network, as
    odelt-fast stats writes."""
    depths: Ints = ()
    """Active blocks l; all of the model's depths by default."""
    depth_schedules: tuple[Schedule, ...] = ()
    """Depths that change with time, beside the depths, for solvers with equal steps."""
    steps: Ints = (128, 4, 1)
    """Time steps T of the solvers that take equal ones."""
    solvers: Annotated[Names, tyro.conf.arg(aliases=["--solver"])] = ("euler",)
    """As in odelt-fast sample. Those that choose their own steps are run at every tolerance."""
    tolerances: Floats = (1e-2,)
    """rtol and atol of solvers that choose their own steps."""
    num_images: int = 50_000
    """Images of every seed."""
    seeds: int = 4
    """Runs with different noise, for mean and standard deviation: seeds --first-seed and those
    after it."""
    first_seed: int = 0
    batch_size: int = 128
    """Images at a time, and what latency is measured with. Part of the result: another size needs
    another --out."""
    labels: str = "drawn"
    """drawn: uniform, from the seed. balanced: every class in turn. data: those of --data in
    turn."""
    guidance_scale: float | None = None
    """w in v_null + w (v_label - v_null). Guided steps are two evaluations."""
    guidance_interval: Interval = None
    """Guidance at times between these two only, from 0 (noise) to 1 (data): 0.3 1."""
    paper_guidance: bool = False
    """Count as the paper does: guidance at T = 128 only, which is then 64 steps of two evaluations;
    other T without guidance."""
    metrics: Names = ("frechet",)
    """frechet (FID), kid, precision_recall, inception_score, recognised (share of images that the
    network takes for their class)."""
    features: str = "auto"
    """Feature network: digits, mnist, cifar10 (bundled, no FID), inception, or a file. auto:
    inception if its weights are given, else the bundled one that takes such images, else
    inception."""
    inception_weights: str | None = None
    """Weights of the Inception network (.pth of pytorch-fid or torch-fidelity, .safetensors);
    looked for in torch's cache by default."""
    trust_features: bool = False
    """Let --features be a TorchScript file: a program that may read and write files."""
    protocol: str = "reference"
    """reference: float images, resized, then clipped. adm: rounded to 8 bits, then resized as
    TensorFlow 1 does."""
    decoder: str | None = None
    """For models of latents: autoencoder, a folder or Hub id (stabilityai/sd-vae-ft-mse)."""
    any_decoder: bool = False
    """Also an autoencoder of other latents than the model was trained on."""
    backend: str = "auto"
    """Of the sampler: auto, eager, compile, fused."""
    allow_few_samples: bool = False
    """Also with no more images than features, where the distance depends on their number."""
    npz: bool = False
    """Keep the images, for other evaluators: OUT/samples/*.npz, arr_0 (N, H, W, C) uint8, arr_1
    labels."""

    def __post_init__(self) -> None:
        for name in ("num_images", "seeds", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for name in ("steps", "solvers", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"--{name} must have at least one value")
        if not 0 <= self.first_seed < 2**64 - self.seeds:
            raise ValueError(
                f"--first-seed must be from 0 to 2^64 - 1 - --seeds, not {self.first_seed}"
            )
        if self.paper_guidance and self.guidance_scale is None:
            raise ValueError("--paper-guidance needs --guidance-scale")
        if self.guidance_interval is not None:
            if self.paper_guidance or self.guidance_scale in (None, 0, 1):
                raise ValueError(
                    "--guidance-interval needs a --guidance-scale other than 0 and 1, and does not"
                    " go with --paper-guidance"
                )
            check_interval(self.guidance_interval)
        if not all(value > 0 and math.isfinite(value) for value in self.tolerances):
            raise ValueError(f"--tolerances must be above 0, not {self.tolerances}")
        for metric in self.metrics:
            one_of("--metrics", metric, METRICS)
        one_of("--labels", self.labels, ("drawn", "balanced", "data"))
        one_of("--protocol", self.protocol, ("reference", "adm"))
        if (self.data is None) == (self.stats is None) and COMPARING & set(self.metrics):
            raise ValueError("give either --data or --stats, to compare with")
        if self.data is None and {"kid", "precision_recall"} & set(self.metrics):
            raise ValueError("kid and precision_recall need real images: --data")
        if self.data is None and (self.image_column or self.label_column):
            raise ValueError("--image-column and --label-column are columns of --data: give it")
        if self.any_decoder and self.decoder is None:
            raise ValueError("--any-decoder is of --decoder, which is not given")
        if self.data is None and self.labels == "data":
            raise ValueError("--labels data needs --data")

    def to_dict(self) -> dict[str, Any]:
        """As files have it: schedules are texts such as 0:4,0.5:12."""
        return {**asdict(self), "depth_schedules": [*map(show_schedule, self.depth_schedules)]}
