"""Integration of a velocity field from noise (t = 0) to data (t = 1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Field = Callable[[float, Tensor, int], Tensor]  # (t, x (B, C, H, W), step index) -> dx/dt, of x's shape and dtype
StepMean = Callable[[Callable[[float, Tensor], Tensor], float, Tensor, float], Tensor]  # (f(t, x), t, x, d) -> mean velocity over d
Hook = Callable[[int], None]


def euler_mean(field: Callable[[float, Tensor], Tensor], t: float, x: Tensor, d: float) -> Tensor:
    """Mean velocity over [t, t + d] by Euler's rule: the velocity at its start."""
    return field(t, x)


STEP_MEANS: dict[str, StepMean] = {"euler": euler_mean}


def check_solver(name: str) -> str:
    """`name` if it is a solver; otherwise ValueError that names those there are."""
    if not isinstance(name, str) or name not in STEP_MEANS:
        raise ValueError(f"solver must be one of {', '.join(STEP_MEANS)}, not {name!r}")
    return name


def integrate(field: Field, x: Tensor, steps: int, log2_steps: int, solver: str = "euler", on_step: Hook | None = None) -> Tensor:
    """`steps` equal steps from t = 0 to 1: t_i = i/T, x <- x + mean velocity/T; x (B, C, H, W) is left as it is.

    log2_steps: the step index that the field is fed. on_step(i) is called after step i. Raises ValueError for an unknown solver.
    """
    step_mean = STEP_MEANS[check_solver(solver)]
    for i in range(steps):
        x = x + step_mean(lambda t, state: field(t, state, log2_steps), i / steps, x, 1 / steps) / steps
        if on_step:
            on_step(i)
    return x


def predict_and_renoise(
    field: Field, x: Tensor, steps: int, log2_steps: int, noise: Callable[[int], Tensor], on_step: Hook | None = None
) -> Tensor:
    """Sampling of consistency models: x1 = x + v (1-t), then x <- x1 (t+d) + eps (1-t-d), for t = i/T, d = 1/T.

    noise(i) gives eps (B, C, H, W) of step i; it is not asked for after the last step, where its weight is 0. on_step as in `integrate`.
    """
    for i in range(steps):
        data = x + field(i / steps, x, log2_steps) * ((steps - i) / steps)
        left = (steps - i - 1) / steps
        x = data * ((i + 1) / steps) + noise(i) * left if left else data
        if on_step:
            on_step(i)
    return x
