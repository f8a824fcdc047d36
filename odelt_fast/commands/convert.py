"""`odelt-fast convert`: a checkpoint of the reference implementation becomes a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from odelt_fast.files import check_folder


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
    out, problem = options.out, None
    if out.exists() and not out.is_dir():
        problem = "is not a folder"
    elif out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        problem = "holds other files"
    if problem:
        raise ValueError(
            f"--out {out} {problem}: give a new or empty folder, or a model folder to replace"
        )
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    check_folder("--out", out, nearest)

    from odelt_fast.checkpoints.folder import save_model
    from odelt_fast.checkpoints.reference import convert_reference_checkpoint

    model = convert_reference_checkpoint(
        options.file,
        num_heads=options.num_heads,
        depth_min=options.depth_min,
        depth_group=options.depth_group,
        image_size=options.image_size,
        step_conditioned=options.step_conditioned,
        weights=options.weights,
    )
    save_model(model, out, metadata={"weights": options.weights})
    count = sum(parameter.numel() for parameter in model.parameters())
    depths = ", ".join(map(str, model.config.depths))
    print(f"{out}: {options.weights} weights, {count:,} parameters")
    print(" ".join(f"{name}={value}" for name, value in model.config.to_dict().items()))
    print(f"runs at depth {depths}: odelt-fast sample --model {out}")
