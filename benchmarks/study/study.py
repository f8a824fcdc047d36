"""The study of docs/results.md: `python -m benchmarks.study` trains, evaluates, times, and writes
tables and figures.

Each run of `benchmarks/study_runs.py` is an `odelt-fast train` command (`--list` prints them),
evaluated as `odelt-fast evaluate` does. Whatever is finished is kept, and whatever was interrupted
goes on: give the same command again. Parts of it:

    python -m benchmarks.study --only odelt shortcut       # these runs alone (and the tables of all
    that is finished) python -m benchmarks.study --latency-only              # all latencies again,
    on a quiet machine, and the tables python -m benchmarks.study --data-folder DATA          # also
    the bundled MNIST model, of DATA/mnist-10k.parquet python -m benchmarks.study --set cifar10
    --data-folder DATA --out runs/study-cifar10     # the same list on a GPU
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.measure import write_json
from benchmarks.study.runs import BY_NAME, DATA_SETS, RUNS, Run
from odelt_fast.evaluation.settings import Evaluation

METRICS = ("frechet", "kid", "precision_recall", "recognised")
GUIDANCE = 1.5  # the paper's on ImageNet
TOLERANCES = (1e-2, 1e-4)
BUNDLED = {"bundled-digits": "digits", "mnist": "mnist"}  # evaluations of the models in the package
MNIST_IMAGES, BUNDLED_SEEDS = 1024, 2  # their networks cost up to ten times as much
Stage = Literal["train", "evaluate", "latency", "report"]
STAGES: tuple[Stage, ...] = ("train", "evaluate", "latency", "report")
Words = tyro.conf.arg(metavar="NAME...", help_behavior_hint="")


@dataclass(frozen=True)
class Options:
    out: Path = Path("runs/study")
    """Folder of the study: NAME/ holds a run's checkpoints and its model, evaluations/NAME/ what
    was measured of it."""
    set: Literal["digits", "cifar10"] = "digits"
    """Data set, with its network and budget."""
    data_folder: Path | None = None
    """Holds mnist-10k.parquet, to evaluate the bundled model of it, too, and cifar10-train.parquet
    (else from the Hub)."""
    only: Annotated[tuple[str, ...], Words] = ()
    """Runs to train and evaluate; all by default."""
    latency_only: bool = False
    """Train and evaluate nothing: the stages latency and report alone."""
    stages: Annotated[tuple[Stage, ...], Words] = STAGES
    """What to do, in this order. latency: of sampling and of training steps, all variants in turn;
    nothing else should run meanwhile."""
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
    documents: Annotated[tuple[Path, ...], Words] = (Path("docs/results.md"), Path("README.md"))
    """Files whose tables the report writes; its pictures go beside the first."""
    list: bool = False
    """Print the training commands and stop."""


class Study:
    """The runs in a folder. Raises ValueError for unknown runs, and for a folder that holds a study
    of another budget."""

    def __init__(self, options: Options) -> None:
        found = DATA_SETS[options.set]
        self.budget = replace(
            found,
            data=(
                str(options.data_folder / found.file)
                if options.data_folder and found.file
                else found.data
            ),
            steps=options.steps or found.steps,
            num_images=options.num_images or found.num_images,
            seeds=options.seeds or found.seeds,
        )
        for name in options.only:
            if name not in BY_NAME and name not in BUNDLED:
                raise ValueError(
                    f"--only: there is no run {name!r}; the runs are"
                    f" {', '.join((*BY_NAME, *BUNDLED))}"
                )
        self.options, self.out = options, options.out

    def bind(self) -> None:
        """Ties the folder to the budget of its trainings: they would not be comparable."""
        budget = {name: getattr(self.budget, name) for name in ("options", "steps", "pairs")}
        path, bound = (
            self.out / "study.json",
            json.loads(json.dumps({"set": self.options.set, **budget})),
        )
        held = json.loads(path.read_text()) if path.exists() else bound
        for name, value in bound.items():
            if held.get(name) != value:
                raise ValueError(
                    f"{self.out} holds a study with {name} {held.get(name)!r}, not {value!r}: name"
                    " another --out"
                )
        if not path.exists():
            write_json(path, bound)

    def chosen(self) -> list[Run]:
        """The runs of --only with the teachers that they need, in the order of the list."""
        if not self.options.only:
            return list(RUNS)
        wanted = {name for name in self.options.only if name in BY_NAME}
        wanted |= {teacher for name in wanted if (teacher := BY_NAME[name].teacher)}
        return [run for run in RUNS if run.name in wanted]

    def training(self, run: Run) -> list[str]:
        """Options of `odelt-fast train`."""
        steps = int(self.budget.steps * run.share)
        command = [
            *self.budget.options,
            "--data",
            self.budget.data,
            *run.options,
            "--steps",
            str(steps),
        ]
        if run.teacher:
            command += ["--init-from", str(self.out / run.teacher)]
        if run.needs_pairs:
            command += [
                "--pairs",
                str(self.out / run.name / "pairs"),
                "--num-pairs",
                str(self.budget.pairs),
            ]
        return [*command, "--output-dir", str(self.out / run.name)]

    def trained(self, run: Run) -> bool:
        return (self.out / run.name / "model.safetensors").exists()

    def train(self, run: Run) -> None:
        """Trains it, or goes on from its newest checkpoint. Does nothing if it is finished."""
        folder = self.out / run.name
        with self.held(folder / ".lock"):
            if self.trained(run):
                return
            print(f"{run.name}: odelt-fast train {shlex.join(self.training(run))}", flush=True)
            command = [
                sys.executable,
                "-m",
                "odelt_fast.cli",
                "train",
                *self.training(run),
                "--resume-from-checkpoint",
                "latest",
            ]
            if subprocess.run(command).returncode:
                raise ValueError(
                    f"the training of {run.name} stopped: give the same command again to go on"
                )
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def evaluations(self, run: Run) -> dict[str, Evaluation]:
        """What is measured of a run, by the folder that holds it."""
        budget, shared = self.budget, {"metrics": METRICS, "labels": "data"}
        if not run.depths:
            return {}
        plain = Evaluation(
            model=str(self.out / run.name),
            data=budget.data,
            depths=run.depths,
            steps=run.steps,
            num_images=budget.num_images,
            seeds=budget.seeds,
            batch_size=budget.batch_size,
            solvers=("euler", "dopri5") if run.adaptive else ("euler",),
            tolerances=TOLERANCES,
            **shared,  # type: ignore[arg-type]
        )
        if not run.guided:
            return {run.name: plain}
        guided = replace(
            plain, steps=(128,), solvers=("euler",), guidance_scale=GUIDANCE, paper_guidance=True
        )
        return {run.name: plain, f"{run.name}-guided": guided}

    def bundled(self) -> dict[str, Evaluation]:
        """Of the models in the package: digits, and MNIST where its images are at hand."""
        folder, data = self.options.data_folder, {"bundled-digits": self.budget.data}
        if self.options.set != "digits":
            return {}
        if folder is not None:
            data["mnist"] = str(folder / "mnist-10k.parquet")
        images = {
            "bundled-digits": self.budget.num_images,
            "mnist": min(MNIST_IMAGES, self.budget.num_images),
        }
        chosen = {
            name: data[name] for name in data if not self.options.only or name in self.options.only
        }
        shared = {
            "seeds": min(BUNDLED_SEEDS, self.budget.seeds),
            "metrics": METRICS,
            "labels": "data",
        }
        return {
            name: Evaluation(BUNDLED[name], of, num_images=images[name], **shared)
            for name, of in chosen.items()
        }  # type: ignore[arg-type]

    def evaluate(self, name: str, settings: Evaluation) -> None:
        from odelt_fast.evaluation.evaluator import Evaluator

        with self.held(self.out / "evaluations" / f"{name}.lock"):
            print(f"{name}: evaluating {settings.model}", flush=True)
            Evaluator(settings, self.out / "evaluations" / name, device=self.budget.device).run()

    @staticmethod
    @contextlib.contextmanager
    def held(path: Path) -> Iterator[None]:
        """Waits for other studies in the folder to be done with it: they share the runs out between
        them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def measure_real(self) -> None:
        """Writes OUT/real.json: what the metrics say of the real images, {"data" or "mnist":
        {metric: value}}."""
        from benchmarks.study.real import measure_real

        path = self.out / "real.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        wanted = {"data": self.evaluations(RUNS[0])[RUNS[0].name]} if self.trained(RUNS[0]) else {}
        for name, settings in (
            wanted | {name: each for name, each in self.bundled().items() if name == "mnist"}
        ).items():
            if name not in found:
                found[name] = measure_real(settings)
                write_json(path, found)

    def results(self) -> dict[str, dict[str, Any]]:
        """The finished evaluations in the folder, in the order of the list, then the bundled
        models'."""
        from odelt_fast.evaluation.results import read_results

        names = [name for run in RUNS for name in (run.name, f"{run.name}-guided")] + list(BUNDLED)
        found = {
            name: read_results(path)
            for name in names
            if (path := self.out / "evaluations" / name / "results.json").exists()
        }
        return {name: results for name, results in found.items() if results["complete"]}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        run(options)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def run(options: Options) -> None:
    """Does the stages that `options` asks for."""
    study = Study(options)
    if options.list:
        for each in study.chosen():
            print(f"{each.name}: odelt-fast train {shlex.join(study.training(each))}")
        return
    study.bind()
    chosen = study.chosen()
    stages = ("latency", "report") if options.latency_only else options.stages
    if "train" in stages:
        for each in chosen:
            study.train(each)
    if "evaluate" in stages:
        for each in chosen:
            if study.trained(each):
                for name, settings in study.evaluations(each).items():
                    study.evaluate(name, settings)
        for name, settings in study.bundled().items():
            study.evaluate(name, settings)
        study.measure_real()
    if "latency" in stages:
        from benchmarks.study.latency import time_everything

        time_everything(study)
    if "report" in stages:
        from benchmarks.study.report import report

        report(study)
