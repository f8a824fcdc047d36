"""A block's products, and whole evaluations by each plan: a sample of `kernel_cases.py`."""

from __future__ import annotations

import pytest
import torch

from odelt_fast.kernels.tiles import BLOCK_TILES, choose_block_tile
from tests.helpers.engine_cases import run_python

KERNELS = ("block_products", "block_float8", "patch_moments", "plans")
CASES = 4
RUN = f"""
import sys
from tests.stress import kernel_cases
kernel_cases.REGISTRIES = ("tests.helpers.kernel_cases_block",)
sys.argv = ["kernel_cases", "--interpret", "--cases", "{CASES}"]
kernel_cases.main()
"""


@pytest.fixture(scope="module")
def sample() -> str:
    return run_python(RUN)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_within_twice_pytorchs_error(sample: str, kernel: str) -> None:
    assert f"{kernel}: {CASES} of {CASES} cases right" in sample, sample


@pytest.mark.parametrize(
    ("batch", "columns", "inner", "tile", "splits"),
    [
        (1, 3 * 768, 768, "small", 1),
        (1, 768, 768, "small", 2),
        (1, 768, 3072, "small", 4),
        (128, 768, 3072, "large", 1),
    ],
)
def test_few_rows_take_small_tiles(
    batch: int, columns: int, inner: int, tile: str, splits: int
) -> None:
    """Of DiT-B/2 on 132 multiprocessors."""
    chosen = choose_block_tile(batch, 256, columns, inner, torch.bfloat16, 132)
    expected = BLOCK_TILES[tile]
    sizes = ("block_m", "block_n", "block_k")
    assert [getattr(chosen, each) for each in sizes] == [getattr(expected, each) for each in sizes]
    assert chosen.splits == splits
