"""Budgets: the best of what was measured and never more; deadlines."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from odelt_fast import deadline_planner
from odelt_fast.planning.evidence import find_evidence
from odelt_fast.planning.planner import BudgetError, Candidate, best, candidates, frontier
from odelt_fast.planning.profiler import operations_of
from tests.helpers.planning_cases import (
    SOLVERS,
    WEIGHTS,
    at_tolerance,
    cost,
    profile_of,
    profiled,
    random_evidence,
    scheduled,
    steps_of,
    table,
)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_within_the_budget(seed: int) -> None:
    """Against a loop over all measurements; of equal quality the fastest."""
    draw = random.Random(seed)
    profile, quality = random_evidence(draw)
    metric, wanted = quality.metrics[0], 0
    found = candidates(profile, quality, batch=4, weights=WEIGHTS)
    sign = 1 if metric == "recognised" else -1
    for _ in range(50):
        latency, peak = draw.uniform(0.5e-3, 15e-3), draw.choice((None, 1, 2, 3))
        within: list[tuple[float, float]] = []
        for m in profile.measurements:
            fits = m.latency <= latency and (
                peak is None or (m.peak_memory is not None and m.peak_memory <= peak)
            )
            if m.batch == 4 and fits and m.operation in quality.rows:
                within.append((sign * quality.rows[m.operation][metric].mean, -m.latency))
        if not within:
            with pytest.raises(BudgetError):
                best(found, latency, peak)
            continue
        chosen = best(found, latency, peak).candidate
        assert (chosen.score, -chosen.latency) == max(within)
        wanted += 1
    assert wanted > 10


def test_an_impossible_budget_is_answered_with_the_nearest_possible_one() -> None:
    """Nearest: the larger of the two factors is the smallest."""
    fast, small, between = steps_of(2, 1), steps_of(2, 2), steps_of(4, 1)
    profile = profile_of(
        cost(fast, 1, 0.010, 4000), cost(small, 1, 0.080, 1000), cost(between, 1, 0.015, 1500)
    )
    found = candidates(profile, table({fast: 1, small: 2, between: 3}))
    for latency, peak, nearest in (
        (0.005, None, fast),
        (None, 900, small),
        (0.009, 1000, between),
        (0.079, 900, small),
    ):
        with pytest.raises(BudgetError) as told:
            best(found, latency, peak)
        assert told.value.nearest.operation == nearest
        assert f"the nearest is {nearest}: " in str(told.value)
        assert best(
            found, told.value.nearest.latency, told.value.nearest.memory
        ).operation  # it really is possible


@pytest.mark.parametrize(
    "limits", [(0, None), (-1.0, None), (math.nan, None), (math.inf, None), (None, 0)]
)
def test_limits_are_above_0(limits: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        best(candidates(profile_of(cost(steps_of(2, 1), 1, 1e-3))), *limits)


def test_unknown_memory_is_never_within_a_limit() -> None:
    unknown = candidates(
        profile_of(cost(steps_of(4, 4), 1, 1e-3, None), cost(steps_of(2, 1), 1, 1e-3, 5))
    )
    assert best(unknown).operation == steps_of(4, 4)
    assert best(unknown, None, 5).operation == steps_of(2, 1)
    with pytest.raises(ValueError, match="says nothing of memory"):
        best(unknown[:1], None, 5)


def test_quality_is_never_guessed() -> None:
    """Not between steps, not for other weights, guidance scales, or in fp8; a batch is bounded from
    above only by a larger one."""
    known, unknown = steps_of(2, 2), steps_of(4, 4)
    profile = profile_of(
        cost(known, 4, 2e-3),
        cost(unknown, 4, 1e-3),
        cost(known, 1, 1e-3),
        cost(known, 4, 2e-3, precision="fp8"),
    )
    assert [each.operation for each in candidates(profile, table({known: 0.3}))] == [known]
    assert candidates(profile, table({known: 0.3}), batch=3)[0].measured_batch == 4
    assert "at most 2 ms" in best(candidates(profile, table({known: 0.3}), batch=3)).why
    for asked, words in (
        ({"precision": "fp8"}, "it is never guessed"),
        (
            {"guidance_scale": 2.0},
            (
                "not float32 with guidance scale 2: measure it with odelt-fast profile --dtypes"
                " float32 --guidance-scale 2$"
            ),
        ),
        (
            {"batch": 5},
            "nor a larger one, only 1, 4: odelt-fast profile --dtypes float32 --batches 5$",
        ),
        ({"metric": "kid"}, "metric must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            candidates(profile, table({known: 0.3}), **asked)
    guided = profile_of(cost(replace(known, guidance_scale=1.5), 1, 1e-3))
    assert candidates(
        guided, table({known: 0.3}, scale=4.0), guidance_scale=4
    )  # which costs what 1.5 costs
    with pytest.raises(ValueError, match="never guessed"):
        candidates(guided, table({known: 0.3}, scale=4.0), guidance_scale=1.5)


def test_adaptive_costs_belong_to_their_weights() -> None:
    adaptive = at_tolerance(2, "dopri5", 1e-2)
    profile = profile_of(cost(adaptive, 1, 1e-3))
    assert candidates(profile, table({adaptive: 0.3}), weights=WEIGHTS)
    with pytest.raises(ValueError, match="measure it with odelt-fast profile"):
        candidates(profile, table({adaptive: 0.3}), weights="b" * 64)


def test_without_a_table_the_order_is_that_of_the_arithmetic_and_said_so() -> None:
    ops = (
        *operations_of((2, 4), SOLVERS, (1, 4), (1e-2,)),
        scheduled(4),
    )
    found = candidates(profile_of(*(cost(op, 1, 1e-3) for op in ops)), weights=WEIGHTS)
    assert [(each.operation.depth, each.operation.steps) for each in found] == [
        (4, 4),
        (2, 4),
        (4, 1),
        (2, 1),
    ]
    assert {each.operation.solver for each in found} == {"euler"}
    assert "quality was not measured" in best(found).why


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_nothing_beats(seed: int, with_memory: bool) -> None:
    profile, quality = random_evidence(random.Random(seed))
    found = candidates(profile, quality, batch=1, weights=WEIGHTS)

    def as_good(a: Candidate, b: Candidate) -> bool:
        small = (
            math.inf if a.memory is None else a.memory,
            math.inf if b.memory is None else b.memory,
        )
        return (
            a.score >= b.score
            and a.latency <= b.latency
            and (not with_memory or small[0] <= small[1])
        )

    kept = frontier(found, with_memory=with_memory)
    for each in found:
        beaten = any(as_good(other, each) and not as_good(each, other) for other in found)
        assert (not beaten) == any(as_good(other, each) and as_good(each, other) for other in kept)
    assert len({id(each) for each in kept}) == len(kept)
    assert all(a.latency <= b.latency for a, b in itertools.pairwise(kept))


def test_a_deadline_becomes_depth_steps_and_solver(model: str) -> None:
    path = profiled(model, "--quality", model + "/quality.json")
    plan = deadline_planner(model, "cpu")
    found = find_evidence(model).candidates(batch=3)
    equal = [each for each in found if each.operation.steps is not None]
    assert plan(3, None, 60.0) == equal[0].operation
    assert plan(2, None, 60.0) == equal[0].operation  # bounded by three
    fastest = min(equal, key=lambda each: each.latency)
    assert plan(3, None, fastest.latency) == fastest.operation
    with pytest.raises(BudgetError) as told:
        plan(3, None, fastest.latency / 2)
    assert told.value.nearest == fastest
    for images, scale, wait, words in (
        (4, None, 1.0, "nor a larger one"),
        (1, 3.0, 1.0, "guidance scale 3"),
        (1, None, 0.0, "above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(images, scale, wait)
    path.unlink()
    with pytest.raises(ValueError, match="has no profile"):
        deadline_planner(model, "cpu")
