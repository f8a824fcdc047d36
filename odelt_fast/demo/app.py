"""The web server of `odelt-fast demo`: Gradio's application behind a door that lets through only
what the page needs.

Gradio serves much more than a page: uploads, files, a proxy, editing by a language model. Here a
request outside `_PAGE` and `_EVENTS` is not found, bodies have a greatest size, and on the loopback
interface the Host must be one of its names (another site that resolves to it is not served).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from odelt_fast.demo.page import CSS, import_gradio

if TYPE_CHECKING:
    import gradio

LARGEST_BODY = 16 * 1024  # bytes; a request of the page has less than 2000
CONNECTIONS = 256
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PAGE = re.compile(
    r"/(|config|theme\.css|manifest\.json|robots\.txt|favicon\.ico|(static|assets|svelte)/[\w./@+-]+)"
)
_READ = re.compile(
    r"/gradio_api/(info|startup-events|app_id|queue/data|heartbeat/\w{1,64}|call/(draw|grid)/\w{1,64})"
)
_EVENTS = re.compile(r"/gradio_api/(queue/join|call/(draw|grid)|cancel|reset)/?")

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


class Door:
    """Passes on what the page needs; answers the rest itself: 400 (Host), 404, 413 (size)."""

    def __init__(self, inner: Application, hosts: tuple[str, ...] | None) -> None:
        self.inner, self.hosts = inner, hosts

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websockets
        headers = dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]")
        if self.hosts is not None and host not in self.hosts:
            return await _answer(send, 400, f"this page is served to {', '.join(self.hosts)} only")
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            allowed = _PAGE.fullmatch(path) or _READ.fullmatch(path)
            return (
                await self.inner(scope, receive, send)
                if allowed and ".." not in path
                else await _answer(send, 404, "not found")
            )
        if method != "POST" or not _EVENTS.fullmatch(path):
            return await _answer(send, 404, "not found")
        body = await _body(receive)
        if body is None:
            return await _answer(send, 413, f"a request has at most {LARGEST_BODY} bytes")
        rest = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(rest, None) or await receive()

        return await self.inner(scope, replay, send)


async def _body(receive: Callable[[], Awaitable[Message]]) -> bytes | None:
    """The whole body, None if it is too large: read before anything is made of it, so that no
    length header has to be believed."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return body


async def _answer(send: Callable[[Message], Awaitable[None]], status: int, words: str) -> None:
    content = words.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def serve(blocks: gradio.Blocks, listener: socket.socket) -> None:
    """Serves the page until it is interrupted. No request leaves this machine: nothing is shared,
    reported or looked up."""
    gr = import_gradio()
    import uvicorn
    from fastapi import FastAPI

    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        theme=gr.themes.Default(),  # its fonts are files of Gradio's
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,  # of mistakes only their message is shown
        max_file_size=1,
    )
    address = listener.getsockname()[0]
    door = Door(application, LOOPBACK if address in LOOPBACK else None)
    # Gradio prints what goes wrong in a drawing itself; uvicorn's errors are of visitors: unknown
    # sessions, connections cut off at the end.
    config = uvicorn.Config(
        door,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run([listener])
