"""Options of commands that say how to sample, as one `Operation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import refuse_unused

if TYPE_CHECKING:
    from odelt_fast.operation import Operation


def operation_of(options: Any) -> Operation:
    """What --depth, --depth-schedule, --steps, --solver, --rtol, --atol, --max-steps, --error-norm,
    --guidance-scale and (where the command has them) --guidance-interval and --time-shift ask for.

    Raises:
        ValueError: for values that cannot be used, alone or together, or have no effect.
    """
    from odelt_fast.operation import Operation, parse_schedule
    from odelt_fast.solvers.options import TORCHDIFFEQ, is_adaptive

    schedule = None
    if options.depth_schedule:
        try:
            schedule = parse_schedule(options.depth_schedule)
        except ValueError as error:
            raise ValueError(f"--depth-schedule {error}") from None
    if schedule and options.depth is not None:
        raise ValueError("--depth and --depth-schedule are both given: leave one out")
    solver = options.solver or Operation.solver
    if is_adaptive(solver):
        refuse_unused(options, f"on {solver}, which chooses its own steps", "steps")
    else:
        tolerances = () if solver.endswith("implicit_adams") else ("rtol", "atol")
        limits = (*tolerances, "max_steps", "error_norm")
        refuse_unused(options, f"on {solver}, which takes equal steps", *limits)
    if solver.startswith(TORCHDIFFEQ):
        refuse_unused(options, f"on {solver}, which has one error for a batch", "error_norm")
    names = ("depth", "rtol", "atol", "max_steps", "error_norm", "guidance_scale")
    shift = getattr(options, "time_shift", 1.0)
    return Operation(
        **{name: getattr(options, name) for name in names},
        steps=options.steps or Operation.steps,
        solver=solver,
        depth_schedule=schedule,
        guidance_interval=getattr(options, "guidance_interval", None),
        time_grid="uniform" if shift == 1 else ("shift", shift),
    )
