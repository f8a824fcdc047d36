"""The command `odelt-fast`: parses, calls, prints. Loads torch only for a command that needs it.

A mistake ends in one message on stderr and exit code 2. Outputs are tried out before sampling starts, and appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from odelt_fast import __version__
from odelt_fast.outputs import check_folder, check_target, picture_formats, save_picture, try_out, write_whole

if TYPE_CHECKING:
    import torch

    from odelt_fast.sampler import Sampler

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Labels = Annotated[tuple[int, ...], tyro.conf.arg(metavar="LABEL...", help_behavior_hint="")]


def _optional(kind: type, metavar: str) -> Any:
    """Parses an option that has a value or is left out; tyro's own way would offer the value None and explain both in every error."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: kind(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


Whole = Annotated[int | None, _optional(int, "INT"), tyro.conf.arg(help_behavior_hint="")]
Number = Annotated[float | None, _optional(float, "FLOAT"), tyro.conf.arg(help_behavior_hint="")]
File = Annotated[Path | None, _optional(Path, "FILE"), tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class Sample:
    """Draw images with a model: --depth and --steps set the cost."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    depth: Whole = None
    """Active blocks l, one of the model's depths; all by default."""
    steps: int = 4
    """Time steps T. Shortcut models make good images with few (1, 4); plain flow models want 128."""
    num_images: int = 16
    """Images to draw. The noise of image i depends on the seed and i alone."""
    labels: Labels = ()
    """Classes, repeated in turn if fewer than images; the number of classes is the null label. Drawn from the seed by default."""
    seed: int = 0
    """From 0 to 2^64 - 1."""
    guidance_scale: Number = None
    """w in v_null + w (v_label - v_null): 0 ignores the labels, 1 (and the default) uses only them, other values cost twice as much."""
    solver: str = "euler"
    """With --steps equal steps: euler, midpoint, heun2, ralston, kutta3, rk4, rk38, or fixed:NAME. Choosing their own steps: dopri5, tsit5,
    bosh3, dop853, adaptive_heun. torchdiffeq:NAME is torchdiffeq's."""
    rtol: float = 1e-2
    """Relative error that an adaptive solver allows itself in a step."""
    atol: float = 1e-2
    """Absolute error, added to it."""
    max_steps: int = 4096
    """Steps of an adaptive solver, at most."""
    time_shift: float = 1.0
    """Above 1: fixed steps lie closer near the noise, for high resolution. 1: equal steps."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU and on CPUs that compute in it, else float32."""
    batch_size: Whole = None
    """Images at a time; by the size of the model's input by default. Changes no picture."""
    out: File = None
    """Picture of all images in a grid (.png, .jpg, ...). Default: samples.png, or none if --npz is given."""
    npz: File = None
    """Arrays for evaluators: arr_0 images (N, H, W, C) uint8 (latents: float32, as they are), arr_1 labels."""
    json: bool = False
    """Print one JSON object instead of text."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the reference implementation (.pkl) into a model folder. Nothing in the file is executed."""

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


@dataclass(frozen=True)
class Plot:
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


@dataclass(frozen=True)
class Train:
    """Train a model (`odelt-fast train --help` lists the options)."""


@dataclass(frozen=True)
class Env:
    """Show versions, devices and the dtype that auto would choose."""


COMMANDS: dict[str, type] = {"sample": Sample, "convert": Convert, "plot": Plot, "train": Train, "env": Env}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 after a mistake that stderr explains, 130 after Ctrl-C."""
    try:
        try:
            code = run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        message = "not enough memory: draw fewer images, or lower --batch-size"
    except (ValueError, OSError) as mistake:
        message = " ".join(str(mistake).split())
    print(f"error: {message if len(message) <= 600 else message[:597] + '...'}", file=sys.stderr)
    return 2


def run(arguments: list[str]) -> int:
    """Parses and runs; mistakes are raised."""
    if arguments == ["--version"]:
        print(f"odelt-fast {__version__}")
        return 0
    if arguments[:1] == ["train"]:
        from odelt_fast.train.main import main as train

        return train(arguments[1:], prog="odelt-fast train")
    if not arguments or arguments[0] in ("-h", "--help"):
        description = "Train, sample and measure ODE_t(ODE_l) diffusion and flow transformers. --version shows the version."
        commands: Any = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007
        tyro.cli(commands, args=arguments, prog="odelt-fast", description=description)
    if arguments[0] not in COMMANDS:
        raise ValueError(f"odelt-fast begins with a command, {', '.join(COMMANDS)}, not {arguments[0]!r}: odelt-fast --help")
    kind: Any = COMMANDS[arguments[0]]
    plain = (tyro.conf.FlagCreatePairsOff,)
    prog = f"odelt-fast {arguments[0]}"
    options, unknown = tyro.cli(kind, args=arguments[1:], prog=prog, config=plain, return_unknown_args=True)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)])
        raise ValueError(f"{prog} has no {name!r}{', perhaps ' + ' or '.join(near) if near else ''}: see {prog} --help")
    actions: dict[type, Callable[[Any], None]] = {Sample: sample, Convert: convert, Plot: plot, Env: env}
    actions[kind](options)
    return 0


def sample(options: Sample) -> None:
    """`odelt-fast sample`."""
    for name in ("steps", "num_images", "batch_size", "max_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"--seed must be from 0 to 2^64 - 1, not {options.seed}")
    if len(options.labels) > options.num_images:
        raise ValueError(f"--labels: {len(options.labels)} labels for {options.num_images} images: raise --num-images")
    picture = Path("samples.png") if options.out is None and options.npz is None else options.out
    if picture is not None:
        check_target("--out", picture, picture_formats())
    if options.npz is not None:
        check_target("--npz", options.npz, (".npz",))

    import numpy as np
    import torch
    from tqdm import tqdm

    from odelt_fast.plots import image_grid, to_uint8
    from odelt_fast.sampler import Sampler, drawn_labels

    model = load(options.model, options.device, options.dtype, options.depth)
    sampler = Sampler(
        model,
        depth=options.depth,
        steps=options.steps,
        solver=options.solver,
        rtol=options.rtol,
        atol=options.atol,
        max_steps=options.max_steps,
        time_grid="uniform" if options.time_shift == 1 else ("shift", options.time_shift),
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
    )
    config, count = model.config, options.num_images
    if picture is not None:
        blank = np.broadcast_to(np.uint8(0), (count, config.image_size, config.image_size, config.channels))
        try_out("--out", picture, image_grid(blank))
    labels = np.resize(options.labels, count) if options.labels else None
    hidden = True if options.quiet or options.json else None  # None: shown on a terminal only
    try:
        with tqdm(total=None if sampler.adaptive else count * options.steps, unit="step", leave=False, disable=hidden) as bar:
            images = sampler(num_images=count, labels=labels, seed=options.seed, progress=bar.update)
    except torch.OutOfMemoryError as error:
        raise MemoryError from error
    written = []
    if options.npz is not None:
        arrays = to_uint8(images) if config.channels in (1, 3) else images.permute(0, 2, 3, 1).cpu().numpy()
        if labels is None:
            labels = drawn_labels(options.seed, range(count), config.num_classes)
        write_whole(options.npz, lambda file: np.savez(file, arr_0=arrays, arr_1=labels))
        written.append(options.npz)
    if picture is not None:
        save_picture(picture, image_grid(to_uint8(images)))
        written.append(picture)
    report(options, sampler, config.depth, written)


def report(options: Sample, sampler: Sampler, blocks: int, written: Sequence[Path]) -> None:
    """Prints what was drawn, where it is, and what it cost (without loading the model)."""
    about, count = sampler.explain(), options.num_images
    evaluations, seconds = sampler.stats["evaluations_per_image"], sampler.stats["seconds"] / count
    if options.json:
        numbers = {"num_images": count, "evaluations": sampler.stats["evaluations"], "seconds_per_image": seconds}
        print(json.dumps({"files": list(map(str, written)), "model": options.model, "seed": options.seed, **numbers, **about}))
        return
    print(f"{' and '.join(map(str, written))}: {plural(count, 'image')} of {options.model}")
    used = f"{about['live_blocks']} of {plural(blocks, 'block')}"
    if sampler.adaptive:
        taken = [a + r for a, r in zip(sampler.stats["accepted"], sampler.stats["rejected"], strict=True)]
        steps = f"{min(taken)} to {max(taken)} steps" if min(taken) < max(taken) else plural(taken[0], "step")
    else:
        steps = plural(options.steps, "step")
    print(f"depth {about['depth']} ({used}), {steps} of {about['solver']}")
    print(f"{plural(round(evaluations), 'evaluation')} and {seconds:.3g} s per image on {about['device']} in {about['dtype']}")


def convert(options: Convert) -> None:
    """`odelt-fast convert`."""
    if not options.file.is_file():
        raise ValueError(f"{options.file} {'is not a file' if options.file.exists() else 'does not exist'}: give the reference's .pkl file")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is not a folder: give a new or empty folder, or a model folder to replace")
    if options.out.exists() and any(options.out.iterdir()) and not (options.out / "config.json").is_file():
        raise ValueError(f"--out {options.out} holds other files: give a new or empty folder, or a model folder to replace")
    nearest = next(folder for folder in (options.out, *options.out.absolute().parents) if folder.is_dir())
    check_folder("--out", options.out, nearest)

    from odelt_fast.checkpoint import save_model
    from odelt_fast.conversion import convert_reference_checkpoint

    model = convert_reference_checkpoint(
        options.file,
        num_heads=options.num_heads,
        depth_min=options.depth_min,
        depth_group=options.depth_group,
        image_size=options.image_size,
        step_conditioned=options.step_conditioned,
        weights=options.weights,
    )
    save_model(model, options.out, metadata={"weights": options.weights})
    config = model.config
    print(f"{options.out}: {options.weights} weights, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(" ".join(f"{name}={value}" for name, value in config.to_dict().items()))
    print(f"runs at depth {', '.join(map(str, config.depths))}: odelt-fast sample --model {options.out}")


def plot(options: Plot) -> None:
    """`odelt-fast plot grid`."""
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


def env(options: Env) -> None:
    """`odelt-fast env`."""
    import platform

    import numpy as np
    import torch

    from odelt_fast.checkpoint import bundled_models

    print(f"odelt-fast {__version__}, python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"cpu: {torch.get_num_threads()} threads, --dtype auto is {choose_dtype('auto', 'cpu')}".replace("torch.", ""))
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, --dtype auto is {choose_dtype('auto', 'cuda')}".replace("torch.", ""))
    print(f"bundled models: {', '.join(bundled_models()) or 'none'}")


def load(name: str, device: Device, dtype: Dtype, depth: Whole) -> Any:
    """The model (DiT) that the options ask for. ValueError for a device that is not there."""
    import torch

    from odelt_fast.checkpoint import load_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here: use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(name, device=device, dtype=choose_dtype(dtype, device), depth=depth)


def choose_dtype(name: Dtype, device: str) -> torch.dtype:
    """The dtype of --dtype: auto is bfloat16 where the device computes in it (GPUs; CPUs with AVX512-BF16 or AMX), else float32."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = device == "cuda" or any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return torch.bfloat16 if native else torch.float32


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
