"""Latencies of the study's evaluations, all variants in turn.

`python -m benchmarks.study --latency-only` measures again and writes the tables, in about five
minutes of one core. Latency: seconds for one batch of images, as the evaluations generate them,
warm, without decoding. Runs of the same network whose solvers take equal steps cost the same,
whatever their weights: one of them is timed (`twin`). What adaptive solvers cost depends on the
weights: each is timed itself.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch

from benchmarks.measure import (
    Record,
    Timer,
    device_record,
    host_timer,
    summary,
    take_turns,
    write_json,
)

from .campaign import Study
from .runs import BY_NAME

_SHORT = 8  # time steps
_GUIDED = "-guided"


def twin(name: str) -> str:
    """The evaluation whose equal steps cost the same as those of the evaluation `name`.

    It has the same network and the same number of evaluations.
    """
    if name not in BY_NAME:
        return name  # guided, or a bundled model
    return "shortcut" if BY_NAME[name].conventional else "odelt"


def row_key(row: Record) -> str:
    """Names a row of an evaluation's results in OUT/latency.json."""
    at = f"T={row['steps']}" if row["steps"] is not None else f"tol={row['tolerance']:g}"
    return f"l={row['depth']} {row['solver']} {at}"


def latency_of(latency: Record, name: str, row: Record) -> float | None:
    """Median seconds of a batch of the row; None before the latency stage."""
    timed = latency.get(name if row["steps"] is None else twin(name), {}).get(row_key(row))
    return None if timed is None else timed["median_s"]


def time_everything(study: Study) -> None:
    """Writes OUT/latency.json.

    {"machine", "latency": {evaluation: {row: seconds}}, "parameters": {l: number that is loaded to
    run the main model at l}}

    Raises:
        ValueError: if nothing has been evaluated.
    """
    if not study.results():
        raise ValueError(
            f"{study.out} holds no finished evaluation to time: run the stages train and evaluate"
            " first"
        )
    torch.manual_seed(0)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(1)
    try:
        found = {
            # the load of the minute before: about 0 on a quiet machine
            "machine": {**device_record(), "load": load},
            "latency": _latencies(study),
            "parameters": _parameters(study),
        }
    finally:
        torch.set_num_threads(threads)
    write_json(study.out / "latency.json", found)


# Sampling


def _latencies(study: Study) -> dict[str, Record]:
    timers: dict[str, Timer] = {}
    bundled: dict[str, Timer] = {}
    for name, results in study.results().items():
        for row in results["rows"]:
            if row["steps"] is None or name == twin(name):
                chosen = timers if name.removesuffix(_GUIDED) in BY_NAME else bundled
                timer = _sampling_timer(study, name, results["settings"], row)
                chosen[f"{name}\n{row_key(row)}"] = timer
    # The bundled models are slower than all the rest together: their long rows are timed once,
    # warmed up by the short ones.
    short = {key: timer for key, timer in bundled.items() if int(key.rpartition("=")[2]) <= _SHORT}
    samples = take_turns(short, 0, least=5)
    samples |= {key: [timer()] for key, timer in bundled.items() if key not in short}
    samples |= take_turns(timers, study.options.seconds, least=3)
    found: dict[str, Record] = {}
    for key, values in samples.items():
        name, row_name = key.split("\n")
        found.setdefault(name, {})[row_name] = summary(values) | {"rounds": len(values)}
    return found


def _sampling_timer(study: Study, name: str, settings: Record, row: Record) -> Timer:
    """Times one batch as the evaluation generated it: `Cell.sampler` for the row."""
    from odelt_fast.checkpoints.folder import load_model
    from odelt_fast.evaluation.cells import plan_cells
    from odelt_fast.evaluation.settings import Evaluation
    from odelt_fast.generation.processes import Processes

    values: Record = {
        key: tuple(each) if isinstance(each, list) else each for key, each in settings.items()
    }
    evaluation = Evaluation(**values)
    device = Processes.of_this_run(study.budget.device).device
    run, depth = name.removesuffix(_GUIDED), row["depth"]
    model = load_model(
        str(study.out / run) if run in BY_NAME else evaluation.model, device, depth=depth
    )
    names = ("solver", "steps", "tolerance")
    (cell,) = (
        cell
        for cell in plan_cells(replace(evaluation, seeds=1, depths=(depth,)), model.config)
        if all(cell.record()[name] == row[name] for name in names)
    )
    sampler, config, batch = cell.sampler(model, evaluation), model.config, evaluation.batch_size
    noise = torch.randn(batch, *config.image_shape, device=device)
    labels = np.arange(batch) % config.num_classes
    return host_timer(lambda: sampler(noise=noise, labels=labels, seed=0), device)


def _parameters(study: Study) -> dict[str, int]:
    from odelt_fast.checkpoints.folder import load_model

    main, folder = BY_NAME["odelt"], str(study.out / "odelt")
    return {
        str(depth): sum(p.numel() for p in load_model(folder, depth=depth).parameters())
        for depth in (main.depths if study.trained(main) else ())
    }
