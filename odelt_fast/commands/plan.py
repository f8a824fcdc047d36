"""`odelt-fast plan`: what can be had for what, on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.commands.budgets import choice_json, described, limits
from odelt_fast.commands.options import (
    Device,
    Dtype,
    File,
    Number,
    Text,
    choose_dtype,
    device_of,
    plural,
)
from odelt_fast.files import check_folder

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
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {options.batch}")
    max_latency, max_memory = limits(options.max_latency, options.max_memory)

    from odelt_fast.planning.evidence import find_evidence
    from odelt_fast.planning.planner import best, frontier

    device = device_of(options.device)
    if options.search_schedule:
        _search(options, device)
        return
    evidence = find_evidence(options.model, device, options.profile, options.quality)
    precision = str(choose_dtype(options.dtype, device.type)).removeprefix("torch.")
    points = evidence.points(
        batch=options.batch,
        precision=precision,
        guidance_scale=options.guidance_scale,
        metric=options.metric,
    )
    kept = frontier(points, with_memory=max_memory is not None)
    choice = best(points, max_latency, max_memory) if max_latency or max_memory else None
    if options.json:
        found: dict[str, Any] = {
            "device": evidence.profile.machine.device,
            "precision": precision,
            "frontier": [described(point) for point in kept],
        }
        found |= {
            "candidates": [described(point) for point in points],
            "choice": None if choice is None else choice_json(choice),
        }
        print(json.dumps(found))
        return
    metric = points[0].metric or "blocks x evaluations"
    print(
        f"| operation | {metric} | latency, {plural(options.batch, 'image')} | peak memory |"
        " frontier |"
    )
    print("|---|---|---|---|---|")
    for point in sorted(points, key=lambda point: point.latency) if options.all else kept:
        worth = f"{point.score:g}" if point.quality is None else str(point.quality)
        bound = "at most " if point.is_bound else ""
        cells = (
            f"{point.operation} | {worth} | {bound}{show_seconds(point.latency)} |"
            f" {bound}{show_memory(point.memory)}"
        )
        print(f"| {cells} | {'yes' if point in kept else ''} |")
    measured = f"measured on {evidence.profile.machine.device} in {precision}"
    quality = evidence.quality
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
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: name a folder")
    options.out.mkdir(parents=True, exist_ok=True)
    check_folder("--out", options.out, options.out)

    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.evaluation.settings import Evaluation
    from odelt_fast.planning.evidence import this_machine
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
        precision=str(choose_dtype(options.dtype, device.type)).removeprefix("torch."),
        metric=options.metric,
        report=(lambda line: None) if options.json else lambda line: print(line, file=sys.stderr),
    )
    if options.json:
        print(
            json.dumps({name: list(map(described, points)) for name, points in vars(found).items()})
        )
        return
    print(
        f"| operation | {found.constant[0].metric} | latency, {plural(options.batch, 'image')} |"
        " |\n|---|---|---|---|"
    )
    for point in sorted(found.constant + found.schedules, key=lambda point: point.latency):
        kind = (
            ""
            if not point.operation.schedule
            else "no constant depth matches it"
            if point in found.beating
            else "schedule"
        )
        print(f"| {point.operation} | {point.quality} | {show_seconds(point.latency)} | {kind} |")
    counts = (
        f"{len(found.beating)} of {plural(len(found.schedules), 'schedule')} of"
        f" {plural(options.steps, 'step')}"
    )
    print(
        f"{counts}: no constant depth is as good and as fast. All on the same noise: a small lead"
        " may be luck."
    )
