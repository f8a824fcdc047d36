"""The service over HTTP: routes, errors, limits, start and stop (extra `serve`).

What may be asked: service.py.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from odelt_fast import __version__

from .batching import MISSING, Batcher, Job, Rejected
from .listening import allow_files
from .metrics import Metrics
from .service import GenerateRequest, Service

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ImportError(MISSING) from None

MEDIA_TYPES = {"png": "image/png", "json": "application/json", "npz": "application/octet-stream"}
ROUTES = ("/", "/generate", "/health", "/ready", "/metrics", "/openapi.json")
_KEEP_ALIVE_SECONDS = 15
_CLIENT_LEFT = 499  # nginx's status for it


@dataclass(frozen=True)
class HttpLimits:
    """Bytes of a request's body; connections at a time; seconds for a body to come, and for what
    runs to finish when the server is told to stop. Slow headers and slow readers are a proxy's
    (docs/serving.md)."""

    max_body: int = 16 << 10
    max_connections: int = 1024
    body_seconds: float = 10.0
    shutdown_seconds: int = 30


def create_app(
    service: Service,
    limits: HttpLimits | None = None,
    log: Callable[[str], object] | None = None,
    on_start: Callable[[], object] = lambda: None,
) -> ASGIApp:
    """The ASGI application of a service.

    Args:
        limits: of a request's body.
        log: called with a line for each request: address, route, status, time; no contents.
        on_start: called when the server has started.
    """
    metrics, limits = Metrics(service.batcher), limits or HttpLimits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        on_start()
        yield
        await asyncio.to_thread(service.batcher.stop)

    app = FastAPI(
        title="odelt-fast", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )

    def reject(rejected: Rejected) -> JSONResponse:
        metrics.rejected.labels(rejected.reason).inc()
        seconds = rejected.retry_after
        headers = None if seconds is None else {"retry-after": str(seconds)}
        return error(rejected.status, str(rejected), headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, wrong: HTTPException) -> JSONResponse:
        return error(wrong.status_code, wrong.detail, wrong.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, wrong: Exception) -> JSONResponse:
        return error(500, "an error in the server; its log says more")

    async def generate(request: Request) -> Response:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        # Other types are what a page of another origin may send without asking first.
        if kind != "application/json":
            return error(415, "the body must be JSON, with content-type: application/json")
        try:
            wanted = GenerateRequest.model_validate_json(await read_body(request, limits))
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            client = request.client.host if request.client else ""
            # Seconds that a front has held it already.
            job, form = service.job(wanted, client, future, request.scope.get("waited", 0.0))
            service.batcher.submit(job)
            body = await wait(service.batcher, job, request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        except ValidationError as wrong:
            return error(*explain(wrong))
        except ValueError as wrong:
            return error(422, str(wrong))
        except Rejected as rejected:
            return reject(rejected)
        except MemoryError:
            return reject(Rejected(503, "memory", "not enough memory: ask for fewer images", 1))
        headers = {
            f"x-odelt-{name.replace('_', '-')}": str(value)
            for name, value in service.about(job).items()
        }
        if wanted.deadline_ms is not None:
            late = time.monotonic() > job.deadline
            metrics.late.inc(late)
            headers["x-odelt-deadline-met"] = str(not late).lower()
        return Response(body, media_type=MEDIA_TYPES[form], headers=headers)

    async def describe() -> dict[str, Any]:
        return service.describe()

    async def health() -> Response:
        if service.batcher.healthy:
            return JSONResponse({"status": "ok"})
        return error(503, "the thread that draws has died")

    async def ready() -> Response:
        if service.batcher.alive:
            return JSONResponse({"ready": True})
        return error(503, "requests are not taken any more")

    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    schema = GenerateRequest.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    extra = {"requestBody": body}
    app.post("/generate", response_model=None, openapi_extra=extra)(generate)
    app.get("/")(describe)
    for path, route in (("/health", health), ("/ready", ready), ("/metrics", numbers)):
        app.get(path, response_model=None)(route)

    def observe(scope: Scope, status: int, seconds: float) -> None:
        # Anybody can think of any number of paths.
        route = scope["path"] if scope["path"] in ROUTES else "other"
        metrics.observe_request(route, status, seconds)
        if log is not None:
            log(f"{(scope['client'] or ('',))[0]} {route} {status} {seconds * 1e3:.1f} ms")

    return observed(app, observe)


def error(status: int, message: str, headers: Any = None) -> JSONResponse:
    """The answer that says in one line what is wrong."""
    return JSONResponse({"error": message[:500]}, status, headers)


def observed(app: ASGIApp, observe: Callable[[Scope, int, float], None]) -> ASGIApp:
    """`app`, with observe(scope, status, seconds) called after each request.

    Status 499: the client left before it had an answer.
    """

    async def observing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        start, status = time.perf_counter(), _CLIENT_LEFT

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, note_status)
        finally:
            observe(scope, status, time.perf_counter() - start)

    return observing


async def read_body(request: Request, limits: HttpLimits) -> bytes:
    """A request's body.

    Raises:
        HTTPException: 413 for a body that is too large, 408 for one that does not come in time.
        ClientDisconnect: the client has left.
    """
    body, close = bytearray(), {"connection": "close"}
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                # What is too large is read to its end all the same, and forgotten: who is still
                # sending would not read the answer.
                if len(body) <= limits.max_body:
                    body += part
    except TimeoutError:
        if len(body) <= limits.max_body:
            late = f"the body did not come within {limits.body_seconds:g} s"
            raise HTTPException(408, late, close) from None
    if len(body) > limits.max_body:
        raise HTTPException(413, f"the body may have at most {limits.max_body} bytes", close)
    return bytes(body)


async def wait(batcher: Batcher, job: Job, request: Request) -> bytes:
    """A job's answer.

    Raises:
        ClientDisconnect: the client has left.
        Rejected: the deadline passed before the job was begun.
        Exception: whatever else became of the job.
    """
    gone = asyncio.ensure_future(request.receive())  # after the body: ends when the client leaves
    try:
        left = max(0.0, job.deadline - time.monotonic())
        await asyncio.wait((job.future, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not job.future.done() and not gone.done():
            if batcher.withdraw(job):
                late = "the deadline passed before the images were drawn"
                raise Rejected(503, "deadline", late, batcher.backlog())
            await asyncio.wait((job.future, gone), return_when=asyncio.FIRST_COMPLETED)
        if job.future.done():
            return job.future.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        batcher.withdraw(job)  # whatever ended the wait: what was not begun has nobody who waits


def explain(wrong: ValidationError) -> tuple[int, str]:
    """Status and one line that names the first thing that is wrong with a body."""
    first = wrong.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(
        str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()
    )[:60]
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return 400 if first["type"] == "json_invalid" else 422, message


class Server(uvicorn.Server):
    """Returns after SIGTERM and SIGINT, once what runs is finished.

    uvicorn's own would raise them again. A second SIGINT hangs up on everybody.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True


def create_server(app: ASGIApp, limits: HttpLimits) -> Server:
    """A server of `app` for clients that are not trusted, behind a proxy or not."""
    allow_files(limits.max_connections + 256)
    # A client that sends no HTTP after its answer trips uvicorn; one line each time would let
    # anyone fill a disk, as would uvicorn's own warnings.
    logging.getLogger("asyncio").addFilter(_not_by_a_client)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,  # whoever may name his own address has as many queues as he likes
        server_header=False,
        limit_concurrency=limits.max_connections + 1,  # the number that it does not serve any more
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return Server(config)


def _not_by_a_client(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], h11.LocalProtocolError))
