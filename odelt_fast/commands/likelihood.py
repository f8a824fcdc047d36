"""`odelt-fast likelihood`: how probable a model finds images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from odelt_fast.checks import check_seed
from odelt_fast.evaluation.arguments import Interval, metavar
from odelt_fast.files import check_target, write_whole

from .operations import operation_of
from .options import (
    Device,
    Dtype,
    File,
    Number,
    Text,
    Whole,
    check_counts,
    check_guidance,
    load,
    plural,
    refuse_unused,
)


@dataclass(frozen=True)
class Command:
    """Measure log p of images under a model, in bits per dimension: the flow is followed from data
    to noise with its divergence."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    data: Path = Path("digits")
    """Images: a file, or what training's --data takes (digits, a folder, a Parquet file, a data
    set, latents)."""
    image_column: Text = None
    """Column of images where --data is a table; looked for by type and name by default."""
    label_column: Text = None
    """Column of labels, as --image-column."""
    num_images: int = 16
    """Images to measure, from the first on."""
    depth: Whole = None
    """Active blocks l, one of the model's depths; all by default."""
    depth_schedule: Annotated[str, metavar("T:L,...")] = ""
    """Depths that change with time, in place of --depth, as in `sample`."""
    null_label: bool = False
    """p(x) by the null label. Default: p(x | class) where the data's classes can be the model's."""
    guidance_scale: Number = None
    """Density of the guided flow, as in `sample`."""
    guidance_interval: Interval = None
    """As in `sample`."""
    solver: str = "dopri5"
    """As in `sample`."""
    steps: int = 128
    """Steps of a solver with equal steps."""
    rtol: float = 1e-4
    """Relative error that an adaptive solver allows itself in a step."""
    atol: float = 1e-4
    """Absolute error, added to it."""
    max_steps: int = 4096
    """Steps of an adaptive solver, at most."""
    error_norm: Literal["per_sample", "batch"] = "per_sample"
    """As in `sample`."""
    probes: int = 1
    """Random probes of Hutchinson's estimate of the divergence, each a backward pass; more give a
    smaller error."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """Kind of probe: numbers +-1, or normal ones."""
    exact: bool = False
    """Exact divergence, without probes: a backward pass for every number of an image, so for small
    images only."""
    seed: int = 0
    """Of probes and of the noise that dequantises pixels, from 0 to 2^64 - 1. That of image i
    depends on the seed and i alone."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "float32"
    """Of the network; states and sums are float64. Half precision costs accuracy here."""
    batch_size: Whole = None
    """Images at a time; by the size of the model's input by default."""
    npz: File = None
    """Arrays: log_prob (nats), error (over the probes), bits_per_dimension, labels, noise (N, H, W,
    C)."""
    json: bool = False
    """Print one JSON object instead of text."""
    quiet: bool = False
    """No progress bar."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "num_images", "steps", "max_steps", "probes", "batch_size")
    check_seed(options.seed, "--seed")
    operation = operation_of(options)
    if options.exact:
        refuse_unused(options, "on --exact, which has no probes", "probes", "probe")
    if options.null_label:
        refuse_unused(options, "with --null-label", "label_column")
    if options.npz is not None:
        check_target("--npz", options.npz, (".npz",))

    import numpy as np
    from tqdm import tqdm

    from odelt_fast.sampling.likelihood import dequantise, log_likelihood
    from odelt_fast.sampling.sampler import Sampler

    from .flows import channels_last, data_images

    model = load(options.model, options.device, options.dtype, operation.deepest)
    sampler = Sampler.of(model, operation, batch_size=options.batch_size)
    images, found, step = data_images(options.data, sampler, options.num_images, options)
    labels = None if options.null_label else found
    count = len(images)
    check_guidance(options.guidance_scale, labels is None)
    if options.exact and step is None:
        refuse_unused(options, "on --exact and data without levels: nothing is drawn", "seed")
    if step is not None:
        images = dequantise(images, step, options.seed)
    hidden = True if options.quiet or options.json else None
    steps = None if operation.adaptive else count * options.steps
    with tqdm(total=steps, unit="step", leave=False, disable=hidden) as bar:
        measured = log_likelihood(
            sampler,
            images,
            labels,
            probes=None if options.exact else options.probes,
            probe=options.probe,
            seed=options.seed,
            progress=bar.update,
        )
    bits = measured.bits_per_dimension(step).cpu().numpy()
    if options.npz is not None:
        arrays: dict[str, Any] = {
            "log_prob": measured.log_prob.cpu().numpy(),
            "error": measured.error.cpu().numpy(),
            "bits_per_dimension": bits,
            "labels": np.full(count, model.config.num_classes) if labels is None else labels,
            "noise": channels_last(measured.noise),
        }
        write_whole(options.npz, lambda file: np.savez(file, **arrays))
    about = sampler.explain()
    spread = float(bits.std(ddof=1) / count**0.5) if count > 1 else None
    log_prob, evaluations = float(measured.log_prob.mean()), sampler.stats["evaluations_per_image"]
    if options.json:
        values = {
            "model": options.model,
            "data": str(options.data),
            "num_images": count,
            "bits_per_dimension": float(bits.mean()),
            "standard_error": spread,
            "log_prob": log_prob,
            "levels_apart": step,
            **{name: about[name] for name in ("depth", "solver", "steps", "device", "dtype")},
            "exact": options.exact,
            "probes": options.probes,
            "evaluations_per_image": evaluations,
        }
        print(json.dumps(values))
        return
    margin = "" if spread is None else f" +- {spread:.3f} (standard error over images)"
    print(
        f"{bits.mean():.4f}{margin} bits per dimension: {plural(count, 'image')} of {options.data}"
        f" under {options.model}"
    )
    levels = "the density of numbers that are not quantised"
    if step is not None:
        levels = f"dequantised levels, {step:.4g} apart"
    print(
        f"log p {log_prob:.2f} nats an image; {levels};"
        f" {'p(x)' if labels is None else 'p(x | class)'}"
    )
    how = "exact divergence" if options.exact else plural(options.probes, f"{options.probe} probe")
    print(
        f"depth {about['depth']}, {about['solver']}, {how}, {evaluations:.0f} evaluations an image"
        f" on {about['device']} in {about['dtype']}"
    )
    if options.npz is not None:
        print(options.npz)
