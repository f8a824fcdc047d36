"""A server on this machine that speaks S3 (moto's), with the faults that networks have."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

BUCKET = "bucket"
_REFUSED = [("Content-Length", "0")]


@dataclass
class Faults:
    """Shares of requests that fail, lose the end of their answer, and are late by `stall` seconds.

    counts: how many of each there were.
    """

    failing: float = 0.0
    truncated: float = 0.0
    stalled: float = 0.0
    stall: float = 2.0
    seed: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    @contextlib.contextmanager
    def having(self, **shares: float) -> Iterator[None]:
        """These shares for a while."""
        before = dict(self.__dict__)
        self.__dict__.update(shares)
        yield
        self.__dict__.update({name: before[name] for name in shares})

    def around(self, application: Any) -> Callable[..., Iterable[bytes]]:
        """The application with these faults."""

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            chance = self._chance.random()
            shares = (self.failing, self.truncated, self.stalled)
            kinds = zip(("failing", "truncated", "stalled"), itertools.accumulate(shares))
            kind = next((kind for kind, end in kinds if chance < end), "whole")
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if kind == "failing":
                start_response("503 Slow Down", _REFUSED)
                return []
            if kind == "stalled":
                time.sleep(self.stall)
            content = application(environ, start_response)
            if kind == "truncated" and environ["REQUEST_METHOD"] == "GET":
                whole = b"".join(content)
                return [whole[: len(whole) // 2]]  # fewer than were promised
            return content  # type: ignore[no-any-return]

        return answer


@contextlib.contextmanager
def object_store(faults: Faults | None = None) -> Iterator[str]:
    """The URL of an empty bucket; clients of this process, and those that it starts, find it by
    their environment. One at a time."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    import boto3
    import s3fs
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    answering = [application]

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return answering[-1](environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of a server before
        urllib.request.urlopen(f"{address}/moto-api/reset", b"").close()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        if faults is not None:
            answering.append(faults.around(application))
        try:
            yield f"s3://{BUCKET}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
