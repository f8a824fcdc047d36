"""Attacks the application of Ray Serve on a cluster of this machine. Exit code 1 if anything is not
as it must be.

    python -m tests.stress.stress_cluster --clients 64 --seconds 20

Each part has clients that ask again and again; every picture is compared with the one that the
library makes alone (at most one level of 255 apart). kill: replicas are killed one after the other;
each request is answered, with 200 or 503. replace: another model takes the place of the first; no
request fails, and each picture is one model's or the other's. nodes: a node comes, and goes with
its replica. throughput: requests per second of one replica and of two, a processor each, in turn;
two answer at least 1.7 times as many (on a quiet machine with a core for each; not by default).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.cluster_utils import Cluster

from odelt_fast import DiT, load_model
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.serving.cluster import app
from odelt_fast.serving.listening import listen
from tests.helpers.serving import HANG, Answer, alone, ask, difference, pictures, until

OPERATIONS = ({"depth": 4, "steps": 1}, {"depth": 12, "steps": 4}, {"depth": 8, "steps": 2})
# Of throughput: what a replica computes is to take the time, not what passes a request on.
HEAVY = tuple({"depth": 12, "steps": steps, "num_images": 8} for steps in range(56, 64))
Answers = list[tuple[dict[str, Any], Answer]]
PARTS = ("kill", "replace", "nodes", "throughput")


@contextlib.contextmanager
def cluster(**head: Any) -> Iterator[tuple[Cluster, int]]:
    """A cluster of one node, and the port on which it will serve."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    nodes = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield nodes, port
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()


@contextlib.contextmanager
def asking(
    port: int, clients: int, operations: Sequence[dict[str, Any]] = OPERATIONS
) -> Iterator[Answers]:
    """The answers of clients that ask while this lasts; all of them have come at its end."""
    answers: Answers = []
    over = threading.Event()

    def client(index: int) -> None:
        turn = 0
        while not over.is_set():
            asked = {"seed": index * 10**6 + turn, **operations[(index + turn) % len(operations)]}
            answers.append((asked, ask(port, asked)))
            turn += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join(HANG)
            assert not thread.is_alive(), "a request has no answer"


def judge(name: str, answers: Answers, models: Sequence[DiT], allowed: set[int]) -> bool:
    statuses = Counter(answer.status for _, answer in answers)
    wrong = 0
    for asked, answer in answers:
        if answer.status == 200:
            shown = pictures(answer.headers, answer.body)
            wrong += min(difference(shown, alone(model, asked)) for model in models) > 1
    print(f"{name}: {len(answers)} answers, statuses {dict(statuses)}, {wrong} wrong", flush=True)
    return not wrong and set(statuses) <= allowed and statuses[200] > 0


def replicas() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b":Replica" in path.read_bytes()[:80]:
                found.add(int(path.parent.name))
    return found


def kill(model: DiT, clients: int, seconds: float) -> bool:
    with cluster(num_cpus=2) as (_, port):
        serve.run(app({"replicas": 2, "cpus": 1}))
        with asking(port, clients) as answers:
            end, killed = time.monotonic() + seconds, 0
            while time.monotonic() < end:
                until(lambda: len(replicas()) == 2)
                time.sleep(2)
                os.kill(min(replicas()), signal.SIGKILL)
                killed += 1
    return judge(f"kill: {killed} replicas of two", answers, [model], {200, 503})


def replace(model: DiT, clients: int, seconds: float) -> bool:
    other = load_model("digits", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    with tempfile.TemporaryDirectory() as folder, cluster(num_cpus=3) as (_, port):
        save_model(other, folder)
        serve.run(app({"replicas": 2, "cpus": 1}))
        with asking(port, clients) as answers:
            time.sleep(seconds / 4)
            serve.run(app({"model": folder, "replicas": 2, "cpus": 1}))
            time.sleep(seconds / 4)
            asked = {"seed": 1, "depth": 4, "steps": 1}
            answer = ask(port, asked)
            taken = difference(pictures(answer.headers, answer.body), alone(other, asked)) <= 1
    return judge("replace: a model by another", answers, [model, other], {200}) and taken


def nodes(model: DiT, clients: int, seconds: float) -> bool:
    with cluster(num_cpus=1) as (machines, port):
        few = max(1, clients // 4)  # so that the clients are too many for one
        serve.run(app({"replicas": 1, "max_replicas": 2, "cpus": 1, "max_batch": few}))
        with asking(port, clients) as answers:
            second = machines.add_node(num_cpus=1)
            until(lambda: len(replicas()) == 2)
            time.sleep(seconds / 2)
            machines.remove_node(second, allow_graceful=False)
            time.sleep(seconds / 2)
    return judge("nodes: one added, one lost", answers, [model], {200, 503})


def throughput(model: DiT, clients: int, seconds: float) -> bool:
    rates: dict[int, list[float]] = {1: [], 2: []}
    with cluster(num_cpus=2) as (_, port):
        for _ in range(3):
            for count, found in rates.items():
                serve.run(app({"replicas": count, "cpus": 1}))
                until(lambda count=count: len(replicas()) == count)
                with asking(port, clients, HEAVY) as answers:
                    time.sleep(seconds)
                    within = len(answers)
                statuses = Counter(answer.status for _, answer in answers)
                assert set(statuses) == {200}, statuses
                found.append(within / seconds)
    one, two = (statistics.median(found) for found in rates.values())
    print(f"throughput: one replica {one:.3g}, two {two:.3g} requests/s: {two / one:.2f} times")
    return two >= 1.7 * one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    model = load_model("digits", dtype=torch.float32)
    parts: dict[str, Callable[[DiT, int, float], bool]] = {
        "kill": kill,
        "replace": replace,
        "nodes": nodes,
        "throughput": throughput,
    }
    passed = [parts[name](model, options.clients, options.seconds) for name in options.parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
