"""`odelt-fast plot`: pictures and figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from odelt_fast.evaluation.arguments import Names, metavar
from odelt_fast.files import check_target, picture_formats, save_picture, write_whole

from .options import (
    Device,
    Dtype,
    File,
    Labels,
    Number,
    Text,
    check_guidance,
    labels_of,
    load,
    refuse_unused,
)


@dataclass(frozen=True)
class Command:
    """Draw a picture of a model over its two dials, or a figure of evaluations (--results)."""

    kind: tyro.conf.Positional[Literal["grid", "pareto", "scaling", "ablation"]]
    """grid: images of --model, depths (rows) by time steps (columns), same noise and labels. Of
    --results: pareto, quality against latency with the frontier; scaling, latency and memory
    against l; ablation, quality against T of several evaluations, and their table."""
    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    out: File = None
    """Picture (.png, .jpg, ...; figures also .pdf, .svg). KIND.png by default."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="L...")] = ()
    """Rows; all of the model's depths by default."""
    steps: Annotated[tuple[int, ...], tyro.conf.arg(metavar="T...")] = (128, 4, 1)
    """Columns."""
    num_images: int = 10
    """Images in a cell."""
    labels: Labels = ()
    """Classes, repeated in turn; all in order by default."""
    seed: int = 0
    guidance_scale: Number = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    results: Annotated[tuple[Path, ...], metavar("PATH...")] = ()
    """Folders of odelt-fast evaluate, or their results.json."""
    names: Names = ()
    """What to call each of --results; their model's folder by default."""
    metric: Text = None
    """What to draw, as the tables name it; their first metric by default."""
    paper: bool = False
    """Of pareto: the paper's own numbers beside it."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    out = options.out or Path(f"{options.kind}.png")
    own = f"on plot {options.kind}"
    if options.kind == "grid":
        refuse_unused(options, own, "results", "names", "metric", "paper")
    else:
        names = ("model", "depths", "steps", "num_images", "labels", "seed", "guidance_scale")
        refuse_unused(options, own, *names, "device", "dtype")
        if options.kind == "scaling":
            refuse_unused(options, own, "metric")
        if options.kind != "pareto":
            refuse_unused(options, own, "paper")
    if options.kind == "grid":
        _draw_grid(options, out)
    else:
        _draw_figure(options, out)


def _draw_figure(options: Command, out: Path) -> None:
    from odelt_fast.evaluation.results import read_results

    check_target("--out", out, (".png", ".jpg", ".webp", ".pdf", ".svg"))
    if not options.results:
        raise ValueError(
            f"plot {options.kind} draws evaluations: give --results, the folders of odelt-fast"
            " evaluate"
        )
    results = [read_results(path) for path in options.results]
    names = options.names or [Path(result["settings"]["model"]).name for result in results]
    if len(names) != len(results):
        raise ValueError(f"--names: {len(names)} names for {len(results)} --results")

    from odelt_fast.evaluation import charts as figures

    if options.kind == "pareto":
        figure = figures.pareto(results, names, options.metric, options.paper)
    elif options.kind == "scaling":
        figure = figures.scaling(results, names)
    else:
        figure, table = figures.ablation(results, names, options.metric)
        print(table)
    write_whole(out, lambda file: figure.savefig(file, format=out.suffix[1:].lower(), dpi=150))
    print(f"{out}: {options.kind} of {', '.join(names)}")


def _draw_grid(options: Command, out: Path) -> None:
    check_target("--out", out, picture_formats())

    from odelt_fast.evaluation.depth_steps import sample_depths_by_steps
    from odelt_fast.sampling.pictures import depth_steps_picture

    model = load(options.model, options.device, options.dtype, None)
    chosen, classes = labels_of(options.labels, model), model.config.num_classes
    check_guidance(options.guidance_scale, {*(chosen or [0] * (classes > 1))} <= {classes})
    if len(chosen) > options.num_images:
        raise ValueError(f"--labels: {len(chosen)} labels for {options.num_images} --num-images")
    labels = [*islice(cycle(chosen), options.num_images)] or None
    depths = sorted(options.depths or model.config.depths, reverse=True)
    drawn: Any = {"labels": labels, "seed": options.seed, "guidance_scale": options.guidance_scale}
    cells = sample_depths_by_steps(model, depths, options.steps, options.num_images, **drawn)
    save_picture(out, depth_steps_picture(cells, depths, options.steps))
    print(f"{out}: depths by time steps of {options.model}")
