"""`odelt-fast sample`: pictures of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from odelt_fast.commands.budgets import as_options, choice_json, choose_for
from odelt_fast.commands.flows import check_options, plan
from odelt_fast.commands.operations import operation_of
from odelt_fast.commands.options import (
    Device,
    Dtype,
    File,
    Labels,
    Number,
    Text,
    Whole,
    load,
    load_decoder,
    plural,
)
from odelt_fast.files import check_target, picture_formats, save_picture, try_out, write_whole

if TYPE_CHECKING:
    from odelt_fast.planning.planner import Choice
    from odelt_fast.sampling.sampler import Sampler


@dataclass(frozen=True)
class Command:
    """Draw images with a model: --depth and --steps set the cost."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    depth: Whole = None
    """Active blocks l, one of the model's depths; all by default."""
    steps: Whole = None
    """Time steps T; 4 by default. Shortcut models make good images with few (1, 4); plain flow
    models want 128."""
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
    labels: Labels = ()
    """Classes, repeated in turn if fewer than images; the number of classes is the null label.
    Drawn from the seed by default."""
    seed: int = 0
    """From 0 to 2^64 - 1."""
    guidance_scale: Number = None
    """w in v_null + w (v_label - v_null): 0 ignores the labels, 1 (and the default) uses only them,
    other values cost twice as much."""
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
    depth_schedule: Annotated[str, tyro.conf.arg(metavar="T:L,...", help_behavior_hint="")] = ""
    """Depths that change with time, in place of --depth: 0:4,0.5:12 runs 4 blocks up to t = 0.5 and
    12 from there on. Adaptive solvers need --error-norm batch for it."""
    time_shift: float = 1.0
    """Above 1: fixed steps lie closer near the noise, for high resolution. 1: equal steps."""
    trajectory: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="TIME...", help_behavior_hint="")
    ] = ()
    """Show the states at these times, rising from 0 (noise) to 1 (data), one row an image; --npz
    holds them as `trajectory`."""
    invert: Annotated[File, tyro.conf.arg(metavar="IMAGES")] = None
    """Carry images (a file, or what training's --data takes) to noise and back instead of drawing:
    originals, noise, reconstructions."""
    interpolate: Annotated[
        tuple[int, int] | None, tyro.conf.arg(metavar="SEED_A SEED_B", help_behavior_hint="")
    ] = None
    """Draw a row of images on the way from the noise of one seed to that of another."""
    frames: int = 8
    """Images of --interpolate, both ends included."""
    decoder: Text = None
    """Autoencoder that makes pictures of a model's latents: folder or Hub id, such as
    stabilityai/sd-vae-ft-mse, or madebyollin/taesd for fast previews."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU and on CPUs that compute in it, else float32."""
    batch_size: Whole = None
    """Images at a time; by the size of the model's input by default. Changes no picture."""
    out: File = None
    """Picture of all images in a grid (.png, .jpg, ...). Default: samples.png, or none if --npz is
    given."""
    npz: File = None
    """Arrays for evaluators: arr_0 images (N, H, W, C) uint8 (latents: float32, as they are), arr_1
    labels."""
    json: bool = False
    """Print one JSON object instead of text."""
    quiet: bool = False
    """No progress bar."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    for name in ("steps", "num_images", "batch_size", "max_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"--seed must be from 0 to 2^64 - 1, not {options.seed}")
    if len(options.labels) > options.num_images:
        raise ValueError(
            f"--labels: {len(options.labels)} labels for {options.num_images} images: raise"
            " --num-images"
        )
    check_options(options)
    operation = operation_of(options)
    picture = Path("samples.png") if options.out is None and options.npz is None else options.out
    if picture is not None:
        check_target("--out", picture, picture_formats())
    if options.npz is not None:
        check_target("--npz", options.npz, (".npz",))
    chosen = choose_for(options)
    if chosen:
        options = replace(options, **as_options(chosen.point))
        operation = operation_of(options)

    import numpy as np
    from tqdm import tqdm

    from odelt_fast.sampling.noise import drawn_labels
    from odelt_fast.sampling.pictures import image_grid, to_uint8
    from odelt_fast.sampling.sampler import Sampler

    model = load(options.model, options.device, options.dtype, operation.deepest)
    decoder = load_decoder(options.decoder, model)
    sampler = Sampler.of(model, operation, batch_size=options.batch_size, decoder=decoder)
    config = model.config
    channels, side = config.channels, config.image_size
    if decoder:
        channels, side = decoder.channels, side * decoder.factor
    labels = np.resize(options.labels, options.num_images) if options.labels else None
    planned = plan(options, sampler, labels)
    if picture is not None:
        blank = np.broadcast_to(np.uint8(0), (planned.tiles, side, side, channels))
        try_out("--out", picture, image_grid(blank, planned.columns))
    hidden = True if options.quiet or options.json else None  # None: shown on a terminal only
    steps = None if operation.adaptive else planned.steps
    with tqdm(total=steps, unit="step", leave=False, disable=hidden) as bar:
        drawing = planned.draw(bar.update)
    written = []
    if options.npz is not None:
        images = drawing.images
        arrays = (
            to_uint8(images) if channels in (1, 3) else images.permute(0, 2, 3, 1).cpu().numpy()
        )
        labels = drawing.labels
        if labels is None:
            labels = drawn_labels(options.seed, range(len(images)), config.num_classes)
        write_whole(
            options.npz, lambda file: np.savez(file, arr_0=arrays, arr_1=labels, **drawing.arrays)
        )
        written.append(options.npz)
    if picture is not None:
        save_picture(picture, image_grid(to_uint8(drawing.tiles), drawing.columns))
        written.append(picture)
    report(options, sampler, config.depth, written, chosen)
    if drawing.remark and not options.json:
        print(drawing.remark)


def report(
    options: Command, sampler: Sampler, blocks: int, written: Sequence[Path], chosen: Choice | None
) -> None:
    """Prints what was drawn, where it is, and what it cost (without loading the model)."""
    about, stats = sampler.explain(), sampler.stats
    count, seconds = stats["images"], stats["seconds"] / stats["images"]
    if options.json:
        about = {
            "files": list(map(str, written)),
            "model": options.model,
            "seed": options.seed,
            "num_images": count,
            "evaluations": stats["evaluations"],
            "seconds_per_image": seconds,
        } | about
        if chosen:
            about["choice"] = choice_json(chosen)
        print(json.dumps(about))
        return
    print(f"{' and '.join(map(str, written))}: {plural(count, 'image')} of {options.model}")
    if chosen:
        print(chosen.why)
    used = f"{about['live_blocks']} of {plural(blocks, 'block')}"
    taken = [a + r for a, r in zip(stats["accepted"], stats["rejected"], strict=True)]
    steps = plural(sampler.operation.steps or taken[0], "step")
    if sampler.operation.adaptive and min(taken) < max(taken):
        steps = f"{min(taken)} to {max(taken)} steps"
    print(f"depth {about['depth']} ({used}), {steps} of {about['solver']}")
    print(
        f"{plural(round(stats['evaluations_per_image']), 'evaluation')} and {seconds:.3g} s per"
        f" image on {about['device']} in {about['dtype']}"
    )
