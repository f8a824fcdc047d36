"""What commands with a budget share: its options, and the choice that it leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from odelt_fast.checks import parse_memory, parse_seconds
from odelt_fast.commands.options import choose_dtype, device_of
from odelt_fast.planning.profile import show_schedule

if TYPE_CHECKING:
    from odelt_fast.commands.sample import Command
    from odelt_fast.planning.planner import Choice, Point


def limits(max_latency: str | None, max_memory: str | None) -> tuple[float | None, int | None]:
    """Seconds and bytes that the options ask for; ValueError that names the option."""
    found: list[Any] = []
    for option, text, parse in (
        ("--max-latency", max_latency, parse_seconds),
        ("--max-memory", max_memory, parse_memory),
    ):
        try:
            found.append(None if text is None else parse(text))
        except ValueError as error:
            raise ValueError(f"{option} {error}") from None
    return found[0], found[1]


def described(point: Point) -> dict[str, Any]:
    """A candidate for --json."""
    operation = point.operation
    return {
        **{name: getattr(operation, name) for name in ("depth", "solver", "steps", "tolerance")},
        "depth_schedule": [list(pair) for pair in operation.schedule],
        "latency": point.latency,
        "peak_memory": point.memory,
        "batch": point.batch,
        "measured_batch": point.measured_batch,
        "evaluations": point.evaluations,
        "metric": point.metric,
        "quality": None if point.quality is None else point.quality._asdict(),
    }


def choice_json(choice: Choice) -> dict[str, Any]:
    return {"why": choice.why, **described(choice.point)}


def choose_for(options: Command) -> Choice | None:
    """What `odelt-fast sample` runs within its budget; None if it has none. The budget is for a
    batch, of --batch-size or all images.

    ValueError for options that the choice would contradict or whose effect on quality was not
    measured, and where nothing can be chosen.
    """
    max_latency, max_memory = limits(options.max_latency, options.max_memory)
    if max_latency is None and max_memory is None:
        for name in ("profile", "quality", "metric"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} goes with a budget: --max-latency or --max-memory")
        return None
    plain: dict[str, Any] = {
        "depth": None,
        "steps": None,
        "solver": None,
        "depth_schedule": "",
        "rtol": 1e-2,
        "atol": 1e-2,
    }
    plain |= {
        "time_shift": 1.0,
        "error_norm": "per_sample",
        "trajectory": (),
        "invert": None,
        "interpolate": None,
    }
    for name, default in plain.items():
        if getattr(options, name) != default:
            what = (
                "is what a budget chooses"
                if name in list(plain)[:6]
                else "has no measured cost or quality"
            )
            raise ValueError(
                f"--{name.replace('_', '-')} {what}: leave it out, or --max-latency and"
                " --max-memory"
            )

    from odelt_fast.planning.evidence import find_evidence

    device = device_of(options.device)
    evidence = find_evidence(options.model, device, options.profile, options.quality)
    precision = str(choose_dtype(options.dtype, device.type)).removeprefix("torch.")
    batch = min(options.num_images, options.batch_size or options.num_images)
    asked = {
        "batch": batch,
        "precision": precision,
        "guidance_scale": options.guidance_scale,
        "metric": options.metric,
    }
    return evidence.choose(max_latency, max_memory, **asked)


def as_options(point: Point) -> dict[str, Any]:
    """The options of `odelt-fast sample` that run a candidate."""
    operation = point.operation
    schedule = show_schedule(operation.schedule)
    found: dict[str, Any] = {
        "depth": None if schedule else operation.depth,
        "depth_schedule": schedule,
        "solver": operation.solver,
    }
    found |= {"steps": operation.steps, "batch_size": point.batch}
    return (
        found
        if operation.tolerance is None
        else {**found, "rtol": operation.tolerance, "atol": operation.tolerance}
    )
