"""`odelt-fast generate`: millions of images of a model, in shards."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from .operations import operation_of
from .options import (
    check_counts,
    check_guidance,
    choose_dtype,
    labels_in_turn,
    load_decoder,
    plural,
)
from .sample_options import Sampling


@dataclass(frozen=True, kw_only=True)
class Command(Sampling):
    """Draw any number of images into shards. The same command goes on where it was interrupted, in
    any number of processes.

    Several GPUs: torchrun --nproc-per-node 4 -m odelt_fast.cli generate ...
    """

    out: str
    """Folder of the shards, or a URL of one: s3://bucket/folder, gs://bucket/folder."""
    num_images: int = 50_000
    """Images 0 to --num-images - 1 of the seed. Image i depends on the seed and i alone."""
    format: Literal["webdataset", "npz", "lance"] = "webdataset"
    """webdataset: tar files of .png and .cls, which --data reads. npz: as sample --npz writes.
    lance: a table of image, label and index (extra lance)."""
    shard_length: int = 10_000
    """Images in a file. A kill loses at most one file of each process."""
    json: bool = False
    """Print one JSON object instead of text."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "steps", "batch_size", "max_steps", "num_images", "shard_length")
    operation = operation_of(options)

    from odelt_fast.checkpoints.folder import load_model
    from odelt_fast.evaluation.machine import model_hash
    from odelt_fast.generation.generator import Generation, generate
    from odelt_fast.generation.processes import Processes
    from odelt_fast.sampling.sampler import Sampler

    names = ("num_images", "seed", "format", "shard_length")
    wanted = Generation(**{name: getattr(options, name) for name in names})
    processes = Processes.of_this_run(options.device)
    device = processes.device
    dtype = choose_dtype(options.dtype, device.type)
    model = load_model(options.model, device, dtype, operation.deepest)
    labels, null = labels_in_turn(options, model), model.config.num_classes
    check_guidance(options.guidance_scale, {*(labels or [0] * (null > 1))} <= {null})
    decoder = load_decoder(options.decoder, model, options.any_decoder)
    sampler = Sampler.of(model, operation, batch_size=options.batch_size, decoder=decoder)
    about: dict[str, Any] = {
        "model_sha256": model_hash(options.model),
        "class_names": model.trained_on.class_names,
        "operation": vars(sampler.operation),
        "dtype": str(dtype).removeprefix("torch."),
        "decoder": options.decoder,
    }
    if operation.adaptive and (operation.error_norm == "batch" or operation.torchdiffeq):
        about["batch_size"] = sampler.batch_size  # images of a batch have their steps in common
    start, show = time.monotonic(), not (options.quiet or options.json)
    wanted = replace(wanted, labels=tuple(labels))
    made, opened = generate(sampler, wanted, options.out, processes, about=about, show=show)
    if processes.first:
        report(options, made, opened, time.monotonic() - start)


def report(options: Command, made: int, opened: str, seconds: float) -> None:
    """Prints where the images are, and how many were `made` now."""
    if options.json:
        told = {"out": opened, "num_images": options.num_images, "made": made, "seconds": seconds}
        print(json.dumps(told))
        return
    print(f"{opened}: {plural(options.num_images, 'image')} of {options.model}")
    rate = f", {made / seconds:.3g} a second" if made else ""
    print(f"{made} of them made now{rate}; what they are: {options.out}/generation.json")
