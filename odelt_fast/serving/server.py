"""The service over HTTP: routes, errors, metrics, start and stop (extra `serve`). What may be
asked: service.py."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from odelt_fast import __version__
from odelt_fast.serving.batching import MISSING, Batcher, Job, Refused
from odelt_fast.serving.http_limits import Guard, HttpLimits, Message, Server
from odelt_fast.serving.service import Asked, Service

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
except ImportError:
    raise ImportError(MISSING) from None

MEDIA_TYPES = {"png": "image/png", "json": "application/json", "npz": "application/octet-stream"}
ROUTES = ("/", "/generate", "/health", "/ready", "/metrics", "/openapi.json")


class Metrics:
    """What /metrics shows of a service."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "odelt"}
        sizes = [2.0**i for i in range(9)]
        times = [0.001 * 2**i for i in range(16)]
        self.requests = Counter(
            "requests",
            "Requests by route and status; 499: the client left",
            ["route", "status"],
            **own,
        )
        self.refused = Counter(
            "refused", "Requests answered with 429 or 503, by reason", ["reason"], **own
        )
        self.latency = Histogram(
            "request_seconds",
            "Seconds from a request of /generate to its answer",
            buckets=times,
            **own,
        )
        self.late = Counter("late", "Answers that came after their deadline", **own)
        self.batch_images = Histogram("batch_images", "Images of a batch", buckets=sizes, **own)
        self.batch_requests = Histogram(
            "batch_requests", "Requests that shared a batch", buckets=sizes, **own
        )
        self.batch_seconds = Histogram(
            "batch_seconds", "Seconds that a batch took to draw", buckets=times, **own
        )
        Gauge("waiting_images", "Images that wait", **own).set_function(
            lambda: service.batcher.waiting
        )
        Gauge("ready", "1 if requests are taken", **own).set_function(lambda: service.batcher.alive)
        service.batcher.on_batch = self.batch

    def batch(self, jobs: int, images: int, seconds: float) -> None:
        self.batch_requests.observe(jobs)
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def request(self, scope: Message, status: int, seconds: float) -> str:
        """Counts a request; returns its route, or "other", since anybody can think of any number of
        paths."""
        route: str = scope["path"] if scope["path"] in ROUTES else "other"
        self.requests.labels(route, status).inc()
        if route == "/generate":
            self.latency.observe(seconds)
        return route


def create_app(
    service: Service, limits: HttpLimits | None = None, log: Callable[[str], object] | None = None
) -> Guard:
    """The ASGI application of a service. log(line) is called for each request with its route,
    status, time and address: no contents."""
    metrics = Metrics(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.stop)

    app = FastAPI(
        title="odelt-fast", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )

    def error(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message[:500]}, status)

    def refuse(refused: Refused) -> JSONResponse:
        metrics.refused.labels(refused.reason).inc()
        response = error(refused.status, str(refused))
        if refused.retry_after is not None:
            response.headers["retry-after"] = str(refused.retry_after)
        return response

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, wrong: HTTPException) -> JSONResponse:
        return error(wrong.status_code, wrong.detail)

    @app.exception_handler(Exception)
    async def broken(request: Request, wrong: Exception) -> JSONResponse:
        return error(500, "an error in the server; its log says more")

    async def generate(request: Request) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if (
            kind != "application/json"
        ):  # other types are what a page of another origin may send without asking first
            return error(415, "the body must be JSON, with content-type: application/json")
        try:
            asked = Asked.model_validate_json(await request.body())
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            job, form = service.job(asked, request.client.host if request.client else "", future)
            service.batcher.submit(job)
            body = await wait(service.batcher, job, request)
        except ValidationError as wrong:
            return error(*explain(wrong))
        except ValueError as wrong:
            return error(422, str(wrong))
        except Refused as refused:
            return refuse(refused)
        except MemoryError:
            return refuse(Refused(503, "memory", "not enough memory: ask for fewer images", 1))
        if body is None:
            return Response(status_code=499)
        headers = {
            f"x-odelt-{name.replace('_', '-')}": str(value)
            for name, value in service.about(job).items()
        }
        if asked.deadline_ms is not None:
            late = time.monotonic() > job.deadline
            metrics.late.inc(late)
            headers["x-odelt-deadline-met"] = str(not late).lower()
        return Response(body, media_type=MEDIA_TYPES[form], headers=headers)

    async def describe() -> dict[str, Any]:
        return service.describe()

    async def health() -> JSONResponse:
        return (
            JSONResponse({"status": "ok"})
            if service.batcher.healthy
            else error(503, "the thread that draws has died")
        )

    async def ready() -> JSONResponse:
        return (
            JSONResponse({"ready": True})
            if service.batcher.alive
            else error(503, "requests are not taken any more")
        )

    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    schema = {
        "required": True,
        "content": {"application/json": {"schema": Asked.model_json_schema()}},
    }
    app.add_api_route(
        "/generate",
        generate,
        methods=["POST"],
        response_model=None,
        openapi_extra={"requestBody": schema},
    )
    for path, route in (
        ("/", describe),
        ("/health", health),
        ("/ready", ready),
        ("/metrics", numbers),
    ):
        app.add_api_route(path, route, methods=["GET"], response_model=None)

    def observe(scope: Message, status: int, seconds: float) -> None:
        route = metrics.request(scope, status, seconds)
        if log is not None:
            log(f"{(scope['client'] or ('',))[0]} {route} {status} {seconds * 1e3:.1f} ms")

    return Guard(app, limits or HttpLimits(), observe)


async def wait(batcher: Batcher, job: Job, request: Request) -> bytes | None:
    """A job's answer, or None if the client leaves. Raises what became of it; Refused when its
    deadline passes before it is begun."""
    gone = asyncio.ensure_future(request.receive())  # after the body: ends when the client leaves
    try:
        left = max(0.0, job.deadline - time.monotonic())
        await asyncio.wait((job.future, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not job.future.done() and not gone.done():
            if batcher.withdraw(job):
                raise Refused(
                    503,
                    "deadline",
                    "the deadline passed before the images were drawn",
                    batcher.backlog(),
                )
            await asyncio.wait((job.future, gone), return_when=asyncio.FIRST_COMPLETED)
        if job.future.done():
            return job.future.result()
        batcher.withdraw(job)
        return None
    except asyncio.CancelledError:
        batcher.withdraw(job)
        raise
    finally:
        gone.cancel()


def explain(wrong: ValidationError) -> tuple[int, str]:
    """Status and one line that names the first thing that is wrong with a body."""
    first = wrong.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(
        str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()
    )[:60]
    return (400 if first["type"] == "json_invalid" else 422), (
        f"{where}: {first['msg']}" if where else first["msg"]
    )


def run(
    service: Service,
    listener: socket.socket,
    *,
    limits: HttpLimits | None = None,
    log: Callable[[str], object] | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Serves on a listening socket until SIGTERM or SIGINT; on_start() is called when requests are
    answered."""
    limits = limits or HttpLimits()
    Server(create_app(service, limits, log), limits, on_start, service.batcher.close).run(
        sockets=[listener]
    )
