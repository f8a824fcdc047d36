"""Kills training at random moments and checks that nothing is lost: `python -m
tests.stress.kill_training --kills 300 --seed 0 [--processes 2] [--workers 2] [--store shards]`.

A run of 200 steps saves every 7 steps, is killed with SIGKILL at random moments, saves included,
and resumed until it is finished; then the next run starts, until there were `kills` kills. Among
the moments: SIGTERM, after which the run must end by itself with a checkpoint of its last step; a
second run in the same folder, which must be refused; and a resume from an older checkpoint, whose
later ones must be set aside. After every kill the newest checkpoint must load and be at least as
new as the last one whose save returned. A finished run must equal the uninterrupted one bitwise:
weights, EMA, optimizer, and the loss of every step; it makes its batches itself, the others may
have workers. --store: the data lie in an object store on this machine, as shards, Parquet or Lance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401  (once, before the forks)
import torch
import torch._dynamo  # what an optimizer imports: 4 of the 5 s of processor time of a start
from safetensors.torch import load_file

from odelt_fast import load_model
from odelt_fast.train.checkpoints import checkpoints, step_of
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.recipes import RECIPES
from odelt_fast.train.run import RunStopped, train
from tests.helpers import forked
from tests.helpers.forked import wait
from tests.helpers.object_store import object_store
from tests.helpers.training import SMALL
from tests.helpers.witness import Witness, equal, shard
from tests.images.test_where_data_lie import laid

STEPS = 200
MODEL = replace(SMALL, dropout=0.1)


def start(
    config: TrainConfig,
    witness: Witness,
    processes: int,
    sharded: bool = False,
    work: Callable[[TrainConfig], object] = train,
) -> list[int]:
    """Forks the processes of a run, so that torch is imported once only; returns their ids.
    sharded: with FSDP2. work: what they do."""

    def watched() -> None:
        witness.watch()
        if sharded:
            shard()
        with contextlib.suppress(RunStopped):
            work(config)

    return forked.start(watched, processes, witness.log)


def assert_same_run(run: Path, whole: Path) -> None:
    weights = [f"checkpoint-{STEPS}/{name}model.safetensors" for name in ("", "ema/", "power-0.1/")]
    weights += [
        f"ema-snapshots/0.1/step-{step}/model.safetensors" for step in range(20, STEPS + 1, 20)
    ]
    for name in (*weights, "model.safetensors"):
        assert equal(load_file(run / name), load_file(whole / name)), (
            f"{name} differs from the uninterrupted run's"
        )
    optimizers = [
        torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.bin", weights_only=True)
        for folder in (run, whole)
    ]
    assert equal(*optimizers), "the optimizer differs from the uninterrupted run's"


def refused(config: TrainConfig) -> None:
    """Work of a second run in the folder of one that goes on: says whether it had the folder."""
    said = "had the folder"
    try:
        train(config)
    except ValueError as error:
        said = "was refused" if "is in use by a run" in str(error) else str(error)
    (config.output_dir.parent / "second").write_text(said)


def has_ended(process: int) -> bool:
    """Whether a child has ended; it is not waited for."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process, options) is not None


def second_run(config: TrainConfig, witness: Witness, first: list[int], until: float) -> bool:
    """Starts another run in the folder of `first`, once that holds it; whether it was refused."""
    if not holds(config.output_dir, first[0], until + 60):
        return False
    log = Witness(witness.log.parent / "other").log
    other = start(config, Witness(witness.log.parent / "other"), 1, work=refused)
    assert wait(other, time.monotonic() + 120, log), "the second run did not end"
    said = (config.output_dir.parent / "second").read_text()
    # Or the first ended while the second was starting.
    assert said == "was refused" or has_ended(first[0]), f"the second run {said}"
    return said == "was refused"


def holds(run: Path, process: int, until: float) -> bool:
    """Whether the process holds the folder before the time `until`: from then on signals end it in
    good order."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((run / ".run.lock").read_text())["pid"] == process:
                return True
        time.sleep(0.01)
    return False


def stepped(witness: Witness, process: int, until: float) -> None:
    """Returns when the process has done a step, has ended, or at the time `until`."""
    losses = witness.losses.with_suffix(".0")
    size = losses.stat().st_size if losses.exists() else 0
    while time.monotonic() < until and not has_ended(process):
        if losses.exists() and losses.stat().st_size > size:
            return
        time.sleep(0.001)


def terminate(run: Path, children: list[int], until: float) -> None:
    """Sends SIGTERM to all of them at the time `until`, or when they have begun."""
    holds(run, children[0], until + 60)
    time.sleep(max(0.0, until - time.monotonic()))
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def torture(
    kills: int, seed: int, processes: int, folder: Path, workers: int = 0, data: str = "digits"
) -> dict[str, int]:
    """Does it all in `folder`; returns counts. Raises AssertionError for the first thing that is
    lost or differs."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    base = replace(
        RECIPES["digits"],
        data=data,
        model=MODEL,
        steps=STEPS,
        train_batch_size=16,
        warmup_steps=2,
        logging_steps=50,
        sampling_steps=0,
    )
    base = replace(
        base,
        checkpointing_steps=7,
        checkpoints_total_limit=2,
        log_with=(),
        resume_from_checkpoint="latest",
    )
    base = replace(base, depth_sampling="stratified", ema_widths=(0.1,), ema_snapshot_steps=20)
    whole = folder / "whole"
    witness = Witness(folder / "witness-whole")
    begin = time.monotonic()
    assert wait(
        start(replace(base, output_dir=whole), witness, processes), begin + 600, witness.log
    )
    duration, expected = time.monotonic() - begin, witness.all_losses()
    assert len(expected) == STEPS * processes
    counts = {"kills": 0, "finished runs": 0, "kills in a save": 0, "started from scratch": 0}
    counts |= {"ended by SIGTERM": 0, "second runs refused": 0, "rollbacks": 0}
    run, name = folder / "run", "latest"
    while counts["kills"] < kills or counts["finished runs"] == 0:
        config = replace(base, output_dir=run, resume_from_checkpoint=name)
        config = replace(config, dataloader_num_workers=workers)
        witness, name = Witness(folder / "witness"), "latest"
        children, lasts = start(config, witness, processes), counts["kills"] < kills
        if lasts and chance.random() < 0.8:  # most of its time may be its start
            stepped(witness, children[0], time.monotonic() + 120)
        until = time.monotonic() + (chance.uniform(0, 0.2 * duration) if lasts else 600)
        moment = chance.random() if lasts else 1.0
        if moment < 0.15:
            terminate(run, children, until)
            until += 120
        elif moment < 0.3:
            counts["second runs refused"] += second_run(config, witness, children, until)
        finished = wait(children, until, witness.log)
        kept = checkpoints(run) if run.exists() else []
        if finished and (not kept or step_of(kept[-1]) < STEPS):
            assert not witness.all_losses() or kept, "SIGTERM left no checkpoint"
            counts["ended by SIGTERM"] += 1
            continue
        if not finished:
            counts["kills"] += 1
            print(f"{counts['kills']} kills", file=sys.stderr, flush=True)
            counts["kills in a save"] += any(run.glob("checkpoint-*.*"))
            kept = checkpoints(run) if run.exists() else []
            replaced = [path.with_suffix("") for path in run.glob("checkpoint-*.replaced")]
            newest = max(
                [int(path.name.removeprefix("checkpoint-")) for path in [*kept, *replaced]],
                default=0,
            )
            assert newest >= witness.last_save(), (
                f"checkpoint-{witness.last_save()} was acknowledged, the newest is {newest}"
            )
            counts["started from scratch"] += not newest
            if kept:
                load_model(kept[-1] / "ema")
                load_file(kept[-1] / "model.safetensors")
                torch.load(kept[-1] / "optimizer.bin", weights_only=True)
            if len(kept) > 1 and chance.random() < 0.15:
                name = str(kept[-2])
                with witness.saves.open("a") as file:
                    print(kept[-2].name.removeprefix("checkpoint-"), file=file)
                counts["rollbacks"] += 1
            continue
        counts["finished runs"] += 1
        assert witness.all_losses() == expected, "a loss differs from the uninterrupted run's"
        assert_same_run(run, whole)
        shutil.rmtree(run)
        shutil.rmtree(folder / "witness")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--store", choices=("shards", "parquet", "lance"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data, log = "digits", Path(folder, "log")
        if options.store:
            root = stack.enter_context(object_store())
            # A copy of one of three shards: images of the others come over the network.
            os.environ |= {"ODELT_FAST_CACHE": f"{folder}/cache", "ODELT_FAST_CACHE_SIZE": "60KB"}
            # In a process of its own: what it starts would not survive the next fork.
            laying = forked.start(partial(laid, options.store, root), 1, log)
            assert wait(laying, time.monotonic() + 600, log)
            data = f"{root}/{options.store}"
        wanted = options.kills, options.seed, options.processes
        counts = torture(*wanted, Path(folder), options.workers, data)
    print(
        ", ".join(f"{value} {name}" for name, value in counts.items())
        + ": nothing lost, every finished run bitwise the same"
    )


if __name__ == "__main__":
    main()
