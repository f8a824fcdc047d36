"""What the commands share: types of options, loading the model that they name, wording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from odelt_fast.model import DiT
    from odelt_fast.sampling.decoder import Decoder

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Labels = Annotated[tuple[int, ...], tyro.conf.arg(metavar="LABEL...", help_behavior_hint="")]


def _optional(kind: type, metavar: str) -> Any:
    """Parses an option that has a value or is left out; tyro's own way would offer the value None
    and explain both in every error."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: kind(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


Whole = Annotated[int | None, _optional(int, "INT"), tyro.conf.arg(help_behavior_hint="")]
Number = Annotated[float | None, _optional(float, "FLOAT"), tyro.conf.arg(help_behavior_hint="")]
Text = Annotated[str | None, _optional(str, "TEXT"), tyro.conf.arg(help_behavior_hint="")]
File = Annotated[Path | None, _optional(Path, "FILE"), tyro.conf.arg(help_behavior_hint="")]


def load(name: str, device: Device, dtype: Dtype, depth: Whole) -> Any:
    """The model (DiT) that the options ask for. ValueError for a device that is not there."""
    import torch

    from odelt_fast.checkpoints.folder import load_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here: use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(name, device=device, dtype=choose_dtype(dtype, device), depth=depth)


def load_decoder(name: str | None, model: DiT) -> Decoder | None:
    """The decoder of --decoder, on the model's device; ValueError if it takes other latents than
    the model makes."""
    if name is None:
        return None
    import torch

    from odelt_fast.sampling import decoder as decoders

    # float16 overflows in the usual autoencoders.
    found = decoders.load_decoder(
        name, model.device, torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    )
    if found.latent_channels != model.config.channels:
        raise ValueError(
            f"--decoder {name} takes latents of {found.latent_channels} channels, the model makes"
            f" {model.config.channels}"
        )
    return found


def choose_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of --dtype: auto is bfloat16 where the device computes in it (GPUs; CPUs with
    AVX512-BF16 or AMX), else float32."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = device == "cuda" or any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return torch.bfloat16 if native else torch.float32


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
