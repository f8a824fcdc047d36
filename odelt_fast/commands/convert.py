"""`odelt-fast convert`: a checkpoint of the reference or of another project becomes a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .options import Text, Whole, check_model_folder, refuse_unused


@dataclass(frozen=True)
class Command:
    """Turn a checkpoint of the reference (.pkl), SiT, REPA, MeanFlow, DiT (.pt, .safetensors) or a
    folder of diffusers into a model folder. Nothing in the file is executed."""

    file: tyro.conf.Positional[Path]
    """The checkpoint, or a folder of diffusers."""
    out: Path
    """Folder to write: new, empty, or a model folder, which is replaced."""
    source: Literal["auto", "reference", "sit", "repa", "meanflow", "dit", "diffusers"] = "auto"
    """Whose it is. DiT's, SiT's and REPA's files look alike: auto asks."""
    num_heads: Whole = None
    """Heads of attention; those of the published sizes by default, by their width."""
    image_size: Whole = None
    """Side of what the network sees (latents: 32 for 256 pixels); what the file says by default."""
    weights: Literal["ema", "raw"] = "ema"
    """Which, of a file that holds averages and raw weights."""
    time_frequencies: Text = None
    """Of diffusers: diffusers, what that library computes, or original, what the weights were
    trained with. Default: diffusers."""
    depth_min: Whole = None
    """Of the reference: smallest depth l, 4 by default."""
    depth_group: Whole = None
    """Of the reference: blocks in a group, G, 4 by default."""
    step_conditioned: bool = True
    """Of the reference: off for models trained with ignore_dt."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    if not options.file.exists():
        raise ValueError(f"{options.file} does not exist: give a checkpoint")
    check_model_folder(options.out)

    from odelt_fast.checkpoints.conversion import convert_checkpoint
    from odelt_fast.checkpoints.folder import save_model
    from odelt_fast.checkpoints.model_card import model_card
    from odelt_fast.config import SD_SCALE

    inner_ode: dict[str, object] = {
        name: getattr(options, name)
        for name in ("depth_min", "depth_group")
        if getattr(options, name) is not None
    }
    if not options.step_conditioned:
        inner_ode["step_conditioned"] = False
    model, origin = convert_checkpoint(
        options.file,
        options.source,
        num_heads=options.num_heads,
        image_size=options.image_size,
        weights=options.weights,
        time_frequencies=options.time_frequencies,
        **inner_ode,
    )
    if origin["weights"] == "unnamed":
        refuse_unused(options, f"on {options.file}, which holds weights of one kind", "weights")
    out, config = save_model(model, options.out, metadata=origin), model.config
    told = f"{origin['converted_from']}, weights: {origin['weights']}"
    card = out / "README.md"
    if not card.exists():
        text = f"Converted from `{origin['converted_file']}` of {told}."
        if "decoder" in origin:
            text += (
                f" It makes latents of Stable Diffusion's autoencoder, scaled by {SD_SCALE}:"
                f" `--decoder {origin['decoder']}` makes pictures of them."
            )
        card.write_text(model_card(config, repo_id=out.name, description=text), encoding="utf-8")
    count = sum(parameter.numel() for parameter in model.parameters())
    depths = ", ".join(map(str, config.depths))
    print(f"{out}: {told}; {count:,} parameters")
    print(" ".join(f"{name}={value}" for name, value in config.to_dict().items()))
    sample = "" if config.sampling == "shortcut" else " --solver dopri5"
    if "decoder" in origin:
        sample += f" --decoder {origin['decoder']}"
    print(f"runs at depth {depths}: odelt-fast sample --model {out}{sample}")
