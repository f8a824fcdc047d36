"""The study of docs/results.md: `python -m benchmarks.study` trains, evaluates, times, reports.

Each run of `benchmarks/study/runs.py` is an `odelt-fast train` command (`--list` prints them),
evaluated as `odelt-fast evaluate` does; the report writes tables and figures. Whatever is finished
is kept, and whatever was interrupted goes on: give the same command again. Parts of it:

    python -m benchmarks.study --only odelt shortcut
        these runs alone (and the tables of all that is finished)
    python -m benchmarks.study --latency-only
        all latencies again, on a quiet machine, and the tables
    python -m benchmarks.study --data-folder DATA
        also the bundled MNIST model, of DATA/mnist-10k.parquet
    python -m benchmarks.study --set mnist --data-folder DATA --out runs/study-mnist
        the same list on MNIST's 10 000 images
    python -m benchmarks.study --set cifar10 --data-folder DATA --out runs/study-cifar10
        the same list on a GPU
"""

from __future__ import annotations

import sys

import tyro

from .campaign import Options, Study
from .costs import measure_costs
from .latency import time_everything
from .report import report


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
    chosen = study.chosen()
    if options.list:
        for each in chosen:
            print(study.training_command(each))
        return
    study.bind()
    stages = ("costs", "latency", "report") if options.latency_only else options.stages
    if "train" in stages:
        for each in chosen:
            study.train(each)
    if "evaluate" in stages:
        evaluations = [study.evaluations(each) for each in chosen if study.trained(each)]
        for settings in (*evaluations, study.bundled()):
            for name, evaluation in settings.items():
                study.evaluate(name, evaluation)
        study.measure_real()
    if "costs" in stages:
        measure_costs(study)
    if "latency" in stages:
        time_everything(study)
    if "report" in stages:
        report(study)


if __name__ == "__main__":
    main()
