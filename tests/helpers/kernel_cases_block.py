"""Cases of a block's products with what lies beside them, and of whole evaluations by each plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.engine.engine import Engine
from odelt_fast.engine.plans import PLANS
from odelt_fast.engine.trial import Way, random_model
from odelt_fast.kernels import block_products as block
from odelt_fast.kernels.block_kernel import Layer, Operand, Residual, launch_block
from odelt_fast.kernels.patch import patch_embed_moments
from odelt_fast.kernels.quantize import quantize_rows_reference
from odelt_fast.kernels.residual_rows import GroupEnd
from odelt_fast.kernels.tiles import BLOCK_TILES, SPLITS, Tile, workspace_elements
from odelt_fast.model import DiT
from tests.helpers.kernel_cases_gemm import WIDTHS, exact_float8_cast, token_shape
from tests.helpers.kernel_checks import Axes, batch_size, check_error, guarded, watched

FLOAT8_BOUND = 4e-2  # of an evaluation, or
FLOAT8_MORE = 1.25  # times the error of the same arithmetic in PyTorch, if that is more
NEAR = 7  # neighbouring states and times at which the model's own error is drawn
SEQUENCES = tuple(name for name in PLANS if name != "whole")  # kernel_cases_whole.py has that one
# (width, heads), head dimensions of 24, 64, 72 and others; the widest are slow to interpret.
SMALL = ((24, 1), (48, 2), (64, 1), (72, 1), (96, 4), (36, 1), (20, 2))
MIDDLE = ((96, 4), (144, 2), (192, 3), (192, 8))
WIDE = ((768, 12), (1152, 16))


def draw_tile(rng: random.Random, kind: str, splits: bool) -> Tile:
    """A shipped tile of "float32", "fp8" or other weights, split or not."""
    names = [
        name
        for name in BLOCK_TILES
        if (name == "float32") == (kind == "float32") and name.startswith("fp8") == (kind == "fp8")
    ]
    tile = BLOCK_TILES[rng.choice(names)]
    return replace(tile, splits=rng.choice(SPLITS)) if splits else tile


def block_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """LayerNorm before a product, a residual or the end of a group after it, in every tile."""
    columns, inner = rng.choice(WIDTHS), rng.choice((*WIDTHS, 200))
    (batch, tokens), form = (
        token_shape(rng, columns),
        rng.choice(["norm", "residual", "end", "last"]),
    )
    tile = draw_tile(rng, "float32" if dtype == torch.float32 else "", rng.random() < 0.3)

    def draw(*shape: int, scale: float = 1.0, layout: str = "contiguous") -> Tensor:
        return guarded(rng, shape, dtype, device, scale, layout)

    x, weight, bias = (
        draw(batch, tokens, inner),
        draw(columns, inner, scale=inner**-0.5),
        draw(columns),
    )
    rows = rng.choice([1, batch])
    sizes = {"b": batch, "n": tokens, "i": inner, "o": columns}
    layer = Layer(weight, bias)
    workspace = torch.zeros(
        sum(workspace_elements(tokens, columns, tile, batch)), dtype=torch.int32, device=device
    )
    if form == "norm":
        x = draw(batch, tokens, inner, scale=rng.choice([0.1, 1.0, 30.0]))
        table, activation = draw(rows, 2 * inner, layout=""), rng.choice(["none", "gelu"])
        moments = split_moments(x, rng.choice([32, 64, 128]))
        with watched(x, weight, bias, table, moments):
            given = Operand(x, None, moments, table, 0, inner), layer, activation
            made = launch_block(*given, workspace=workspace, tile=tile)
        arguments: tuple[Any, ...] = x, moments, table, 0, inner, weight, bias, None, activation
        reference: Callable[..., Any] = block.norm_linear_reference
        names = ("bni", None, "bk", None, None, "oi", "o", None, None)
        derived = {"k": lambda order: torch.cat([order["i"], order["i"] + inner])}
        outputs = ("bno",)
    else:
        base, gates = draw(batch, tokens, columns), draw(rows, columns, layout="")
        xr, vr = (draw(batch, tokens, columns) if rng.random() < 0.7 else None for _ in range(2))
        xr = draw(batch, tokens, columns) if form == "end" else None
        steps = torch.rand(rng.choice([1, batch]), device=device) if rng.random() < 0.5 else None
        end = None if form == "residual" else GroupEnd(xr, vr, steps)
        with watched(x, weight, bias, base, gates, xr, vr):
            given = Operand(x), layer, "none", Residual(base, gates, 0, end)
            made = launch_block(*given, workspace=workspace, tile=tile)
        arguments = x, None, weight, bias, None, base, gates, 0
        names = ("bni", None, "oi", "o", None, "bno", "bo", None)
        if form != "residual":
            arguments += (vr, steps) if form == "last" else (xr, vr, steps)
            names += ("bno", "b") if form == "last" else ("bno", "bno", "b")
        derived, outputs = {}, ("bno", "bno") if form == "end" else ("bno",)
        reference = {
            "residual": lambda *given: block.residual_linear_reference(*given)[0],
            "end": lambda *given: block.group_end_linear_reference(*given)[:2],
            "last": block.last_group_end_linear_reference,
        }[form]
        if form != "last":
            check_moments(made.pop(1), made[0])
    assert not workspace[: workspace_elements(tokens, columns, tile, batch)[0]].any()
    axes = Axes(names, outputs, sizes, derived)
    exact = reference(*(each.double() if isinstance(each, Tensor) else each for each in arguments))
    exact = exact if isinstance(exact, tuple) else (exact,)
    plain = zip(*axes.results(rng, reference, *arguments))
    for got, right, others in zip(made, exact, plain, strict=True):
        check_error(f"{form} {tile}", got, others, right)
    return tuple(made)


def split_moments(x: Tensor, width: int) -> Tensor:
    """Moments of x in parts of `width` columns."""
    parts = [block.moments_reference(part) for part in x.split(width, -1)]
    return torch.cat(parts, -1).contiguous()


def check_moments(moments: Tensor, x: Tensor) -> None:
    """AssertionError unless they are those of x (B, N, D)."""
    columns, parts = x.shape[-1], moments.shape[-1]
    width = next(2**n for n in range(20) if -(-columns // 2**n) <= parts)
    expected = split_moments(x.double(), width)
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-5)


def block_float8_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Float8 weights: x in float8 by blocks, or quantised on the way in, and on the way out."""
    columns, inner = rng.randint(1, 300), rng.randint(1, 300)
    batch, tokens = token_shape(rng, columns)
    tile = draw_tile(rng, "fp8", rng.random() < 0.3)
    x = guarded(rng, (batch, tokens, inner), dtype, device, layout="contiguous")
    weight = guarded(rng, (columns, inner), dtype, device, inner**-0.5, "contiguous")
    bias = guarded(rng, (columns,), dtype, device, layout="contiguous")
    weight, scale = quantize_rows_reference(weight)
    layer = Layer(weight, bias, scale)
    if rng.random() < 0.5:
        base = guarded(rng, (batch, tokens, columns), dtype, device, layout="contiguous")
        gates = guarded(rng, (batch, columns), dtype, device)
        q, scales = block.quantize_blocks_reference(x)
        with watched(x, weight, base, gates):
            residual = Residual(base, gates, 0)
            made = launch_block(Operand(q, scales), layer, residual=residual, tile=tile)
        wide = scales.double().repeat_interleave(block.BLOCK, -1)[..., :inner]
        exact = block.residual_linear_reference(
            q.double() * wide, None, weight.double() * scale.double()[:, None], bias.double(),
            None, base.double(), gates.double(), 0,
        )[0]  # fmt: skip
        arguments = q, scales, weight, bias, scale, base, gates, 0
        check_error("float8", made[0], block.residual_linear_reference(*arguments)[0], exact)
        check_moments(made[1], made[0])
        return tuple(made)
    table, moments = guarded(rng, (batch, 2 * inner), dtype, device), split_moments(x, 64)
    quantized = rng.random() < 0.5
    with watched(x, weight, table, moments), exact_float8_cast():
        given = Operand(x, None, moments, table, 0, inner), layer, "gelu"
        made = launch_block(*given, float8=quantized, tile=tile)
    expected = block.norm_linear_reference(x, moments, table, 0, inner, weight, bias, scale, "gelu")
    got = made[0].float()
    if quantized:
        got = got * made[1].repeat_interleave(block.BLOCK, -1)[..., :columns]
    # A value beside the border of two float8 values may be rounded either way, and the hidden
    # values are rounded once more, by a sixteenth at most.
    bound = 4e-2 if quantized else 2e-2
    assert (got - expected.float()).norm() <= bound * expected.float().norm(), "float8 with a norm"
    return tuple(made)


def moments_case(rng: random.Random, device: torch.device, dtype: torch.dtype) -> object:
    """Tokens of patches, and their moments."""
    size, patch, channels = 4 * rng.randint(1, 60), rng.choice([1, 2]), rng.choice([1, 3, 4])
    rows, columns = rng.randint(1, 5), rng.randint(1, 5)
    x = guarded(rng, (batch_size(rng, 17), channels, patch * rows, patch * columns), dtype, device)
    weight, bias = guarded(rng, (size, channels * patch**2), dtype, device), torch.randn(size)
    positions = torch.randn(rows * columns, size, device=device)
    with watched(x, weight, positions):
        tokens, moments = patch_embed_moments(x, weight, bias.to(x), positions, patch)
    check_moments(moments, tokens)
    return tokens, moments


def random_config(rng: random.Random, cost: int, side: int = 1) -> DiTConfig:
    """Of the widest few blocks and tokens, so that they can be interpreted; of images of at least
    `side` pixels squared."""
    size, heads = rng.choice((SMALL, MIDDLE, WIDE)[cost])
    patch, group = rng.choice([1, 2]), rng.choice(([1, 2, 3], [1, 2], [1])[cost])
    groups = rng.choice([1, 2]) if group == 1 and not cost else 1
    conditioned = rng.random() < 0.85
    return DiTConfig(
        image_size=patch * max(rng.randint(1, 4 - cost), side // patch),
        channels=rng.choice([1, 3]), patch_size=patch,
        hidden_size=size, depth=groups * group + 1, depth_min=1 + group * (groups - 1),
        depth_group=group, num_heads=heads, mlp_ratio=rng.choice([1.0, 1.55, 2.0, 4.0][: 4 - cost]),
        num_classes=3, length_conditioned=conditioned,
        inner_step=rng.choice(["unit", "inverse_depth", "residual"]) if conditioned else "unit",
    )  # fmt: skip


def by_engine(engine: Engine, x: Tensor, depth: int, guidance: float | None) -> Tensor:
    """Velocity at t = 0.25, labels 0, 1, 2, 3 (null), 0, ..."""
    labels = torch.arange(len(x), device=x.device) % 4
    if guidance is not None:
        labels = torch.cat([labels, torch.full_like(labels, 3)])
    t = torch.full((1,), 0.25, device=x.device)
    final = engine.condition(t, 2) + engine.weights.label_embed(labels)
    tables = engine.modulations(final + engine.length_rows(depth), final, depth)
    kept = engine.kept.get("whole")  # whose kernel takes the weights' addresses
    with watched(x, *tables, reachable=kept.weights if kept else ()):
        return engine.velocity(x, tables, depth, guidance)


def by_model(model: DiT, x: Tensor, depth: int, guidance: float | None, t: float = 0.25) -> Tensor:
    """The same by the model."""
    labels = torch.arange(len(x), device=x.device) % 4
    said = model(x, t, 2, labels, depth)
    if guidance is None:
        return said
    null = model(x, t, 2, torch.full_like(labels, 3), depth)
    return null + guidance * (said - null)


def plans_case(
    rng: random.Random, device: torch.device, dtype: torch.dtype,
    names: Sequence[str] = SEQUENCES, float8: float = 0.15, rows: int = 257, side: int = 1,
) -> object:  # fmt: skip
    """Each plan on at most that many rows, within twice the model's own error; with float8, of
    which float8 is the chance, within what that costs."""
    cost = rng.choices((0, 1, 2), (70, 27, 3))[0]
    config = random_config(rng, cost, side)
    model = random_model(Way.of(config, device, dtype), rng.getrandbits(30))
    exact_model = DiT(config).to(device).double()
    exact_model.load_state_dict(model.state_dict())
    tokens, depth = config.grid[0] * config.grid[1], rng.choice(config.depths)
    batch = 1 if cost else batch_size(rng, max(1, rows // tokens))
    # The largest error of few values is luck.
    batch = max(batch, -(-64 // (config.channels * config.image_shape[1] ** 2)))
    guidance = rng.choice([None, None, 1.5])
    x = guarded(rng, (batch, *config.image_shape), dtype, device)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    precision = "fp8" if rng.random() < float8 and config.live_blocks(depth) else None
    results = {}
    with torch.no_grad(), exact_float8_cast():
        exact, plain = by_model(exact_model, x.double(), depth, guidance), []
        for change in range(0 if precision else NEAR + 1):
            # A row of little variance lies near or far by luck, and so does the modulation, whose
            # errors all rows share.
            bits = torch.randint(-1, 2, x.shape, generator=generator).to(x) * (change > 0)
            near = x * (1 + torch.finfo(dtype).eps * bits)
            t = 0.25 * (1 + torch.finfo(torch.float32).eps * change)
            own = by_model(exact_model, near.double(), depth, guidance, t)
            plain.append((exact + by_model(model, near, depth, guidance, t) - own).to(dtype))
        for name in names:
            if device.type == "cuda" or not PLANS[name].overlapped:
                engine = Engine(model, "triton", precision, plans=(name,))
                results[name] = by_engine(engine, x, depth, guidance)
    for name, got in results.items():
        if precision:
            slow = Engine(model, precision=precision, kind="reference", plans=(name,))
            with torch.no_grad():
                own = by_engine(slow, x, depth, guidance)
            error, cost = ((each.double() - exact).norm() / exact.norm() for each in (got, own))
            bound = max(FLOAT8_BOUND, FLOAT8_MORE * cost)
            assert error < bound, f"{name}: {error:.2g} with float8, {cost:.2g} in PyTorch"
        else:
            check_error(name, got, plain, exact)
    return tuple(results.values())


def opchecks() -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, operands) for torch.library.opcheck; float8 as in kernel_cases_gemm.py."""
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(8)
    table, base, ops = torch.randn(2, 96), torch.randn(2, 3, 8), torch.ops.odelt_fast
    given = x, None, weight, bias, None, base, table, 8
    moments = block.moments_reference(x)
    return [
        (ops.norm_linear.default, (x, moments, table, 0, 16, weight, bias, None, "gelu", None)),
        (ops.residual_linear.default, (*given, None)),
        (ops.group_end_linear.default, (*given, base.clone(), None, torch.ones(1), None)),
        (ops.last_group_end_linear.default, (*given, base.clone(), None, None)),
        (
            ops.patch_embed_moments.default,
            (torch.randn(2, 1, 8, 8), torch.randn(12, 4), torch.randn(12), torch.randn(16, 12), 2),
        ),
    ]


CASES: list[tuple[str, Callable[[random.Random, torch.device, torch.dtype], object]]] = [
    ("block_products", block_case),
    ("block_float8", block_float8_case),
    ("patch_moments", moments_case),
    ("plans", plans_case),
]
