"""`odelt-fast ema`: the average of any width from the snapshots of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from .options import Whole, check_model_folder


@dataclass(frozen=True)
class Command:
    """Make the average of the weights with any width, after training, from the snapshots that
    `odelt-fast train --ema-widths` stored."""

    run: tyro.conf.Positional[Path]
    """Output folder of the run."""
    width: float
    """Width sigma_rel of the wanted average: the standard deviation of its weights over the run, as
    a share of the run up to its step."""
    out: Path
    """Folder to write: new, empty, or a model folder, which is replaced."""
    step: Whole = None
    """Optimizer step of the wanted average, one of the stored ones. Left out: the last."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    if not options.run.is_dir():
        raise ValueError(f"{options.run} is not a folder: give the output folder of a run")
    check_model_folder(options.out)

    from odelt_fast.checkpoints.folder import save_model
    from odelt_fast.train.post_hoc import reconstruct

    model, made, error = reconstruct(options.run, options.width, options.step)
    save_model(model, options.out, metadata=made.metadata())
    print(
        f"{options.out}: width {made.width:g} at step {made.step}; the profile of its weights is"
        f" within {error:.1e} of the wanted one"
    )
