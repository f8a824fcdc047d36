"""Trains over hosts that die. Exit code 1 if anything is not as it must be; needs root.

    python -m tests.stress.stress_nodes --parts equal kill --kills 30 --cuts 10

Hosts are network namespaces, each with an agent of torchrun; they meet on a machine beside them,
and share a file system (this machine's). equal: two hosts, and three, train as one process with the
whole batch, weights sharded (FSDP2) or not. kill: at random moments all processes of a random host
are killed with SIGKILL, or its link is cut (`ip link set down`). The host that is left ends its
step with one line, starts again alone with the same batch, and goes on from the newest checkpoint,
which is no older than the last one that was said to be whole; then the other comes back. What every
such run wrote is compared, bitwise, with a run of its size that starts at the same checkpoint.
slow: a process that is held up is named.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from odelt_fast.train.loop import Trainer
from odelt_fast.train.main import main as train
from odelt_fast.train.main import parse
from tests.helpers import forked
from tests.helpers.hosts import Host, until
from tests.helpers.namespaces import Network, missing
from tests.helpers.witness import Witness, equal, shard

PARTS = ("equal", "kill", "slow")
PATIENCE = 600.0  # seconds for what a busy machine needs to start a few processes
MODEL = [
    *("--model.hidden-size=24", "--model.num-heads=2", "--model.depth=4", "--model.depth-min=2"),
    *("--model.depth-group=2", "--warmup-steps=2", "--sampling-steps=0", "--log-with"),
]
EVERY = 5  # steps between checkpoints
LOST = re.compile(r"process \d+ has lost another process of the run in step \d+ ")
GOES_ON = re.compile(r"goes on from \S*checkpoint-(\d+)")
WHOLE = re.compile(r"checkpoint-(\d+) is whole")


def worker(arguments: Sequence[str]) -> int:
    """What torchrun starts on a host: training, with what the test adds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--witness", type=Path)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that rank 1 is held up")
    mine, options = parser.parse_known_args(arguments)
    if mine.witness:
        Witness(mine.witness).watch()
    if mine.sharded:
        shard(parse(options).collective_timeout)
    if mine.slow:
        batch = Trainer._accumulate

        def slowly(trainer: Trainer, part: int, rows: object) -> torch.Tensor:
            if trainer.accelerator.process_index == 1:
                with trainer.times.own():
                    time.sleep(mine.slow)
            return batch(trainer, part, rows)  # type: ignore[arg-type]

        Trainer._accumulate = slowly  # type: ignore[assignment,method-assign]
    return train(options)


def program(*options: str, sharded: bool = False) -> list[str]:
    ours = ["--sharded"] if sharded else []
    return ["-m", "tests.stress.stress_nodes", "worker", *ours, *MODEL, *options]


def torchrun(network: Network, hosts: int, name: str, *, elastic: bool = False) -> list[str]:
    conf = "is_host=0,join_timeout=600,last_call_timeout=3,"
    conf += "keep_alive_interval=3,keep_alive_max_attempt=5"
    nodes = f"--nnodes={'1:' if elastic else ''}{hosts}"
    options = [nodes, f"--rdzv-endpoint={network.endpoint}", f"--rdzv-id={name}"]
    return [*options, f"--rdzv-conf={conf}", f"--max-restarts={1000 if elastic else 0}"]


def launched(network: Network, hosts: int, rank: int) -> list[str]:
    """The same through `accelerate launch`."""
    address, port = network.endpoint.split(":")
    options = ["--multi_gpu", f"--num_machines={hosts}", f"--machine_rank={rank}"]
    options += [f"--num_processes={hosts}", f"--main_process_ip={address}"]
    return [*options, f"--main_process_port={port}", "--rdzv_conf=is_host=0"]


def weights(run: Path) -> torch.Tensor:
    """Of the finished run's model, one after another, float64."""
    values = sorted(load_file(run / "model.safetensors").items())
    return torch.cat([tensor.flatten() for _, tensor in values]).double()


def losses(witness: Witness, steps: int, processes: int) -> list[float]:
    """Summed over the batch, of every step."""
    found = witness.all_losses()
    assert len(found) == steps * processes, f"{len(found)} losses of {steps} steps were reported"
    return [
        sum(float.fromhex(value) for (_, at), value in found.items() if at == step)
        for step in range(steps)
    ]


def finished(hosts: Sequence[Host]) -> str:
    """What they said to their end, which must be a good one."""
    until("the end", lambda: all(host.ended() for host in hosts), PATIENCE, hosts)
    said = "\n".join(host.said() for host in hosts)
    assert all(host.agent and host.agent.returncode == 0 for host in hosts), said
    return said


def part_equal(folder: Path, steps: int = 12) -> None:
    options = [f"--steps={steps}", "--model.dropout=0", "--checkpointing-steps=6"]
    whole = Witness(folder / "witness")
    alone = parse([*MODEL, *options, "--train-batch-size=48", f"--output-dir={folder / 'whole'}"])

    def watched() -> None:
        whole.watch()
        from odelt_fast.train.run import train as work

        work(alone)

    ran = forked.start(watched, 1, whole.log)
    assert forked.wait(ran, time.monotonic() + PATIENCE, whole.log)
    expected, target = losses(whole, steps, 1), weights(folder / "whole")
    for count, kind in ((2, ""), (2, "sharded"), (3, ""), (3, "sharded"), (2, "accelerate")):
        name = f"{count} hosts{kind and ', '}{kind}"
        run, witness = folder / name.replace(" ", "-"), Witness(folder / f"witness of {name}")
        network = Network(count, witness.log.parent)
        with network.up():
            ours = [f"--train-batch-size={48 // count}", f"--output-dir={run}"]
            ours += [f"--witness={witness.log.parent}"]
            work = program(*options, *ours, sharded=kind == "sharded")
            for rank, host in enumerate(network.hosts):
                if kind == "accelerate":
                    host.start(launched(network, count, rank), work, "accelerate.commands.launch")
                else:
                    host.start(torchrun(network, count, "equal"), work)
            finished(network.hosts)
        found = losses(witness, steps, count)
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected))
        moved = weights(run)
        far = (torch.linalg.vector_norm(moved - target) / torch.linalg.vector_norm(target)).item()
        said = f"{name} as one process: losses within {apart:.1e}, weights within {far:.1e}"
        print(said, flush=True)
        assert apart < 1e-6, said
        assert far < 1e-6, said


class Run:
    """A run over two hosts, with what was seen of it."""

    def __init__(self, network: Network, folder: Path, sharded: bool, timeout: float) -> None:
        self.network, self.folder, self.sharded, self.timeout = network, folder, sharded, timeout
        self.hosts, self.counts = network.hosts, Counter[str]()
        self.main = self.hosts[0]
        self.waits: dict[str, list[float]] = {"killed": [], "cut": []}
        self.ran: list[tuple[int, int, list[int]]] = []  # from, processes, checkpoints to compare

    def options(self) -> list[str]:
        ours = ["--steps=1000000", f"--checkpointing-steps={EVERY}", "--train-batch-size=16"]
        ours += ["--checkpoints-total-limit=None", "--resume-from-checkpoint=latest"]
        ours += [f"--collective-timeout={self.timeout:g}", "--model.dropout=0.1"]
        return [*ours, "--depth-sampling=stratified"]

    def start(self, host: Host) -> None:
        ours = [*self.options(), f"--output-dir={self.folder}"]
        ours = program(*ours, sharded=self.sharded)
        host.start(torchrun(self.network, 2, "kill", elastic=True), ours)

    def goes_on(self, processes: int, hosts: Sequence[Host], since: dict[Path, int]) -> None:
        """Waits until so many processes have written two checkpoints; notes where they began."""
        batch = f"batch 32 ({processes} process"

        def later(host: Host) -> str:
            text = host.said()[since.get(host.log, 0) :]
            return text[text.rfind(batch) :] if batch in text else ""

        def begun() -> list[Host]:
            return [host for host in hosts if len(WHOLE.findall(later(host))) >= 2]

        until(f"{processes} processes go on", begun, PATIENCE, self.hosts)
        self.main = begun()[0]  # it is the one that says so
        text = later(self.main)
        begin = int(found[1]) if (found := GOES_ON.search(text)) else 0
        said = [int(step) for step in WHOLE.findall(text)][:2]
        assert all(step > begin for step in said), f"{said} after {begin}"
        self.ran.append((begin, processes, said))

    def lose(self, chance: random.Random, cut: bool) -> None:
        """One host dies, or is cut off, at a random moment; the other goes on; it comes back."""
        number = chance.randrange(2)
        victim, left, main = self.hosts[number], self.hosts[1 - number], self.main
        time.sleep(chance.uniform(0, 3))
        since = {host.log: len(host.said()) for host in self.hosts}
        if cut:
            self.network.link(number, "down")
        else:
            victim.kill()
        begin = time.monotonic()

        def told(host: Host) -> bool:
            return bool(LOST.search(host.said()[since[host.log] :]))

        # Twice: one operation that begins late may wait for another.
        until("one line", lambda: told(left), 2 * self.timeout + PATIENCE / 10, self.hosts)
        took = time.monotonic() - begin
        self.waits["cut" if cut else "killed"].append(took)
        if cut:
            until("one line of the other", lambda: told(victim), PATIENCE, self.hosts)
            victim.kill()  # whoever minds the hosts starts it anew
            self.network.link(number, "up")
        text = left.said()
        text = text[: since[left.log]] + text[since[left.log] :].split("has lost another")[0]
        acknowledged = max(map(int, WHOLE.findall(text + victim.said())), default=0)
        self.goes_on(1, [left], since)
        begun = self.ran[-1][0]
        assert begun >= acknowledged, f"{acknowledged} was whole, {begun} is taken"
        assert not list(self.folder.glob("abandoned-*")), "checkpoints were set aside"
        self.counts["cut links" if cut else "kills"] += 1
        self.counts["of the main process's host"] += victim is main
        since = {host.log: len(host.said()) for host in self.hosts}
        self.start(victim)
        self.goes_on(2, self.hosts, since)

    def compare(self, where: Path) -> None:
        """Repeats what ran, from the same checkpoints, with as many processes."""
        where.mkdir()
        for begin, processes, steps in self.ran:
            again = where / f"{begin}-{processes}"
            if begin:
                name = f"checkpoint-{begin}"
                shutil.copytree(self.folder / name, again / name)
            ours = [*MODEL, *self.options(), f"--output-dir={again}"]
            log = where / "log"
            work = partial(repeated, ours, steps, self.sharded)
            ran = forked.start(work, processes, log)
            assert forked.wait(ran, time.monotonic() + PATIENCE, log)
            for step in steps:
                same(self.folder / f"checkpoint-{step}", again / f"checkpoint-{step}")
            shutil.rmtree(again)


def repeated(options: Sequence[str], steps: Sequence[int], sharded: bool) -> None:
    if sharded:
        shard()
    trainer = Trainer(parse(options))
    trainer.resume("latest")
    while trainer.finished_steps < steps[-1]:
        trainer.step()
        if trainer.finished_steps in steps:
            trainer.save()
    trainer.saver.wait()


def same(ours: Path, theirs: Path) -> None:
    """Both checkpoints hold the same, bitwise."""
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert files
    for file in files:
        assert equal(load_file(ours / file), load_file(theirs / file)), f"{ours / file} differs"
    if (theirs / "optimizer.bin").exists():
        found = [torch.load(each / "optimizer.bin", weights_only=True) for each in (ours, theirs)]
        assert equal(*found), f"{ours}: the optimizer differs"


def part_kill(folder: Path, options: argparse.Namespace, sharded: bool) -> None:
    chance = random.Random(options.seed)
    moments = [False] * options.kills + [True] * options.cuts
    chance.shuffle(moments)
    network = Network(2, folder)
    run = Run(network, folder / "run", sharded, options.timeout)
    until_ = time.monotonic() + options.minutes * 60
    with network.up():
        for host in run.hosts:
            run.start(host)
        run.goes_on(2, run.hosts, {})
        for cut in moments:
            if time.monotonic() > until_:
                break
            run.lose(chance, cut)
            print(dict(run.counts), run.ran[-2:], flush=True)
        for host in run.hosts:
            host.kill()
    run.compare(folder / "again")
    kinds = ", sharded" if sharded else ""
    told = ", ".join(
        f"{max(each):.1f} s after it was {how}" for how, each in run.waits.items() if each
    )
    print(
        f"two hosts{kinds}: {', '.join(f'{n} {what}' for what, n in run.counts.items())}; the line"
        f" came at most {told}; {len(run.ran)} runs from {len({b for b, _, _ in run.ran})}"
        " checkpoints, bitwise those of their size: no acknowledged checkpoint was lost"
    )


def part_slow(folder: Path) -> None:
    network = Network(2, folder)
    with network.up():
        ours = ["--steps=12", "--logging-steps=4", "--train-batch-size=16", "--slow=1"]
        for host in network.hosts:
            host.start(
                torchrun(network, 2, "slow"), program(*ours, f"--output-dir={folder / 'run'}")
            )
        said = finished(network.hosts)
        lines = re.findall(r"process 1 on host-\w is slow: .*", said)
        assert lines, said
        print(lines[-1], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--sharded", action="store_true", help="kill: with FSDP2")
    parser.add_argument(
        "--timeout", type=float, default=30, help="--collective-timeout of the runs"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="kill: no further one after them"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    for part in options.parts:
        with tempfile.TemporaryDirectory() as name:
            if part == "equal":
                part_equal(Path(name))
            elif part == "slow":
                part_slow(Path(name))
            else:
                part_kill(Path(name), options, options.sharded)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        sys.exit(worker(sys.argv[2:]))
    sys.exit(main())
