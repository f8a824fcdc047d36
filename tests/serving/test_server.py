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
from odelt_fast import operation as sampling
from odelt_fast.cli import main
from odelt_fast.commands.serve import Command, chosen
from odelt_fast.engine.availability import ContextLostError
from odelt_fast.evaluation.machine import this_machine
from odelt_fast.operation import Operation
from odelt_fast.planning.profile import Measurement, Profile, write_profile
from odelt_fast.sampling.decoder import Decoder
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.serving.batching import Batcher, Job, Key, Part, Rejected
from odelt_fast.serving.listening import listen
from odelt_fast.serving.opening import Opening, find_plan
from odelt_fast.serving.server import HttpLimits
from odelt_fast.serving.service import RequestLimits, Service
from tests.helpers.serving import (
    alone,
    ask,
    difference,
    get,
    held,
    metric,
    pictures,
    say,
    serve_command,
    serving,
    until,
)

SLOW = {"num_images": 64, "depth": 12, "steps": 32, "seed": 0}  # a second or more


@pytest.fixture(scope="module")
def model() -> DiT:
    return load_model("digits", dtype=torch.float32)


@pytest.fixture(scope="module")
def port(model: DiT) -> Iterator[int]:
    with serving(Service(model)) as port:
        yield port


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


def test_every_image_is_the_one_that_the_library_makes_alone(model: DiT) -> None:
    asked, service = [some_request(random.Random(seed)) for seed in range(80)], Service(model)
    images = sum(len(alone(model, {**body, "steps": 1})) for body in asked)
    with serving(service) as port, ThreadPoolExecutor(80) as pool:
        with held(service.batcher):
            coming = [pool.submit(ask, port, body) for body in asked]
            until(lambda: service.batcher.waiting >= images - service.batcher.max_batch)
        answers = [future.result() for future in coming]
        assert metric(port, "odelt_batch_requests_count") < 20, "requests did not share batches"
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status == 200, answer.body
        assert difference(pictures(answer.headers, answer.body), alone(model, body)) <= 1, body


def test_guidance_on_an_interval(model: DiT) -> None:
    asked = {"labels": 3, "guidance_scale": 3.0, "steps": 4, "seed": 5, "format": "npz"}
    inside = {**asked, "guidance_interval": [0.5, 1]}
    with serving(Service(model)) as port:
        answer = ask(port, inside)
        found = pictures(answer.headers, answer.body)
        assert difference(found, alone(model, inside)) <= 1
        assert difference(found, alone(model, asked)) > 1


def test_a_request_of_more_images_than_a_batch_is_put_together(model: DiT) -> None:
    asked = {"num_images": 50, "depth": 4, "steps": 1, "seed": 3, "format": "npz"}
    with serving(Service(model, RequestLimits(max_batch=7))) as port:
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
    ({"guidance_scale": 2, "guidance_interval": [0.5, 0.2]}, 422),
    ({"guidance_scale": 2, "guidance_interval": [0.5]}, 422),
    ({"guidance_interval": [0.2, 0.5]}, 422),
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


HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_bodies_are_bounded_in_size_and_time(port: int, model: DiT) -> None:
    declared = say(port, HEAD + b"content-length: 100000\r\n\r\n", b"x" * 100_000)
    chunks = [b"2000\r\n" + b" " * 0x2000 + b"\r\n"] * 40
    chunked = say(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
    for answer in (declared, chunked):
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"at most 16384 bytes" in answer
    with serving(Service(model), HttpLimits(body_seconds=0.1)) as impatient:
        late = say(impatient, HEAD + b"content-length: 10\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408 ")
        assert get(impatient, "/health").status == 200


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/one\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda text: repr(text[-30:]),
)
def test_what_is_not_http_is_answered_with_400(port: int, text: bytes) -> None:
    assert say(port, text + b"\r\n" * 2).startswith(b"HTTP/1.1 400 ")
    assert get(port, "/health").status == 200


@pytest.mark.parametrize("header", [b"name: " + b"x" * 2_000_000, b"name: value\r\n" * 200_000])
def test_a_header_without_end_is_cut_off(port: int, header: bytes) -> None:
    """Who still sends may miss the answer: the connection is closed."""
    answer = say(port, b"GET / HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert get(port, "/health").status == 200


def test_what_clients_do_wrong_is_not_logged(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """A line for every malformed request would let anyone fill a disk."""
    head = HEAD.replace(b"json", b"text") + b"transfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"no length of a chunk\r\n")
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass
    say(port, b"\x00\r\n\r\n")
    assert get(port, "/health").status == 200
    assert caplog.records == []


def test_full_queues_are_answered_with_429(model: DiT) -> None:
    """One request is being drawn, one waits, the others are too many."""
    small = {"num_images": 8, "depth": 4, "steps": 1}
    for limits, name, words in (
        (RequestLimits(max_queue=8, max_batch=8), "queue", "the queue is full"),
        (RequestLimits(max_client=8, max_batch=8), "client_queue", "your queue is full"),
    ):
        service = Service(model, limits)
        with serving(service) as port, ThreadPoolExecutor(12) as pool:
            with held(service.batcher) as begun:
                taken = [pool.submit(ask, port, {**small, "seed": 0})]
                assert begun.wait(60)
                others = [pool.submit(ask, port, {**small, "seed": i}) for i in range(1, 12)]
                until(lambda: sum(future.done() for future in others) == 10)  # noqa: B023
                refused = [future.result() for future in others if future.done()]
                taken += [future for future in others if not future.done()]
            assert {answer.status for answer in refused} == {429}
            assert all(words in answer.error for answer in refused)
            assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
            assert [future.result().status for future in taken] == [200, 200]
            assert metric(port, f'odelt_refused_total{{reason="{name}"}}') == 10
            assert ask(port, {"seed": 1}).status == 200


def test_more_connections_than_allowed_are_told_so(model: DiT) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with serving(Service(model), HttpLimits(max_connections=10)) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        assert say(port, request).startswith(b"HTTP/1.1 503 ")
        idle[0].sendall(request)  # those that were there are served
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in idle:
            connection.close()
        until(lambda: get(port, "/health").status == 200)


# Deadlines


def test_a_deadline_chooses_depth_and_steps(model: DiT, tmp_path: Path) -> None:
    operations = {
        Operation(depth=4, steps=1): 1e-3,
        Operation(depth=12, steps=4): 50.0,
        Operation(depth=12, steps=8): 200.0,
    }
    measured = [
        Measurement(op, 8, "float32", cost, cost, cost, 5, float(op.steps or 0))
        for op, cost in operations.items()
    ]
    path = tmp_path / "profile.json"
    write_profile(Profile(this_machine("cpu"), model.config, "digits", tuple(measured)), path)
    service = Service(
        model, RequestLimits(timeout=600), plan=deadline_planner("digits", profile=path)
    )
    with serving(service) as port:
        for milliseconds, wanted in ((40_000, (4, 1)), (100_000, (12, 4)), (590_000, (12, 8))):
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
        more = ask(port, {"deadline_ms": 100_000, "num_images": 9})
        assert more.status == 422, "more images than were profiled"
        given = ask(port, {"deadline_ms": 200_000, "depth": 4})
        assert given.headers["x-odelt-depth"] == "4"


def test_a_deadline_without_a_profile_says_what_to_run(port: int) -> None:
    service = Service(
        load_model("digits", dtype=torch.float32),
        plan="digits has no profile: run odelt-fast profile",
    )
    with serving(service) as other:
        answer = ask(other, {"deadline_ms": 100})
        assert (answer.status, "odelt-fast profile" in answer.error) == (422, True)
        assert ask(other, {"deadline_ms": 60_000, "depth": 4, "steps": 1}).status == 200


def test_a_deadline_that_others_have_used_up_is_answered_with_503(model: DiT) -> None:
    service = Service(model)
    with serving(service) as port, ThreadPoolExecutor(1) as pool:
        with held(service.batcher) as begun:
            slow = pool.submit(ask, port, {"num_images": 2})
            assert begun.wait(60)
            late = ask(port, {"deadline_ms": 100, "depth": 4, "steps": 1})
            assert late.status == 503
            assert service.batcher.waiting == 0
        assert slow.result().status == 200
        assert ask(port, {"deadline_ms": 60_000, "depth": 4, "steps": 1}).status == 200


# Batches, without HTTP

KEY = Key(sampling.Operation(depth=4, steps=1))


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
            except Rejected as refused:
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
        service.sampler(KEY.operation).decoder = no_memory
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


def test_where_the_gpu_is_lost_everybody_is_told_and_the_server_is_not_healthy() -> None:
    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        raise ContextLostError("the GPU context is lost: restart")

    batcher = Batcher(draw, max_batch=4)
    assert batcher.healthy
    answers = run_jobs(batcher, range(5), images=6)
    assert isinstance(answers[0], ContextLostError)
    assert all(isinstance(answer, ContextLostError | Rejected) for answer in answers)
    assert not batcher.healthy
    assert not batcher.alive
    assert batcher.waiting == 0
    assert isinstance(run_jobs(batcher, [1])[0], Rejected)
    batcher.stop()


def test_a_slow_start_does_not_refuse_deadlines_for_ever() -> None:
    """The first batch of a kind may build what later ones use: an estimate that nothing corrects
    must fade."""
    batcher = Batcher(blank)
    batcher.durations.add(KEY, 1, 100.0)
    answers = [run_jobs(batcher, [seed], seconds=30)[0] for seed in range(40)]
    assert isinstance(answers[0], Rejected)
    assert answers[-1] == b"39"
    batcher.stop()


def test_a_stopped_batcher_answers_everybody() -> None:
    entered = threading.Event()

    def draw(key: Key, parts: Sequence[Part]) -> np.ndarray:
        entered.set()
        until(lambda: not batcher.alive)
        return blank(key, parts)

    batcher = Batcher(draw, max_batch=1)

    def stop() -> None:
        entered.wait(60)
        batcher.stop(60)

    stopping = threading.Thread(target=stop)
    stopping.start()
    answers = run_jobs(batcher, range(5))
    stopping.join()
    assert answers[0] == b"0", "the batch that ran is finished"
    assert all(isinstance(answer, Rejected) and answer.status == 503 for answer in answers[1:])
    assert isinstance(run_jobs(batcher, [1])[0], Rejected)


# Clients that leave, and the server's own start and stop


def test_a_client_that_leaves_leaves_no_work_behind(model: DiT) -> None:
    service = Service(model)
    body = json.dumps({"num_images": 64}).encode()
    with serving(service) as port, ThreadPoolExecutor(1) as pool:
        with held(service.batcher) as begun:
            staying = pool.submit(ask, port, {"depth": 4, "steps": 1, "seed": 5})
            assert begun.wait(60)
            leaving = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
            for connection in leaving:
                connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: service.batcher.waiting == 8 * 64)
            for connection in leaving:
                connection.close()
            until(lambda: service.batcher.waiting == 0)
        answer = staying.result()
        asked = {"depth": 4, "steps": 1, "seed": 5}
        assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
        assert metric(port, 'odelt_requests_total{route="/generate",status="499"}') == 8


def test_told_to_stop_the_server_finishes_what_runs(model: DiT) -> None:
    with (
        serve_command("--max-batch", "8", "--shutdown", "300") as (process, port),
        ThreadPoolExecutor(1) as pool,
    ):
        idle = http.client.HTTPConnection("127.0.0.1", port)
        idle.request("GET", "/health")
        idle.getresponse().read()
        asked = {**SLOW, "format": "json"}
        running = pool.submit(ask, port, asked)
        until(lambda: metric(port, "odelt_waiting_images") > 0)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as process managers repeat it
        answer = running.result()
        assert answer.status == 200
        # By default a CPU serves float32 weights, also where it computes in bfloat16.
        assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output == "stopped\n"
        assert "Traceback" not in errors, errors
        with pytest.raises(ConnectionRefusedError):
            get(port, "/health")


def test_a_second_interrupt_does_not_wait() -> None:
    longer = {**SLOW, "steps": 128}

    def listens() -> bool:
        try:
            return bool(get(port, "/health"))
        except (OSError, http.client.HTTPException):
            return False

    with (
        serve_command("--max-batch", "4", "--shutdown", "300") as (process, port),
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(ask, port, longer)
        until(lambda: metric(port, "odelt_waiting_images") > 0)
        process.send_signal(signal.SIGINT)
        until(lambda: not listens())
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors
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
    operation, path = Operation(depth=4, steps=1), tmp_path / "profile.json"
    measured = Measurement(operation, 8, "bfloat16", 1e-3, 1e-3, 1e-3, 5, 1.0)
    write_profile(Profile(this_machine("cpu"), model.config, "digits", (measured,)), path)
    options = Command(dtype="float32")
    assert "--depth leaves out" in str(
        find_plan(
            chosen(Opening, replace(options, depth=4)),
            load_model("digits", dtype=torch.float32, depth=4),
        )
    )
    with pytest.raises(ValueError, match="odelt-fast profile --dtypes float32"):
        find_plan(chosen(Opening, replace(options, profile=path)), model)


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

    async def nodelay() -> int:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[socket.socket] = loop.create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport.get_extra_info("socket"))

        with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
            async with await loop.create_server(Protocol, sock=listener):
                return (await made).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(nodelay())
