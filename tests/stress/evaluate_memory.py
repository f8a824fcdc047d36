"""Peak memory of evaluations of ever more images: `python -m tests.stress.evaluate_memory`. It must
not grow with their number.

Every evaluation runs in a process of its own, whose peak resident memory the operating system
reports. With --metrics kid, the features of up to 10 000 images are kept: from there on nothing
grows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.stress.kill_evaluate import evaluation, random_model, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--metrics", nargs="+", default=["frechet", "inception_score"])
    parser.add_argument(
        "--limit",
        type=float,
        default=0.05,
        help="growth from the first to the last that is a failure",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model")
        for count in options.images:
            changes = {
                "num_images": count,
                "batch_size": 250,
                "depths": (2,),
                "steps": (1,),
                "seeds": 1,
                "npz": True,
            }
            settings, begin = (
                evaluation(model, **changes, metrics=tuple(options.metrics)),
                time.monotonic(),
            )
            child = os.fork()
            if child == 0:
                run(settings, Path(folder) / str(count))
                os._exit(0)
            _, status, usage = os.wait4(child, 0)
            assert status == 0, "the evaluation failed"
            peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            print(
                f"{count} images: peak {peaks[-1] / 2**20:.1f} MiB,"
                f" {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    grown = peaks[-1] / peaks[0] - 1
    print(f"from {options.images[0]} to {options.images[-1]} images: {100 * grown:+.1f} %")
    raise SystemExit(grown > options.limit)


if __name__ == "__main__":
    main()
