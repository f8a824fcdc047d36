"""Cases of the products whose loads, products and epilogues have warps of their own.

`kernel_cases` runs them, `kernel_checks` says what a case is.
"""

from __future__ import annotations

import contextlib
import random
from unittest import mock

import torch
from torch import Tensor

from odelt_fast.kernels import linear as module
from odelt_fast.kernels.linear import Epilogue, launch_linear, linear_reference
from odelt_fast.kernels.quantize import FP8, quantize_rows_reference
from odelt_fast.kernels.tiles import SPECIALIZED, specialized_tiles
from tests.helpers.kernel_cases_gemm import (
    double,
    float8_result,
    linear_axes,
    poisoned_output,
    problem,
)
from tests.helpers.kernel_checks import GUARD, check_error, watched


def specialized_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Over so few programs that each has several tiles; of float32 the float8 kernels instead."""
    cuda, float8 = device.type == "cuda", dtype == torch.float32
    arch = module.architecture(device)[0] if cuda else rng.choice([90, 90, 100])
    kind, unit = float8_result(device.type, torch.float16) if float8 else dtype, 16 if float8 else 8
    columns, inner = (unit * rng.randint(1, 500 // unit) for _ in range(2))
    arguments = problem(rng, device, kind, columns, inner)
    tiles = specialized_tiles(arch, FP8 if float8 else dtype, arguments[4] is not None)
    if not tiles:
        return None  # not on this card
    operands, scales = arguments[:2], (None, None)
    if float8:
        operands, scales = zip(*map(quantize_rows_reference, operands))
    x, weight = (apart(rng, each.reshape(-1, inner), unit) for each in operands)
    tensors = [each for each in (x, weight, *arguments[2:], *scales) if isinstance(each, Tensor)]
    few = mock.patch.object(module, "architecture", return_value=(arch, rng.choice([1, 2, 3, 132])))
    with contextlib.ExitStack() as stack:
        if not cuda:
            from tests.helpers.warps_in_turn import warps_in_turn

            stack.enter_context(warps_in_turn(rng))
        out = stack.enter_context(poisoned_output(len(x), columns, kind, device))
        stack.enter_context(watched(*tensors))
        stack.enter_context(few)
        tile = tiles[rng.choice(list(tiles))]
        launch_linear(x, weight, Epilogue(*arguments[2:], *scales), out, tile)
    got = out.view(*arguments[0].shape[:-1], -1)
    exact = [double(each) for each in arguments]
    if float8:
        pairs = zip(operands, scales)
        exact[:2] = [each.double() * scale.double()[..., None] for each, scale in pairs]
        arguments = [*operands, *arguments[2:], *scales, kind]
    plain = linear_axes(*operands).plain(rng, linear_reference, *arguments)
    check_error(str(tile), got, plain, linear_reference(*exact))
    return got


def unheeded_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Where nobody waits for one of the kernel's barriers the result is wrong, or the interpreter
    says what happened: at one of several orders in which the warps may run."""
    if device.type == "cuda":
        return None
    from tests.helpers.warps_in_turn import BARRIERS, warps_in_turn

    # More steps of K than stages: a group that comes before its turn finds its first stage's
    # barrier in the phase that it waits for.
    x, weight = torch.randn(40, 64 * 7).half(), torch.randn(264, 64 * 7).half()
    out, exact = torch.empty(40, 264, dtype=torch.float16), x.float() @ weight.float().t()

    def right(barrier: str) -> bool:
        one = mock.patch.object(module, "architecture", return_value=(90, 1))
        with contextlib.suppress(Exception), warps_in_turn(rng, barrier), one:
            launch_linear(x, weight, Epilogue(), out.fill_(torch.nan), SPECIALIZED[90]["ping_pong"])
        return torch.allclose(out.float(), exact, 1e-2, 1e-1)

    barrier = rng.choice(["", *BARRIERS])
    if barrier:
        assert not all(right(barrier) for _ in range(12)), f"nobody misses the barriers {barrier}"
    else:
        assert right(barrier)
    return None


def apart(rng: random.Random, matrix: Tensor, unit: int) -> Tensor:
    """A copy whose rows lie `unit` values or a few times that further apart, amid NaNs."""
    rows, width = matrix.shape
    stride = width + unit * rng.choice([0, 0, 1, 5])
    buffer = torch.full((2 * GUARD + rows * stride,), torch.nan, device=matrix.device)
    buffer = buffer.to(matrix.dtype)
    made = buffer[GUARD : GUARD + rows * stride].view(rows, stride)[:, :width]
    made.copy_(matrix)
    return made


CASES = [("linear_specialized", specialized_case), ("linear_unheeded", unheeded_case)]
