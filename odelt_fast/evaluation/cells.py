"""The cells of an evaluation's tables: which depths, solvers, steps, tolerances and seeds are run,
and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.model import DiT
from odelt_fast.planning.profile import Schedule, parse_schedule, show_schedule
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.solvers.options import check_solver, is_adaptive


@dataclass(frozen=True)
class Cell:
    """One seed of one cell of the tables. steps: T of solvers with equal steps, else None.
    guidance_scale: what is really used."""

    depth: int
    solver: str
    steps: int | None
    tolerance: float | None
    seed: int
    guidance_scale: float | None
    halved: bool  # the paper's T = 128 with guidance: 64 steps of two evaluations
    schedule: Schedule = ()  # in place of depth, which is then its largest

    @property
    def key(self) -> str:
        at = f"T{self.steps}" if self.steps is not None else f"tol{self.tolerance:g}"
        depths = (
            show_schedule(self.schedule).replace(":", "_") if self.schedule else str(self.depth)
        )
        return f"l{depths}-{self.solver.replace(':', '_')}-{at}-seed{self.seed}"

    def sampler(self, model: DiT, settings: Evaluation) -> Sampler:
        steps = 1 if self.steps is None else self.steps // 2 if self.halved else self.steps
        tolerance = 1e-2 if self.tolerance is None else self.tolerance
        return Sampler(
            model,
            None if self.schedule else self.depth,
            steps,
            self.solver,
            rtol=tolerance,
            atol=tolerance,
            guidance_scale=self.guidance_scale,
            backend=settings.backend,
            batch_size=settings.batch_size,
            depth_schedule=self.schedule or None,
        )

    def live_blocks(self, config: DiTConfig) -> float:
        """Blocks that run in an evaluation; of a schedule the mean over time."""
        if not self.schedule:
            return config.live_blocks(self.depth)
        ends = [*(time for time, _ in self.schedule[1:]), 1.0]
        return sum(
            (end - start) * config.live_blocks(depth)
            for (start, depth), end in zip(self.schedule, ends)
        )

    def cost(self, live_blocks: float) -> float:
        """Blocks to run for an image, for the time left: an adaptive solver is taken to need 60
        evaluations."""
        passes = 1 if self.guidance_scale in (None, 0, 1) or self.halved else 2
        return live_blocks * passes * (60 if self.steps is None else self.steps)


def plan_cells(settings: Evaluation, depths: Sequence[int]) -> list[Cell]:
    """The cells in the order in which they are run: deepest first, a depth's together. ValueError
    for an unknown solver, and for one that chooses its steps if there are schedules: it would need
    one time for a whole batch, which costs more."""
    kinds: list[tuple[str, int | None, float | None]] = []
    for solver in map(check_solver, settings.solvers):
        adaptive = is_adaptive(solver)
        kinds += (
            [(solver, None, tol) for tol in settings.tolerances]
            if adaptive
            else [(solver, steps, None) for steps in settings.steps]
        )
    cells = []
    schedules = [
        (max(depth for _, depth in schedule), schedule)
        for schedule in map(parse_schedule, settings.depth_schedules)
    ]
    if schedules and any(steps is None for _, steps, _ in kinds):
        raise ValueError("--depth-schedules go with solvers of equal steps only")
    none: Schedule = ()
    lengths = [(depth, none) for depth in depths] + schedules
    for depth, schedule in sorted(set(lengths), key=lambda pair: (-pair[0], pair[1])):
        for solver, steps, tolerance in dict.fromkeys(kinds):
            halved = (
                settings.paper_guidance
                and steps == 128
                and settings.guidance_scale not in (None, 0, 1)
            )
            scale = settings.guidance_scale if halved or not settings.paper_guidance else None
            for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
                cells.append(Cell(depth, solver, steps, tolerance, seed, scale, halved, schedule))
    return cells
