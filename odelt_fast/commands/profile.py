"""`odelt-fast profile`: what sampling costs on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from odelt_fast.checks import show_memory, show_seconds
from odelt_fast.evaluation.arguments import Floats, Ints, Names, metavar

from .options import (
    Device,
    File,
    Number,
    Text,
    check_guidance,
    device_of,
    dtype_name,
    plural,
    refuse_unused,
    reporter,
)

if TYPE_CHECKING:
    from odelt_fast.operation import Operation
    from odelt_fast.planning.profile import Measurement, Profile

Precision = Literal["auto", "float32", "bfloat16", "float16", "fp8"]


@dataclass(frozen=True)
class Command:
    """Measure latency and peak memory of a model on this machine, for odelt-fast plan and
    odelt-fast sample --max-latency.

    Run it when nothing else runs: operations take turns, warm. It goes on where it was interrupted,
    and adds to what it measured before.
    """

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    depths: Ints = ()
    """Active blocks l. By default, if steps and solvers are left out too, what the model's table of
    quality has; else all depths."""
    steps: Ints = ()
    """Time steps T. Default: the table's; else 1, 4 and 128."""
    solvers: Names = ()
    """As in odelt-fast sample. Default: the table's; else euler."""
    tolerances: Floats = (1e-2,)
    """rtol and atol of solvers that choose their own steps."""
    batches: Ints = (1, 4, 16)
    """Images at a time. A batch between two of these takes the cost of the larger one as a bound;
    above the largest nothing is known."""
    dtypes: Annotated[tuple[Precision, ...], metavar("NAME...")] = ("auto",)
    """float32, bfloat16, float16, fp8 (GPU: lossy); auto is what odelt-fast sample takes."""
    guidance_scale: Number = None
    """w of guided steps, which cost two evaluations; every w but 0 and 1 costs the same."""
    quality: Text = None
    """Folder of odelt-fast evaluate, or its results.json, in place of the quality.json in the
    model's folder."""
    profile: File = None
    """Where to keep it. Default: a file of this machine and model in the cache folder."""
    seconds: float = 10.0
    """About how long to measure each batch size, in at least 5 rounds."""
    again: bool = False
    """Measure also what the profile has."""
    device: Device = "auto"
    json: bool = False
    """Print the profile as one JSON object."""
    quiet: bool = False
    """Say nothing while measuring."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    for name in ("batches", "steps"):
        values = getattr(options, name)
        if any(value < 1 for value in values) or (name == "batches" and not values):
            shown = " ".join(map(str, values)) or "nothing"
            raise ValueError(f"--{name} must be at least 1, not {shown}")
    if not all(0 < tolerance < 1e3 for tolerance in options.tolerances):
        raise ValueError(
            f"--tolerances must be above 0, not {' '.join(map(str, options.tolerances))}"
        )
    if not options.dtypes:
        raise ValueError("--dtypes must have at least one value")
    if not 0 <= options.seconds < 1e6:
        raise ValueError(f"--seconds must be from 0 to 1000000, not {options.seconds:g}")

    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.evaluation.machine import this_machine
    from odelt_fast.planning.evidence import find_quality
    from odelt_fast.planning.profile import default_path
    from odelt_fast.planning.profiler import Profiler, operations_of
    from odelt_fast.solvers.options import is_adaptive

    device = device_of(options.device)
    config, machine = read_config(options.model), this_machine(device)
    path = options.profile or default_path(machine, config)
    if path.is_dir():
        raise ValueError(f"--profile {path} is a folder: name a file in it")
    profiler = Profiler(options.model, device, path, seconds=options.seconds, again=options.again)
    operations: tuple[Operation, ...] = ()
    if not (options.depths or options.steps or options.solvers):
        quality = find_quality(options.model, config, profiler.weights, options.quality)
        operations = quality.operations(options.guidance_scale) if quality else ()
    else:
        beside = "beside --depths, --steps or --solvers"
        refuse_unused(options, f"{beside}: the table's operations are not measured", "quality")
    solvers, steps = options.solvers or ("euler",), options.steps or (1, 4, 128)
    adaptive = [is_adaptive(solver) for solver in solvers]
    if operations:
        refuse_unused(options, "on the operations of the table of quality", "tolerances")
    elif not any(adaptive):
        refuse_unused(options, "without solvers that choose their steps", "tolerances")
    elif all(adaptive):
        refuse_unused(options, "without solvers of equal steps", "steps")
    check_guidance(options.guidance_scale, config.num_classes == 1)
    depths = [config.check_depth(depth) for depth in options.depths or config.depths]
    operations = operations or operations_of(
        depths, solvers, steps, options.tolerances, options.guidance_scale
    )
    precisions = dict.fromkeys(
        dtype_name(name, device.type) if name == "auto" else name for name in options.dtypes
    )
    report = reporter(options.quiet or options.json)
    found = profiler.run(operations, dict.fromkeys(options.batches), precisions, report)
    if options.json:
        print(json.dumps({"path": str(path), **profile_json(found)}))
        return
    print(table(found))
    print(
        f"{path}: {plural(len(found.measurements), 'measurement')} of {options.model} on"
        f" {found.machine.device}"
    )


def profile_json(profile: Profile) -> dict[str, Any]:
    """The profile for --json."""

    def described(measurement: Measurement) -> dict[str, Any]:
        fields = measurement.fields()
        names = ("depth", "solver", "steps", "tolerance", "schedule")
        return {"operation": {name: fields.pop(name) for name in names}, **fields}

    return {
        "machine": asdict(profile.machine),
        "config": asdict(profile.config),
        "model": profile.model,
        "measurements": [*map(described, profile.measurements)],
    }


def table(profile: Profile) -> str:
    """The measurements, one row each."""
    lines = [
        "| batch | operation | precision | latency (10 % to 90 %) | peak memory |",
        "|---|---|---|---|---|",
    ]
    for m in sorted(profile.measurements, key=lambda m: (m.precision, m.batch, m.latency)):
        guided = "" if m.guidance_scale is None else f", w = {m.guidance_scale:g}"
        spread = f"{show_seconds(m.latency)} ({show_seconds(m.low)} to {show_seconds(m.high)})"
        lines.append(
            f"| {m.batch} | {m.operation}{guided} | {m.precision} | {spread} |"
            f" {show_memory(m.peak_memory)} |"
        )
    return "\n".join(lines)
