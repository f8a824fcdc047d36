"""An operation as the flat fields that files have of it.

depth l (the largest of a schedule), solver, steps or tolerance (rtol and atol), schedule, guidance
scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from odelt_fast.checks import number, shown, whole
from odelt_fast.operation import Operation, check_schedule, effective_guidance


def operation_fields(operation: Operation) -> dict[str, Any]:
    """The fields of an operation whose depths are known: no function decides them."""
    interval = operation.guidance_interval
    return {
        "depth": operation.deepest,
        "solver": operation.solver,
        "steps": operation.steps,
        "tolerance": operation.tolerance,
        "schedule": operation.depth_schedule or (),
        "guidance_scale": operation.guidance_scale,
        **({"guidance_interval": list(interval)} if interval else {}),
    }


def read_operation(fields: Mapping[str, Any]) -> Operation:
    """The operation of fields that anybody may have written.

    schedule, guidance_scale and guidance_interval may be missing.

    Raises:
        ValueError: for a value that cannot be, and for steps of a solver that chooses its own.
    """
    solver: Any = fields.get("solver")
    scale, steps, tolerance = map(fields.get, ("guidance_scale", "steps", "tolerance"))
    if scale is not None:
        scale = effective_guidance(number("guidance_scale", scale, -1e6, 1e6))
    if (steps is None) == (tolerance is None):
        raise ValueError(
            f"an operation has either steps or a tolerance, not {steps!r} and {tolerance!r}"
        )
    limit = Operation.rtol if tolerance is None else number("tolerance", tolerance, 1e-15, 1e3)
    depth, schedule = whole("depth", fields.get("depth"), 1, 4096), fields.get("schedule") or None
    operation = Operation(
        depth=depth if schedule is None else None,
        solver=solver,
        steps=1 if steps is None else whole("steps", steps, 1, 10**6),
        rtol=limit,
        atol=limit,
        guidance_scale=scale,
        depth_schedule=None if schedule is None else check_schedule(schedule),
        guidance_interval=fields.get("guidance_interval"),
    )
    if operation.adaptive != (steps is None):
        raise ValueError(f"{solver} takes {'steps' if steps is None else 'a tolerance'}")
    if operation.deepest != depth:
        raise ValueError(f"depth {depth} is not the largest of the schedule {shown(schedule)}")
    return operation
