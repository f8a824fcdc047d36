"""A run over hosts: two agents of torchrun, with a rendezvous over loopback and gloo."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.train.batch import batch_state, kept
from odelt_fast.train.checkpoints import checkpoints, model_of, written_whole
from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import parse
from odelt_fast.train.processes import loss_in, lost
from odelt_fast.train.run_lock import held
from odelt_fast.train.timing import slow_ones
from tests.helpers.hosts import Host, until
from tests.helpers.training import small_run

OPTIONS = [
    *("--model.hidden-size=16", "--model.num-heads=2", "--model.depth=2", "--model.depth-min=1"),
    *("--model.depth-group=1", "--sampling-steps=0", "--warmup-steps=2", "--log-with"),
    *("--checkpointing-steps=4", "--checkpoints-total-limit=1000", "--collective-timeout=60"),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        both = [Host(tmp_path / f"host-{number}") for number in range(2)]
        for host in both:
            stack.callback(host.kill)
        yield both


def test_two_hosts_train_as_one_and_one_goes_on_when_the_other_dies(
    hosts: list[Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "run"
    options = [*OPTIONS, f"--output-dir={run}"]
    program = ["train/main.py", *options, "--train-batch-size=16", "--steps=100000"]
    for number, host in enumerate(hosts):
        conf = f"is_host={1 - number},keep_alive_interval=5,join_timeout=120"
        ours = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={conf}"]
        host.start([*ours, "--local-addr=127.0.0.1"], program)
    until("two checkpoints", lambda: len(checkpoints(run)) > 1, 240, hosts)
    hosts[1].kill()
    until("the other host ends", hosts[0].ended, 120, hosts)
    said = hosts[0].said()
    assert "has lost another process of the run in step" in said
    assert "the newest checkpoint is" in said
    assert "go on with --resume-from-checkpoint latest" in said
    assert "Traceback" not in said.split("torch/distributed/elastic")[0]

    def trainer(*changes: str) -> Trainer:
        return Trainer(parse([*options, "--steps=100000", *changes]))

    resumed = trainer("--train-batch-size=16", "--resume-from-checkpoint=latest")
    said = "batch 32 (1 process x 2 accumulation steps x 16)"
    assert said in capsys.readouterr().out
    newest = str(checkpoints(run)[-1])
    assert resumed.resume(newest)
    asked = trainer("--train-batch-size=16", "--gradient-accumulation-steps=2")
    assert asked.resume(newest)
    assert all(torch.equal(resumed.step(), asked.step()) for _ in range(2))

    alone = trainer("--train-batch-size=32")
    for _ in range(4):
        alone.step()
    theirs = load_file(run / "checkpoint-4" / "ema" / "model.safetensors")
    difference, size = 0.0, 0.0
    for name, tensor in alone.ema.state_dict().items():
        difference += (tensor - theirs[name]).double().square().sum().item()
        size += tensor.double().square().sum().item()
    assert difference**0.5 < 1e-6 * size**0.5


def test_another_number_of_processes_keeps_the_batch(tmp_path: Path) -> None:
    config = small_run(tmp_path, train_batch_size=16)
    state = batch_state(config, 48)  # of three processes
    for processes, division in ((3, (16, 1)), (1, (16, 3)), (2, (8, 3)), (6, (8, 1))):
        same = kept(config, state, processes)
        assert (same.train_batch_size, same.gradient_accumulation_steps or 1) == division
    with pytest.raises(ValueError, match="among 4 processes: start 3 or 6, or set"):
        kept(config, state, 4)
    # Another batch that is asked for is taken; and what strangers wrote is nothing.
    other = small_run(tmp_path, train_batch_size=8)
    assert kept(other, state, 4) == other
    for hostile in ({}, {"rows": "48"}, {**state, "rows": 0}, {**state, "rows": 7}):
        assert kept(config, hostile, 2) == config


@pytest.mark.parametrize("model", [7, "x", {"depth": 0}, {"depth": "x"}, {"unknown": 1}])
def test_a_hostile_model_of_a_checkpoint_in_shards_is_damage(model: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state.json names no model"):
        model_of(tmp_path, {"model": model})


@pytest.mark.parametrize(
    "text",
    [
        "Application timeout caused pair closure",
        "[/x/gloo/transport/tcp/pair.cc:537] Read error [10.77.0.11]:5: Connection reset by peer",
        "Timed out waiting 40000ms for recv operation to complete",
    ],
)
def test_what_gloo_says_of_a_lost_process_is_known(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = RuntimeError(text)
    assert loss_in(error) is error
    assert loss_in(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    # While a checkpoint is being written, too; but not what the disk says.
    for cause, found in ((error, error), (OSError(28, "No space left on device"), None)):
        with (
            pytest.raises(ValueError, match=r"checkpoint-5 cannot be written") as stopped,
            written_whole(tmp_path / "run" / "checkpoint-5", None),
        ):
            raise cause
        assert loss_in(stopped.value) is found
    line = str(lost(RuntimeError(text), 7, tmp_path))
    assert line.endswith("): there is no checkpoint yet")
    assert "lost another process of the run in step 7 (" in line
    assert "/x/" not in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert loss_in(error) is None


def test_the_slow_process_is_named() -> None:
    assert slow_ones([1.0, 1.0, 2.0, 1.2], step=3.0) == [2]
    assert slow_ones([1.0, 2.0], step=3.0) == [1]
    assert slow_ones([0.001, 0.002], step=3.0) == []  # holds nobody up


def test_a_restarted_run_waits_for_the_end_of_the_one_that_was_cut_off(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with held(tmp_path):
            with pytest.raises(ValueError, match="in use by a run"), held(tmp_path):
                pass

            def restarted() -> str | None:
                with held(tmp_path, patience=60) as remark:
                    return remark

            waiting = pool.submit(restarted)
            time.sleep(0.2)
            assert not waiting.done()
        assert waiting.result(60) is None
