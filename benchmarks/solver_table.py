"""Evaluations and error of the adaptive solvers beside torchdiffeq's: `python -m benchmarks.solver_table [--model digits]`.

For each tolerance (rtol = atol): evaluations of the network per image, and the largest error in any pixel against a DOP853 solution at a
tolerance of 1e-6. One error over the batch, as torchdiffeq has it; the last column has each image choose its own steps, and
gives the mean of the evaluations that the images needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro

from odelt_fast import Sampler, load_model


@dataclass(frozen=True)
class Options:
    model: str = "digits"
    """Bundled name, folder, or Hub id."""
    depth: int = 4
    """Active blocks."""
    num_images: int = 8
    seed: int = 0
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    solvers: tuple[str, ...] = ("torchdiffeq:dopri5", "dopri5", "tsit5", "torchdiffeq:bosh3", "bosh3", "dop853")


def main() -> None:
    options = tyro.cli(Options)
    model = load_model(options.model, depth=options.depth)
    draw = {"num_images": options.num_images, "seed": options.seed}
    # The sampler's state is float32; below 1e-6 rounding decides, so the reference stops there.
    exact = Sampler(model, solver="dop853", rtol=1e-6, atol=1e-6)(**draw)
    print(f"{options.model}, depth {options.depth}, {options.num_images} images, torch {torch.__version__}, {model.device}, {model.dtype}")
    print(f"{'rtol = atol':>11}  {'solver':<20} {'evaluations':>11} {'error':>9}  {'per sample: needed':>18} {'error':>9}")
    for tolerance in options.tolerances:
        for solver in options.solvers:
            shared = Sampler(model, solver=solver, rtol=tolerance, atol=tolerance, error_norm="batch")
            error = (shared(**draw) - exact).abs().max().item()
            line = f"{tolerance:>11.0e}  {solver:<20} {shared.stats['evaluations_per_image']:>11.0f} {error:>9.1e}"
            if not solver.startswith("torchdiffeq:"):
                own = Sampler(model, solver=solver, rtol=tolerance, atol=tolerance)
                error = (own(**draw) - exact).abs().max().item()
                needed = own.stats["evaluations_needed"]
                line += f"  {sum(needed) / len(needed):>18.1f} {error:>9.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
