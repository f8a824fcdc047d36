"""Matrix products, attention, quantisation: a sample of `kernel_cases.py`, and what is refused.

The interpreter must be asked for before Triton is imported, and the rest of the suite runs without
it: the cases run in a child.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from odelt_fast.kernels.attention import attention, head_parts
from odelt_fast.kernels.attention_tangent import attention_tangent
from odelt_fast.kernels.linear import FP8, TILES, choose_tile, linear, workspace_elements
from odelt_fast.kernels.quantize import quantize_rows, quantize_rows_reference
from odelt_fast.kernels.tiles import SPECIALIZED, specialized_tiles
from tests.helpers.interpreted import printed_by

KERNELS = (
    "linear",
    "linear_tiles",
    "linear_split",
    "linear_float8",
    "linear_specialized",
    "linear_unheeded",
    "attention",
    "attention_tangent",
    "quantize",
)
CASES = 8
REGISTRIES = ("kernel_cases_gemm", "kernel_cases_specialized")


@pytest.fixture(scope="module")
def sample() -> str:
    return printed_by(REGISTRIES, "--cases", str(CASES), "--seed", "0")


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_within_twice_pytorchs_error(sample: str, kernel: str) -> None:
    assert f"\n{kernel}: {CASES} of {CASES} cases right" in sample, sample


def test_the_product_leaves_no_argument_at_its_default() -> None:
    """torch 2.11 would lose the workspace, which is written to."""
    arguments = torch.ops.odelt_fast.linear.default._schema.arguments
    assert not [argument.name for argument in arguments if argument.has_default_value()]


def layer(**changes: object) -> dict[str, object]:
    return {
        "x": torch.randn(2, 3, 16),
        "weight": torch.randn(8, 16),
        "bias": torch.randn(8),
        **changes,
    }


FLOAT8 = torch.zeros(2, 3, 16).to(FP8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (layer(weight=torch.randn(8, 15)), "do not fit"),
        (layer(x=torch.randn(16)), "do not fit"),
        (layer(x=torch.randn(2, 3, 16).half()), "must share"),
        (layer(x=torch.randn(2, 3, 16).double(), weight=torch.randn(8, 16).double()), "must share"),
        (layer(weight=torch.randn(16, 8).t()), "rows of weight must be contiguous"),
        (layer(activation="relu"), "activation must be one of none, gelu, not 'relu'"),
        (layer(bias=torch.randn(9)), r"bias must be of shape \(8,\)"),
        (layer(gate=torch.randn(2, 8)), "come together"),
        (layer(gate=torch.randn(3, 8), residual=torch.randn(2, 3, 8)), "gate"),
        (layer(gate=torch.randn(2, 8), residual=torch.randn(2, 4, 8)), "residual must be of shape"),
        (layer(x=FLOAT8, weight=FLOAT8[0]), "float8 needs x_scale and weight_scale"),
        (layer(x_scale=torch.ones(2, 3), weight_scale=torch.ones(8)), "other types take neither"),
        (
            layer(
                x=FLOAT8,
                weight=FLOAT8[0],
                bias=None,
                x_scale=torch.ones(2, 3),
                weight_scale=torch.ones(8),
            ),
            "weight_scale must be of shape",
        ),
        (
            layer(
                x=FLOAT8,
                weight=FLOAT8[0],
                bias=None,
                x_scale=torch.ones(2, 3).half(),
                weight_scale=torch.ones(3),
            ),
            "x_scale must be float32",
        ),
        (layer(), "runs on CUDA tensors"),
    ],
)
def test_linear_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


@pytest.mark.parametrize(
    ("qkv", "heads", "message"),
    [
        (torch.randn(2, 5, 50), 2, "does not fit 2 heads"),
        (torch.randn(5, 48), 2, "does not fit"),
        (torch.randn(2, 5, 48), 0, "does not fit 0 heads"),
        (torch.randn(2, 5, 48).double(), 2, "must be float32, bfloat16 or float16"),
        (torch.randn(1, 1, 3 * 257), 1, "head dimensions up to 256"),
        (torch.randn(2, 5, 48), 2, "runs on CUDA tensors"),
    ],
)
def test_attention_refuses(qkv: Tensor, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(qkv, heads)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.randn(2, 2, 5, 8)] * 5 + [torch.randn(2, 2, 6, 8)], "must be of one shape"),
        ([torch.randn(2, 5, 8)] * 6, "must be of one shape"),
        ([torch.randn(2, 2, 5, 8)] * 5 + [torch.randn(2, 2, 5, 8).half()], "must be float32"),
        ([torch.randn(1, 1, 1, 129)] * 6, "head dimensions up to 128 in torch.float32"),
        ([torch.randn(1, 1, 1, 257).half()] * 6, "head dimensions up to 256 in torch.float16"),
        ([torch.randn(2, 2, 5, 8)] * 6, "runs on CUDA tensors"),
    ],
)
def test_attention_tangent_refuses(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_tangent(*inputs)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 3).double(),
        torch.randn(1, 16385),
        torch.tensor(1.0),
        torch.empty(3, 0),
        torch.randn(4, 3),
    ],
)
def test_quantize_refuses(x: Tensor) -> None:
    with pytest.raises(ValueError, match="quantize_rows"):
        quantize_rows(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_quantised_rows_keep_three_bits(scale: float) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * scale
    q, row_scale = quantize_rows_reference(x)
    error = (q.double() * row_scale.double()[:, None] - x.double()).abs()
    # Half of the last of three bits; below e4m3's smallest normal value, 2^-6, half of 2^-9.
    bound = torch.maximum(x.double().abs() * 2**-4, row_scale.double()[:, None] * 2**-10) * 1.0001
    assert bool((error <= bound).all())


def test_a_row_of_zeros_quantises_to_zeros() -> None:
    q, scale = quantize_rows_reference(torch.zeros(2, 8))
    assert not q.float().any()
    assert bool((scale > 0).all())


def test_head_dimension_is_covered_with_little_padding() -> None:
    for head_dim in range(1, 257):
        main, tail = head_parts(head_dim)
        assert main + tail >= head_dim
        assert main + tail <= max(16, 1 << (head_dim - 1).bit_length())
        assert {part & (part - 1) for part in (main, tail)} == {0}
    assert head_parts(72) == (64, 16)


def test_small_batch_spreads_over_the_card_by_splitting() -> None:
    narrow = choose_tile(256, 768, 3072, torch.bfloat16, 90, 132, True, True)
    assert narrow.splits == 4
    assert workspace_elements(256, 768, narrow) == (512, 48 * 4 * 64 * 64)
    assert choose_tile(256, 3072, 768, torch.bfloat16, 90, 132, True, False).splits == 1
    assert choose_tile(256, 768, 768, torch.bfloat16, 90, 132, True, True).splits == 2


@pytest.mark.parametrize(
    ("rows", "dtype", "arch", "aligned", "gated", "name"),
    [
        (32768, torch.bfloat16, 90, True, False, "hopper"),
        (32768, torch.bfloat16, 90, False, False, "large"),
        (32768, torch.bfloat16, 80, True, False, "large"),
        (1024, torch.float16, 90, True, False, "hopper_narrow"),
        (32768, FP8, 90, True, True, "fp8_hopper"),
        (32768, FP8, 100, True, True, "fp8_hopper_narrow"),
        (32768, torch.bfloat16, 100, True, True, "hopper_narrow"),
        (32768, torch.bfloat16, 100, True, False, "hopper"),
        (32768, FP8, 90, False, True, "fp8_small"),
        (32768, torch.float32, 90, True, False, "float32"),
    ],
)
def test_tile_of_each_shape_and_card(
    rows: int, dtype: torch.dtype, arch: int, aligned: bool, gated: bool, name: str
) -> None:
    assert choose_tile(rows, 2304, 768, dtype, arch, 132, aligned, gated) == TILES[name]


@pytest.mark.parametrize(
    ("arch", "dtype", "gated", "names"),
    [
        (90, torch.bfloat16, True, ["ping_pong", "ping_pong_wide"]),
        (90, FP8, False, ["fp8_ping_pong"]),
        (100, torch.float16, False, ["overlapped", "overlapped_wide"]),
        (100, torch.float16, True, ["overlapped"]),
        (103, FP8, True, ["fp8_overlapped"]),
        (90, torch.float32, False, []),
        (80, torch.bfloat16, False, []),
        (120, torch.bfloat16, False, []),
    ],
)
def test_specialised_tiles_of_each_card(
    arch: int, dtype: torch.dtype, gated: bool, names: list[str]
) -> None:
    assert list(specialized_tiles(arch, dtype, gated)) == names


def test_no_card_takes_a_specialised_tile_unmeasured() -> None:
    shipped = {tile for tiles in SPECIALIZED.values() for tile in tiles.values()}
    for rows, arch, gated in itertools.product((256, 32768), (90, 100), (False, True)):
        for dtype in (torch.bfloat16, FP8):
            assert choose_tile(rows, 2304, 768, dtype, arch, 132, True, gated) not in shipped
