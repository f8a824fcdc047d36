"""`odelt-fast serve`: images over HTTP."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .options import (
    Device,
    Dtype,
    File,
    Text,
    Whole,
    check_counts,
    device_of,
    load,
    load_decoder,
)

if TYPE_CHECKING:
    from odelt_fast.model import DiT
    from odelt_fast.serving.service import Plan


@dataclass(frozen=True)
class Command:
    """Answer requests for images over HTTP, several requests in one batch: POST /generate, GET /
    says what may be asked."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; there is no
    authentication."""
    port: int = 8000
    """0: a free one, which is printed."""
    decoder: Text = None
    """Autoencoder that makes pictures of a model's latents: folder or Hub id."""
    any_decoder: bool = False
    """Also an autoencoder of other latents than the model was trained on."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU, where images are within one level of 255 of those
    that `odelt-fast sample` draws."""
    depth: Whole = None
    """Load no more than these active blocks."""
    profile: File = None
    """Of deadlines: file of odelt-fast profile, from which they get depth and steps; by default
    that of this machine and model."""
    quality: Text = None
    """Of deadlines: folder of odelt-fast evaluate, or its results.json, in place of the
    quality.json in the model's folder."""
    max_batch: Whole = None
    """Images that are drawn at a time, at most: 32 on a CPU, 128 on a GPU by default."""
    max_images: int = 64
    """Images of a request, at most."""
    max_steps: int = 128
    """Time steps of a request, at most."""
    max_evaluations: int = 8192
    """Network evaluations of a request, at most: images x steps x stages of the solver, twice with
    guidance."""
    max_queue: int = 1024
    """Images that wait, at most: then requests get 429."""
    max_client: int = 1024
    """Images that wait for one client's address, at most."""
    max_connections: int = 1024
    """Connections at a time: then requests get 503."""
    timeout: float = 60.0
    """Seconds after which a request is given up (503) if its client sets no earlier deadline."""
    shutdown: int = 30
    """Seconds for running requests when the server is told to stop (SIGTERM, SIGINT)."""
    log: bool = False
    """Print a line for each request: address, route, status, time; never its contents."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "shutdown", "max_connections")
    try:
        from odelt_fast.serving.listening import listen, url_of
        from odelt_fast.serving.server import HttpLimits, create_app, create_server
        from odelt_fast.serving.service import RequestLimits, Service
    except ImportError as missing:
        raise ValueError(str(missing)) from None
    names = [field.name for field in dataclasses.fields(RequestLimits)]
    limits = RequestLimits(**{name: getattr(options, name) for name in names})
    http = HttpLimits(max_connections=options.max_connections, shutdown_seconds=options.shutdown)
    with listen(options.host, options.port) as listener:
        dtype = options.dtype
        if dtype == "auto" and device_of(options.device).type == "cpu":
            dtype = "float32"
        model = load(options.model, options.device, dtype, options.depth)

        def write_error(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        plan = find_plan(options, model)
        if isinstance(plan, str):
            write_error(f"deadlines choose no depth and steps: {plan}")
        decoder = load_decoder(options.decoder, model, options.any_decoder)
        service = Service(model, limits, name=options.model, decoder=decoder, plan=plan)
        service.warm_up()
        url = url_of(listener)

        def started() -> None:
            print(f"{options.model} on {model.device}: {url} (Ctrl-C stops it)", flush=True)

        app = create_app(service, http, write_error if options.log else None, started)
        create_server(app, http).run([listener])
    print("stopped", flush=True)


def find_plan(options: Command, model: DiT) -> Plan | str:
    """What turns deadlines into depth and steps, or why nothing does. ValueError for files that
    were asked for and cannot be used."""
    from odelt_fast.planning.evidence import deadline_planner

    precision = str(model.dtype).removeprefix("torch.")
    try:
        if model.max_depth < model.config.depth:
            raise ValueError("profiles may choose blocks that --depth leaves out")
        plan = deadline_planner(
            options.model,
            model.device,
            precision=precision,
            profile=options.profile,
            quality=options.quality,
        )
        plan(1, None, 1e6)  # a profile of another precision is found out here
        return plan
    except ValueError as error:
        if options.profile is not None or options.quality is not None:
            raise
        return str(error)
