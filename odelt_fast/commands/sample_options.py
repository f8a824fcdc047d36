"""The options of `odelt-fast sample`, which its own module and those of its modes read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from odelt_fast.checks import check_seed
from odelt_fast.evaluation.arguments import Interval, metavar

from .options import Device, Dtype, File, Labels, Number, Text, Whole, refuse_unused


@dataclass(frozen=True)
class Sampling:
    """How to draw images from a seed."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    depth: Whole = None
    """Active blocks l, one of the model's depths; all by default."""
    steps: Whole = None
    """Time steps T; 4 by default. Shortcut models make good images with few (1, 4); plain flow
    models want 128."""
    labels: Labels = ()
    """Classes, by number or name (3 cat, or 3,cat), repeated in turn if fewer than images; the
    number of classes is the null label. Drawn from the seed by default."""
    seed: int = 0
    """From 0 to 2^64 - 1."""
    guidance_scale: Number = None
    """w in v_null + w (v_label - v_null): 0 ignores the labels, 1 (and the default) uses only them,
    other values cost twice as much."""
    guidance_interval: Interval = None
    """Guidance at times between these two only, from 0 (noise) to 1 (data), and by the labels alone
    at others: 0.3 1."""
    solver: Text = None
    """With --steps equal steps: euler (the default), midpoint, heun2, ralston, kutta3, rk4, rk38,
    or fixed:NAME. Choosing their own steps: dopri5, tsit5, bosh3, dop853, adaptive_heun.
    torchdiffeq:NAME is torchdiffeq's."""
    rtol: float = 1e-2
    """Relative error that an adaptive solver allows itself in a step."""
    atol: float = 1e-2
    """Absolute error, added to it."""
    max_steps: int = 4096
    """Steps of an adaptive solver, at most."""
    error_norm: Literal["per_sample", "batch"] = "per_sample"
    """Whether an adaptive solver chooses steps for each image, or the same for a whole batch."""
    depth_schedule: Annotated[str, metavar("T:L,...")] = ""
    """Depths that change with time, in place of --depth: 0:4,0.5:12 runs 4 blocks up to t = 0.5 and
    12 from there on. Adaptive solvers need --error-norm batch for it."""
    time_shift: float = 1.0
    """Above 1: fixed steps lie closer near the noise, for high resolution. 1: equal steps."""
    decoder: Text = None
    """Autoencoder that makes pictures of a model's latents: folder or Hub id, such as
    stabilityai/sd-vae-ft-mse, or madebyollin/taesd for fast previews."""
    any_decoder: bool = False
    """Also an autoencoder of other latents than the model was trained on."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU and on CPUs that compute in it, else float32."""
    batch_size: Whole = None
    """Images at a time; by the size of the model's input by default. Changes no picture."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class Command(Sampling):
    """Draw images with a model: --depth and --steps set the cost."""

    max_latency: Text = None
    """Budget for a batch, such as 20ms (us, ms, s), in place of --depth, --steps and --solver: the
    best within it by the measurements of odelt-fast profile and evaluate. For a warm call;
    starting, decoding and writing files come on top."""
    max_memory: Text = None
    """Budget for weights, inputs and activations, such as 2GB (KB, MB, GB, or MiB, GiB)."""
    profile: File = None
    """Of a budget: file of odelt-fast profile; by default that of this machine and model."""
    quality: Text = None
    """Of a budget: folder of odelt-fast evaluate, or its results.json, in place of the quality.json
    in the model's folder."""
    metric: Text = None
    """Of a budget: what counts as quality, as the table names it; its first metric by default."""
    num_images: int = 16
    """Images to draw. The noise of image i depends on the seed and i alone."""
    trajectory: Annotated[tuple[float, ...], metavar("TIME...")] = ()
    """Show the states at these times, rising from 0 (noise) to 1 (data), one row an image; --npz
    holds them as `trajectory`."""
    invert: Annotated[File, tyro.conf.arg(metavar="IMAGES")] = None
    """Carry images (a file, or what training's --data takes) to noise and back instead of drawing:
    originals, noise, reconstructions."""
    image_column: Text = None
    """Column of images where --invert names a table; looked for by type and name by default."""
    label_column: Text = None
    """Column of labels, as --image-column."""
    interpolate: Annotated[tuple[int, int] | None, metavar("SEED_A SEED_B")] = None
    """Draw a row of images on the way from the noise of one seed to that of another."""
    init_image: Annotated[File, tyro.conf.arg(metavar="IMAGE")] = None
    """Keep a part of this image, of the model's size, and draw the rest to fit: where --mask is
    white. For flows and solvers with equal steps."""
    mask: Annotated[File, tyro.conf.arg(metavar="IMAGE")] = None
    """Of --init-image: a picture of its size, white (from half grey on) where it is drawn anew,
    black where it is kept."""
    frames: int = 8
    """Images of --interpolate, both ends included."""
    out: File = None
    """Picture of all images in a grid (.png, .jpg, ...). Default: samples.png, or none if --npz is
    given."""
    npz: File = None
    """Arrays for evaluators: arr_0 images (N, H, W, C) uint8 (latents: float32, as they are), arr_1
    labels."""
    json: bool = False
    """Print one JSON object instead of text."""


def check_modes(options: Command) -> None:
    """ValueError for options that exclude each other or are out of range."""
    modes = ("trajectory", "invert", "interpolate", "init_image")
    given = [name.replace("_", "-") for name in modes if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} draw different pictures: leave one out")
    if (options.init_image is None) != (options.mask is None):
        raise ValueError("--init-image and --mask go together: what to keep, and where to draw")
    if options.invert is None and (options.image_column or options.label_column):
        raise ValueError("--image-column and --label-column are columns of --invert: give it")
    if options.interpolate is None:
        refuse_unused(options, "without --interpolate", "frames")
    else:
        own = "on --interpolate, which has seeds and --frames of its own"
        refuse_unused(options, own, "num_images", "seed")
    if options.invert is not None:
        refuse_unused(options, "on --invert, which draws no noise", "seed")
    times = list(options.trajectory)
    if any(not 0 <= time <= 1 for time in times) or times != sorted(times):
        raise ValueError(
            "--trajectory must be rising times from 0 (noise) to 1 (data), not"
            f" {' '.join(map(str, times))}"
        )
    for seed in options.interpolate or ():
        check_seed(seed, "--interpolate: a seed")
    if options.frames < 2:
        raise ValueError(
            f"--frames must be at least 2, the two seeds' own images, not {options.frames}"
        )
