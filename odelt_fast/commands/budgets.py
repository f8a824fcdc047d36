"""What commands with a budget share: its options, and the choice that it leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from odelt_fast.checks import parse_memory, parse_seconds

from .options import device_of, dtype_name

if TYPE_CHECKING:
    from odelt_fast.planning.planner import Candidate, Choice

    from .sample_options import Command


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


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate for --json."""
    from odelt_fast.evaluation.operation_fields import operation_fields

    fields = operation_fields(candidate.operation)
    return {
        **{name: fields[name] for name in ("depth", "solver", "steps", "tolerance")},
        "depth_schedule": fields["schedule"],
        "guidance_interval": fields.get("guidance_interval"),
        "latency": candidate.latency,
        "peak_memory": candidate.memory,
        "batch": candidate.batch,
        "measured_batch": candidate.measured_batch,
        "evaluations": candidate.evaluations,
        "metric": candidate.metric,
        "quality": None if candidate.quality is None else candidate.quality._asdict(),
    }


def choice_json(choice: Choice) -> dict[str, Any]:
    """A choice for --json."""
    return {"why": choice.why, **candidate_json(choice.candidate)}


# Options of `odelt-fast sample` that say what a budget chooses, and those whose effect on cost and
# quality was not measured: their defaults leave them to it.
_CHOSEN = ("depth", "steps", "solver", "depth_schedule", "rtol", "atol")
_UNMEASURED = (
    "time_shift",
    "guidance_interval",
    "error_norm",
    "max_steps",
    "trajectory",
    "invert",
    "interpolate",
    "init_image",
)


def choose_for(options: Command) -> Choice | None:
    """What `odelt-fast sample` runs within its budget, which is for a batch, of --batch-size or all
    images.

    Args:
        options: the command's.

    Returns:
        The choice, or None if there is no budget.

    Raises:
        ValueError: for options that the choice would contradict or whose effect on quality was not
            measured, and where nothing can be chosen.
    """
    max_latency, max_memory = limits(options.max_latency, options.max_memory)
    if max_latency is None and max_memory is None:
        for name in ("profile", "quality", "metric"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} goes with a budget: --max-latency or --max-memory")
        return None
    for name in _CHOSEN + _UNMEASURED:
        if getattr(options, name) != getattr(type(options), name):
            chosen, unknown = "is what a budget chooses", "has no measured cost or quality"
            raise ValueError(
                f"--{name.replace('_', '-')} {chosen if name in _CHOSEN else unknown}: leave it"
                " out, or --max-latency and --max-memory"
            )

    from odelt_fast.planning.evidence import find_evidence

    device = device_of(options.device)
    evidence = find_evidence(options.model, device, options.profile, options.quality)
    return evidence.choose(
        max_latency,
        max_memory,
        batch=min(options.num_images, options.batch_size or options.num_images),
        precision=dtype_name(options.dtype, device.type),
        guidance_scale=options.guidance_scale,
        metric=options.metric,
    )
