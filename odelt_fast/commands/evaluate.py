"""`odelt-fast evaluate`: the tables of quality, latency and memory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from odelt_fast.evaluation.arguments import metavar
from odelt_fast.evaluation.settings import COMPARING, Evaluation
from odelt_fast.files import make_folder
from odelt_fast.operation import parse_schedule

from .options import (
    Device,
    Dtype,
    Number,
    Text,
    check_guidance,
    check_trust,
    choose_dtype,
    device_of,
    refuse_unused,
)

Schedules = Annotated[tuple[str, ...], metavar("T:L,... ...")]


@dataclass(frozen=True)
class Command(Evaluation):
    """Measure quality, latency and memory of a model over depths, time steps and solvers, as tables
    (JSON and Markdown).

    The same command goes on where it was interrupted. Several GPUs: torchrun --nproc-per-node 4 -m
    odelt_fast.cli evaluate ...

    With --samples no model is needed: the images are there.
    """

    model: Text = None  # type: ignore[assignment]  # `evaluation_of` has the default
    """Folder of a model, name of a bundled one, or Hub id (user/repo); digits by default."""
    samples: Text = None
    """In place of --model: images that exist already, all of one size. A folder of them, a Parquet
    file, or .npz with arr_0 (N, H, W, C) uint8 as ADM's evaluator reads it. frechet, kid and
    precision_recall against --data (or, frechet, --stats), under either --protocol."""
    data: Text = None
    """Real images to compare with, as for training: digits, a folder, a Parquet file, a data set's
    id."""
    image_column: Text = None
    """Column of images where --data is a table; looked for by type and name by default."""
    label_column: Text = None
    """Column of labels, as --image-column."""
    stats: Text = None
    """In place of --data: statistics file (.npz with mu and sigma) of the same feature network, as
    odelt-fast stats writes."""
    depth_schedules: Schedules = ()  # type: ignore[assignment]  # `evaluation_of` reads them
    """Depths that change with time, beside the depths: 0:4,0.5:12 runs 4 blocks up to t = 0.5 and
    12 from there on. For solvers with equal steps."""
    guidance_scale: Number = None
    """w in v_null + w (v_label - v_null). Guided steps are two evaluations."""
    inception_weights: Text = None
    """Weights of the Inception network (.pth of pytorch-fid or torch-fidelity, .safetensors);
    looked for in torch's cache by default."""
    decoder: Text = None
    """For models of latents: autoencoder, a folder or Hub id (stabilityai/sd-vae-ft-mse)."""
    any_decoder: bool = False
    """Also an autoencoder of other latents than the model was trained on."""
    out: Path = Path("evaluation")
    """Folder for results.json, results.md, and the state to go on from."""
    device: Device = "auto"
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU and on CPUs that compute in it, else float32."""
    json: bool = False
    """Print the results as one JSON object."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Nothing: `evaluation_of` validates, and its errors are one line; here they would be the
        parser's."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    if options.samples is not None:
        measure_samples(options.samples, options)
        return
    settings = evaluation_of(options)
    check_effects(options)
    dtype = choose_dtype(options.dtype, device_of(options.device).type)

    from odelt_fast.evaluation.evaluator import Evaluator
    from odelt_fast.evaluation.results import to_markdown

    with new_folder(options.out):
        evaluator = Evaluator(
            settings,
            options.out,
            device=options.device,
            dtype=dtype,
            show=not (options.quiet or options.json),
        )
    first = evaluator.processes.index == 0
    if evaluator.inputs.remark and first:
        print(evaluator.inputs.remark, file=sys.stderr)
    results = evaluator.run()
    if first:
        show(results, to_markdown(results), options)
        compared = COMPARING & {*options.metrics}
        if options.data and options.labels != "data" and not compared:
            print("--data had no effect: none of --metrics compares with it", file=sys.stderr)
        if options.allow_few_samples and "frechet" not in compared:
            print("--allow-few-samples had no effect without frechet", file=sys.stderr)


def check_effects(options: Command) -> None:
    """ValueError for the first option that has no effect beside the others."""
    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.solvers.options import is_adaptive

    adaptive = [is_adaptive(solver) for solver in options.solvers]
    if not any(adaptive):
        refuse_unused(options, "without solvers that choose their steps", "tolerances")
    if all(adaptive):
        refuse_unused(options, "without solvers of equal steps", "steps", "paper_guidance")
    if options.paper_guidance and (128 not in options.steps or options.guidance_scale in (0, 1)):
        raise ValueError(
            "--paper-guidance has no effect without --steps 128 and a --guidance-scale that mixes"
            " velocities: leave it out"
        )
    if not COMPARING & {*options.metrics}:
        why = f"on {' and '.join(options.metrics)}, which compare nothing"
        refuse_unused(options, why, "stats")
    if options.data is None:
        refuse_unused(options, "without --data", "split")
    check_trust(options)
    one_class = read_config(options.model or Evaluation.model).num_classes == 1
    check_guidance(options.guidance_scale, one_class)


def measure_samples(samples: str, options: Command) -> None:
    """Runs it with --samples; ValueError for an option that has no effect then."""
    from odelt_fast.evaluation.existing import APPLYING, measure_existing
    from odelt_fast.evaluation.results import to_markdown

    applying = {"samples", "out", "device", "json", "quiet", *APPLYING}
    others = {field.name for field in fields(options)} - applying
    refuse_unused(options, "on --samples, images that exist already", *others)
    settings = evaluation_of(options)
    check_trust(options)
    if settings.data is None and settings.split != Evaluation.split:
        raise ValueError("--split is of --data, which is not given: leave it out")
    quiet = options.quiet or options.json
    with new_folder(options.out):
        results = measure_existing(
            samples, settings, options.out, device=options.device, show=not quiet
        )
    if results:
        show(results, to_markdown(results), options)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Makes --out, and takes it away again after a mistake if it was new and is still empty."""
    made = make_folder("--out", out)
    try:
        yield
    except ValueError:
        if made:
            with contextlib.suppress(OSError):  # another process's, or not empty
                out.rmdir()
        raise


def show(results: dict[str, Any], tables: str, options: Command) -> None:
    """Prints what was found, and where it is."""
    text = f"{tables}\n{options.out / 'results.md'}, {options.out / 'results.json'}"
    print(json.dumps(results) if options.json else text)


def evaluation_of(options: Any) -> Evaluation:
    """The settings among a command's options."""
    values = {field.name: getattr(options, field.name) for field in fields(Evaluation)}
    values["model"] = values["model"] or Evaluation.model
    try:
        values["depth_schedules"] = tuple(map(parse_schedule, options.depth_schedules))
    except ValueError as error:
        raise ValueError(f"--depth-schedules {error}") from None
    return Evaluation(**values)
