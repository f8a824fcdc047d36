"""What the commands share: types of options, loading the model that they name, wording."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from odelt_fast.checks import device_of as device_of
from odelt_fast.evaluation.arguments import metavar
from odelt_fast.files import check_folder

if TYPE_CHECKING:
    import torch

    from odelt_fast.model import DiT
    from odelt_fast.sampling.decoder import Decoder

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Labels = Annotated[tuple[str, ...], metavar("LABEL...")]


def _optional(kind: type, metavar: str) -> Any:
    """Parses an option that has a value or is left out.

    Tyro's own way would offer the value None and explain both in every error.
    """
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
    from odelt_fast.checkpoints.folder import load_model

    place = device_of(device)
    return load_model(name, place, choose_dtype(dtype, place.type), depth)


def load_decoder(name: str | None, model: DiT, any_decoder: bool) -> Decoder | None:
    """The decoder of --decoder, on the model's device; ValueError if it does not fit the model."""
    if name is None:
        if any_decoder:
            raise ValueError("--any-decoder is of --decoder, which is not given")
        return None
    from odelt_fast.sampling.decoder import decoder_of

    return decoder_of(model, name, any_decoder)


def labels_of(texts: Sequence[str], model: DiT) -> list[int]:
    """The classes of --labels; says so where a number is also the name of another class."""
    from odelt_fast.sampling.labels import labels_from_text

    known, classes = model.trained_on, model.config.num_classes
    try:
        labels = labels_from_text(known, texts, classes)
    except ValueError as error:
        raise ValueError(f"--labels: {error}") from None
    for label in dict.fromkeys(labels):
        other = known.find(str(label))
        if other and label not in other:
            name = "the null label" if label == classes else f"named {known.class_names[label]!r}"
            print(
                f"--labels {label} is class number {label}, {name}; the class named {label} is"
                f" number {other[0]}",
                file=sys.stderr,
            )
    return labels


def labels_in_turn(options: Any, model: DiT) -> list[int]:
    """The classes of --labels for --num-images images; ValueError for more of them than images."""
    labels = labels_of(options.labels, model)
    if len(labels) > options.num_images:
        raise ValueError(
            f"--labels: {len(labels)} labels for {options.num_images} images: raise --num-images"
        )
    return labels


def choose_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of --dtype.

    auto is bfloat16 where the device computes in it (GPUs; CPUs with AVX512-BF16 or AMX), else
    float32.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = device == "cuda" or any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return torch.bfloat16 if fast else torch.float32


def dtype_name(name: Any, device: str) -> str:
    """The name of the dtype that --dtype means on a type of device."""
    return str(choose_dtype(name, device)).removeprefix("torch.")


def check_counts(options: Any, *names: str) -> None:
    """ValueError for the first of these options that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def refuse_unused(options: Any, why: str, *names: str) -> None:
    """ValueError for the first of these options that has another value than its default: it has no
    effect, for the reason `why`."""
    for field in dataclasses.fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise ValueError(f"--{option} has no effect {why}: leave it out")


def check_guidance(scale: float | None, null_alone: bool) -> None:
    """ValueError for a guidance scale that would mix the null label's velocities with
    themselves."""
    if scale not in (None, 0, 1) and null_alone:
        raise ValueError(
            "--guidance-scale has no effect where all images have the null label, as those of a"
            " model of one class, and costs twice as much: leave it out"
        )


def check_trust(options: Any) -> None:
    """ValueError for --trust-features of a network that is no program."""
    name = options.features
    known = ("auto", "inception", "digits", "mnist", "cifar10")
    if name in known or Path(name).suffix in (".safetensors", ".pth"):
        refuse_unused(options, f"on --features {name}, which are no program", "trust_features")


def check_model_folder(out: Path) -> None:
    """ValueError unless a model can be written to --out: a new or empty folder, or one of a
    model."""
    problem = None
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


def reporter(silent: bool) -> Callable[[str], None]:
    """What shows the lines of a long command's progress: on standard error, or nowhere."""
    return (lambda line: None) if silent else partial(print, file=sys.stderr)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
