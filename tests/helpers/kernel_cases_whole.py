"""Cases of the persistent kernel; `kernel_cases` runs them, `kernel_checks` says what a case is.

"whole": phase by phase in the interpreter, where a phase that reads what no phase before it wrote
finds NaN, and one that reads what its own launch writes is a race. "whole_at_once": the kernel as
on a card, with its barriers. "plan_whole": by the engine.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from odelt_fast.kernels import whole as module
from odelt_fast.kernels.whole import TENSORS, address_table, whole, whole_reference
from odelt_fast.kernels.whole_launch import Sizes, counters_needed
from tests.helpers.grid_at_once import grid_at_once
from tests.helpers.kernel_cases_block import plans_case
from tests.helpers.kernel_checks import ORDERS, check_error, guarded, watched

HEAD_DIMS = (24, 64, 72, 16)
WIDE = ((768, 64), (1152, 72))


def draw(rng: random.Random, small: bool) -> tuple[Sizes, int, int]:
    """(sizes, blocks, blocks of a group)."""
    head_dim, samples = rng.choice(HEAD_DIMS), rng.choice([1, 1, 2, 4])
    heads = rng.choice([1, 2, 4]) if head_dim == 24 else rng.choice([1, 2])
    group, groups = rng.choice([(0, 1), (1, 2), (2, 1), (1, 3)])
    live = group * groups or rng.choice([1, 2, 3])
    tokens, width = rng.randint(1, 40), heads * head_dim
    if small:
        samples, tokens, live = min(samples, 2), rng.randint(1, 20), group * min(groups, 2) or 2
    elif rng.random() < 0.1:
        (width, head_dim), samples, live, group = rng.choice(WIDE), 1, 1, rng.choice([0, 1])
        return Sizes(1, rng.randint(1, 20), width, 2 * width, width // head_dim), live, group
    elif rng.random() < 0.1:
        samples, tokens, live, group = 1, rng.randint(200, 260), 1, rng.choice([0, 1])
    mlp = rng.choice([4 * width, 3 * width + 8 * rng.randint(0, 4), rng.randint(17, 100)])
    return Sizes(samples, max(tokens, -(-64 // (samples * width))), width, mlp, heads), live, group


def arguments(
    rng: random.Random, device: torch.device, dtype: torch.dtype, small: bool
) -> list[Any]:
    """Of `whole`, with `counters` at last, which it needs."""
    sizes, live, group = draw(rng, small)
    D, mlp = sizes.width, sizes.mlp
    weights = []
    for columns, inner in ((3 * D, D), (D, D), (mlp, D), (D, mlp)) * live:
        weights.append(guarded(rng, (columns, inner), dtype, device, inner**-0.5, "contiguous"))
        weights.append(guarded(rng, (columns,), dtype, device, 0.1, "contiguous"))
    x = guarded(
        rng, (sizes.samples, sizes.tokens, D), dtype, device, rng.choice([0.3, 1.0, 8.0]),
        rng.choice(["contiguous", "misaligned"]),
    )  # fmt: skip
    tables = [
        guarded(
            rng, (rng.choice([1, sizes.samples]), columns + rng.choice([0, 5])), dtype, device, 0.5,
            rng.choice(["contiguous", "strided", "misaligned"]),
        )
        for columns in (live * 6 * D, 2 * D)
    ]  # fmt: skip
    steps = torch.tensor([rng.choice([0.25, 0.5, 1.0])], device=device)
    counters = torch.zeros(counters_needed(sizes, dtype), dtype=torch.int32, device=device)
    given = [x, *tables, weights, address_table(weights), sizes.heads, group]
    return [*given, steps if group and rng.random() < 0.5 else None, counters]


def exact(given: list[Any]) -> Tensor:
    """The float64 result."""

    def wide(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating and value is not given[7] else value

    weights = [wide(each) for each in given[3]]
    return whole_reference(*map(wide, given[:3]), weights, *given[4:])


def case(
    rng: random.Random, device: torch.device, dtype: torch.dtype, at_once: bool = False
) -> object:
    """Within twice PyTorch's error; once more on the same counters, with the same bits."""
    given = arguments(rng, device, dtype, at_once)
    tensors = [*given[:3], *given[3], given[4]]
    results = []
    for _ in range(2 if at_once else 1):
        with contextlib.ExitStack() as stack:
            if at_once and device.type == "cpu":
                every = lambda live: [(0, live, -1)]  # noqa: E731
                stack.enter_context(mock.patch.object(module, "in_turn", every))
                stack.enter_context(grid_at_once(given[3]))
            stack.enter_context(watched(*tensors, reachable=given[3]))
            results.append(whole(*given))
        assert not given[-1][1:].any(), "a counter is left set"
    assert all(torch.equal(each, results[0]) for each in results)
    truth = exact(given)
    plain = [whole_reference(*given)]
    # As in kernel_cases_network: errors at neighbouring states, too.
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    for _ in range(ORDERS // 4):
        last_bits = torch.randint(-1, 2, given[0].shape, generator=generator).to(given[0])
        near = [given[0] * (1 + torch.finfo(dtype).eps * last_bits), *given[1:]]
        plain.append(truth + (whole_reference(*near) - exact(near)))
    check_error("whole", results[0], plain, truth)
    return results[0]


def at_once(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    return case(rng, device, dtype, at_once=True)


def plan_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Evaluations by the engine's plan; many samples of few tokens are slow to interpret."""
    return plans_case(rng, device, dtype, ("whole",), 0.0, rng.choice([16, 16, 16, 257]), side=2)


CASES = [("whole", case), ("whole_at_once", at_once), ("plan_whole", plan_case)]


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, operands) for torch.library.opcheck."""
    given = arguments(random.Random(0), torch.device("cpu"), torch.float32, small=True)
    assert len(given[3]) % TENSORS == 0
    return [(whole, tuple(given))]
