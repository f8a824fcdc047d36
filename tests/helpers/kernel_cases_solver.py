"""Cases of the solver kernels; `kernel_checks` says what a case is, `kernel_cases` runs them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelt_fast.kernels.adaptive_step import (
    adaptive_step_update,
    adaptive_step_update_reference,
    first_attempt,
)
from odelt_fast.kernels.solver_update import combine_stages, combine_stages_reference
from odelt_fast.solvers.adaptive import AdaptiveSteps, State
from odelt_fast.solvers.options import ERROR_NORMS, Limits
from odelt_fast.solvers.solution import Solution, column, combine
from odelt_fast.solvers.step_control import StepRules
from odelt_fast.solvers.tableau import TABLEAUS as ALL
from odelt_fast.solvers.tableau import Tableau
from tests.helpers.kernel_checks import (
    Axes,
    batch_size,
    check_error,
    enough_tokens,
    guarded,
    watched,
)
from tests.helpers.solving import solve_adaptive
from tests.stress.kernel_audit import exact_fma

Field = Callable[[Any, Tensor, int], Tensor]
TABLEAUS = [ALL[name] for name in ("adaptive_heun", "bosh3", "dopri5", "dop853")]


def combine_stages_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    x, stages, coefficients, step = _stages(rng, device, rng.choice([dtype, dtype, torch.float64]))
    with watched(x, stages, coefficients, step):
        got = combine_stages(x, stages, coefficients, step)
    stages = stages.nan_to_num()[: len(coefficients)]  # NaN: of stages whose coefficient is 0
    operands = (x, stages, coefficients, step)
    doubles = tuple(operand.double() for operand in operands)
    if x.dtype == torch.float64:  # S + 2 roundings, each of at most the sum of all magnitudes
        error = (got - combine_stages_reference(*operands)).abs()
        size = combine_stages_reference(*(operand.abs() for operand in doubles))
        bound = 2 * (len(coefficients) + 2) * torch.finfo(torch.float64).eps * size
        assert bool((error <= bound).all())
    else:
        axes = Axes(("bx", "sbx", "s", "b"), ("bx",), {"s": len(coefficients)})
        plain = axes.plain(rng, combine_stages_reference, *operands)
        check_error("state", got, plain, combine_stages_reference(*doubles))
    return got


def _stages(
    rng: random.Random, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state, stages, coefficients, step).

    At times there are more stages than coefficients, and a coefficient is 0 and its stage NaN.
    """
    batch, count = batch_size(rng), rng.randint(1, 7)
    inner = inner_shape(rng)
    if batch < 6 and rng.random() < 0.1:
        inner = (rng.randint(1000, 40000),)
    batch = enough_tokens(batch, math.prod(inner))
    x = guarded(rng, (batch, *inner), dtype, device)
    shape = (count + rng.choice([0, 0, 2]), batch, *inner)
    stages = guarded(rng, shape, rng.choice([dtype, torch.float32]), device)
    coefficients = torch.tensor([rng.uniform(-2, 2) for _ in range(count)], device=device)
    if count > 1 and stages.stride(0) and rng.random() < 0.5:
        unused = rng.randrange(count)
        coefficients[unused] = 0.0
        stages[unused] = float("nan")
    steps = [rng.uniform(0.001, 1) for _ in range(rng.choice([1, batch]))]
    return x, stages, coefficients, torch.tensor(steps, device=device)


def inner_shape(rng: random.Random) -> tuple[int, ...]:
    """Of a sample of a state."""
    image = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 9)
    return rng.choice([(rng.randint(1, 50),), image])


def adaptive_step_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """One attempt of samples in every state: running, ended, refused, beyond floating point."""
    tableau, shared = rng.choice(TABLEAUS), rng.random() < 0.5
    dtype = rng.choice([torch.float32, torch.float64])  # solvers keep their state in these
    batch, inner = batch_size(rng), inner_shape(rng)
    if batch < 6 and rng.random() < 0.1:
        inner = (rng.choice([1024, 16384, 16385, 20000]),)
    count = tableau.stages + (not tableau.fsal)
    x, x_new = (guarded(rng, (batch, *inner), dtype, device, layout="contiguous") for _ in range(2))
    stages = guarded(rng, (count, batch, *inner), dtype, device, layout="contiguous")
    for place in (x_new, stages[0], stages[-1]):
        if rng.random() < 0.2:
            place[rng.randrange(batch)].view(-1)[0] = rng.choice([math.nan, math.inf])
    nodes, error, error3 = tableau_tensors(tableau, device)
    t0, t1 = rng.choice([(0.0, 1.0), (1.0, 0.0), (-0.5, 2.0)])
    tolerance = rng.choice([1e-3, 0.3, 3.0, 100.0])
    rules = rules_tensor(tableau, t0, t1, tolerance, rng.choice([3, 100]), device)
    draw = torch.Generator().manual_seed(rng.getrandbits(60))
    uniform = torch.rand((5, batch), generator=draw, dtype=torch.float64)
    control = torch.stack(
        [
            t0 + (t1 - t0) * uniform[0],
            10 ** (-17 * uniform[1] ** 4),
            0.1 * uniform[2],
            uniform[3].clamp(min=1e-4),
            uniform[4],
        ]
    )
    control[4] = torch.where(uniform[4] < 0.5, 1.0, 10.0)
    counters = torch.randint(0, 4, (4, batch), generator=draw)
    counters[0] = torch.where(uniform[4] < 0.8, -1, counters[0])
    if shared:  # time and step are the batch's
        control[:], counters[0, 0] = control[:, :1].clone(), -1
    control, counters = control.contiguous().to(device), counters.to(device)
    step, times, _ = first_attempt(control, nodes, rules)
    step, times = step.contiguous(), times.contiguous()
    running = torch.ones(1, dtype=torch.int32, device=device)
    state = (x, stages, control, counters, step, times, running)
    rules_of_step = (nodes, error, error3, rules, shared, tableau.fsal)
    (x_right, stages_right, *right), (x_got, stages_got, *got) = (
        [value.clone() for value in state] for _ in range(2)
    )
    adaptive_step_update_reference(x_right, x_new, stages_right, *right, *rules_of_step)
    with watched(x_new, nodes, error, error3, rules):
        adaptive_step_update(x_got, x_new, stages_got, *got, *rules_of_step)
    # Norms are means of numbers that were rounded to the state's dtype, a few times each.
    relative = 100 * torch.finfo(dtype).eps
    for name, mine, theirs in zip(
        ("x", "stages", "control", "counters", "step", "times", "running"),
        (x_got, stages_got, *got),
        (x_right, stages_right, *right),
        strict=True,
    ):
        rounded = name in ("control", "step", "times")
        near = {"rtol": relative, "atol": 1e-15} if rounded else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            mine, theirs, **near, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(stages_got[1:].nan_to_num(7.0), stages[1:].nan_to_num(7.0)), (
        "a stage but the first was changed"
    )
    return (x_got, stages_got, *got)


def tableau_tensors(tableau: Tableau, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(nodes, error, error3) as adaptive_step_update takes them."""
    c, error, error3 = (
        None if row is None else torch.tensor(row, dtype=torch.float64, device=device)
        for row in ((*tableau.c, *(() if tableau.fsal else (1.0,))), tableau.error, tableau.error3)
    )
    assert c is not None
    assert error is not None
    return c, error, error3


def rules_tensor(
    tableau: Tableau, t0: float, t1: float, tolerance: float, max_steps: int, device: torch.device
) -> Tensor:
    """The rules of a solve as adaptive_step_update takes them; rtol = atol = tolerance."""
    assert tableau.error_order is not None
    return torch.tensor(
        StepRules.of(tableau.error_order, t0, t1, Limits(tolerance, tolerance, max_steps)),
        dtype=torch.float64,
        device=device,
    )


def solve(update: Callable[..., None], steps: AdaptiveSteps, start: State) -> Solution:
    """`integrate_adaptive` after its first step size, with `update` for what follows an attempt."""
    tableau, field, (x, k, *_) = steps.tableau, steps.field, start
    nodes, error, error3 = tableau_tensors(tableau, x.device)
    rules = torch.tensor(steps.rules, dtype=torch.float64, device=x.device)
    x, stages = x.clone(), torch.zeros((len(nodes), *x.shape), dtype=x.dtype, device=x.device)
    stages[0] = k
    control, counters = torch.stack(start.control), torch.stack(start.counts)
    step, times, _ = first_attempt(control, nodes, rules)
    step, times = step.contiguous(), times.contiguous()
    running = torch.ones(1, dtype=torch.int32, device=x.device)
    while running.item():
        d, x_new = column(step, x), x
        for i, row in enumerate(tableau.a[1:], 1):
            x_new = x + d * combine(row, list(stages[:i]))
            stages[i] = field(times[i], x_new, 0)
        if not tableau.fsal:
            x_new = x + d * combine(tableau.b, list(stages[:-1]))
            stages[-1] = field(times[-1], x_new, 0)
        state = (x, x_new, stages, control, counters, step, times, running)
        update(*state, nodes, error, error3, rules, steps.shared, tableau.fsal)
    return Solution(x, *counters)


def both_solutions(
    update: Callable[..., None],
    field: Field,
    x: Tensor,
    tableau: Tableau,
    t0: float,
    t1: float,
    error_norm: str,
    **tolerances: Any,
) -> tuple[Solution, Solution]:
    """(on the device, `integrate_adaptive`'s); both start with the latter's first step size."""
    steps = AdaptiveSteps(field, 0, tableau, t0, t1, Limits(**tolerances, error_norm=error_norm))
    host = solve_adaptive(field, x, 0, tableau, t0=t0, t1=t1, error_norm=error_norm, **tolerances)
    return solve(update, steps, steps.first(x)), host


def hard_field(t: Any, x: Tensor, log2_steps: int) -> Tensor:
    """Samples of every kind.

    Smooth, stiff, oscillating, one whose velocity ends at t = 0.6, one that grows without bound.
    """
    t = torch.as_tensor(t).reshape(-1, 1).expand(len(x), 1)
    kinds = [
        -x,
        40 * (torch.cos(3 * t) - x),
        30 * torch.cos(25 * t) + 0 * x,
        torch.where(t < 0.6, x, math.nan),
        x * x.abs() * 4,
    ]
    index = torch.arange(len(x)) % len(kinds)
    return torch.stack([kind.to(x.dtype) for kind in kinds])[index, torch.arange(len(x))]


def adaptive_solve_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Whole solves take the host's steps: equal counts, states far within the tolerance."""
    dtype, tableau = torch.float64, rng.choice(TABLEAUS)
    x = guarded(
        rng, (rng.choice([1, 2, 5, 6]), rng.randint(1, 30)), dtype, device, layout="contiguous"
    )
    tolerance, norm = rng.choice([1e-2, 1e-3]), rng.choice(ERROR_NORMS)
    with exact_fma():
        got, host = both_solutions(
            adaptive_step_update,
            hard_field,
            x,
            tableau,
            0.0,
            1.0,
            norm,
            rtol=tolerance,
            atol=tolerance,
            max_steps=rng.choice([4, 12]),
        )
    for name in ("status", "accepted", "rejected", "evaluations"):
        mine, theirs = getattr(got, name), getattr(host, name)
        assert torch.equal(mine, theirs), f"{tableau.name}, {norm}: {name} {mine}, not {theirs}"
    # Step sizes follow an estimate of the error that is a difference of nearly equal stages: in
    # DOP853 it cancels down to its last digits.
    near = 1e-5 * tolerance if tableau.name == "dop853" else 1e-9
    torch.testing.assert_close(got.x, host.x, rtol=1e-9, atol=near, equal_nan=True)
    return got.x


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, operands) for torch.library.opcheck."""
    rules = rules_tensor(ALL["bosh3"], 0.0, 1.0, 1e-2, 100, torch.device("cpu"))
    nodes, error, _ = tableau_tensors(ALL["bosh3"], torch.device("cpu"))
    control = torch.tensor(
        [[0.0, 0.0], [0.1, 0.2], [0.1, 0.2], [1e-4, 1e-4], [10.0, 10.0]], dtype=torch.float64
    )
    counters = torch.tensor([[-1, -1], [0, 0], [0, 0], [0, 0]])
    attempt, times, _ = first_attempt(control, nodes, rules)
    changed = (
        torch.randn(2, 5),
        torch.randn(2, 5),
        torch.randn(4, 2, 5),
        control,
        counters,
        attempt.contiguous(),
        times.contiguous(),
    )
    return [
        (combine_stages, (torch.randn(2, 5), torch.randn(3, 2, 5), torch.randn(3), torch.ones(1))),
        (
            adaptive_step_update,
            (*changed, torch.ones(1, dtype=torch.int32), nodes, error, None, rules, False, True),
        ),
    ]


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("combine_stages", combine_stages_case),
    ("adaptive_step", adaptive_step_case),
    ("adaptive_solve", adaptive_solve_case),
]
