"""Attacks and loads `odelt-fast serve`, in a process of its own. Exit code 1 if anything is not as
it must be.

    python -m tests.stress.stress_server --hostile 10000 --clients 200 --seconds 60 --burst 1000 \\
        --throughput

--hostile N: N malformed or oversized requests, 32 at a time; each must be answered with 4xx or 503
(what is not HTTP may be hung up on instead), good requests between them with their image.
--clients C --seconds S: C connections that ask for images of random seeds, again and again;
afterwards every image is compared with the one that the library makes alone: at most one level of
255 apart. --burst N: N requests at once, each answered with 200, 429 or 503, images right.
--throughput: requests per second of one image, one at a time and 64 at a time. --replicas R: all
this of a server with R replicas (extra `cluster`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from odelt_fast import DiT, load_model
from tests.helpers.serving import HANG, alone, ask, difference, metric, pictures, serve_command

GOOD = [
    {"depth": 4, "steps": 1},
    {"depth": 12, "steps": 4},
    {"depth": 8, "steps": 2, "solver": "heun2"},
    {"depth": 4, "guidance_scale": 2.0},
]
HUGE = (
    *("9" * 4000, "-1", "1e400", "1e308", "18446744073709551616", "9223372036854775808", "NaN"),
    *("-Infinity", "0.5", '"x"', "[[1]]", "{}", "true"),
)
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
NUMBERS = ("num_images", "labels", "seed", "depth", "steps", "guidance_scale", "deadline_ms")


def request(
    body: bytes,
    head: Sequence[bytes] = (),
    line: bytes = b"POST /generate HTTP/1.1",
    kind: bytes = b"application/json",
) -> bytes:
    lines = [line, b"host: x", b"content-type: " + kind, b"content-length: %d" % len(body), *head]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Connection:
    """Requests one after the other on one connection, which is opened when it is needed.

    Of a server that hangs up while it is sent too much the answer is read all the same.
    """

    def __init__(self, port: int) -> None:
        self.port, self.socket, self.come = port, None, b""

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        loop = asyncio.get_running_loop()
        if self.socket is None:
            self.socket, self.come = socket.socket(), b""
            self.socket.setblocking(False)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        try:
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(self.socket, data)
            while b"\r\n\r\n" not in self.come:
                await self._more()
            head, _, self.come = self.come.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            length = int(headers.get("content-length", 0))
            while len(self.come) < length:
                await self._more()
            body, self.come = self.come[:length], self.come[length:]
        except BaseException:
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), headers, body

    async def _more(self) -> None:
        part = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
        if not part:
            raise EOFError("the server has hung up")
        self.come += part

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


TYPES = ([], "x", 5, None, True, [{}], {"labels": {}}, {"solver": 5}, {"format": []})
FIELDS = ("__class__", "path", "x" * 9000, "\u202e")
CHUNKS = (b"zz\r\n", b"-1\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n", b"fffffffffffffffffffff\r\n")
MEDIA = (b"text/plain", b"multipart/form-data", b"image/png", b"application/json5", b"\xff")
LINES = (
    *(b"GET /generate", b"PUT /generate", b"POST /", b"POST /generate/../../etc/passwd"),
    *(b"POST /%00", b"PATCH /metrics"),
)
GARBAGE = (
    *(b"GET\r\n", b"POST /generate HTTP/one\r\n", b"PRI * HTTP/2.0\r\n"),
    b"\x16\x03\x01\x02\x00",
)
HEADERS = (b"a" * 2_000_000 + b": 1", b"a: " + b"b" * 2_000_000, b"no colon", b"a b: c", b"a: \x00")
LENGTHS = (
    *(b"-5", b"1e3", b"99999999999999999999", b"5\r\ncontent-length: 6", b"0x10"),
    b"5\r\ntransfer-encoding: chunked",
)
NOT_HTTP = ("chunked", "http", "header", "length")  # kinds that may be hung up on


def hostile(draw: random.Random) -> tuple[str, bytes]:
    """A kind and a request that must be refused."""
    asked = {"seed": draw.randrange(2**64), **draw.choice(GOOD)}
    valid = json.dumps(asked).encode()
    kinds = ("cut", "binary", "type", "huge", "field", "nested", "large", "media", "route")
    match draw.choice(kinds + NOT_HTTP):
        case "cut" as kind:
            return kind, request(valid[: draw.randrange(len(valid))])
        case "binary" as kind:
            return kind, request(draw.randbytes(draw.randrange(1, 2000)) + b"\xff")
        case "type" as kind:
            return kind, request(json.dumps(draw.choice(TYPES)).encode())
        case "huge" as kind:
            name = draw.choice(NUMBERS)
            allowed = {"guidance_scale": ("-1", "0.5"), "seed": ("9223372036854775808",)}
            value = draw.choice([value for value in HUGE if value not in allowed.get(name, ())])
            return kind, request(b'{"%s": %s}' % (name.encode(), value.encode()))
        case "field" as kind:
            return kind, request(json.dumps({**asked, draw.choice(FIELDS): 1}).encode())
        case "nested" as kind:
            opened = draw.choice((b"[", b'{"a":', b'{"labels":['))
            return kind, request(opened * draw.randrange(200, 1400))
        case "large" as kind:
            return kind, request(b" " * draw.choice((16385, 100_000, 5_000_000)) + valid)
        case "media" as kind:
            return kind, request(valid, kind=draw.choice(MEDIA))
        case "route" as kind:
            return kind, request(valid, line=draw.choice(LINES) + b" HTTP/1.1")
        case "chunked" as kind:
            body = draw.choice(CHUNKS) * 8 + b"0\r\n\r\n"
            return kind, HEAD + b"transfer-encoding: chunked\r\n\r\n" + body
        case "http" as kind:
            noise = bytes(draw.choices(b"\x00\x01\x16\x7f\xff \r", k=draw.randrange(1, 300)))
            return kind, draw.choice((noise, *GARBAGE)) + b"\r\n\r\n"
        case "header" as kind:
            return kind, request(valid, head=[draw.choice(HEADERS)])
        case kind:
            return kind, HEAD + b"content-length: " + draw.choice(LENGTHS) + b"\r\n\r\n" + valid


def check(model: DiT, asked: dict[str, Any], headers: dict[str, str], body: bytes) -> bool:
    """Whether the images of an answer are those that the library makes alone."""
    return difference(pictures(headers, body), alone(model, asked)) <= 1


def memory(process: subprocess.Popen[str]) -> float:
    """Resident MiB."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 2**20


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that must end well: healthy, an empty queue, nothing on stderr but that there is no
    profile."""
    with serve_command(*options) as (process, port):
        yield process, port
        assert ask(port, method="GET", path="/health").status == 200
        assert metric(port, "odelt_waiting_images") == 0
        process.terminate()
        output, errors = process.communicate(timeout=HANG)
        lines = [line for line in errors.splitlines() if not line.startswith("deadlines choose")]
        ended = process.returncode, output, lines[:20]
        assert ended == (0, "stopped\n", []), ended


def attack(model: DiT, count: int, seed: int, *options: str) -> bool:
    statuses, wrong, turns = Counter[tuple[str, int]](), list[str](), iter(range(count))

    async def attacker(port: int) -> None:
        connection = Connection(port)
        for turn in turns:
            kind, data = hostile(random.Random(f"{seed} {turn}"))
            status, what = 0, repr(data[:300])
            try:
                status = (await asyncio.wait_for(connection.ask(data), HANG))[0]
            except (OSError, EOFError, TimeoutError) as error:
                what = f"{error!r} after {what}"
                hung_up = kind in NOT_HTTP and not isinstance(error, TimeoutError)
            else:
                hung_up = False
            statuses[kind, status] += 1
            if not (400 <= status < 500 or status == 503 or hung_up):
                wrong.append(f"{kind}: {status} {what}")
            if turn % 100 == 0:
                connection.close()
                asked = {"seed": turn, **GOOD[0]}
                status, headers, body = await asyncio.wait_for(
                    connection.ask(request(json.dumps(asked).encode())), HANG
                )
                if status != 200 or not check(model, asked, headers, body):
                    wrong.append(f"a good request: {status}")
        connection.close()

    async def everybody(port: int) -> None:
        await asyncio.gather(*(attacker(port) for _ in range(32)))

    with server(*options) as (process, port):
        before, start = memory(process), time.perf_counter()
        asyncio.run(everybody(port))
        seconds, after = time.perf_counter() - start, memory(process)
    by_status = Counter[int]()
    for (_, status), number in statuses.items():
        by_status[status] += number
    print(
        f"hostile: {count} requests in {seconds:.0f} s, statuses {dict(sorted(by_status.items()))},"
        f" {len(wrong)} wrong,",
        end=" ",
    )
    print(f"memory {before:.0f} to {after:.0f} MiB", *wrong[:10], sep="\n  ")
    return not wrong and sum(by_status.values()) == count


def some_request(draw: random.Random) -> dict[str, Any]:
    count = draw.choice((1, 1, 1, 2, 4))
    asked = {
        "seed": draw.randrange(2**64),
        "num_images": count,
        "format": "npz" if count > 1 else "png",
        **draw.choice(GOOD),
    }
    return (
        asked
        if draw.random() < 0.5
        else {**asked, "labels": [draw.randrange(11) for _ in range(count)]}
    )


def load(model: DiT, clients: int, seconds: float, seed: int, *options: str) -> bool:
    answers, statuses = list[tuple[dict[str, Any], dict[str, str], bytes]](), Counter[int]()

    async def client(port: int, index: int, end: float) -> None:
        draw, connection = random.Random(f"{seed} {index}"), Connection(port)
        while time.perf_counter() < end:
            asked = some_request(draw)
            status, headers, body = await asyncio.wait_for(
                connection.ask(request(json.dumps(asked).encode())), HANG
            )
            statuses[status] += 1
            if status == 200:
                answers.append((asked, headers, body))
        connection.close()

    async def everybody(port: int) -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(port, index, end) for index in range(clients)))

    with server(*options) as (_, port):
        start = time.perf_counter()
        asyncio.run(everybody(port))
        took = time.perf_counter() - start
        shared = metric(port, "odelt_batch_requests_sum") / metric(
            port, "odelt_batch_requests_count"
        )
    print(
        f"{clients} clients: {sum(statuses.values())} requests in {took:.0f} s, statuses"
        f" {dict(statuses)}, {shared:.1f} requests a batch",
        flush=True,
    )
    wrong = [asked for asked, headers, body in answers if not check(model, asked, headers, body)]
    print(
        f"  {len(answers)} answers compared with the library's, {len(wrong)} wrong",
        *wrong[:5],
        sep="\n  ",
    )
    return not wrong and set(statuses) <= {200, 429, 503} and statuses[200] > clients


def burst(model: DiT, count: int, seed: int, *options: str) -> bool:
    asked = [some_request(random.Random(f"{seed} {index}")) for index in range(count)]

    async def one(port: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        connection = Connection(port)
        answer = await asyncio.wait_for(connection.ask(request(json.dumps(body).encode())), HANG)
        connection.close()
        return answer

    async def everybody(port: int) -> list[tuple[int, dict[str, str], bytes] | BaseException]:
        return await asyncio.gather(*(one(port, body) for body in asked), return_exceptions=True)

    with server(*options) as (_, port):
        start = time.perf_counter()
        answers = asyncio.run(everybody(port))
        seconds = time.perf_counter() - start
    unanswered = [repr(answer) for answer in answers if isinstance(answer, BaseException)]
    got = [
        (body, *answer)
        for body, answer in zip(asked, answers, strict=True)
        if not isinstance(answer, BaseException)
    ]
    statuses = Counter(status for _, status, _, _ in got)
    wrong = [
        body
        for body, status, headers, data in got
        if status == 200 and not check(model, body, headers, data)
    ]
    print(
        f"burst of {count}: {seconds:.1f} s, statuses {dict(statuses)}, {len(unanswered)}"
        f" unanswered, {len(wrong)} images wrong",
        *unanswered[:5],
    )
    return not wrong and not unanswered and set(statuses) <= {200, 429, 503} and statuses[200] > 0


def throughput(seconds: float, rounds: int, *options: str) -> bool:
    """Full depth, four steps, one image a request: one client, 64 clients of a server that draws
    one image at a time, and 64 of one that batches, taking turns."""
    counts = {
        "one at a time": (1, "1"),
        "64 clients, batches of 1": (64, "1"),
        "64 clients, batches of up to 64": (64, "64"),
    }
    rates: dict[str, list[float]] = {name: [] for name in counts}
    where: dict[str, str] = {}

    async def client(port: int, index: int, end: float) -> int:
        connection, done = Connection(port), 0
        while time.perf_counter() < end:
            body = json.dumps({"seed": index * 10**6 + done, "depth": 12, "steps": 4}).encode()
            status, _, _ = await connection.ask(request(body))
            assert status == 200, status
            done += 1
        connection.close()
        return done

    async def everybody(port: int, clients: int, span: float) -> float:
        start = time.perf_counter()
        done = await asyncio.gather(
            *(client(port, index, start + span) for index in range(clients))
        )
        return sum(done) / (time.perf_counter() - start)

    with (
        server("--max-batch", "1", *options) as (_, single),
        server("--max-batch", "64", *options) as (_, batching),
    ):
        ports = {"1": single, "64": batching}
        for turn in range(rounds + 1):
            for name, (clients, size) in counts.items():
                port = ports[size]
                before = [
                    metric(port, f"odelt_batch_{what}")
                    for what in ("images_sum", "images_count", "seconds_sum")
                ]
                rate = asyncio.run(everybody(port, clients, seconds if turn else 1.0))
                images, batches, drawing = (
                    metric(port, f"odelt_batch_{what}") - old
                    for what, old in zip(("images_sum", "images_count", "seconds_sum"), before)
                )
                if turn:  # the first warms up
                    rates[name].append(rate)
                    where[name] = (
                        f"{images / batches:.1f} images a batch, drawing"
                        f" {drawing / images * 1e3:.2f} of {1e3 / rate:.2f} ms an image"
                    )
    for name, values in rates.items():
        print(
            f"{name}: {statistics.median(values):.1f} requests/s ({min(values):.1f} to"
            f" {max(values):.1f}); {where[name]}"
        )
    single_rates, several, together = (statistics.median(values) for values in rates.values())
    ratio = together / max(single_rates, several)
    print(
        f"throughput with batches: {ratio:.2f}x of one at a time ({together / single_rates:.2f}x of"
        " one client)"
    )
    return ratio >= 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("hostile", "clients", "burst"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of --clients")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="of --throughput, 5 s each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=0)
    options = parser.parse_args()
    of_server = ["--replicas", str(options.replicas)] if options.replicas else []
    model = load_model("digits", dtype=torch.float32)
    passed = []
    if options.hostile:
        passed.append(attack(model, options.hostile, options.seed, *of_server))
    if options.clients:
        clients = options.clients, options.seconds
        passed.append(load(model, *clients, options.seed, *of_server))
    if options.burst:
        passed.append(burst(model, options.burst, options.seed, *of_server))
    if options.throughput:
        passed.append(throughput(5.0, options.rounds, *of_server))
    if not passed:
        parser.error("nothing to do: --hostile, --clients, --burst or --throughput")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
