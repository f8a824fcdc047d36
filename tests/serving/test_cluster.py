"""The service of several processes: the same answers as of one, whatever becomes of a replica."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from odelt_fast import DiT, load_model
from odelt_fast.cli import main
from odelt_fast.serving.cluster import Settings
from odelt_fast.serving.front import joined, operation_of
from tests.helpers.serving import (
    HANG,
    alone,
    ask,
    difference,
    get,
    metric,
    pictures,
    serve_command,
    until,
)

OPERATIONS: tuple[dict[str, Any], ...] = (
    {"depth": 4, "steps": 1},
    {"depth": 12, "steps": 2, "num_images": 3, "labels": [1, 2, 10], "format": "json"},
    {"depth": 8, "steps": 2, "solver": "heun2", "format": "npz", "num_images": 2},
    {"depth": 4, "guidance_scale": 2.0},
)


@pytest.fixture(scope="module")
def model() -> DiT:
    return load_model("digits", dtype=torch.float32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """The port of two replicas; the process must end well."""
    with serve_command("--replicas", "2", "--cpus", "0.5") as (process, port):
        yield port
        process.terminate()
        output, _ = process.communicate(timeout=HANG)
        # Ray tells of a replica that was killed before
        assert (process.returncode, output.endswith("stopped\n")) == (0, True), output


def replicas() -> set[int]:
    """Processes of replicas on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ServeReplica:odelt-fast:Replica"):
                found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_pictures_are_the_librarys(cluster: int, model: DiT, operation: dict[str, Any]) -> None:
    asked = {"seed": str(2**63 + 7), **operation}
    answer = ask(cluster, asked)
    assert answer.status == 200, answer.body
    assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
    assert answer.headers["x-odelt-seed"] == asked["seed"]


def test_mistakes_are_answered_as_by_one_process(cluster: int) -> None:
    assert ask(cluster, b"{").status == 400
    assert ask(cluster, {"depth": 5}).status == 422
    assert ask(cluster, {"depth": 5}).error.startswith("depth")
    assert ask(cluster, {}, kind="text/plain").status == 415
    assert ask(cluster, b" " * 20_000).status == 413
    assert ask(cluster, {}, path="/other").status == 404
    assert get(cluster, "/generate").status == 405
    assert get(cluster, "/").body == get(cluster, "/").body
    assert json.loads(get(cluster, "/").body)["depths"] == [4, 8, 12]
    assert ask(cluster, {"steps": 128, "depth": 12, "deadline_ms": 0.001}).status == 503


def drawn(port: int) -> Counter[str]:
    """Requests that each replica has drawn."""
    lines = get(port, "/metrics").body.decode().splitlines()
    name = 'odelt_batch_requests_sum{replica="'
    shown = (line.removeprefix(name) for line in lines if line.startswith(name))
    return Counter({line.split('"')[0]: int(float(line.split()[-1])) for line in shown})


def test_one_operation_keeps_to_one_replica_and_all_are_counted(cluster: int) -> None:
    before = drawn(cluster)
    assert len(before) == 2
    for seed in range(24):
        assert ask(cluster, {"depth": 8, "steps": 3, "seed": seed}).status == 200
    shares = drawn(cluster) - before
    assert shares.total() == 24
    # On a busy machine Ray may still count requests that are answered: a few go to the other.
    assert max(shares.values()) >= 18, shares
    before = drawn(cluster)
    for steps in range(1, 25):  # of two replicas one has none of them once in 2^23 times
        assert ask(cluster, {"depth": 4, "steps": steps}).status == 200
    counts = drawn(cluster)
    assert len(counts - before) == 2
    total = metric(cluster, "odelt_batch_requests_sum")
    assert total == sum(counts.values()) >= 6


def test_no_replica_idles_beside_a_queue(cluster: int) -> None:
    before = drawn(cluster)
    # Long, so that all wait together: on a busy machine short ones come one after another. How even
    # the shares of a burst are depends on how soon Ray counts what it has sent.
    asked = {"depth": 12, "steps": 128, "num_images": 4}
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda seed: ask(cluster, {**asked, "seed": seed}), range(16)))
    assert {answer.status for answer in answers} == {200}
    shares = drawn(cluster) - before
    assert shares.total() == 16
    assert len(shares) == 2, shares


def test_a_replica_that_is_killed_costs_no_answer(cluster: int, model: DiT) -> None:
    answers: list[tuple[dict[str, Any], Any]] = []

    def client(index: int) -> None:
        for turn in range(12):
            asked = {"depth": 4, "steps": 4, "seed": 1000 * index + turn}
            answers.append((asked, ask(cluster, asked)))

    threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    before = replicas()
    for thread in threads:
        thread.start()
    until(lambda: len(answers) > 8)
    os.kill(min(before), signal.SIGKILL)
    for thread in threads:
        thread.join(HANG)
    statuses = Counter(answer.status for _, answer in answers)
    assert sum(statuses.values()) == 8 * 12
    assert set(statuses) <= {200, 503}
    assert statuses[200] > 80, statuses
    for asked, answer in answers:
        if answer.status == 200:
            assert difference(pictures(answer.headers, answer.body), alone(model, asked)) <= 1
    until(lambda: len(replicas()) == 2 and min(before) not in replicas())  # another one came


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-replicas", "2"], "--max-replicas is of --replicas, which is not given"),
        (["--cpus", "2"], "--cpus is of --replicas, which is not given"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--replicas", "2", "--max-replicas", "1"], "max_replicas must be at least replicas, 2"),
        (["--replicas", "999"], "--replicas 999 of --cpus 1 need 999 processors, this machine has"),
        (["--replicas", "1", "--model", "nothing"], "nothing"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *options]) != 0
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_without_ray_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "odelt_fast.serving.cluster")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--port", "0", "--replicas", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: odelt-fast serve --replicas needs Ray Serve: pip install 'odelt-fast[cluster]'\n"
    )


def test_metrics_of_replicas_are_joined() -> None:
    text = (
        "# HELP a_total A\n# TYPE a_total counter\n"
        'a_total{route="/"} 2.0\n# HELP b B\n# TYPE b gauge\nb 1.0\n'
    )
    lines = joined([("x", text), ("y", text)]).decode().splitlines()
    assert 'a_total{replica="x",route="/"} 2.0' in lines
    assert 'a_total{replica="y",route="/"} 2.0' in lines
    assert 'b{replica="y"} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == 2


def test_operation_is_read_from_any_body() -> None:
    one = operation_of(b'{"depth": 4, "steps": 2, "seed": 1}')
    assert one == operation_of(b'{"steps": 2, "depth": 4, "labels": 3}')
    assert one != operation_of(b'{"steps": 2, "depth": 8}')
    for hostile in (b"", b"\xff", b"[" * 100_000, b"[1]", b"{", b'{"depth": ' + b"9" * 5000 + b"}"):
        assert len(operation_of(hostile)) < 200


def test_arguments_are_texts_or_values_and_unknown_ones_are_refused() -> None:
    settings = Settings.of({"model": "mnist", "replicas": "2", "timeout": "1.5", "depth": None})
    assert (settings.opening.model, settings.replicas.replicas) == ("mnist", 2)
    assert settings.limits.timeout == 1.5
    for wrong, says in (
        ({"modle": "x"}, "no argument modle"),
        ({"replicas": "two"}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be at least replicas, 3"),
        ({"cpus": 0}, "cpus must be a number from 0.01"),
        ({"max_images": 0}, "max_images must be above 0"),
    ):
        with pytest.raises(ValueError, match=says):
            Settings.of(wrong)
