"""The service on many processes and machines: an application of Ray Serve (extra `cluster`).

    odelt-fast serve --model digits --replicas 4
    serve run odelt_fast.serving.cluster:app model=digits replicas=4

Replicas draw, each with a device, a model and a batcher of its own. A front takes requests over
HTTP and hands each to a replica: of those that have no more than their share, always the same one
for the same way to sample, so that batches fill. What a replica answers is what the server of one
process would (server.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from odelt_fast.checkpoints.folder import read_config
from odelt_fast.checks import number, whole
from odelt_fast.files import one_line

from .listening import listen, url_of
from .opening import Opening, open_service
from .server import HttpLimits, create_app, create_server, observed
from .service import RequestLimits

try:
    from pydantic import TypeAdapter
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Mount
    from starlette.types import Receive, Scope, Send

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody else's matter
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

    from .front import Answered, Asked, call, forward
except ImportError:
    raise ImportError(
        "odelt-fast serve --replicas needs Ray Serve: pip install 'odelt-fast[cluster]'"
    ) from None

NAME = "odelt-fast"  # of the application
_UNEVEN = 1.25  # how many times its even share of the requests a replica takes


@dataclass(frozen=True)
class Replicas:
    """How many: up to max_replicas as requests come, if that is given; processors of each; seconds
    for what runs in one that is stopped."""

    replicas: int = 1
    max_replicas: int | None = None
    cpus: float = 1.0
    shutdown: int = 30

    def __post_init__(self) -> None:
        for name in ("replicas", "shutdown"):
            whole(name, getattr(self, name))
        number("cpus", self.cpus, 0.01, 1e4)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas must be at least replicas, {self.replicas}, not {self.max_replicas}"
            )


@dataclass(frozen=True)
class Settings:
    """Of the application."""

    opening: Opening = field(default_factory=Opening)
    limits: RequestLimits = field(default_factory=RequestLimits)
    replicas: Replicas = field(default_factory=Replicas)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """From options by name, whose values may be texts. ValueError for what cannot be."""
        left = dict(arguments)

        def taken(kind: type[Any]) -> Any:
            names = [each.name for each in fields(kind) if each.name in left]
            return TypeAdapter(kind).validate_python({name: left.pop(name) for name in names})

        settings = cls(taken(Opening), taken(RequestLimits), taken(Replicas))
        if left:
            raise ValueError(f"the application has no argument {', '.join(left)}")
        return settings


class Replica:
    """Draws, with a model of its own: the ASGI application of one process, asked through Ray."""

    def __init__(self, opening: Opening, limits: RequestLimits, threads: int) -> None:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self.log = logging.getLogger("ray.serve")
        self.service = open_service(opening, limits, self.log.warning)
        self.app = create_app(self.service)

    async def answer(self, asked: Asked) -> Answered:
        """What the application answers. Cancelled where the client has left."""
        return await call(self.app, asked)

    async def numbers(self) -> tuple[str, str]:
        """The replica's id, and what its /metrics shows."""
        shown = await self.answer(Asked("GET", "/metrics", [], None, b"", 0.0))
        return serve.get_replica_context().replica_id.unique_id, shown.body.decode()

    def check_health(self) -> None:
        """Asked by Ray now and then: a replica that raises is replaced."""
        if not self.service.batcher.healthy:
            raise RuntimeError("the thread that draws has died")

    def __del__(self) -> None:
        if service := getattr(self, "service", None):
            service.batcher.stop()


class ByOperation(RequestRouter):  # type: ignore[misc]
    """Sends the same operation to the same replica, so that batches fill, unless that has more than
    its share of the requests: rendezvous hashing, so that a replica more or less moves few of them,
    with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016), so that none idles beside a queue.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        operation = pending_request.metadata.multiplexed_model_id if pending_request else ""
        lengths = self.replica_queue_len_cache
        loads = {each.replica_id: lengths.get(each.replica_id) or 0 for each in candidate_replicas}
        share = math.ceil(_UNEVEN * (sum(loads.values()) + 1) / max(1, len(loads)))

        def place(replica: RunningReplica) -> tuple[int, bytes]:
            text = f"{operation} {replica.replica_id.unique_id}"
            over = max(0, loads[replica.replica_id] + 1 - share)
            return over, hashlib.blake2b(text.encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=place)]


class Front:
    """The ingress of the application."""

    def __init__(self, replicas: DeploymentHandle, limits: HttpLimits) -> None:
        self.replicas, self.limits = replicas, limits

    async def __call__(self, request: Request) -> Response:
        return await forward(request, self.replicas, self.limits)


def replicas_of(settings: Settings) -> serve.Application:
    """The replicas alone."""
    wanted, limits = settings.replicas, settings.limits
    gpu = settings.opening.device == "cuda" or (
        settings.opening.device == "auto"
        and ray.is_initialized()
        and ray.cluster_resources().get("GPU", 0)
    )
    batch = limits.max_batch or (128 if gpu else 32)
    count: dict[str, Any] = {"num_replicas": wanted.replicas}
    if wanted.max_replicas is not None:
        count = {
            "autoscaling_config": {
                "min_replicas": wanted.replicas,
                "max_replicas": wanted.max_replicas,
                "target_ongoing_requests": batch,
            }
        }
    router: Any = f"{__name__}:ByOperation"
    deployment = serve.deployment(
        name="Replica",
        max_ongoing_requests=limits.max_queue,
        graceful_shutdown_timeout_s=wanted.shutdown,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": int(bool(gpu))},
        request_router_config=RequestRouterConfig(request_router_class=router),
        **count,
    )(Replica)
    return deployment.bind(settings.opening, limits, max(1, int(wanted.cpus)))


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and `serve deploy`: replicas behind an ingress.

    Args:
        arguments: options of `odelt-fast serve`, "_" for "-".
    """
    front = serve.deployment(
        name="Front", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0}
    )(Front)
    return front.bind(replicas_of(Settings.of(arguments)), HttpLimits())


def run_cluster(
    settings: Settings,
    address: tuple[str, int],
    http: HttpLimits,
    log: Callable[[str], object] | None,
) -> None:
    """`odelt-fast serve --replicas`: the front in this process, the replicas in a cluster of Ray:
    that of RAY_ADDRESS, or one on this machine that ends with the process."""
    read_config(settings.opening.model)  # what is wrong with it is told at once
    with listen(*address) as listener:
        quiet = logging.ERROR  # its lines of progress are not what a service prints
        logging.getLogger("ray.serve").setLevel(quiet)
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False,
            logging_level=quiet,
            log_to_driver=False,
        )
        try:
            _check_room(settings)
            serve.start(proxy_location="Disabled")
            try:
                replicas = serve.run(replicas_of(settings), name=NAME, route_prefix=None)
            except RuntimeError as failed:  # the constructor's traceback, last line last
                why = one_line(str(failed).strip().splitlines()[-1])
                raise ValueError(f"the replicas cannot start: {why}") from None

            async def answer(scope: Scope, receive: Receive, send: Send) -> None:
                response = await forward(Request(scope, receive), replicas, http)
                await response(scope, receive, send)

            @contextlib.asynccontextmanager
            async def lifespan(_: Starlette) -> AsyncIterator[None]:
                print(
                    f"{settings.opening.model} on {settings.replicas.replicas} replicas:"
                    f" {url_of(listener)} (Ctrl-C stops it)",
                    flush=True,
                )
                yield

            def observe(scope: Scope, status: int, seconds: float) -> None:
                if log is not None:
                    client = (scope["client"] or ("",))[0]
                    log(f"{client} {scope['path']!r} {status} {seconds * 1e3:.1f} ms")

            front = Starlette(routes=[Mount("/", answer)], lifespan=lifespan)
            create_server(observed(front, observe), http).run([listener])
        finally:
            if "RAY_ADDRESS" in os.environ:
                serve.delete(NAME)
            ray.shutdown()


def _check_room(settings: Settings) -> None:
    """ValueError if this machine's cluster has too few processors; one of RAY_ADDRESS may grow."""
    replicas, has = settings.replicas, ray.cluster_resources().get("CPU", 0)
    wanted = replicas.replicas * replicas.cpus
    if wanted > has and "RAY_ADDRESS" not in os.environ:
        raise ValueError(
            f"--replicas {replicas.replicas} of --cpus {replicas.cpus:g} need {wanted:g}"
            f" processors, this machine has {has:g}"
        )
