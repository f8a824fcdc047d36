"""From a request over HTTP to a replica and back (extra `cluster`).

What a replica answers is handed on as it is; a request whose replica is lost goes to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from .batching import Rejected
from .server import HttpLimits, error, read_body

ATTEMPTS = 3  # replicas that a request may lose before it is given up
_NUMBERS_SECONDS = 5.0  # for all replicas to tell their numbers
_LOST = "the replica that drew it was lost: ask again"


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
    gone, asked = asyncio.ensure_future(request.receive()), asyncio.ensure_future(answer)
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


def _rejected(rejected: Rejected) -> Response:
    return error(rejected.status, str(rejected), {"retry-after": str(rejected.retry_after)})


def operation_of(body: bytes) -> str:
    """What decides about company, as far as it can be told from a body that nobody has checked."""
    with contextlib.suppress(ValueError, RecursionError):
        asked = json.loads(body)
        if isinstance(asked, dict):
            names = ("depth", "steps", "solver", "guidance_scale", "guidance_interval")
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
