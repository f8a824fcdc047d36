"""Cases of the row and element kernels; `kernel_checks` says what a case is, `kernel_cases` runs them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_cases_gemm import exact_float8_cast
from kernel_checks import GUARD, batch_size, check_error, guarded, watched
from torch import Tensor

from odelt_fast.kernels.ema import ema_update, ema_update_reference
from odelt_fast.kernels.final_layer import final_euler, final_layer_reference, final_velocity
from odelt_fast.kernels.gated_residual import gated_residual, gated_residual_reference
from odelt_fast.kernels.group_end import group_end, group_end_reference, last_group_end
from odelt_fast.kernels.modulation import modulation, modulation_reference
from odelt_fast.kernels.norm_modulate import norm_modulate, norm_modulate_reference
from odelt_fast.kernels.patch import patch_embed, patch_embed_reference
from odelt_fast.kernels.quantize import quantize_rows_reference
from odelt_fast.kernels.row_float8 import gated_residual_float8, group_end_float8, norm_modulate_float8
from odelt_fast.kernels.solver_update import combine_stages, combine_stages_reference, error_norm, error_norm_reference

SIZES = (1, 4, 8, 12, 20, 24, 33, 64, 72, 96, 100, 128, 130)
WIDE = (384, 768, 1152)


def differentiable(
    rng: random.Random, operator: Callable[..., Any], reference: Callable[..., Any], arguments: Sequence[Any], terms: int
) -> list[Tensor]:
    """Outputs of `operator`, each a sum of `terms` values, and its gradients for all tensors, against `reference`; returns them."""
    exact_arguments = [argument.double() if isinstance(argument, Tensor) else argument for argument in arguments]
    given = [argument for argument in arguments if isinstance(argument, Tensor)]
    leaves = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    results = []
    cotangents: list[Tensor] = []
    for function, values in ((operator, list(arguments)), (reference, list(arguments)), (reference, exact_arguments)):
        values = [value.detach().requires_grad_(i in leaves) if isinstance(value, Tensor) else value for i, value in enumerate(values)]
        with watched(*given):
            outputs = function(*values)
            outputs = [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if output is not None]
        if not cotangents:
            cotangents = [guarded(rng, output.shape, output.dtype, output.device) for output in outputs]
        with watched(*given, *cotangents):
            weights = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs)]
            gradients = torch.autograd.grad(outputs, [values[i] for i in leaves], weights)
        results.append([*(output.detach() for output in outputs), *gradients])
    for index, (got, plain, exact) in enumerate(zip(*results)):
        what = f"output {index}" if index < len(cotangents) else f"gradient of argument {leaves[index - len(cotangents)]}"
        # A weight's gradient is summed over all rows of the output, a packed modulation's over those that share its row.
        summed = 0 if got.dim() > 2 else cotangents[0][..., 0].numel() / (got.shape[0] if cotangents[0].dim() > got.dim() > 1 else 1)
        check_error(what, got, plain, exact, max(terms, summed))
    return results[0]


def token_shape(rng: random.Random) -> tuple[int, int, int]:
    batch = batch_size(rng)
    tokens = rng.randint(1, 40) if batch < 6 else rng.randint(1, 2)
    return batch, tokens, rng.choice(WIDE if rng.random() < 0.05 and batch < 6 else SIZES)


def packed(rng: random.Random, batch: int, size: int, parts: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[int]]:
    """A packed modulation (batch or 1, K), and `parts` distinct columns in it: those of a block, or anywhere."""
    table = guarded(rng, (rng.choice([1, batch]), 6 * size + rng.choice([0, 0, 5])), dtype, device)
    shift = rng.randint(0, table.shape[1] - 6 * size) if rng.random() < 0.3 else 0
    return table, [shift + size * column for column in rng.sample(range(6), parts)]


def norm_modulate_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x = guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0]))
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    return differentiable(rng, norm_modulate, norm_modulate_reference, (x, table, *columns), shape[2])


def gated_residual_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y = (guarded(rng, shape, dtype, device, rng.choice([0.1, 1.0, 30.0])) for _ in range(2))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    return differentiable(rng, gated_residual, gated_residual_reference, (x, y, gates, gate, table, *columns), shape[2])


def group_end_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    # Values that every dtype holds, so that all three computations are given the same steps.
    steps = rng.choice([None, torch.tensor([rng.choice([0.25, 0.5, 1.0]) for _ in range(rng.choice([1, shape[0]]))], device=device)])
    rest = (gates, gate, table, *columns)
    first = rng.choice([None, vr])
    if rng.random() < 0.5:
        return differentiable(rng, _with(group_end, steps), _with(group_end_reference, steps), (x, y, xr, first, *rest), shape[2])

    def last_reference(x: Tensor, y: Tensor, vr: Tensor | None, *others: Any) -> Any:
        return group_end_reference(x, y, None, vr, *others)

    return differentiable(rng, _with(last_group_end, steps), _with(last_reference, steps), (x, y, first, *rest), shape[2])


def _with(function: Callable[..., Any], steps: Tensor | None) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, steps)


def modulation_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    size, columns, count = rng.choice(SIZES), rng.randint(1, 200), rng.choice([1, 2, 3, 15, 16, 17, batch_size(rng)])
    condition = guarded(rng, (count, size), rng.choice([dtype, torch.float32]), device)
    weight = guarded(rng, (columns, size), dtype, device, size**-0.5)
    bias = guarded(rng, (columns,), dtype, device)
    return differentiable(rng, modulation, modulation_reference, (condition, weight, bias), size)


def patch_embed_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    patch, channels, batch = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 3, 4, 5]), batch_size(rng)
    height, width = (patch * rng.randint(1, 6 if batch < 6 else 1) for _ in range(2))
    size = rng.choice(SIZES)
    x = guarded(rng, (batch, channels, height, width), rng.choice([dtype, torch.float32]), device)
    weight = guarded(rng, (size, channels * patch**2), dtype, device, 0.3)
    bias = guarded(rng, (size,), dtype, device)
    positions = guarded(rng, (height * width // patch**2, size), torch.float32, device)
    # A state that the weights' dtype holds exactly, so that its rounding is no error of either; positions are data, without a gradient.
    x.copy_(x.to(dtype)) if 0 not in x.stride() else None
    operator, reference = (lambda *values, f=f: f(*values, positions, patch) for f in (patch_embed, patch_embed_reference))
    return differentiable(rng, operator, reference, (x, weight, bias), weight.shape[1])


def final_layer_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    patch, channels, batch = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 3, 4, 5]), batch_size(rng)
    height, width = (patch * rng.randint(1, 6 if batch < 6 else 1) for _ in range(2))
    size, guidance, step = rng.choice(SIZES), rng.choice([None, None, 1.5, 0.0, -2.0]), rng.choice([1.0, 1 / 3, 1 / 128])
    state = rng.choice([dtype, torch.float32])
    h = guarded(rng, ((1 if guidance is None else 2) * batch, height * width // patch**2, size), dtype, device)
    weight = guarded(rng, (channels * patch**2, size), dtype, device, size**-0.5)
    bias = guarded(rng, (channels * patch**2,), dtype, device)
    x = guarded(rng, (batch, channels, height, width), state, device) if rng.random() < 0.6 else None
    with watched(x, h, weight, bias):
        if x is None:
            got = final_velocity(h, weight, bias, patch, height, width, state, guidance)
        else:
            got = final_euler(x, h, weight, bias, patch, step, guidance)
    plain = final_layer_reference(x, h, weight, bias, patch, height, width, step, guidance)
    doubled = (None if x is None else x.double(), h.double(), weight.double(), bias.double())
    exact = final_layer_reference(*doubled, patch, height, width, step, guidance)
    check_error("velocity" if x is None else "state", got, plain.to(state), exact, size)
    return got


def combine_stages_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    x, stages, coefficients, step = _stages(rng, device, rng.choice([dtype, dtype, torch.float64]))
    with watched(x, stages, coefficients, step):
        got = combine_stages(x, stages, coefficients, step)
    stages = stages.nan_to_num()  # of stages whose coefficient is 0
    plain = combine_stages_reference(x, stages, coefficients, step)
    if x.dtype == torch.float64:  # S + 2 roundings, each of at most the sum of all magnitudes
        size = combine_stages_reference(x.abs(), stages.double().abs(), coefficients.abs(), step.abs())
        assert bool(((got - plain).abs() <= 2 * (len(coefficients) + 2) * torch.finfo(torch.float64).eps * size).all())
    else:
        exact = combine_stages_reference(x.double(), stages.double(), coefficients.double(), step.double())
        check_error("state", got, plain, exact, len(coefficients) + 1)
    return got


def error_norm_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    x, stages, weights, step = _stages(rng, device, dtype)
    x_new = guarded(rng, x.shape, dtype, device)
    rtol, atol = (torch.tensor([rng.choice([1e-1, 1e-2, 1e-4])], device=device) for _ in range(2))
    with watched(x, x_new, stages, weights, step, rtol, atol):
        got = error_norm(x, x_new, stages, weights, step, rtol, atol)
    stages = stages.nan_to_num()
    plain = error_norm_reference(x, x_new, stages, weights, step, rtol.item(), atol.item()).float()
    doubled = (tensor.double() for tensor in (x, x_new, stages, weights, step))
    check_error("norm", got, plain, error_norm_reference(*doubled, rtol.item(), atol.item()), x[0].numel())
    sample = rng.randrange(len(x))
    x_new = x_new.clone(memory_format=torch.contiguous_format)
    x_new[sample].view(-1)[-1] = float("nan")
    assert error_norm(x, x_new, stages, weights, step, rtol, atol).isnan().nonzero().flatten().tolist() == [sample]
    return got


def _stages(rng: random.Random, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, stages (one more than coefficients at times), coefficients (some 0, and then the stage is NaN) and step."""
    batch, count = batch_size(rng), rng.randint(1, 7)
    inner = rng.choice([(rng.randint(1, 50),), (rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 9))])
    if batch < 6 and rng.random() < 0.1:
        inner = (rng.randint(1000, 40000),)
    x = guarded(rng, (batch, *inner), dtype, device)
    stages = guarded(rng, (count + rng.choice([0, 0, 2]), batch, *inner), rng.choice([dtype, torch.float32]), device)
    coefficients = torch.tensor([rng.uniform(-2, 2) for _ in range(count)], device=device)
    if count > 1 and stages.stride(0) and rng.random() < 0.5:
        unused = rng.randrange(count)
        coefficients[unused] = 0.0
        stages[unused] = float("nan")
    step = torch.tensor([rng.uniform(0.001, 1) for _ in range(rng.choice([1, batch]))], device=device)
    return x, stages, coefficients, step


def ema_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    kinds, decay = (rng.choice([dtype, torch.float32]), dtype), rng.choice([0.0, 0.5, 0.999, 0.9999, 1.0])
    layout = rng.choice(["contiguous", "misaligned"])
    kinds_of_shape = [(), (0,), (rng.randint(1, 70),), (rng.randint(1, 30), rng.randint(1, 30))]
    shapes: list[tuple[int, ...]] = [rng.choice(kinds_of_shape) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.1:
        shapes.append((rng.choice([8191, 8192, 8193, 20000]),))
    ema, live = ([guarded(rng, shape, kind, device, layout=layout) for shape in shapes] for kind in kinds)
    plain = ema_update_reference(ema, live, decay)
    exact = ema_update_reference([tensor.double() for tensor in ema], [tensor.double() for tensor in live], decay)
    with watched(*live, reachable=[*ema, *live]):
        ema_update(ema, live, decay)
    for index, average in enumerate(ema):
        check_error(f"average {index}", average, plain[index], exact[index])
        whole = torch.empty(0, dtype=average.dtype, device=device).set_(average.untyped_storage())
        start = average.storage_offset()
        around = torch.cat([whole[:start], whole[start + average.numel() :]])
        assert around.numel() >= 2 * GUARD
        assert bool(around.isnan().all()), "the kernel wrote beside an average"
    return [average.clone() for average in ema]


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that torch.library.opcheck may try it on."""
    x, y, xr, vr = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(4))
    table = torch.randn(2, 48, requires_grad=True)
    weight, bias = torch.randn(16, 8, requires_grad=True), torch.randn(16, requires_grad=True)
    image, h = torch.randn(2, 4, 2, 6), torch.randn(2, 3, 8)
    stages, step, tolerance = torch.randn(3, 2, 5), torch.ones(1), torch.full((1,), 0.1)
    return [
        (norm_modulate, (x, table, 0, 8)),
        (gated_residual, (x, y, table, 16, table, 24, 32)),
        (group_end, (x, y, xr, vr, table, 40, table, 0, 8, torch.ones(2))),
        (group_end, (x, y, xr, None, table, 40, table, 0, 8)),
        (last_group_end, (x, y, vr, table, 40, table, 0, 8)),
        (modulation, (torch.randn(2, 8, requires_grad=True), weight, bias)),
        (modulation, (torch.randn(17, 8), weight.detach().half(), bias.detach().half())),
        (
            patch_embed,
            (image.clone().requires_grad_(), weight.detach().t().contiguous().requires_grad_(), torch.randn(8), torch.randn(3, 8), 2),
        ),
        (final_euler, (image, h, weight.detach(), bias.detach(), 2, 0.5)),
        (final_velocity, (torch.cat([h, h]), weight.detach(), bias.detach(), 2, 2, 6, torch.float32, 1.5)),
        (combine_stages, (torch.randn(2, 5), stages, torch.randn(3), step)),
        (error_norm, (torch.randn(2, 5), torch.randn(2, 5), stages, torch.randn(3), step, tolerance, tolerance)),
        (ema_update, ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], 0.9)),
    ]


def float8_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """The float8 forms: the sums as without float8, bit by bit, and q*scales within twice the error of PyTorch's result quantised."""
    shape = token_shape(rng)
    x, y, xr, vr = (guarded(rng, shape, dtype, device) for _ in range(4))
    gates, (gate,) = packed(rng, shape[0], shape[2], 1, dtype, device)
    table, columns = packed(rng, shape[0], shape[2], 2, dtype, device)
    arguments, plain_operator, operator, reference = rng.choice(
        [
            ((x, table, *columns), norm_modulate, norm_modulate_float8, norm_modulate_reference),
            ((x, y, gates, gate, table, *columns), gated_residual, gated_residual_float8, gated_residual_reference),
            ((x, y, xr, rng.choice([None, vr]), gates, gate, table, *columns), group_end, group_end_float8, group_end_reference),
        ]
    )
    with watched(x, y, xr, vr, gates, table), exact_float8_cast():
        *sums, q, scales = operator(*arguments)
    unquantised = plain_operator(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sums, unquantised)) or isinstance(unquantised, Tensor)
    results = [_last(reference(*arguments)), _last(reference(*(v.double() if isinstance(v, Tensor) else v for v in arguments)))]
    plain_q, plain_scales = quantize_rows_reference(results[0])
    assert bool((q.float().abs() <= 448).all()), "a value outside e4m3, or NaN"
    check_error("float8", q.float() * scales[..., None], plain_q.float() * plain_scales[..., None], results[1], shape[2])
    return (*sums, q.view(torch.uint8), scales)


def _last(outputs: Any) -> Tensor:
    return outputs[-1] if isinstance(outputs, tuple) else outputs


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("norm_modulate", norm_modulate_case),
    ("gated_residual", gated_residual_case),
    ("group_end", group_end_case),
    ("modulation", modulation_case),
    ("patch_embed", patch_embed_case),
    ("final_layer", final_layer_case),
    ("combine_stages", combine_stages_case),
    ("error_norm", error_norm_case),
    ("ema", ema_case),
    ("row_float8", float8_case),
]
