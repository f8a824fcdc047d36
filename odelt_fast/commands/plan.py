"""`odelt-fast plan`: what can be had for what, on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.files import make_folder

from .budgets import candidate_json, choice_json, limits
from .options import (
    Device,
    Dtype,
    File,
    Number,
    Text,
    check_counts,
    device_of,
    dtype_name,
    plural,
    refuse_unused,
    reporter,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Command:
    """Print the Pareto frontier of a model on this machine: what was measured to be best for its
    latency; with a budget, the choice too.

    Stands on odelt-fast profile and on a table of quality; nothing is estimated.
    """

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    batch: int = 16
    """Images at a time."""
    max_latency: Text = None
    """Budget for a batch: a number and a unit (us, ms, s), such as 20ms."""
    max_memory: Text = None
    """Budget for weights, inputs and activations: a number and a unit (KB, MB, GB, or MiB, GiB),
    such as 2GB."""
    guidance_scale: Number = None
    """w; only what was evaluated at it is a candidate."""
    quality: Text = None
    """Folder of odelt-fast evaluate, or its results.json, in place of the quality.json in the
    model's folder."""
    metric: Text = None
    """What counts as quality, as the table names it; its first metric by default."""
    profile: File = None
    """File of odelt-fast profile; by default that of this machine and model."""
    all: bool = False
    """Print every candidate, not only the frontier."""
    search_schedule: bool = False
    """Look for depth schedules of --steps steps (one depth early, another late) that no constant
    depth matches: measures quality and latency of all of them, and of the constant depths at T/2, T
    and 2T, which takes a while. Compares with --data."""
    steps: int = 4
    """Of --search-schedule: time steps T."""
    data: Text = None
    """Of --search-schedule: real images, as in odelt-fast evaluate."""
    num_images: int = 50_000
    """Of --search-schedule: images of every seed."""
    seeds: int = 1
    """Of --search-schedule: runs with different noise."""
    out: Path = Path("schedules")
    """Of --search-schedule: folder for the evaluations, to go on from; --quality takes it, so that
    budgets choose schedules too."""
    device: Device = "auto"
    dtype: Dtype = "auto"
    json: bool = False
    """Print one JSON object instead of text."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "batch")
    max_latency, max_memory = limits(options.max_latency, options.max_memory)

    from odelt_fast.planning.evidence import find_evidence
    from odelt_fast.planning.planner import best, frontier

    device = device_of(options.device)
    if not options.search_schedule:
        names = ("steps", "data", "num_images", "seeds", "out")
        refuse_unused(options, "without --search-schedule", *names)
    else:
        refuse_unused(options, "with --search-schedule, which prints all", "all")
        _search(options, device)
        return
    evidence = find_evidence(options.model, device, options.profile, options.quality)
    precision = dtype_name(options.dtype, device.type)
    found = evidence.candidates(
        batch=options.batch,
        precision=precision,
        guidance_scale=options.guidance_scale,
        metric=options.metric,
    )
    kept = frontier(found, with_memory=max_memory is not None)
    choice = best(found, max_latency, max_memory) if max_latency or max_memory else None
    machine = evidence.profile.machine.device
    if options.json:
        about = {
            "device": machine,
            "precision": precision,
            "frontier": [*map(candidate_json, kept)],
            "candidates": [*map(candidate_json, found)],
            "choice": None if choice is None else choice_json(choice),
        }
        print(json.dumps(about))
        return
    metric = found[0].metric or "blocks x evaluations"
    images = plural(options.batch, "image")
    print(f"| operation | {metric} | latency, {images} | peak memory | frontier |")
    print("|---|---|---|---|---|")
    for each in sorted(found, key=lambda each: each.latency) if options.all else kept:
        worth = f"{each.score:g}" if each.quality is None else str(each.quality)
        bound = "at most " if each.is_bound else ""
        costs = f"{bound}{show_seconds(each.latency)} | {bound}{show_memory(each.memory)}"
        print(f"| {each.operation} | {worth} | {costs} | {'yes' if each in kept else ''} |")
    measured, quality = f"measured on {machine} in {precision}", evidence.quality
    if quality is None:
        print(
            f"{measured}; quality was not measured: ordered by arithmetic, until odelt-fast"
            " evaluate and --quality"
        )
    else:
        seeds = f"{quality.images} images of {plural(quality.seeds, 'seed')} in {quality.dtype}"
        print(f"{measured}; quality of {seeds}: {quality.path}")
    if choice:
        print(choice.why)


def _search(options: Command, device: torch.device) -> None:
    if options.max_latency or options.max_memory or options.quality:
        raise ValueError(
            "--search-schedule measures quality itself and has no budget: leave --max-latency,"
            " --max-memory and --quality out"
        )
    if options.data is None:
        raise ValueError(
            "--search-schedule measures quality: give --data, as for odelt-fast evaluate"
        )
    make_folder("--out", options.out)

    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.evaluation.machine import this_machine
    from odelt_fast.evaluation.settings import Evaluation
    from odelt_fast.planning.profile import default_path
    from odelt_fast.planning.profiler import Profiler
    from odelt_fast.planning.schedule_search import search_schedules

    settings = Evaluation(
        options.model,
        options.data,
        num_images=options.num_images,
        seeds=options.seeds,
        guidance_scale=options.guidance_scale,
    )
    path = options.profile or default_path(this_machine(device), read_config(options.model))
    found = search_schedules(
        settings,
        options.steps,
        options.out,
        Profiler(options.model, device, path),
        batch=options.batch,
        precision=dtype_name(options.dtype, device.type),
        metric=options.metric,
        report=reporter(options.json),
    )
    if options.json:
        print(
            json.dumps({name: [*map(candidate_json, each)] for name, each in vars(found).items()})
        )
        return
    images = plural(options.batch, "image")
    print(f"| operation | {found.constant[0].metric} | latency, {images} | |\n|---|---|---|---|")
    for each in sorted(found.constant + found.schedules, key=lambda each: each.latency):
        kind = "" if each in found.constant else "schedule"
        kind = "no constant depth matches it" if each in found.beating else kind
        print(f"| {each.operation} | {each.quality} | {show_seconds(each.latency)} | {kind} |")
    schedules = plural(len(found.schedules), "schedule")
    print(
        f"{len(found.beating)} of {schedules} of {plural(options.steps, 'step')}: no constant depth"
        " is as good and as fast. All on the same noise: a small lead may be luck."
    )
