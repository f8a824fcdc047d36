"""`odelt-fast serve`: images over HTTP."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .options import Device, Dtype, File, Number, Text, Whole, check_counts

if TYPE_CHECKING:
    from odelt_fast.serving.server import HttpLimits

T = TypeVar("T")


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
    replicas: Whole = None
    """Draw in this many processes of a Ray cluster (that of RAY_ADDRESS, else one on this machine),
    a GPU each if there are any; limits are a replica's. Default: in this process."""
    max_replicas: Whole = None
    """Start up to so many replicas as requests come, and stop them again."""
    cpus: Number = None
    """Processors of a replica: 1 by default."""
    log: bool = False
    """Print a line for each request: address, route, status, time; never its contents."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "shutdown", "max_connections", "replicas", "max_replicas")
    try:
        from odelt_fast.serving.listening import listen, url_of
        from odelt_fast.serving.opening import Opening, open_service
        from odelt_fast.serving.server import HttpLimits, create_app, create_server
        from odelt_fast.serving.service import RequestLimits
    except ImportError as missing:
        raise ValueError(str(missing)) from None
    limits = chosen(RequestLimits, options)
    http = HttpLimits(max_connections=options.max_connections, shutdown_seconds=options.shutdown)

    def write_error(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    log = write_error if options.log else None
    if options.replicas is not None:
        run_replicas(options, http, log)
    else:
        for name in ("max_replicas", "cpus"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is of --replicas, which is not given")
        with listen(options.host, options.port) as listener:
            service = open_service(chosen(Opening, options), limits, write_error)
            started = f"{options.model} on {service.model.device}: {url_of(listener)}"

            def say() -> None:
                print(f"{started} (Ctrl-C stops it)", flush=True)

            create_server(create_app(service, http, log, say), http).run([listener])
    print("stopped", flush=True)


def run_replicas(options: Command, http: HttpLimits, log: Callable[[str], None] | None) -> None:
    """Runs it in processes of a cluster; mistakes are raised."""
    try:
        from odelt_fast.serving.cluster import Settings, run_cluster
    except ImportError as missing:
        raise ValueError(str(missing)) from None
    elsewhere = ("host", "port", "max_connections", "log")
    values = dataclasses.asdict(options) | {"cpus": 1.0 if options.cpus is None else options.cpus}
    settings = Settings.of({name: values[name] for name in values if name not in elsewhere})
    run_cluster(settings, (options.host, options.port), http, log)


def chosen(kind: type[T], options: Command) -> T:
    """The dataclass of the options that have its fields' names."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names})
