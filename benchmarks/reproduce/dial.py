"""Which way to give a pretrained network lengths is best: a conventional flow is trained on MNIST,
then fine-tuned in four ways with equal budgets.

    python -m benchmarks.reproduce.dial --data mnist-10k.parquet --seeds 0 1 2

Writes OUT/dial.md, OUT/dial.json and OUT/dial.png: Frechet distance in the features of the bundled
MNIST classifier (no FID) at T = 32 Euler steps, at each length, over the seeds of the fine-tuning.
The same command goes on where it was interrupted; what is finished is not done again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.tables import table
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.files import make_folder, write_json

STEPS = 32  # T of the samples that are compared
# Name -> what `odelt-fast train` is told.
WAYS = {
    "paper": "--model.inner-step unit",
    "paper, gates folded": "--wiring paper",
    "residual": "--wiring residual",
    "residual, frozen teacher": "--wiring residual --length-teacher init",
}
_RUN = (
    "--recipe mnist --objective flow --times continuous --sampling-steps 0"
    " --checkpoints-total-limit 1 --checkpointing-steps 250 --resume-from-checkpoint latest"
)
_NETWORK = "--model.no-length-conditioned --model.hidden-size 96 --model.num-heads 4"


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/dial")
    """Folder of the runs, evaluations, table and picture."""
    data: str = "ylecun/mnist"
    """MNIST's training images: a Parquet file, or the data set's id."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = (0, 1, 2)
    """Of the fine-tuning; the flow that it starts from is that of seed 0."""
    start_steps: int = 3000
    """Optimizer steps of the flow: about 10 minutes of a CPU core."""
    steps: int = 500
    """Optimizer steps of each fine-tuning."""
    depths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = (4, 8, 12)
    """Lengths l to learn and to measure."""
    num_images: int = 2000
    """Generated images of each measurement."""


def train(folder: Path, arguments: str, options: Options, steps: int) -> None:
    """Trains into `folder`, or goes on there; nothing if it is finished."""
    if (folder / "model.safetensors").exists():
        return
    command = shlex.split(f"{_RUN} {arguments}")
    command += ["--data", options.data, "--steps", str(steps), "--output-dir", str(folder)]
    print("odelt-fast train", shlex.join(command), flush=True)
    if subprocess.run([sys.executable, "-m", "odelt_fast.cli", "train", *command]).returncode:
        raise ValueError(f"the training of {folder} stopped: the same command goes on")


def measure(folder: Path, depths: tuple[int, ...], options: Options) -> dict[int, float]:
    """Frechet distance at each length of the model in `folder`."""
    from odelt_fast.evaluation.evaluator import Evaluator

    settings = Evaluation(
        str(folder),
        options.data,
        depths=depths,
        steps=(STEPS,),
        num_images=options.num_images,
        seeds=1,
        labels="balanced",
        features="mnist",
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
    make_folder("--out", options.out)
    budget = options.out / "options.json"
    wanted = json.loads(json.dumps({**asdict(options), "out": "", "seeds": ""}, default=str))
    if budget.exists() and json.loads(budget.read_text()) != wanted:
        raise ValueError(f"{options.out} holds runs of other options: name another --out")
    write_json(budget, wanted)
    start, depth = options.out / "flow", options.depths[-1]
    train(start, f"{_NETWORK} --seed 0", options, options.start_steps)
    before = measure(start, (depth,), options)[depth]
    lengths = " ".join(map(str, options.depths))
    common = f"--init-from {shlex.quote(str(start))} --depths {lengths} --learning-rate 5e-4"
    common += " --warmup-steps 50"
    ways: dict[str, dict[int, list[float]]] = {name: {} for name in WAYS}
    for seed in options.seeds:
        for name, how in WAYS.items():
            folder = options.out / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            train(folder, f"{common} {how} --seed {seed}", options, options.steps)
            for length, distance in measure(folder, options.depths, options).items():
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
    return (
        f"Before, at l = {depths[0]}: {results['before']:.3f}. {options.start_steps} steps of the"
        f" flow, {options.steps} of each fine-tuning, {len(options.seeds)} seeds (mean ± standard"
        f" deviation), T = {STEPS}, {options.num_images} images.\n\n{table(head, rows)}\n"
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
    write_json(options.out / "dial.json", results)
    (options.out / "dial.md").write_text(text)
    draw(results, options, options.out / "dial.png")
    print(text)


if __name__ == "__main__":
    main()
