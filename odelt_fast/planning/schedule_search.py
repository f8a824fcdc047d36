"""Depth schedules of two levels, one l early and another late: which are worth having.

For a fixed T, a step costs what its depth costs; whether the blocks of the early or of the late
steps matter more is a question to the trained model. Every switch between two steps and every pair
of depths is measured, quality and latency, beside the constant depths at T/2, T and 2T; a schedule
is worth reporting if no constant depth is at least as good and at least as fast. Many are tried on
the same noise and the best are looked at, so that a small lead may be luck: other seeds tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.files import write_json
from odelt_fast.operation import Schedule

from .evidence import Evidence
from .planner import Candidate
from .profiler import Profiler
from .quality import read_quality


@dataclass(frozen=True)
class Search:
    """What was found, in the order of `planner.candidates`, best first.

    constant: the constant depths at T/2, T and 2T. schedules: all that were tried. beating: those
    of them that no constant one matches.
    """

    constant: list[Candidate]
    schedules: list[Candidate]
    beating: list[Candidate]


def two_level_schedules(depths: Iterable[int], steps: int) -> list[Schedule]:
    """(0, l early), (t, l late) for every t between two of the `steps` equal steps and every two
    different depths."""
    pairs = list(itertools.permutations(depths, 2))
    switches = [step / steps for step in range(1, steps)]
    return [((0.0, early), (time, late)) for time in switches for early, late in pairs]


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
    """Measures quality and latency of all schedules of two levels, and compares.

    Args:
        settings: of the evaluations: model, data, images, seeds, metrics, guidance.
        steps: T.
        out: folder; the evaluations lie in `depths` and `schedules`, from which an interrupted
            search goes on, and results.json holds the quality of all of them, for budgets.
        profiler: measures latency, into its profile.
        batch: images at a time.
        precision: a dtype by name.
        metric: what counts (None: the first of the evaluation).
        report: called with a line for each thing that is begun.

    Raises:
        ValueError: for fewer than two steps or depths, and for what Evaluator and Profiler refuse.
    """
    depths = profiler.profile.config.depths
    if steps < 2 or len(depths) < 2:
        raise ValueError(
            f"a schedule of two levels needs at least two steps and two depths, not {steps} and"
            f" {len(depths)}"
        )
    tried = tuple(two_level_schedules(depths, steps))
    settings, dtype = replace(settings, depths=depths), getattr(torch, precision)
    parts = {
        "depths": replace(settings, steps=(steps // 2, 2 * steps)),
        # At T the constant depths, too.
        "schedules": replace(settings, steps=(steps,), depth_schedules=tried),
    }
    results = []
    for name, part in parts.items():
        report(f"quality of {name}: {out / name}")
        device = profiler.device.type
        results.append(Evaluator(part, out / name, device=device, dtype=dtype, show=False).run())
    # One way to measure, so one table.
    rows = [row for result in results for row in result["rows"]]
    write_json(out / "results.json", {**results[1], "rows": rows})
    scale, quality = settings.guidance_scale, read_quality(out)
    profile = profiler.run(quality.operations(scale), (batch,), (precision,), report)
    evidence = Evidence(settings.model, profile, quality, profiler.weights)
    found = evidence.candidates(
        batch=batch, precision=precision, guidance_scale=scale, metric=metric
    )
    constant = [each for each in found if each.operation.depth is not None]
    schedules = [each for each in found if each.operation.depth is None]
    beating = [  # where no constant depth is at least as good and at least as fast
        each
        for each in schedules
        if all(other.score < each.score or other.latency > each.latency for other in constant)
    ]
    return Search(constant, schedules, beating)
