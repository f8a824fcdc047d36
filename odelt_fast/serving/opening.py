"""From the names of a model and its files to the service that draws with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.checks import device_of
from odelt_fast.model import DiT
from odelt_fast.planning.evidence import deadline_planner
from odelt_fast.sampling.decoder import decoder_of

from .service import Plan, RequestLimits, Service


@dataclass(frozen=True)
class Opening:
    """What a service draws with; the fields are options of `odelt-fast serve`."""

    model: str = "digits"
    decoder: str | None = None
    any_decoder: bool = False
    device: str = "auto"
    dtype: str = "auto"
    depth: int | None = None
    profile: Path | None = None
    quality: str | None = None


def open_service(
    wanted: Opening, limits: RequestLimits, say: Callable[[str], object] = lambda line: None
) -> Service:
    """The service, warm; `say` is told what it does without.

    Raises:
        ValueError: for a device, model, decoder, profile or table of quality that cannot be used.
    """
    device = device_of(wanted.device)
    dtype = wanted.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = load_model(wanted.model, device, dtype, wanted.depth)
    plan = find_plan(wanted, model)
    if isinstance(plan, str):
        say(f"deadlines choose no depth and steps: {plan}")
    decoder = None
    if wanted.decoder is not None:
        decoder = decoder_of(model, wanted.decoder, wanted.any_decoder)
    service = Service(model, limits, name=wanted.model, decoder=decoder, plan=plan)
    service.warm_up()
    return service


def find_plan(wanted: Opening, model: DiT) -> Plan | str:
    """What turns deadlines into depth and steps, or why nothing does. ValueError for files that
    were asked for and cannot be used."""
    precision = str(model.dtype).removeprefix("torch.")
    try:
        if model.max_depth < model.config.depth:
            raise ValueError("profiles may choose blocks that --depth leaves out")
        plan = deadline_planner(
            wanted.model,
            model.device,
            precision=precision,
            profile=wanted.profile,
            quality=wanted.quality,
        )
        plan(1, None, 1e6)  # a profile of another precision is found out here
        return plan
    except ValueError as error:
        if wanted.profile is not None or wanted.quality is not None:
            raise
        return str(error)
