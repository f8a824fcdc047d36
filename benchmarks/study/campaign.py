"""The runs of a study in their folder: what is done of each, and what is left to do."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from benchmarks.measure import Record, write_json
from odelt_fast.evaluation.arguments import Names, metavar
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.files import locked

from .real import measure_real
from .runs import BY_NAME, DATA_SETS, RUNS, Run

METRICS = ("frechet", "kid", "precision_recall", "recognised")
GUIDANCE = 1.5  # the paper's on ImageNet
TOLERANCES = (1e-2, 1e-4)
BUNDLED = ("bundled-digits", "mnist")  # evaluations of the models in the package
MNIST_IMAGES, BUNDLED_SEEDS = 1024, 2  # their networks cost up to ten times as much
Stage = Literal["train", "evaluate", "costs", "latency", "report"]
STAGES: tuple[Stage, ...] = ("train", "evaluate", "costs", "latency", "report")


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/study")
    """Folder of the study: NAME/ holds a run's checkpoints and its model, evaluations/NAME/ what
    was measured of it."""
    set: Literal["digits", "mnist", "cifar10"] = "digits"
    """Data set, with its network and budget."""
    data_folder: Path | None = None
    """Holds mnist-10k.parquet (of set digits: to evaluate the bundled model of it, too) and
    cifar10-train.parquet; else from the Hub."""
    only: Names = ()
    """Runs to train and evaluate; all by default."""
    latency_only: bool = False
    """Train and evaluate nothing: the stages costs, latency and report alone."""
    stages: Annotated[tuple[Stage, ...], metavar("NAME...")] = STAGES
    """What to do, in this order. costs, latency: of training steps and of sampling, all variants in
    turn; nothing else should run meanwhile."""
    steps: int | None = None
    """Optimizer steps of a run; the set's by default."""
    num_images: int | None = None
    """Images of a seed in evaluations; the set's by default."""
    seeds: int | None = None
    """Sampling seeds; the set's by default."""
    seconds: float = 150.0
    """Of measuring latencies in turn, about."""
    results: Path = Path("benchmarks/results")
    """The report puts each evaluation's numbers into study-SET/ there."""
    documents: Annotated[tuple[Path, ...], metavar("NAME...")] = (
        Path("docs/results.md"),
        Path("README.md"),
    )
    """Files whose tables the report writes; its pictures go beside the first."""
    list: bool = False
    """Print the training commands and stop."""


class Study:
    """The runs in a folder.

    Raises:
        ValueError: for unknown runs, and by `bind` for a folder of another budget.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.out = options, options.out
        chosen = DATA_SETS[options.set]
        names = ("steps", "num_images", "seeds")
        own: Record = {name: value for name in names if (value := getattr(options, name))}
        if options.data_folder and chosen.file:
            own["data"] = str(options.data_folder / chosen.file)
        self.budget = replace(chosen, **own)
        known = (*BY_NAME, *BUNDLED)
        for name in options.only:
            if name not in known:
                raise ValueError(
                    f"--only: there is no run {name!r}; the runs are {', '.join(known)}"
                )

    def bind(self) -> None:
        """Ties the folder to the budget of its trainings: others would not be comparable."""
        path, budget = self.out / "study.json", self.budget
        bound: Record = {"set": self.options.set, "options": budget.options.split()}
        bound |= {"steps": budget.steps, "pairs": budget.pairs}
        if not path.exists():
            write_json(path, bound)
        held = json.loads(path.read_text())
        for name, value in bound.items():
            if held.get(name) != value:
                raise ValueError(
                    f"{self.out} holds a study with {name} {held.get(name)!r}, not {value!r}: name"
                    " another --out"
                )

    def chosen(self) -> list[Run]:
        """The runs of --only with the teachers that they need, in the order of the list."""
        only = self.options.only or BY_NAME
        teachers = {BY_NAME[name].teacher for name in only if name in BY_NAME}
        return [run for run in RUNS if run.name in {*only, *teachers}]

    def training(self, run: Run) -> list[str]:
        """Options of `odelt-fast train`."""
        folder, steps = self.out / run.name, str(int(self.budget.steps * run.share))
        command = [
            *self.budget.options.split(),
            *([] if run.needs_pairs else ["--data", self.budget.data]),
            *run.options.split(),
            "--steps",
            steps,
        ]
        if run.teacher:
            command += ["--init-from", str(self.out / run.teacher)]
        if run.needs_pairs:
            command += ["--pairs", str(folder / "pairs"), "--num-pairs", str(self.budget.pairs)]
        return [*command, "--output-dir", str(folder)]

    def training_command(self, run: Run) -> str:
        return f"{run.name}: odelt-fast train {shlex.join(self.training(run))}"

    def trained(self, run: Run) -> bool:
        return (self.out / run.name / "model.safetensors").exists()

    def train(self, run: Run) -> None:
        """Trains it, or goes on from its newest checkpoint. Does nothing if it is finished."""
        folder = self.out / run.name
        with locked(folder / ".lock"):
            if self.trained(run):
                return
            print(self.training_command(run), flush=True)
            command = [sys.executable, "-m", "odelt_fast.cli", "train", *self.training(run)]
            if subprocess.run([*command, "--resume-from-checkpoint", "latest"]).returncode:
                raise ValueError(
                    f"the training of {run.name} stopped: give the same command again to go on"
                )
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def evaluations(self, run: Run) -> dict[str, Evaluation]:
        """What is measured of a run, by the folder that holds it."""
        if not run.depths:
            return {}
        plain = replace(
            self.compared(str(self.out / run.name), self.budget.data),
            depths=run.depths,
            steps=run.steps,
            batch_size=self.budget.batch_size,
            tolerances=TOLERANCES,
        )
        adaptive = replace(plain, solvers=("euler", "dopri5")) if run.adaptive else plain
        if not run.guided:
            return {run.name: adaptive}
        guided = replace(plain, steps=(128,), guidance_scale=GUIDANCE, paper_guidance=True)
        return {run.name: adaptive, f"{run.name}-guided": guided}

    def compared(self, model: str, data: str) -> Evaluation:
        """What all evaluations have in common."""
        images, seeds = self.budget.num_images, self.budget.seeds
        return Evaluation(
            model, data, num_images=images, seeds=seeds, metrics=METRICS, labels="data"
        )

    def bundled(self) -> dict[str, Evaluation]:
        """Of the models in the package: digits, and MNIST where its images are at hand."""
        if self.options.set != "digits":
            return {}
        found = {"bundled-digits": self.compared("digits", self.budget.data)}
        if folder := self.options.data_folder:
            mnist = self.compared("mnist", str(folder / "mnist-10k.parquet"))
            found["mnist"] = replace(mnist, num_images=min(MNIST_IMAGES, mnist.num_images))
        only, seeds = self.options.only or BUNDLED, min(BUNDLED_SEEDS, self.budget.seeds)
        return {name: replace(each, seeds=seeds) for name, each in found.items() if name in only}

    def evaluate(self, name: str, settings: Evaluation) -> None:
        from odelt_fast.evaluation.evaluator import Evaluator

        with locked(self.out / "evaluations" / f"{name}.lock"):
            print(f"{name}: evaluating {settings.model}", flush=True)
            Evaluator(settings, self.out / "evaluations" / name, device=self.budget.device).run()

    def measure_real(self) -> None:
        """Writes OUT/real.json: what the metrics say of the real images.

        {"data" or "mnist": {metric: value}}
        """
        path, main = self.out / "real.json", RUNS[0]
        found = json.loads(path.read_text()) if path.exists() else {}
        wanted = {"data": self.evaluations(main)[main.name]} if self.trained(main) else {}
        wanted |= {name: each for name, each in self.bundled().items() if name == "mnist"}
        for name, settings in wanted.items():
            if name not in found:
                found[name] = measure_real(settings)
                write_json(path, found)

    def results(self) -> dict[str, Record]:
        """The finished evaluations: in the order of the list, then the bundled models'."""
        from odelt_fast.evaluation.results import read_results

        names = [name for run in RUNS for name in (run.name, f"{run.name}-guided")]
        folders = {name: self.out / "evaluations" / name for name in (*names, *BUNDLED)}
        found = {
            name: read_results(folder)
            for name, folder in folders.items()
            if (folder / "results.json").exists()
        }
        return {name: results for name, results in found.items() if results["complete"]}
