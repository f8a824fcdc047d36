"""The cells of an evaluation's tables: which depths, solvers, steps, tolerances and seeds are run, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from odelt_fast.evaluation_settings import Evaluation
from odelt_fast.model import DiT
from odelt_fast.sampler import Sampler
from odelt_fast.solvers import check_solver, is_adaptive


@dataclass(frozen=True)
class Cell:
    """One seed of one cell of the tables. steps: T of solvers with equal steps, else None. guidance_scale: what is really used."""

    depth: int
    solver: str
    steps: int | None
    tolerance: float | None
    seed: int
    guidance_scale: float | None
    halved: bool  # the paper's T = 128 with guidance: 64 steps of two evaluations

    @property
    def key(self) -> str:
        at = f"T{self.steps}" if self.steps is not None else f"tol{self.tolerance:g}"
        return f"l{self.depth}-{self.solver.replace(':', '_')}-{at}-seed{self.seed}"

    def sampler(self, model: DiT, settings: Evaluation) -> Sampler:
        steps = 1 if self.steps is None else self.steps // 2 if self.halved else self.steps
        tolerance = 1e-2 if self.tolerance is None else self.tolerance
        return Sampler(
            model,
            self.depth,
            steps,
            self.solver,
            rtol=tolerance,
            atol=tolerance,
            guidance_scale=self.guidance_scale,
            backend=settings.backend,
            batch_size=settings.batch_size,
        )

    def cost(self, live_blocks: int) -> float:
        """Blocks to run for an image, for the time left: an adaptive solver is taken to need 60 evaluations."""
        passes = 1 if self.guidance_scale in (None, 0, 1) or self.halved else 2
        return live_blocks * passes * (60 if self.steps is None else self.steps)


def plan_cells(settings: Evaluation, depths: Sequence[int]) -> list[Cell]:
    """The cells in the order in which they are run: deepest first, a depth's together. ValueError for an unknown solver."""
    kinds: list[tuple[str, int | None, float | None]] = []
    for solver in map(check_solver, settings.solvers):
        adaptive = is_adaptive(solver)
        kinds += [(solver, None, tol) for tol in settings.tolerances] if adaptive else [(solver, steps, None) for steps in settings.steps]
    cells = []
    for depth in sorted(set(depths), reverse=True):
        for solver, steps, tolerance in dict.fromkeys(kinds):
            halved = settings.paper_guidance and steps == 128 and settings.guidance_scale not in (None, 0, 1)
            scale = settings.guidance_scale if halved or not settings.paper_guidance else None
            for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
                cells.append(Cell(depth, solver, steps, tolerance, seed, scale, halved))
    return cells
