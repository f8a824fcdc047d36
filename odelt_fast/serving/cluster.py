"""The service on many processes and machines: an application of Ray Serve (extra `cluster`).

    odelt-fast serve --model digits --replicas 4
    serve run odelt_fast.serving.cluster:app model=digits replicas=4

Replicas draw, each with a device, a model and a batcher of its own. A front takes requests over
HTTP and hands each to a replica: of those with room in their next batch, always the same one for
the same depth, steps, solver and guidance scale, so that batches fill. What a replica answers is
what the server of one process would (server.py); a request whose replica is lost is drawn by
another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from odelt_fast.checkpoints.folder import read_config
from odelt_fast.files import one_line

from .batching import Rejected
from .listening import listen, url_of
from .opening import Opening, open_service
from .server import HttpLimits, create_app, create_server, error, observed, read_body
from .service import RequestLimits

try:
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.parser import text_string_to_metric_families
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody else's matter
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.handle import DeploymentHandle
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError:
    raise ImportError(
        "odelt-fast serve --replicas needs Ray Serve: pip install 'odelt-fast[cluster]'"
    ) from None

NAME = "odelt-fast"  # of the application
ATTEMPTS = 3  # replicas that a request may lose before it is given up
_NUMBERS_SECONDS = 5.0  # for all replicas to tell their numbers
_LOST = "the replica that drew it was lost: ask again"


class Settings(BaseModel):
    """Arguments of the application; those of `odelt-fast serve` have the same names."""

    model_config = ConfigDict(extra="forbid")

    model: str = "digits"
    decoder: str | None = None
    any_decoder: bool = False
    device: str = "auto"
    dtype: str = "auto"
    depth: int | None = None
    profile: Path | None = None
    quality: str | None = None
    max_images: int = RequestLimits.max_images
    max_steps: int = RequestLimits.max_steps
    max_evaluations: int = RequestLimits.max_evaluations
    timeout: float = RequestLimits.timeout
    max_batch: int | None = None
    max_queue: int = RequestLimits.max_queue
    max_client: int = RequestLimits.max_client
    replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[float, Field(gt=0)] = 1.0
    shutdown: Annotated[int, Field(ge=1)] = 30

    def opening(self) -> Opening:
        return Opening(**{field.name: getattr(self, field.name) for field in _fields(Opening)})

    def limits(self) -> RequestLimits:
        names = _fields(RequestLimits)
        return RequestLimits(**{field.name: getattr(self, field.name) for field in names})


def _fields(kind: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


class Asked(NamedTuple):
    """A request of HTTP, and the seconds since it came."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    waited: float


class Answered(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


# Replicas


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


async def call(app: ASGIApp, asked: Asked) -> Answered:
    """Asks an ASGI application in this process."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": asked.headers,
        "client": asked.client,
        "server": None,
        "waited": asked.waited,
    }
    messages = iter([{"type": "http.request", "body": asked.body, "more_body": False}])
    status, headers, body = 500, [], bytearray()

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()  # a client that leaves cancels the call
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], [*message["headers"]]
        else:
            body.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # it has answered 500 already
        logging.getLogger("ray.serve").exception("a request failed")
    return Answered(status, headers, bytes(body))


class ByOperation(RequestRouter):  # type: ignore[misc]
    """Sends the same operation to the same replica until a batch of requests waits there, then to
    the next: rendezvous hashing, so that a replica more or less moves few of them."""

    def initialize_state(self, **kwargs: int) -> None:
        self.max_batch = kwargs["max_batch"]

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        operation = pending_request.metadata.multiplexed_model_id if pending_request else ""

        def place(replica: RunningReplica) -> tuple[int, bytes]:
            waiting = self.replica_queue_len_cache.get(replica.replica_id) or 0
            text = f"{operation} {replica.replica_id.unique_id}"
            return waiting // self.max_batch, hashlib.blake2b(text.encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=place)]


# Front


async def forward(request: Request, replicas: DeploymentHandle, limits: HttpLimits) -> Response:
    """The answer of a replica to a request; 503 where none could give one."""
    start, path = time.monotonic(), request.url.path
    try:
        body = await read_body(request, limits)
    except HTTPException as wrong:
        return error(wrong.status_code, wrong.detail, wrong.headers)
    except ClientDisconnect:
        return Response(status_code=499)
    if (request.method, path) == ("GET", "/metrics"):
        return await numbers(replicas)
    handle = replicas.options(multiplexed_model_id=operation_of(body))
    client = (request.client.host, request.client.port) if request.client else None
    for _ in range(ATTEMPTS):
        waited = time.monotonic() - start
        asked = Asked(request.method, path, request.headers.raw, client, body, waited)
        try:
            answered: Answered = await _unless_left(request, handle.answer.remote(asked))
        except RayActorError:  # a picture is a function of its request: another one draws it
            continue
        except BackPressureError:
            return _rejected(Rejected(429, "queue", "the queue is full", 1))
        except RayServeException:
            break
        except ClientDisconnect:
            return Response(status_code=499)
        response = Response(answered.body, answered.status)
        response.raw_headers = answered.headers
        return response
    return _rejected(Rejected(503, "lost", _LOST, 1))


async def _unless_left(request: Request, answer: Any) -> Answered:
    """Waits for a replica's answer; a client that leaves is drawn for no more."""
    gone, asked = asyncio.ensure_future(request.receive()), asyncio.ensure_future(_await(answer))
    try:
        await asyncio.wait((gone, asked), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise ClientDisconnect
        return asked.result()
    finally:
        gone.cancel()
        if not asked.done():
            answer.cancel()
            asked.cancel()


async def _await(answer: Any) -> Answered:
    found: Answered = await answer
    return found


def _rejected(rejected: Rejected) -> Response:
    return error(rejected.status, str(rejected), {"retry-after": str(rejected.retry_after)})


def operation_of(body: bytes) -> str:
    """What decides about company, as far as it can be told from a body that nobody has checked."""
    with contextlib.suppress(ValueError, RecursionError):
        asked = json.loads(body)
        if isinstance(asked, dict):
            names = ("depth", "steps", "solver", "guidance_scale")
            return " ".join(str(asked.get(name))[:40] for name in names)
    return ""


async def numbers(replicas: DeploymentHandle) -> Response:
    """The metrics of all replicas, told apart by a label."""
    try:
        told = await replicas.broadcast("numbers").results_async(timeout_s=_NUMBERS_SECONDS)
    except (TimeoutError, RayActorError, RayServeException):
        return _rejected(Rejected(503, "lost", "a replica tells no numbers: ask again", 1))
    return Response(joined(told), media_type="text/plain; version=0.0.4; charset=utf-8")


def joined(told: Iterable[tuple[str, str]]) -> bytes:
    """Prometheus texts of (replica, text) as one, with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in told:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                known.add_sample(sample.name, labels, sample.value)

    class Collected:
        def collect(self) -> Iterator[Metric]:
            return iter(families.values())

    registry = CollectorRegistry()
    registry.register(Collected())  # type: ignore[arg-type]
    return generate_latest(registry)


class Front:
    """The ingress of the application."""

    def __init__(self, replicas: DeploymentHandle, limits: HttpLimits) -> None:
        self.replicas, self.limits = replicas, limits

    async def __call__(self, request: Request) -> Response:
        return await forward(request, self.replicas, self.limits)


def replicas_of(settings: Settings) -> serve.Application:
    """The replicas alone."""
    wanted, limits = settings, settings.limits()
    gpu = wanted.device == "cuda" or (
        wanted.device == "auto" and ray.is_initialized() and ray.cluster_resources().get("GPU", 0)
    )
    batch = limits.max_batch or (128 if gpu else 32)
    count: dict[str, Any] = {"num_replicas": wanted.replicas}
    if wanted.max_replicas is not None:
        if wanted.max_replicas < wanted.replicas:
            raise ValueError(
                f"max_replicas must be at least replicas, {wanted.replicas}, not"
                f" {wanted.max_replicas}"
            )
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
        request_router_config=RequestRouterConfig(
            request_router_class=router,
            request_router_kwargs={"max_batch": batch},
        ),
        **count,
    )(Replica)
    return deployment.bind(wanted.opening(), limits, max(1, int(wanted.cpus)))


def app(settings: Settings) -> serve.Application:
    """The application for `serve run` and `serve deploy`: replicas behind an ingress."""
    front = serve.deployment(
        name="Front", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0}
    )(Front)
    return front.bind(replicas_of(settings), HttpLimits())


def run_cluster(
    settings: Settings,
    address: tuple[str, int],
    http: HttpLimits,
    log: Callable[[str], object] | None,
) -> None:
    """`odelt-fast serve --replicas`: the front in this process, the replicas in a cluster of Ray:
    that of RAY_ADDRESS, or one on this machine that ends with the process."""
    read_config(settings.model)  # what is wrong with it is told at once
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

            async def front(scope: Scope, receive: Receive, send: Send) -> None:
                if scope["type"] == "lifespan":
                    return await _lifespan(receive, send, started)
                response = await forward(Request(scope, receive), replicas, http)
                await response(scope, receive, send)

            def started() -> None:
                print(
                    f"{settings.model} on {settings.replicas} replicas: {url_of(listener)}"
                    " (Ctrl-C stops it)",
                    flush=True,
                )

            def observe(scope: Scope, status: int, seconds: float) -> None:
                if log is not None:
                    client = (scope["client"] or ("",))[0]
                    log(f"{client} {scope['path']!r} {status} {seconds * 1e3:.1f} ms")

            create_server(observed(front, observe), http).run([listener])
        finally:
            if "RAY_ADDRESS" in os.environ:
                serve.delete(NAME)
            ray.shutdown()


def _check_room(settings: Settings) -> None:
    """ValueError if this machine's cluster has too few processors; one of RAY_ADDRESS may grow."""
    wanted, has = settings.replicas * settings.cpus, ray.cluster_resources().get("CPU", 0)
    if wanted > has and "RAY_ADDRESS" not in os.environ:
        raise ValueError(
            f"--replicas {settings.replicas} of --cpus {settings.cpus:g} need {wanted:g}"
            f" processors, this machine has {has:g}"
        )


async def _lifespan(receive: Receive, send: Send, started: Callable[[], object]) -> None:
    await receive()
    started()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


__all__: Sequence[str] = ("ByOperation", "Front", "Replica", "Settings", "app", "run_cluster")
