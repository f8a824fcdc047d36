"""What a client may send, how slowly, and how a server of ours starts and stops: uvicorn with the
limits that it lacks.

Every request's body is read whole, within a size and a time, before the application sees it;
whoever sends more is answered at once, and what still comes is thrown away for a moment, because
closing a socket with unread data would take the answer back. Connections that do not finish a
header, or do not read what they asked for, are closed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from odelt_fast.serving.batching import MISSING

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise ImportError(MISSING) from None

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
_LINGER_BYTES, _LINGER_SECONDS = 32 << 20, 2.0
_SPARE = 1024  # connections above the limit that are still told why
_FULL = b"503 Service Unavailable\r\nretry-after: 1"
_SLOW = b"408 Request Timeout"
_BAD = b"400 Bad Request"


@dataclass(frozen=True)
class HttpLimits:
    """Bytes of a request's body and of its header; connections at a time; seconds for a header or a
    body to come, for an answer to be read, between two requests of a connection, and for what runs
    to finish when the server is told to stop."""

    max_body: int = 16 << 10
    max_header: int = 16 << 10
    max_connections: int = 1024
    read_seconds: float = 10.0
    write_seconds: float = 60.0
    keep_alive_seconds: int = 15
    shutdown_seconds: int = 30


class Guard:
    """ASGI application that bounds the size of requests to `app`. observe(scope, status, seconds)
    is called for each; status 499: the client left."""

    def __init__(
        self, app: App, limits: HttpLimits, observe: Callable[[Message, int, float], None]
    ) -> None:
        self.app, self.limits, self.observe = app, limits, observe

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(scope, receive)
            if isinstance(body, bytes):
                first = [{"type": "http.request", "body": body, "more_body": False}]

                async def replayed() -> Message:
                    return first.pop() if first else await receive()

                await self.app(scope, replayed, noting)
            elif body is not None:
                await self._refuse(*body, receive, noting)
        finally:
            self.observe(scope, status, time.perf_counter() - start)

    async def _body(self, scope: Message, receive: Receive) -> bytes | tuple[int, str] | None:
        """The body; status and reason of a refusal; None if the client has left."""
        limit = self.limits.max_body
        if (
            len(scope["raw_path"])
            + len(scope["query_string"])
            + sum(map(len, itertools.chain(*scope["headers"])))
            > self.limits.max_header
        ):
            return 431, f"the header may have at most {self.limits.max_header} bytes"
        too_large = 413, f"the body may have at most {limit} bytes"
        for name, value in scope["headers"]:
            if name == b"content-length" and (len(value) > 18 or int(value) > limit):
                return too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message["body"]
                    if len(body) > limit:
                        return too_large
                    if not message["more_body"]:
                        return bytes(body)
        except TimeoutError:
            return 408, f"the body did not come within {self.limits.read_seconds:g} s"

    async def _refuse(self, status: int, reason: str, receive: Receive, send: Send) -> None:
        text = json.dumps({"error": reason}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(text)),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": True})
        left = _LINGER_BYTES
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request" or not message["more_body"]:
                        break
                    left -= len(message["body"])
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def protocol(limits: HttpLimits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with time limits on headers and on reading the answer, and a bound on
    connections.

    What is refused without the application gets its answer even while it is still sending.
    """

    refused = set[H11Protocol]()  # connections above the limit, until they have their answer

    class Protocol(H11Protocol):
        header_timer: asyncio.TimerHandle | None = None
        write_timer: asyncio.TimerHandle | None = None
        leaving: asyncio.TimerHandle | None = None
        left = _LINGER_BYTES

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self.connections.discard(self)
                if len(refused) < _SPARE:
                    refused.add(self)
                    self.leave(_FULL)
                else:
                    transport.abort()
            else:
                self.header_timer = self.loop.call_later(limits.read_seconds, self.header_late)

        def leave(self, status: bytes) -> None:
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.leaving = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.leave(_BAD)
            else:
                self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self.leaving is not None:
                self.left -= len(data)
                if self.left < 0:
                    self.transport.close()
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                if self.header_timer is not None:
                    self.header_timer.cancel()
                    self.header_timer = None
            elif self.header_timer is None and not self.transport.is_closing():
                self.header_timer = self.loop.call_later(limits.read_seconds, self.header_late)

        def header_late(self) -> None:
            self.header_timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                if self.conn.our_state is h11.IDLE:
                    self.leave(_SLOW)
                else:
                    self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch_writing()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.watch_writing()

        def watch_writing(self) -> None:
            if self.write_timer is None and self.transport.get_write_buffer_size():
                self.write_timer = self.loop.call_later(limits.write_seconds, self.write_late)

        def write_late(self) -> None:
            self.write_timer = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            refused.discard(self)
            for timer in (self.header_timer, self.write_timer, self.leaving):
                if timer is not None:
                    timer.cancel()

    return Protocol


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: on_exit(), then no new connections, then what runs is finished.
    A second SIGINT does not wait for it."""

    def __init__(
        self,
        app: App,
        limits: HttpLimits,
        on_start: Callable[[], None],
        on_exit: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",  # a warning for every malformed request would let anyone fill a disk
            access_log=False,
            proxy_headers=False,  # whoever may name his own address has as many queues as he likes
            server_header=False,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=limits.shutdown_seconds,
        )
        super().__init__(config)
        allow_files(limits.max_connections + _SPARE + 256)
        self.on_start, self.on_exit = on_start, on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True
        self.on_exit()


def allow_files(count: int) -> None:
    """Raises the number of files and connections that the process may have open, as far as the
    system lets it."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: a free one. ValueError if it cannot."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, not {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. asyncio sets it itself only on sockets that name their protocol,
        # which these do not, and an answer's last packet would wait 40 ms for a delayed
        # acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error};"
            " --port 0 takes a free one"
        ) from None
