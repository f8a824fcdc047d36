"""Evaluations and error of the adaptive solvers beside torchdiffeq's.

    python -m benchmarks.reproduce.solver_table [--model digits]

Two tables. The first: for each tolerance (rtol = atol), evaluations of the network per image and
the error (root mean square, largest) in the pixels against a DOP853 solution at a tolerance of
1e-6. The second compares at the same error, since equal tolerances do not give equal errors: for
each error that one of torchdiffeq's solvers reached at a whole power of ten, the fewest evaluations
with which each solver was at least as accurate at any tolerance that was tried (four for each power
of ten; - where none was).

One error over the batch, as torchdiffeq has it; solvers ending in /image have each image choose its
own steps, and count the mean of the evaluations that the images needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from odelt_fast import Sampler, load_model
from odelt_fast.operation import Operation

PER_DECADE = 4


@dataclass(frozen=True)
class Options:
    model: str = "digits"
    """Bundled name, folder, or Hub id."""
    depth: int = 4
    """Active blocks."""
    num_images: int = 64
    seed: int = 0
    finest: int = 5
    """Tolerances go from 1 down to 10^-finest."""
    solvers: tuple[str, ...] = (
        "torchdiffeq:dopri5",
        "dopri5",
        "dopri5/image",
        "tsit5",
        "torchdiffeq:bosh3",
        "bosh3",
        "dop853",
    )


@dataclass(frozen=True)
class Cost:
    """Means over the images; error: root mean square in the pixels."""

    tolerance: float
    evaluations: float
    error: float
    largest: float
    rejected: float


def sweep(options: Options) -> dict[str, list[Cost]]:
    """For each solver what every tolerance cost and gave, coarsest first."""
    model = load_model(options.model, depth=options.depth)

    def draw(solver: str, tolerance: float, error_norm: str = "per_sample") -> tuple[Tensor, Any]:
        operation = Operation(
            solver=solver, steps=None, rtol=tolerance, atol=tolerance, error_norm=error_norm
        )
        sampler = Sampler.of(model, operation, batch_size=options.num_images)
        return sampler(num_images=options.num_images, seed=options.seed), sampler.stats

    # The sampler's state is float32; below 1e-6 rounding decides, so the reference stops there.
    exact, _ = draw("dop853", 1e-6)
    tolerances = [10 ** (-i / PER_DECADE) for i in range(PER_DECADE * options.finest + 1)]
    costs: dict[str, list[Cost]] = {name: [] for name in options.solvers}
    with tqdm(total=len(costs) * len(tolerances), leave=False) as bar:
        for name, found in costs.items():
            solver, _, norm = name.partition("/")
            for tolerance in tolerances:
                images, stats = draw(solver, tolerance, "per_sample" if norm else "batch")
                error = images - exact
                rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
                needed, rejected = (fmean(stats[key]) for key in ("evaluations_needed", "rejected"))
                found.append(Cost(tolerance, needed, rms, largest, rejected))
                bar.update()
    return costs


def fewest(costs: list[Cost], error: float) -> float | None:
    """Evaluations of the cheapest that is at least as accurate."""
    return min((cost.evaluations for cost in costs if cost.error <= error), default=None)


def main() -> None:
    options = tyro.cli(Options)
    costs = sweep(options)
    settings = (
        f"{options.num_images} images, seed {options.seed}, torch {torch.__version__}, CPU, float32"
    )
    print(f"{options.model}, depth {options.depth}, {settings}\n")
    print(
        f"{'rtol = atol':>11}  {'solver':<20} {'evaluations':>11} {'rejected':>8} {'rms error':>9}"
        f" {'largest':>8}"
    )
    for i in range(PER_DECADE, PER_DECADE * options.finest + 1, PER_DECADE):
        for name, found in costs.items():
            p = found[i]
            print(
                f"{p.tolerance:>11.0e}  {name:<20} {p.evaluations:>11.1f} {p.rejected:>8.1f}"
                f" {p.error:>9.1e} {p.largest:>8.1e}"
            )
    print(
        f"\nfewest evaluations for an error no larger than that of torchdiffeq\n{'at rtol':>24}"
        f" {'rms error':>9}",
        *costs,
    )
    for theirs in (name for name in costs if name.startswith("torchdiffeq:")):
        for p in costs[theirs][PER_DECADE::PER_DECADE]:
            row = [fewest(found, p.error) for found in costs.values()]
            cells = ["-" if cost is None else f"{cost:.1f}" for cost in row]
            power = (
                f"{theirs.removeprefix('torchdiffeq:')} 1e-{round(-math.log10(p.tolerance))}"
                f" ({p.evaluations:.0f})"
            )
            print(
                f"{power:>24} {p.error:>9.1e}",
                *(f"{cell:>{len(name)}}" for cell, name in zip(cells, costs, strict=True)),
            )


if __name__ == "__main__":
    main()
