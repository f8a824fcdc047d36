"""Which way to give a pretrained network lengths is best: a conventional flow is trained on digits
or MNIST, then fine-tuned in five ways with equal budgets.

    python -m benchmarks.reproduce.dial --set digits --seeds 0 1 2
    python -m benchmarks.reproduce.dial --data mnist-10k.parquet --seeds 0 1 2

Writes OUT/dial.md, OUT/dial.json and OUT/dial.png: Frechet distance in the features of the set's
bundled classifier (no FID) at T = 32 Euler steps, at each length, over the seeds of the
fine-tuning. The same command goes on where it was interrupted; what is finished is not done again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.tables import table
from odelt_fast.files import make_folder, write_json

STEPS = 32  # T of the samples that are compared
# Name -> what `odelt-fast train` is told.
WAYS = {
    "paper": "--model.inner-step unit",
    "paper, gates folded": "--wiring paper",
    "residual": "--wiring residual --length-teacher ema",
    "residual, frozen teacher": "--wiring residual --length-teacher init",
    "residual, frozen teacher, rows weighted": (
        "--wiring residual --length-teacher init --loss-weight-power 0.7"
    ),
}
_RUN = (
    "--objective flow --times continuous --sampling-steps 0 --checkpoints-total-limit 1"
    " --checkpointing-steps 250 --resume-from-checkpoint latest"
)


@dataclass(frozen=True)
class Budget:
    """Of a set: what is trained on it, and how it is measured."""

    data: str
    network: str
    learning_rate: float  # of the flow
    tuned: float  # learning rate of the fine-tuning
    start_steps: int
    images: int
    seeds: int  # of sampling
    labels: Literal["balanced", "data"]


BUDGETS = {
    # The flow of docs/results.md.
    "digits": Budget(
        data="digits",
        network="--model.hidden-size 64 --model.patch-size 4 --model.num-heads 2"
        " --train-batch-size 64",
        learning_rate=4e-3,
        tuned=2e-3,
        start_steps=3600,
        images=1797,
        seeds=3,
        labels="data",
    ),
    "mnist": Budget(
        data="ylecun/mnist",
        network="--model.hidden-size 96 --model.num-heads 4",
        learning_rate=1e-3,
        tuned=5e-4,
        start_steps=3000,
        images=2000,
        seeds=1,
        labels="balanced",
    ),
}


@dataclass(frozen=True)
class Options:
    out: Path | None = None
    """Folder of the runs, evaluations, table and picture; runs/dial-SET by default."""
    set: Literal["digits", "mnist"] = "mnist"
    """Data set, with its network and budget."""
    data: str | None = None
    """The set's training images in another place: a Parquet file, or an id of the Hub."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = (0, 1, 2)
    """Of the fine-tuning; the flow that it starts from is that of seed 0."""
    start_steps: int | None = None
    """Optimizer steps of the flow; the set's by default, about 10 minutes of a CPU core."""
    steps: int = 500
    """Optimizer steps of each fine-tuning."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = (4, 8, 12)
    """Lengths l to learn and to measure."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs", f"dial-{self.set}")

    @property
    def budget(self) -> Budget:
        own = {"data": self.data, "start_steps": self.start_steps}
        chosen: dict[str, Any] = {n: value for n, value in own.items() if value is not None}
        return replace(BUDGETS[self.set], **chosen)

    def arguments(self) -> str:
        """What every training is told."""
        return f"--recipe {self.set} {_RUN} --data {shlex.quote(self.budget.data)}"

    def start(self) -> str:
        """What the training of the flow is told."""
        rate = self.budget.learning_rate
        network = f"--model.no-length-conditioned {self.budget.network} --learning-rate {rate:g}"
        return f"{self.arguments()} {network} --seed 0"

    def tuning(self, start: Path, how: str, seed: int) -> str:
        """What a fine-tuning of the flow in the folder `start` is told."""
        lengths = " ".join(map(str, self.depths))
        own = f"--init-from {shlex.quote(str(start))} --depths {lengths} --seed {seed} {how}"
        batch = self.budget.network.partition("--train-batch-size")
        rate = f"--learning-rate {self.budget.tuned:g} --warmup-steps 50"
        return f"{self.arguments()} {own} {rate} {''.join(batch[1:])}"


def train(folder: Path, arguments: str, steps: int) -> None:
    """Trains into `folder`, or goes on there; nothing if it is finished."""
    if (folder / "model.safetensors").exists():
        return
    command = [*shlex.split(arguments), "--steps", str(steps), "--output-dir", str(folder)]
    print("odelt-fast train", shlex.join(command), flush=True)
    if subprocess.run([sys.executable, "-m", "odelt_fast.cli", "train", *command]).returncode:
        raise ValueError(f"the training of {folder} stopped: the same command goes on")


def measure(folder: Path, depths: tuple[int, ...], options: Options) -> dict[int, float]:
    """Frechet distance at each length of the model in `folder`."""
    from odelt_fast.evaluation.evaluator import Evaluator
    from odelt_fast.evaluation.settings import Evaluation

    budget = options.budget
    settings = Evaluation(
        str(folder),
        budget.data,
        depths=depths,
        steps=(STEPS,),
        num_images=budget.images,
        seeds=budget.seeds,
        labels=budget.labels,
        features=options.set,
    )
    results = Evaluator(settings, folder / "evaluation", device="cpu").run()
    found = {}
    for row in results["rows"]:
        (distance,) = row["metrics"].values()
        found[row["depth"]] = distance["mean"]
    return found


def run(options: Options) -> dict[str, Any]:
    """Trains and measures; returns the distances: of the flow at its depth, and by way and length,
    one of each seed."""
    folder = options.folder
    make_folder("--out", folder)
    bound = folder / "options.json"
    wanted = {**asdict(options.budget), "set": options.set, "steps": options.steps}
    wanted["depths"] = list(options.depths)
    if bound.exists() and json.loads(bound.read_text()) != wanted:
        raise ValueError(f"{folder} holds runs of other options: name another --out")
    write_json(bound, wanted)
    start, depth = folder / "flow", options.depths[-1]
    train(start, options.start(), options.budget.start_steps)
    before = measure(start, (depth,), options)[depth]
    ways: dict[str, dict[int, list[float]]] = {name: {} for name in WAYS}
    for seed in options.seeds:
        for name, how in WAYS.items():
            tuned = folder / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            train(tuned, options.tuning(start, how, seed), options.steps)
            for length, distance in measure(tuned, options.depths, options).items():
                ways[name].setdefault(length, []).append(distance)
    return {"steps": STEPS, "seeds": list(options.seeds), "before": before, "ways": ways}


def document(results: dict[str, Any], options: Options) -> str:
    """The table, as markdown."""
    depths = options.depths[::-1]
    rows = [
        (name, *(_spread(distances[depth]) for depth in depths))
        for name, distances in results["ways"].items()
    ]
    head = " | ".join(["after fine-tuning", *(f"l = {depth}" for depth in depths)])
    budget, seeds = options.budget, len(options.seeds)
    return (
        f"Before, at l = {depths[0]}: {results['before']:.3f}. {budget.start_steps} steps of the"
        f" flow, {options.steps} of each fine-tuning, {seeds} seeds (mean ± standard deviation),"
        f" T = {STEPS}, {budget.images} images.\n\n{table(head, rows)}\n"
    )


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def draw(results: dict[str, Any], options: Options, out: Path) -> None:
    """Distance against length, a line for each way."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, distances in results["ways"].items():
        means = [statistics.mean(distances[depth]) for depth in options.depths]
        ends = [[m - min(distances[d]) for d, m in zip(options.depths, means)],
                [max(distances[d]) - m for d, m in zip(options.depths, means)]]  # fmt: skip
        axes.errorbar(options.depths, means, yerr=ends, marker="o", capsize=3, label=name)
    axes.axhline(results["before"], color="grey", linestyle="--", label="before, all blocks")
    axes.set(xlabel="active blocks l", ylabel=f"Frechet distance, T = {STEPS}", yscale="log")
    axes.set_xticks(options.depths)
    axes.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        results = run(options)
    except ValueError as mistake:
        raise SystemExit(f"error: {mistake}") from None
    text = document(results, options)
    write_json(options.folder / "dial.json", results)
    (options.folder / "dial.md").write_text(text)
    draw(results, options, options.folder / "dial.png")
    print(text)


if __name__ == "__main__":
    main()
