"""Loss curves of a training run from its TensorBoard files: `python -m benchmarks.reproduce.curves
runs/mnist --out docs/mnist-curves.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LOSSES = {
    "loss": "all rows",
    "loss_flow": "flow matching",
    "loss_time": "time consistency",
    "loss_length": "length consistency",
}


def read(run: Path) -> dict[str, dict[int, float]]:
    """Logged losses by name and step. Where a resumed run repeated steps, the last file's value
    stands."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(run.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for name in set(LOSSES) & set(events.Tags()["scalars"]):
            found.setdefault(name, {}).update(
                {event.step: event.value for event in events.Scalars(name)}
            )
    if not found:
        raise SystemExit(f"error: {run} holds no TensorBoard file with losses")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--window", type=int, default=20, help="logged values in a running mean")
    options = parser.parse_args()
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, text in LOSSES.items():
        if values := sorted(read(options.run).get(name, {}).items()):
            steps, losses = np.array(values).T
            window = min(options.window, len(losses))
            axes.semilogy(
                steps[window - 1 :],
                np.convolve(losses, np.ones(window) / window, "valid"),
                label=text,
            )
    axes.set(xlabel="step", ylabel=f"squared error (mean of {options.window} logged values)")
    axes.legend()
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
