"""A server of ours on loopback, what speaks to it, and the images that its answers should hold."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from odelt_fast.model import DiT
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.serving.batching import Batcher, Key, Part
from odelt_fast.serving.listening import listen
from odelt_fast.serving.server import HttpLimits, create_app, create_server
from odelt_fast.serving.service import Service

ROOT = Path(__file__).resolve().parents[2]
HANG = 120.0  # seconds: what takes longer has hung, however slow the machine


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]


@contextlib.contextmanager
def serving(service: Service, limits: HttpLimits | None = None) -> Iterator[int]:
    """The port on which a service answers, from a thread of this process."""
    limits, started = limits or HttpLimits(), threading.Event()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = create_server(create_app(service, limits, on_start=started.set), limits)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert started.wait(HANG)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(HANG)
            assert not thread.is_alive()


@contextlib.contextmanager
def held(batcher: Batcher) -> Iterator[threading.Event]:
    """Batches are begun but not drawn while this lasts; the event says that one has begun."""
    begun, go, draw = threading.Event(), threading.Event(), batcher.draw

    def wait_and_draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        begun.set()
        assert go.wait(HANG)
        return draw(key, parts)

    batcher.draw = wait_and_draw
    try:
        yield begun
    finally:
        batcher.draw = draw
        go.set()


def until(condition: Callable[[], object]) -> None:
    """Returns when it has become true."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def interruptible() -> None:
    """Undoes that a shell's background jobs ignore SIGINT: for `preexec_fn`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def serve_command(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`odelt-fast serve` in a process of its own, and its port. Killed at the end if it still
    runs."""
    command = [sys.executable, "-m", "odelt_fast.cli", "serve", "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=interruptible,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line
            yield process, int(line.split("http://127.0.0.1:")[1].split()[0])
        finally:
            process.kill()


def ask(
    port: int,
    body: Any = None,
    *,
    method: str = "POST",
    path: str = "/generate",
    kind: str = "application/json",
    timeout: float = HANG,
) -> Answer:
    """One request on a connection of its own; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": kind} if data is not None else {})
        response = connection.getresponse()
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
    finally:
        connection.close()


def get(port: int, path: str) -> Answer:
    return ask(port, method="GET", path=path)


def metric(port: int, name: str) -> float:
    """A number of /metrics (0 if it is not there yet), of all replicas together."""
    lines = get(port, "/metrics").body.decode().splitlines()
    places = (f"{name} ", f'{name}{{replica="')
    return sum(float(line.split()[-1]) for line in lines if line.startswith(places))


def say(port: int, *parts: bytes) -> bytes:
    """Everything that comes back after these bytes, until the server closes the connection."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=HANG) as connection,
        contextlib.suppress(ConnectionError),  # refused while sending
    ):
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        while part := connection.recv(65536):
            answer += part
    return answer


def pictures(headers: Mapping[str, str], body: bytes) -> np.ndarray:
    """The images of an answer, (N, H, W, C) uint8."""
    kind = headers["content-type"]
    if kind == "application/octet-stream":
        return np.load(io.BytesIO(body))["arr_0"]
    encoded = (
        [body]
        if kind == "image/png"
        else [base64.b64decode(text) for text in json.loads(body)["images"]]
    )
    arrays = [np.asarray(Image.open(io.BytesIO(data))) for data in encoded]
    return np.stack([array if array.ndim == 3 else array[:, :, None] for array in arrays])


def alone(model: DiT, asked: Mapping[str, Any]) -> np.ndarray:
    """What the library makes of a request by itself, (N, H, W, C) uint8."""
    labels = asked.get("labels")
    count = asked.get("num_images") or (len(labels) if isinstance(labels, list) else 1)
    options = {
        name: asked[name]
        for name in ("depth", "steps", "solver", "guidance_scale", "guidance_interval")
        if name in asked
    }
    return to_uint8(Sampler(model, **options)(count, labels, int(asked["seed"])))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference, in levels of 255; 256 for images of other shapes."""
    return (
        int(np.abs(one.astype(int) - other.astype(int)).max()) if one.shape == other.shape else 256
    )
