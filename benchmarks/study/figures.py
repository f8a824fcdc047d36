"""Figures of the study, beside its first document.

The grid of l by T, the methods beside each other, quality against latency.
"""

from __future__ import annotations

from pathlib import Path

from odelt_fast.evaluation.paper import STEPS
from odelt_fast.files import save_picture

from .campaign import Study
from .runs import BY_NAME
from .tables import METHODS, Results

_IMAGES = 10  # one of each class


def draw(study: Study, folder: Path, published: Results | None) -> None:
    """Draws what the published results in `folder` and the trained models are enough for.

    `odelt-fast plot` draws the first and the last.

    Args:
        published: results of the main run, if there are any.
    """
    beside, name = study.options.documents[0].parent, f"study-{study.options.set}"
    if study.trained(BY_NAME["odelt"]):
        network = ["--model", str(study.out / "odelt"), "--device", study.budget.device]
        _plot(beside / f"{name}-grid.png", "grid", *network, "--dtype", "float32")
    _draw_methods(study, beside / f"{name}-methods.png")
    if published and all(row["latency"] for row in published["rows"]):
        results = ["--results", str(folder / "odelt.json"), "--paper"]
        _plot(beside / f"{name}-pareto.png", "pareto", *results)


def _plot(out: Path, *arguments: str) -> None:
    from odelt_fast.cli import main

    command = ["plot", *arguments, "--out", str(out)]
    if main(command):
        raise ValueError(f"odelt-fast {' '.join(command)} failed")


def _draw_methods(study: Study, out: Path) -> None:
    """One row a method, one column a T, all from the same noise and labels."""
    from odelt_fast.checkpoints.folder import load_model
    from odelt_fast.evaluation.depth_steps import sample_depths_by_steps
    from odelt_fast.sampling.pictures import labelled_grid

    runs = [BY_NAME[name] for name in (*METHODS, "odelt")]
    trained = [run for run in runs if study.trained(run)]
    if not trained or (trained != runs and out.exists()):  # that may show more of them
        return
    titles, cells = [], []
    for run in trained:
        model = load_model(str(study.out / run.name))
        cells += sample_depths_by_steps(model, run.depths, STEPS, _IMAGES)
        lengths = [f"{run.title}, l = {depth}" for depth in run.depths]
        titles += lengths if len(lengths) > 1 else [run.title]
    columns = [f"T = {steps}" for steps in STEPS]
    save_picture(out, labelled_grid(cells, titles, columns, _IMAGES, upright=True))
