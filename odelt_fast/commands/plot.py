"""`odelt-fast plot`: pictures and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from odelt_fast.commands.options import Device, Dtype, Labels, Number, load
from odelt_fast.outputs import check_target, picture_formats, save_picture


@dataclass(frozen=True)
class Command:
    """Draw a picture of a model over its two dials."""

    kind: tyro.conf.Positional[Literal["grid"]]
    """grid: depths (rows) by time steps (columns), same noise and labels."""
    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    out: Path = Path("grid.png")
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


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_target("--out", options.out, picture_formats())

    from odelt_fast.evaluation import sample_depths_by_steps
    from odelt_fast.plots import depth_steps_picture

    labels = [options.labels[i % len(options.labels)] for i in range(options.num_images)] if options.labels else None
    model = load(options.model, options.device, options.dtype, None)
    depths = sorted(options.depths or model.config.depths, reverse=True)
    cells = sample_depths_by_steps(
        model, depths, options.steps, options.num_images, labels=labels, seed=options.seed, guidance_scale=options.guidance_scale
    )
    save_picture(options.out, depth_steps_picture(cells, depths, options.steps))
    print(f"{options.out}: depths by time steps of {options.model}")
