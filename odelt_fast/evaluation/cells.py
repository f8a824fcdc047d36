"""The cells of an evaluation's tables: which operations and seeds are run, and in what order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from odelt_fast.config import DiTConfig
from odelt_fast.operation import Operation, Schedule, show_schedule
from odelt_fast.solvers.options import is_adaptive

from .operation_fields import operation_fields
from .settings import Evaluation

if TYPE_CHECKING:
    from odelt_fast.model import DiT
    from odelt_fast.sampling.sampler import Sampler


@dataclass(frozen=True)
class Cell:
    """One seed of one cell of the tables.

    halved: the paper's T = 128 with guidance, of which 64 steps of two evaluations are run.
    """

    operation: Operation
    seed: int
    halved: bool = False

    @property
    def depth(self) -> int:
        """l, the largest of a schedule."""
        assert self.operation.deepest is not None
        return self.operation.deepest

    @property
    def steps(self) -> int | None:
        """T as tables name it; None of solvers that choose their steps."""
        steps = self.operation.steps
        return 2 * steps if steps and self.halved else steps

    @property
    def key(self) -> str:
        """The name of its files."""
        operation, depths = self.operation, str(self.depth)
        at = f"tol{operation.tolerance:g}" if operation.adaptive else f"T{self.steps}"
        if operation.depth_schedule is not None:
            depths = show_schedule(operation.depth_schedule).replace(":", "_")
        return f"l{depths}-{operation.solver.replace(':', '_')}-{at}-seed{self.seed}"

    def record(self) -> dict[str, Any]:
        """What its file says of it besides what was measured."""
        fields = operation_fields(self.operation) | {"steps": self.steps, "seed": self.seed}
        names = ["depth", "solver", "steps", "tolerance", "seed", "guidance_scale"]
        names += [name for name in ("schedule", "guidance_interval") if fields.get(name)]
        return {name: fields[name] for name in names}

    def sampler(self, model: DiT, settings: Evaluation) -> Sampler:
        """What draws its images."""
        from odelt_fast.sampling.sampler import Sampler

        return Sampler.of(
            model, self.operation, backend=settings.backend, batch_size=settings.batch_size
        )

    def live_blocks(self, config: DiTConfig) -> float:
        """Blocks that run in an evaluation; of a schedule the mean over time."""
        schedule: Any = self.operation.depth_schedule
        if schedule is None:
            return config.live_blocks(self.depth)
        ends = [*(time for time, _ in schedule[1:]), 1.0]
        spans = [(end - start, depth) for (start, depth), end in zip(schedule, ends)]
        return sum(span * config.live_blocks(depth) for span, depth in spans)

    def cost(self, config: DiTConfig) -> float:
        """Blocks to run for an image, for the time left; adaptive solvers: 60 evaluations."""
        rows = 1 if config.guidance_max is not None else self.operation.rows_per_image
        evaluations = (self.operation.steps or 60) * rows
        return self.live_blocks(config) * evaluations


def plan_cells(settings: Evaluation, config: DiTConfig) -> list[Cell]:
    """The cells in the order in which they are run: deepest first, a depth's together.

    Raises:
        ValueError: for an unknown solver, for depths that the model does not have, and for a solver
            that chooses its steps if there are schedules: it would need one time for a whole batch,
            which costs more.
    """
    kinds: list[tuple[str, int | None, float]] = []
    for solver in settings.solvers:
        if not is_adaptive(solver):
            kinds += [(solver, steps, Operation.rtol) for steps in settings.steps]
        elif settings.depth_schedules:
            raise ValueError("--depth-schedules go with solvers of equal steps only")
        else:
            kinds += [(solver, None, tolerance) for tolerance in settings.tolerances]
    lengths: set[tuple[int, Schedule]] = {
        (config.check_depth(depth), ()) for depth in settings.depths or config.depths
    }
    for schedule in settings.depth_schedules:
        lengths.add((max(config.check_depth(depth) for _, depth in schedule), schedule))
    cells = []
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    ordered = sorted(lengths, key=lambda length: (-length[0], length[1]))
    for (depth, schedule), kind in itertools.product(ordered, dict.fromkeys(kinds)):
        (solver, steps, tolerance), scale = kind, settings.guidance_scale
        halved = settings.paper_guidance and steps == 128 and scale not in (None, 0, 1)
        operation = Operation(
            depth=None if schedule else depth,
            depth_schedule=schedule or None,
            solver=solver,
            steps=steps // 2 if steps and halved else steps,
            rtol=tolerance,
            atol=tolerance,
            guidance_scale=None if settings.paper_guidance and not halved else scale,
            guidance_interval=settings.guidance_interval,
        )
        cells += [Cell(operation, seed, halved) for seed in seeds]
    return cells
