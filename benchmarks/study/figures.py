"""Figures of the study, beside its first document: the grid of l by T, the methods beside each
other, quality against latency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.report import METHODS, STEPS, read_published
from benchmarks.study.runs import BY_NAME
from odelt_fast.files import save_picture

if TYPE_CHECKING:
    from benchmarks.study.study import Study

_IMAGES = 10  # one of each class


def draw(study: Study, folder: Path) -> None:
    """Draws what the results in `folder` and the trained models are enough for; `odelt-fast plot`
    draws the first and the last."""
    from odelt_fast.cli import main

    beside, found = study.options.documents[0].parent, read_published(folder)
    name = f"study-{study.options.set}"
    if study.trained(BY_NAME["odelt"]):
        network = [
            "--model",
            str(study.out / "odelt"),
            "--dtype",
            "float32",
            "--device",
            study.budget.device,
        ]
        _plot(main, ["grid", *network, "--out", str(beside / f"{name}-grid.png")])
    _draw_methods(study, beside / f"{name}-methods.png")
    if "odelt" in found and all(row["latency"] for row in found["odelt"]["rows"]):
        _plot(
            main,
            [
                "pareto",
                "--results",
                str(folder / "odelt.json"),
                "--paper",
                "--out",
                str(beside / f"{name}-pareto.png"),
            ],
        )


def _plot(main: object, arguments: list[str]) -> None:
    assert callable(main)
    if main(["plot", *arguments]):
        raise ValueError(f"odelt-fast plot {' '.join(arguments)} failed")


def _draw_methods(study: Study, out: Path) -> None:
    """One row a method, one column a T, all from the same noise and labels."""
    from odelt_fast.checkpoints.folder import load_model
    from odelt_fast.evaluation.evaluator import sample_depths_by_steps
    from odelt_fast.sampling.pictures import labelled_grid

    runs = [BY_NAME[name] for name in (*METHODS, "odelt") if study.trained(BY_NAME[name])]
    rows = [
        (run, depth, f"{run.title}, l = {depth}" if len(run.depths) > 1 else run.title)
        for run in runs
        for depth in run.depths
    ]
    cells = [
        sample_depths_by_steps(load_model(str(study.out / run.name)), [depth], STEPS, _IMAGES)[0]
        for run, depth, _ in rows
    ]
    if cells:
        picture = labelled_grid(
            cells,
            [title for _, _, title in rows],
            [f"T = {steps}" for steps in STEPS],
            _IMAGES,
            upright=True,
        )
        save_picture(out, picture)
