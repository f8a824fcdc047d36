"""The service over real HTTP: batches that mix nobody's images, refusals, deadlines, clients that
misbehave or leave, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odelt_fast import DiT, DiTConfig, deadline_planner, load_model
from odelt_fast.cli import main
from odelt_fast.commands.serve import Command, find_plan
from odelt_fast.planning.evidence import this_machine
from odelt_fast.planning.profile import Measurement, Operation, Profile, write_profile
from odelt_fast.sampling.decoder import Decoder
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.serving.batching import Batcher, Job, Key, Part, Refused
from odelt_fast.serving.http_limits import HttpLimits, listen
from odelt_fast.serving.service import Limits, Service
from tests.helpers.serving import (
    alone,
    ask,
    difference,
    get,
    metric,
    pictures,
    say,
    serve_command,
    serving,
)

SLOW = {"num_images": 64, "depth": 12, "steps": 32, "seed": 0}  # a second or more


@pytest.fixture(scope="module")
def model() -> DiT:
    return load_model("digits", dtype=torch.float32)


@pytest.fixture(scope="module")
def port(model: DiT) -> Iterator[int]:
    limits = HttpLimits(read_seconds=0.5, max_connections=100)
    with serving(Service(model), limits) as port:
        yield port


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


# Images


def some_request(draw: random.Random) -> dict[str, Any]:
    count = draw.randint(1, 4)
    asked: dict[str, Any] = {
        "seed": draw.choice([draw.randrange(2**64), str(draw.randrange(2**64))])
    }
    asked |= draw.choice(
        [
            {},
            {"depth": 4, "steps": 1},
            {"depth": 8, "steps": 2, "solver": "heun2"},
            {"depth": 12, "guidance_scale": 1.5},
        ]
    )
    labels = draw.choice([None, draw.randrange(11), [draw.randrange(11) for _ in range(count)]])
    asked |= {"num_images": count} if not isinstance(labels, list) else {}
    form = draw.choice(["json", "npz"] + ["png"] * (count == 1))
    return {**asked, "format": form} | ({} if labels is None else {"labels": labels})


def test_every_image_is_the_one_that_the_library_makes_alone(port: int, model: DiT) -> None:
    asked = [some_request(random.Random(seed)) for seed in range(80)]
    batches = metric(port, "odelt_batch_requests_count")
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda body: ask(port, body), asked))
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status == 200, answer.body
        assert difference(pictures(answer.headers, answer.body), alone(model, body)) <= 1, body
    assert metric(port, "odelt_batch_requests_count") - batches < 70, (
        "requests did not share batches"
    )


def test_a_request_of_more_images_than_a_batch_is_put_together(model: DiT) -> None:
    asked = {"num_images": 50, "depth": 4, "steps": 1, "seed": 3, "format": "npz"}
    with serving(Service(model, Limits(max_batch=7))) as port:
        answer = ask(port, asked)
        assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1


def test_noise_that_is_drawn_on_the_way_is_each_requests_own() -> None:
    """Consistency models add noise between steps, which depends on the seed: their requests share
    no batch."""
    config = DiTConfig(
        image_size=8,
        channels=1,
        hidden_size=16,
        depth=2,
        depth_min=1,
        depth_group=1,
        num_heads=2,
        num_classes=10,
    )
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**config.to_dict(), "sampling": "consistency"}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    asked = [{"seed": seed, "steps": 3, "num_images": 2} for seed in range(12)]
    with serving(Service(model)) as port, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: ask(port, body), asked))
        assert ask(port, {"solver": "rk4"}).status == 422
    for body, answer in zip(asked, answers, strict=True):
        assert difference(pictures(answer.headers, answer.body), alone(model, body)) <= 1


@pytest.mark.parametrize("decoded", [False, True])
def test_latents_are_answered_as_arrays_or_decoded(decoded: bool) -> None:
    import diffusers

    config = DiTConfig(
        image_size=4,
        channels=4,
        hidden_size=16,
        depth=2,
        depth_min=1,
        depth_group=1,
        num_heads=2,
        num_classes=3,
    )
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    decoder = (
        Decoder(
            diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, **blocks).eval()
        )
        if decoded
        else None
    )
    service = Service(model, decoder=decoder)
    service.warm_up()
    with serving(service) as port, ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda seed: ask(port, {"seed": seed, "num_images": 3, "format": "npz"}), range(8)
            )
        )
        assert ask(port, {"seed": 1}).headers["content-type"] == (
            "image/png" if decoded else "application/octet-stream"
        )
        assert ask(port, {"seed": 1, "format": "png"}).status == (200 if decoded else 422)
    for seed, answer in enumerate(answers):
        images, expected = (
            pictures(answer.headers, answer.body),
            Sampler(model, decoder=decoder)(3, seed=seed),
        )
        if decoded:
            assert difference(images, to_uint8(expected)) <= 1
        else:
            np.testing.assert_allclose(images, expected.permute(0, 2, 3, 1), atol=1e-4)


def test_an_answer_says_what_made_it(port: int, model: DiT) -> None:
    drawn = ask(port, {"depth": 4, "steps": 1})
    assert drawn.headers["content-type"] == "image/png"
    again = {
        "seed": drawn.headers["x-odelt-seed"],
        "labels": json.loads(drawn.headers["x-odelt-labels"]),
        "depth": 4,
        "steps": 1,
    }
    answer = ask(port, {**again, "format": "json"})
    assert (
        difference(pictures(answer.headers, answer.body), pictures(drawn.headers, drawn.body)) <= 1
    )
    made = json.loads(answer.body)
    assert (made["seed"], made["labels"], made["depth"], made["steps"], made["solver"]) == (
        again["seed"],
        again["labels"],
        4,
        1,
        "euler",
    )
    described = json.loads(get(port, "/").body)
    assert described["depths"] == [4, 8, 12]
    assert described["image"] == [1, 8, 8]
    assert get(port, "/health").status == get(port, "/ready").status == 200


# Refusals

WRONG: list[tuple[Any, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe{}", 400),
    (b'{"seed": NaN}', 422),
    (b'{"guidance_scale": NaN}', 422),
    (b'{"deadline_ms": Infinity}', 422),
    (b"[" * 15000, 400),
    (b'{"seed": 1}' * 2, 400),
    (b'{"guidance_scale": 1e400}', 422),
    (b'{"seed": ' + b"9" * 15000 + b"}", 400),
    (b'{"seed": ' + b"9" * 4000 + b"}", 422),
    (b'{"labels": ' + b"9" * 400 + b"}", 422),
    (b'{"depth": -' + b"9" * 5000 + b"}", 400),
    (b"null", 422),
    ([], 422),
    ({"no_such_field": 1}, 422),
    ({"num_images": 0}, 422),
    ({"num_images": 65}, 422),
    ({"num_images": 2**63}, 422),
    ({"num_images": 10**400}, 422),
    ({"num_images": True}, 422),
    ({"num_images": 1.5}, 422),
    ({"num_images": 2, "labels": [1, 2, 3]}, 422),
    ({"labels": []}, 422),
    ({"labels": [0] * 65}, 422),
    ({"labels": 11}, 422),
    ({"labels": -1}, 422),
    ({"labels": 2**63}, 422),
    ({"labels": [1, 10**30]}, 422),
    ({"labels": [[1]]}, 422),
    ({"seed": -1}, 422),
    ({"seed": 2**64}, 422),
    ({"seed": str(2**64)}, 422),
    ({"seed": "0x10"}, 422),
    ({"seed": "1\n"}, 422),
    ({"depth": 5}, 422),
    ({"depth": 10**30}, 422),
    ({"steps": 0}, 422),
    ({"steps": 129}, 422),
    ({"steps": 10**18}, 422),
    ({"steps": 128, "num_images": 64, "solver": "rk4"}, 422),
    ({"solver": "dopri5"}, 422),
    ({"solver": "torchdiffeq:dopri5"}, 422),
    ({"solver": "\u0000\ud7ff"}, 422),
    ({"solver": "x" * 10000}, 422),
    ({"guidance_scale": 1e308}, 422),
    ({"guidance_scale": "2"}, 422),
    ({"deadline_ms": 0}, 422),
    ({"deadline_ms": -1}, 422),
    ({"deadline_ms": 1e300}, 422),
    ({"format": "gif"}, 422),
    ({"format": "png", "num_images": 2}, 422),
]


@pytest.mark.parametrize(("body", "status"), WRONG, ids=lambda value: repr(value)[:40])
def test_a_mistake_is_answered_with_one_line(port: int, body: Any, status: int) -> None:
    answer = ask(port, body)
    assert answer.status == status, answer.body[:300]
    assert 0 < len(answer.error) <= 500
    assert "\n" not in answer.error
    assert "Traceback" not in answer.error


def test_other_routes_methods_and_types_are_refused(port: int) -> None:
    assert get(port, "/nowhere").status == 404
    assert get(port, "/generate").status == 405
    assert ask(port, {}, method="DELETE", path="/health").status == 405
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
    ):  # what pages of other origins may send
        assert ask(port, {"depth": 4, "steps": 1}, kind=kind).status == 415


def test_bodies_are_bounded_in_size_and_time(port: int) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    declared = say(port, head + b"content-length: 99999999999\r\n\r\n", b"x" * 100_000)
    chunked = say(
        port,
        head + b"transfer-encoding: chunked\r\n\r\n",
        *[b"2000\r\n" + b" " * 0x2000 + b"\r\n"] * 40,
        b"0\r\n\r\n",
    )
    for answer in (declared, chunked):
        assert answer.startswith(b"HTTP/1.1 413 ")
    assert say(port, head + b"content-length: 10\r\n\r\n{").startswith(b"HTTP/1.1 408 ")
    assert say(port, head).startswith(b"HTTP/1.1 408 "), "a header that does not end"
    assert say(port, b"").startswith(b"HTTP/1.1 408 "), "nothing"


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/one\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        (
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length:"
            b" 6\r\n\r\nhello"
        ),
        b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nname: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"name: value\r\n" * 4000 + b"\r\n\r\n",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_what_is_not_http_is_refused(port: int, text: bytes) -> None:
    assert say(port, text + b"\r\n" * 2).startswith(b"HTTP/1.1 4")
    assert get(port, "/health").status == 200


def test_who_does_not_read_his_answers_is_hung_up_on(model: DiT) -> None:
    asked, read = 5000, 0
    with serving(Service(model), HttpLimits(write_seconds=0.5)) as port:
        size = len(get(port, "/openapi.json").body)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
            until(
                lambda: (
                    metric(port, 'odelt_requests_total{route="/openapi.json",status="200"}') > 100
                )
            )
            time.sleep(1.5)
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 20):
                    read += len(part)
        assert size * 100 < read < size * asked
        assert get(port, "/health").status == 200


def test_full_queues_are_answered_with_429(model: DiT) -> None:
    small = {**SLOW, "num_images": 8, "steps": 32}
    with (
        serving(Service(model, Limits(max_queue=8, max_batch=8))) as port,
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda seed: ask(port, {**small, "seed": seed}), range(12)))
        assert {answer.status for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status == 429)
        assert "queue is full" in refused.error
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert metric(port, 'odelt_refused_total{reason="queue"}') == sum(
            answer.status == 429 for answer in answers
        )
        assert ask(port, {"seed": 1}).status == 200
    with (
        serving(Service(model, Limits(max_client=8, max_batch=8))) as port,
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda seed: ask(port, {**small, "seed": seed}), range(12)))
        assert (
            "your queue is full" in next(answer for answer in answers if answer.status == 429).error
        )


def test_more_connections_than_allowed_are_told_so(model: DiT) -> None:
    with serving(Service(model), HttpLimits(max_connections=10)) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        until(
            lambda: say(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").startswith(
                b"HTTP/1.1 503 "
            )
        )
        idle[0].sendall(
            b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        )  # those that were there are served
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in idle:
            connection.close()
        until(lambda: get(port, "/health").status == 200)


# Deadlines


def test_a_deadline_chooses_depth_and_steps(model: DiT, tmp_path: Path) -> None:
    operations = {
        Operation(4, steps=1): 1e-3,
        Operation(12, steps=4): 5.0,
        Operation(12, steps=8): 20.0,
    }
    measured = [
        Measurement(op, 8, "float32", None, cost, cost, cost, 5, float(op.steps or 0))
        for op, cost in operations.items()
    ]
    path = tmp_path / "profile.json"
    write_profile(Profile(this_machine("cpu"), model.config, "digits", tuple(measured)), path)
    with serving(Service(model, plan=deadline_planner("digits", profile=path))) as port:
        for milliseconds, wanted in ((4000, (4, 1)), (10_000, (12, 4)), (59_000, (12, 8))):
            asked = {"deadline_ms": milliseconds, "seed": 7, "num_images": 2, "format": "json"}
            answer = ask(port, asked)
            made = json.loads(answer.body)
            assert (made["depth"], made["steps"]) == wanted
            assert answer.headers["x-odelt-deadline-met"] == "true"
            depth, steps = wanted
            same = {"depth": depth, "steps": steps, "seed": 7, "num_images": 2}
            assert difference(pictures(answer.headers, answer.body), alone(model, same)) <= 1
        impossible = ask(port, {"deadline_ms": 0.5})
        assert impossible.status == 422
        assert "the nearest is depth 4, 1 step" in impossible.error
        assert ask(port, {"deadline_ms": 10_000, "num_images": 9}).status == 422, (
            "more images than were profiled"
        )
        assert (
            json.loads(ask(port, {"deadline_ms": 20_000, "depth": 4, "format": "json"}).body)[
                "depth"
            ]
            == 4
        )


def test_a_deadline_without_a_profile_says_what_to_run(port: int) -> None:
    service = Service(
        load_model("digits", dtype=torch.float32),
        plan="digits has no profile: run odelt-fast profile",
    )
    with serving(service) as other:
        answer = ask(other, {"deadline_ms": 100})
        assert (answer.status, "odelt-fast profile" in answer.error) == (422, True)
        assert ask(other, {"deadline_ms": 5000, "depth": 4, "steps": 1}).status == 200


def test_a_deadline_that_others_have_used_up_is_answered_with_503(model: DiT) -> None:
    with serving(Service(model, Limits(max_batch=32))) as port, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, port, SLOW)
        until(lambda: metric(port, "odelt_waiting_images") == 32)
        start = time.monotonic()
        late = ask(port, {"deadline_ms": 100, "depth": 4, "steps": 1})
        assert late.status == 503
        assert time.monotonic() - start < 1
        assert slow.result().status == 200
        assert metric(port, "odelt_waiting_images") == 0
        assert ask(port, {"deadline_ms": 5000, "depth": 4, "steps": 1}).status == 200


# Batches, without HTTP

KEY = Key(4, 1, "euler", None)


def run_jobs(
    batcher: Batcher, seeds: Sequence[int], seconds: float = 60.0, images: int = 1
) -> list[bytes | BaseException]:
    """What becomes of jobs that arrive together."""

    async def submitted() -> list[bytes | BaseException]:
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + seconds
        jobs = [
            Job(
                KEY,
                seed,
                images,
                None,
                deadline,
                "",
                loop.create_future(),
                lambda job: b"%d" % job.seed,
            )
            for seed in seeds
        ]
        for job in jobs:
            try:
                batcher.submit(job)
            except Refused as refused:
                job.future.set_exception(refused)
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    return asyncio.run(submitted())


def blank(key: Key, parts: Sequence[Part]) -> np.ndarray:
    return np.zeros((sum(len(indices) for _, indices in parts), 1, 1, 1), np.uint8)


def test_one_requests_fault_is_not_anothers() -> None:
    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        if any(job.seed == 5 for job, _ in parts):
            raise ValueError("samples are not finite")
        return blank(key, parts)

    batcher = Batcher(draw)
    answers = run_jobs(batcher, range(10))
    assert [answer for seed, answer in enumerate(answers) if seed != 5] == [
        b"%d" % seed for seed in range(10) if seed != 5
    ]
    assert isinstance(answers[5], ValueError)
    batcher.stop()


def test_no_memory_is_answered_with_503(model: DiT) -> None:
    def no_memory(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    service = Service(model)
    with serving(service) as port:
        service.sampler(Key(4, 1, "euler", None)).decoder = no_memory
        answer = ask(port, {"depth": 4, "steps": 1})
        assert (answer.status, answer.error) == (503, "not enough memory: ask for fewer images")
        assert ask(port, {"depth": 8, "steps": 1}).status == 200


def test_what_goes_wrong_in_drawing_reaches_everybody_and_the_next_batch_is_drawn() -> None:
    broken = threading.Event()
    broken.set()

    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        if broken.is_set():
            raise RuntimeError("the device is lost")
        return blank(key, parts)

    batcher = Batcher(draw, max_batch=4)
    assert all(isinstance(answer, RuntimeError) for answer in run_jobs(batcher, range(3), images=6))
    broken.clear()
    assert run_jobs(batcher, [1], images=6) == [b"1"]
    assert batcher.waiting == 0
    batcher.stop()


def test_a_slow_start_does_not_refuse_deadlines_for_ever() -> None:
    """The first batch of a kind may build what later ones use: a guess that nothing corrects must
    fade."""
    times = iter([0.3])

    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        time.sleep(next(times, 0.0))
        return blank(key, parts)

    batcher = Batcher(draw)
    assert run_jobs(batcher, [0]) == [b"0"]
    answers = [run_jobs(batcher, [seed], seconds=0.1)[0] for seed in range(40)]
    assert isinstance(answers[0], Refused)
    assert answers[-1] == b"39"
    batcher.stop()


def test_a_stopped_batcher_answers_everybody() -> None:
    entered, leave = threading.Event(), threading.Event()

    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        entered.set()
        leave.wait(10)
        return blank(key, parts)

    batcher = Batcher(draw, max_batch=1)

    def stop() -> None:
        entered.wait(10)
        threading.Timer(0.1, leave.set).start()
        batcher.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    answers = run_jobs(batcher, range(5))
    stopping.join()
    assert answers[0] == b"0", "the batch that ran is finished"
    assert all(isinstance(answer, Refused) and answer.status == 503 for answer in answers[1:])
    assert isinstance(run_jobs(batcher, [1])[0], Refused)


# Clients that leave, and the server's own start and stop


def test_a_client_that_leaves_leaves_no_work_behind(model: DiT) -> None:
    with serving(Service(model, Limits(max_batch=16))) as port:
        slow = threading.Thread(target=ask, args=(port, {**SLOW, "num_images": 16}))
        slow.start()
        body = json.dumps(SLOW).encode()
        head = (
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type:"
            b" application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        leaving = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        for connection in leaving:
            connection.sendall(head + body)
        until(lambda: metric(port, "odelt_waiting_images") >= 6 * 64)
        for connection in leaving:
            connection.close()
        until(
            lambda: metric(port, "odelt_waiting_images") <= 16, 3
        )  # those of the one who stays, if it is not their turn yet
        slow.join()
        assert metric(port, "odelt_waiting_images") == 0
        asked = {"depth": 4, "steps": 1, "seed": 5}
        answer = ask(port, asked)
        assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
        assert metric(port, 'odelt_requests_total{route="/generate",status="499"}') == 8


def test_told_to_stop_the_server_finishes_what_runs(model: DiT) -> None:
    with serve_command("--max-batch", "16") as (process, port), ThreadPoolExecutor(1) as pool:
        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.request("GET", "/health")
        idle.getresponse().read()
        asked = {**SLOW, "num_images": 32, "format": "json"}
        running = pool.submit(ask, port, asked)
        until(lambda: metric(port, "odelt_waiting_images") > 0)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as process managers repeat it
        answer = running.result()
        assert answer.status == 200
        # By default a CPU serves float32 weights, also where it computes in bfloat16.
        assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
        said, complained = process.communicate(timeout=20)
        assert process.returncode == 0
        assert said == "stopped\n"
        assert "Traceback" not in complained, complained
        with pytest.raises(ConnectionRefusedError):
            get(port, "/health")


def test_a_second_interrupt_does_not_wait() -> None:
    with serve_command("--max-batch", "8") as (process, port), ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, port, SLOW)
        until(lambda: metric(port, "odelt_waiting_images") > 0)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Traceback" not in complained, complained
        with pytest.raises((OSError, http.client.HTTPException)):
            running.result()


def test_a_missing_extra_is_named_in_one_line() -> None:
    code = (
        "import sys; sys.modules[sys.argv.pop()] = None\nfrom odelt_fast.cli import"
        " main\nsys.exit(main(['serve', '--port', '0']))"
    )
    for package in ("uvicorn", "prometheus_client"):
        done = subprocess.run(
            [sys.executable, "-c", code, package], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "pip install 'odelt-fast[serve]'" in done.stderr


def test_a_profile_that_deadlines_cannot_use_is_said_at_the_start(
    model: DiT, tmp_path: Path
) -> None:
    operation, path = Operation(4, steps=1), tmp_path / "profile.json"
    measured = Measurement(operation, 8, "bfloat16", None, 1e-3, 1e-3, 1e-3, 5, 1.0)
    write_profile(Profile(this_machine("cpu"), model.config, "digits", (measured,)), path)
    options = Command(dtype="float32")
    assert "--depth leaves out" in str(
        find_plan(replace(options, depth=4), load_model("digits", dtype=torch.float32, depth=4))
    )
    with pytest.raises(ValueError, match="odelt-fast profile --dtypes float32"):
        find_plan(replace(options, profile=path), model)


def test_mistakes_of_the_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options in (
            ["--port", "70000"],
            ["--port", str(taken.getsockname()[1])],
            ["--host", "no.such.host.invalid"],
            ["--port", "0", "--max-queue", "0"],
            ["--port", "0", "--profile", "no_such_profile.json"],
        ):
            assert main(["serve", *options]) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1


def test_connections_do_not_wait_for_acknowledgements() -> None:
    """An answer in two packets would take 40 ms more."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
