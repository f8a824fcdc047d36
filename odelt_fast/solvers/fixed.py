"""Integration of a velocity field with given steps, and the sampling rule of consistency models.

A field is a function (t, x, step index) -> dx/dt of x's shape and dtype, x (B, ...). Fixed steps
pass t as a number; adaptive ones (`adaptive`) as a (B,) float64 tensor, since every sample has its
own time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .solution import Field, Hook, Noise, Solution, check_times, combine, hermite
from .tableau import Tableau


def integrate_fixed(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    log2_steps: float,
    tableau: Tableau,
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """Steps of `tableau` between neighbouring `times`, rising or falling. save_at as in
    `integrate_adaptive`."""
    save = check_times(times[0], times[-1], save_at)
    saved = [x] * sum(s == times[0] for s in save)
    stages = tableau.stages - tableau.fsal  # FSAL: the last is the first of the next step
    weights = tableau.a[-1] if tableau.fsal else tableau.b
    evaluations, k_new = 0, None
    for i in range(len(times) - 1):
        t, t_new = times[i], times[i + 1]
        d, ks = t_new - t, [field(t, x, log2_steps) if k_new is None else k_new]
        evaluations += k_new is None
        for c, row in zip(tableau.c[1:stages], tableau.a[1:stages], strict=True):
            ks.append(field(t_new if c == 1 else t + c * d, x + d * combine(row, ks), log2_steps))
        evaluations += stages - 1
        x_new, k_new = x + d * combine(weights, ks), None
        inside = [s for s in save[len(saved) :] if (t < s <= t_new) or (t > s >= t_new)]
        if any(s != t_new for s in inside):
            k_new = field(t_new, x_new, log2_steps)
            evaluations += 1
        saved += [
            x_new if k_new is None else hermite((s - t) / d, d, x, x_new, ks[0], k_new)
            for s in inside
        ]
        x = x_new
        if on_step:
            on_step(i)
    return Solution.of_fixed_steps(
        x, len(times) - 1, evaluations, torch.stack(saved) if save else None
    )


def predict_and_renoise(
    field: Field,
    x: Tensor,
    steps: int,
    log2_steps: float,
    noise: Noise,
    on_step: Hook | None = None,
) -> Tensor:
    """Sampling of consistency models: predict the data, add noise anew, at each of T steps.

    x1 = x + v (1-t), then x <- x1 (t+d) + eps (1-t-d), for t = i/T, d = 1/T.

    Args:
        noise: gives eps (B, C, H, W) of step i; it is not asked for after the last step, where its
            weight is 0.
        on_step: called with i after step i.
    """
    for i in range(steps):
        data = x + field(i / steps, x, log2_steps) * ((steps - i) / steps)
        left = (steps - i - 1) / steps
        x = data * ((i + 1) / steps) + noise(i) * left if left else data
        if on_step:
            on_step(i)
    return x
