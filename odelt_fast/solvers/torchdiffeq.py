"""torchdiffeq's solvers under our interface: errors in one line, steps and evaluations counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .options import TORCHDIFFEQ_ADAPTIVE, Limits
from .solution import Field, Hook, Solution, check_times


def integrate_torchdiffeq(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    log2_steps: float,
    method: str,
    limits: Limits = Limits(),  # noqa: B008 (it is frozen)
    on_step: Hook | None = None,
    save_at: Sequence[float] = (),
) -> Solution:
    """State at times[-1] of x (B, ...) at times[0], by torchdiffeq's `method`.

    Fixed-step methods step along `times`, rising or falling; adaptive ones choose theirs, with one
    error over the batch.

    Args:
        on_step: called with the number of each step that was taken, or tried.
        save_at: times in order whose states come back as torchdiffeq interpolates them (linearly
            between fixed steps).

    Raises:
        ValueError: where torchdiffeq gives up.
    """
    from torchdiffeq import odeint

    rtol, atol = limits.rtol, limits.atol
    save = check_times(times[0], times[-1], save_at)
    if times[0] == times[-1]:
        return Solution.of_fixed_steps(x, 0, 0, torch.stack([x] * len(save)) if save else None)
    counts = {"evaluations": 0, "accepted": 0, "rejected": 0}
    # Backward time is forward time of the field -f(-t): a grid of steps must rise.
    sign = 1 if times[-1] > times[0] else -1

    def function(t: Tensor, state: Tensor) -> Tensor:
        counts["evaluations"] += 1
        return sign * field(sign * t, state, log2_steps)

    def count(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            counts[name] += 1
            if on_step:
                on_step(counts["accepted"] + counts["rejected"] - 1)

        return called

    grid = sign * torch.tensor(times, dtype=torch.float64, device=x.device)
    wanted = sorted({times[0], *save, times[-1]}, reverse=sign < 0)
    options: dict[str, Any]
    if method in TORCHDIFFEQ_ADAPTIVE:
        options = {"max_num_steps": limits.max_steps}
        hooks = {"callback_accept_step": "accepted", "callback_reject_step": "rejected"}
    else:
        options = {"grid_constructor": lambda function, state, t: grid}
        if method.endswith("_adams"):
            # torchdiffeq's default of 12 is unstable at the step sizes of sampling.
            options["max_order"] = 4
        hooks = {"callback_step": "accepted"}
    for hook, name in hooks.items():
        setattr(function, hook, count(name))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Functional iteration did not converge")
            at = sign * torch.tensor(wanted, dtype=torch.float64, device=x.device)
            states = odeint(function, x, at, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:
        reason = str(error).split(":")[0]
        raise ValueError(
            f"torchdiffeq:{method} gave up at rtol {rtol:g}, atol {atol:g} ({reason}): raise rtol"
            " and atol or max_steps, or take dopri5 or tsit5, which say which image failed"
        ) from error
    saved = torch.stack([states[wanted.index(s)] for s in save]) if save else None
    return Solution.of_fixed_steps(states[-1], trajectory=saved, **counts)
