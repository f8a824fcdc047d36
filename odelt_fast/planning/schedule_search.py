"""Depth schedules of two levels: l early in the trajectory, another l late; which of them are worth
having, by measurement.

For a fixed T, a step costs what its depth costs; whether the blocks of the early or of the late
steps matter more is a question to the trained model. Every switch between two steps and every pair
of depths is measured, quality and latency, beside the constant depths at T/2, T and 2T; a schedule
is worth reporting if no constant depth is at least as good and at least as fast. Many are tried on
the same noise and the best are looked at, so that a small lead may be luck: other seeds tell.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.files import write_whole
from odelt_fast.planning.evidence import Evidence
from odelt_fast.planning.planner import Point
from odelt_fast.planning.profile import Schedule, show_schedule
from odelt_fast.planning.profiler import Grid, Profiler
from odelt_fast.planning.quality import read_quality


@dataclass(frozen=True)
class Search:
    """constant: the constant depths at T/2, T and 2T. schedules: all that were tried. beating:
    those of them that no constant one matches. In the order of `planner.candidates`, best first."""

    constant: list[Point]
    schedules: list[Point]
    beating: list[Point]


def two_level_schedules(depths: Iterable[int], steps: int) -> list[Schedule]:
    """(0, l early), (t, l late) for every t between two of the `steps` equal steps and every two
    different depths."""
    pairs = list(itertools.permutations(depths, 2))
    return [
        ((0.0, early), (switch / steps, late))
        for switch in range(1, steps)
        for early, late in pairs
    ]


def search_schedules(
    settings: Evaluation,
    steps: int,
    out: Path,
    profiler: Profiler,
    *,
    batch: int,
    precision: str,
    metric: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Search:
    """Measures quality (`settings`: model, data, images, seeds, metrics; in the folders `depths`
    and `schedules` of `out`, from which an interrupted search goes on) and latency for `batch`
    images (into the profile), and compares. out/results.json holds the quality of all of them, for
    budgets (`--quality`).

    precision: a dtype by name. Raises ValueError for fewer than two steps or depths, and what the
    Evaluator and the Profiler refuse.
    """
    config = profiler.profile.config
    if steps < 2 or len(config.depths) < 2:
        raise ValueError(
            f"a schedule of two levels needs at least two steps and two depths, not {steps} and"
            f" {len(config.depths)}"
        )
    tried = two_level_schedules(config.depths, steps)
    dtype = getattr(torch, precision)
    parts = {
        "depths": replace(
            settings, depths=config.depths, steps=(steps // 2, 2 * steps), depth_schedules=()
        ),
        # At T the constant depths, too.
        "schedules": replace(
            settings,
            depths=config.depths,
            steps=(steps,),
            depth_schedules=tuple(map(show_schedule, tried)),
        ),
    }
    results = []
    for name, part in parts.items():
        report(f"quality of {name}: {out / name}")
        results.append(
            Evaluator(part, out / name, device=profiler.device.type, dtype=dtype, show=False).run()
        )
    joined = {
        **results[1],
        "rows": [row for result in results for row in result["rows"]],
    }  # one way to measure, so one table
    write_whole(
        out / "results.json", lambda file: file.write(json.dumps(joined, indent=1).encode() + b"\n")
    )
    quality = read_quality(out)
    grid = Grid(
        tuple(quality.operations(settings.guidance_scale)),
        (batch,),
        (precision,),
        settings.guidance_scale,
    )
    evidence = Evidence(settings.model, profiler.run(grid, report), quality, profiler.weights)
    points = evidence.points(
        batch=batch, precision=precision, guidance_scale=settings.guidance_scale, metric=metric
    )
    constant = [point for point in points if not point.operation.schedule]
    schedules = [point for point in points if point.operation.schedule]
    return Search(
        constant, schedules, [point for point in schedules if not _matched(point, constant)]
    )


def _matched(point: Point, constant: Iterable[Point]) -> bool:
    """Whether a constant depth is at least as good and at least as fast."""
    return any(other.score >= point.score and other.latency <= point.latency for other in constant)
