"""Checkpoints of the reference and of other projects become models, with a note of their origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odelt_fast.checks import one_of
from odelt_fast.model import DiT

from .peers import SOURCES, convert_peer_checkpoint
from .reference import convert_reference_checkpoint

REFERENCE = "the reference implementation (github.com/gudovskiy/odelt)"


def convert_checkpoint(
    path: str | Path,
    source: str = "auto",
    *,
    num_heads: int | None = None,
    image_size: int | None = None,
    weights: str = "ema",
    time_frequencies: str | None = None,
    **inner_ode: Any,
) -> tuple[DiT, dict[str, str]]:
    """The model of a checkpoint, and where it came from. Nothing in the file is executed.

    Args:
        path: a file (.pkl, .pt, .safetensors, flax's msgpack), or a folder of diffusers.
        source: "reference", "sit", "repa", "meanflow", "dit", "diffusers"; "auto": what the file
            tells (pickles are the reference's).
        num_heads: None: what the width says.
        image_size: of what the network sees; None: what the file says, else 32.
        weights: "ema" or "raw", of a file that holds both.
        time_frequencies: of diffusers, see `peers.convert_peer_checkpoint`.
        inner_ode: of the reference: depth_min, depth_group, step_conditioned.

    Returns:
        The model in float32 on the CPU, in eval mode; metadata for `save_model`.

    Raises:
        CheckpointError: in one line: what is wrong with the file, or does not fit it.
        ValueError: an argument that cannot be, or that the source has no use for.
    """
    path = Path(path)
    if one_of("source", source, SOURCES) == "auto" and path.is_file():
        with path.open("rb") as file:
            source = "reference" if file.read(1) == b"\x80" else source
    if source != "reference":
        if inner_ode:
            raise ValueError(
                f"{next(iter(inner_ode))} is for checkpoints of the reference: other projects'"
                " models have no inner ODE"
            )
        return convert_peer_checkpoint(
            path,
            source,
            num_heads=num_heads,
            image_size=image_size,
            weights=weights,
            time_frequencies=time_frequencies,
        )
    if time_frequencies:
        raise ValueError("time_frequencies are a choice for diffusers, not for the reference")
    model = convert_reference_checkpoint(
        path, num_heads, image_size=image_size or 32, weights=weights, **inner_ode
    )
    return model, {"weights": weights, "converted_from": REFERENCE, "converted_file": path.name}
