"""`odelt-fast convert`: a checkpoint of the reference implementation becomes a model folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .options import check_model_folder


@dataclass(frozen=True)
class Command:
    """Turn a checkpoint of the reference implementation (.pkl) into a model folder. Nothing in the
    file is executed."""

    file: tyro.conf.Positional[Path]
    """The checkpoint."""
    out: Path
    """Folder to write: new, empty, or a model folder, which is replaced."""
    num_heads: int = 12
    depth_min: int = 4
    """Smallest depth l."""
    depth_group: int = 4
    """Blocks in a group, G."""
    image_size: int = 32
    """Side of what the network sees (latents: 32 for 256 pixels)."""
    step_conditioned: bool = True
    """Off for models trained with ignore_dt."""
    weights: Literal["ema", "raw"] = "ema"


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    if not options.file.is_file():
        raise ValueError(
            f"{options.file} {'is not a file' if options.file.exists() else 'does not exist'}: give"
            " the reference's .pkl file"
        )
    check_model_folder(options.out)

    from odelt_fast.checkpoints.folder import save_model
    from odelt_fast.checkpoints.reference import convert_reference_checkpoint

    arguments = dataclasses.asdict(options)
    del arguments["file"], arguments["out"]
    model = convert_reference_checkpoint(options.file, **arguments)
    out = save_model(model, options.out, metadata={"weights": options.weights})
    count = sum(parameter.numel() for parameter in model.parameters())
    depths = ", ".join(map(str, model.config.depths))
    print(f"{out}: {options.weights} weights, {count:,} parameters")
    print(" ".join(f"{name}={value}" for name, value in model.config.to_dict().items()))
    print(f"runs at depth {depths}: odelt-fast sample --model {out}")
