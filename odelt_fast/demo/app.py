"""The web server of `odelt-fast demo`: Gradio's application, without what the page does not need.

Gradio serves much more than a page: uploads, files, a fetcher of any URL, tools of its developers,
and no option leaves them out. So of its API only `_API` is passed on, elsewhere nothing is posted,
bodies have a greatest size, and on the loopback interface the Host must be one of its names
(another site that resolves to it is not served).
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from .page import CSS, import_gradio

if TYPE_CHECKING:
    import gradio
    from starlette.types import ASGIApp, Receive, Scope, Send

LARGEST_BODY = 16 * 1024  # bytes; a request of the page has less than 2000
CONNECTIONS = 256
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# First parts of the paths below /gradio_api/ that the page asks for.
_API = {"app_id", "call", "cancel", "heartbeat", "info", "queue", "reset", "startup-events"}


class PageOnly:
    """ASGI middleware that answers 404 for the API beside `_API`, and for methods that change what
    is not there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        app = self.app
        if scope["type"] == "http":
            _, first, *rest = scope["path"].split("/")
            api = first == "gradio_api"
            methods = ("GET", "HEAD", "POST") if api else ("GET", "HEAD")
            if scope["method"] not in methods or (api and not _API & set(rest[:1])):
                app = PlainTextResponse("not found", 404)
        await app(scope, receive, send)


def serve(blocks: gradio.Blocks, listener: socket.socket) -> None:
    """Serves the page until it is interrupted.

    No request leaves this machine: nothing is shared, reported or looked up.
    """
    gr = import_gradio()
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    local = listener.getsockname()[0] in LOOPBACK
    hosts = [*LOOPBACK, "[::1]"] if local else ["*"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(PageOnly)]
    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None, max_body_size=LARGEST_BODY, middleware=middleware),
        blocks,
        path="/",
        app_kwargs={"openapi_url": None},
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
    # Gradio prints what goes wrong in a drawing itself; uvicorn's errors are of visitors: unknown
    # sessions, connections cut off at the end.
    config = uvicorn.Config(
        application,
        http="h11",
        ws="none",
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run([listener])
