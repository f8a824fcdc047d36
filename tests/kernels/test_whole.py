"""The persistent kernel: a sample of `kernel_cases.py`, how many programs run, what is refused."""

from __future__ import annotations

import pytest
import torch

from odelt_fast.kernels.whole import address_table, in_turn, whole
from odelt_fast.kernels.whole_launch import (
    FLOAT32,
    HEADER,
    LAUNCHES,
    Sizes,
    choose_launch,
    counters_needed,
    most_counters,
    resident,
    unsuitable,
)
from tests.helpers.interpreted import printed_by


@pytest.mark.parametrize(("kernel", "cases"), [("whole", 4), ("whole_at_once", 2)])
def test_results_are_within_twice_pytorchs_error(kernel: str, cases: int) -> None:
    """Phase by phase, and as one launch whose programs wait for each other."""
    printed = printed_by(
        ("kernel_cases_whole",), "--kernel", kernel, "--cases", str(cases), "--seed", "0"
    )
    assert f"\n{kernel}: {cases} of {cases} cases right" in printed, printed


def test_phases_follow_each_other_block_by_block() -> None:
    assert list(in_turn(2)) == [
        (0, 0, 0),
        *((0, 1, phase) for phase in range(1, 6)),
        *((1, 2, phase) for phase in range(1, 6)),
        (0, 0, 6),
    ]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "programs"),
    [
        (255, 65536, 4, 90, 2),
        (255, 66560, 8, 90, 1),
        (128, 65536, 4, 90, 3),  # by shared memory
        (128, 65536, 4, 89, 1),
        (40, 1024, 4, 100, 12),  # by threads
        (255, 131072, 4, 80, 1),
        (255, 180000, 4, 80, 0),
    ],
)
def test_no_more_programs_than_run_at_once(
    registers: int, shared: int, warps: int, arch: int, programs: int
) -> None:
    assert resident(registers, shared, warps, arch) == programs


def test_registers_allow_the_programs_of_every_launch() -> None:
    for launch in (*LAUNCHES.values(), *FLOAT32.values()):
        assert resident(255, 0, launch.num_warps, 90) >= launch.programs


def test_sizes_without_use_are_told_in_one_line() -> None:
    assert unsuitable(Sizes(2, 256, 768, 3072, 12)) is None
    assert unsuitable(Sizes(5, 256, 768, 3072, 12)) == (
        "it serves at most 1024 rows (samples x tokens), not 1280"
    )
    assert "head dimensions up to 128" in str(unsuitable(Sizes(1, 16, 512, 512, 2)))


def test_batch_1_keeps_most_of_a_card_busy() -> None:
    sizes = Sizes(1, 256, 768, 3072, 12)
    tiles = sizes.tiles(choose_launch(256, 768, torch.bfloat16))
    assert tiles == {
        "qkv": 144, "attention": 96, "attention_out": 96, "mlp_in": 192, "mlp_out": 96
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 768, 2048])
def test_counters_of_all_sizes_are_enough_for_each(width: int, dtype: torch.dtype) -> None:
    for tokens in (*range(1, 70), 128, 255, 256, 257, 1000, 1024):
        sizes = Sizes(1024 // tokens, tokens, width, 4 * width, 1)
        assert HEADER < counters_needed(sizes, dtype) <= most_counters(width, dtype)


def operands(**changes: object) -> list[object]:
    weights = [torch.zeros(shape) for shape in ((48, 16), 48, (16, 16), 16, (32, 16), 32, (16, 32))]
    given: dict[str, object] = {
        "x": torch.zeros(2, 3, 16),
        "modulation": torch.zeros(1, 96),
        "final_modulation": torch.zeros(2, 32),
        "weights": [*weights, torch.zeros(16)],
        "table": torch.zeros(1, 8, dtype=torch.int64),
        "num_heads": 2,
        "depth_group": 1,
        "steps": None,
        "counters": torch.zeros(
            counters_needed(Sizes(2, 3, 16, 32, 2), torch.float32), dtype=torch.int32
        ),
    }
    return list((given | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 16, 3).mT}, "x must be contiguous"),
        ({"weights": []}, "8 tensors a block"),
        ({"num_heads": 3}, "3 heads and groups of 1 blocks do not fit"),
        ({"depth_group": 2}, "groups of 2 blocks do not fit"),
        ({"modulation": torch.zeros(1, 95)}, "column 80 of modulation"),
        ({"final_modulation": torch.zeros(1, 32).half()}, "final_modulation must be in"),
        ({"table": torch.zeros(1, 8)}, "address_table"),
        ({"table": torch.zeros(0, 8, dtype=torch.int64)}, "a row for each of 1 blocks"),
        ({"steps": torch.ones(2)}, r"steps must be \(1,\)"),
        ({"counters": torch.zeros(1, dtype=torch.int32)}, "counters must be"),
        ({"x": torch.zeros(400, 3, 16)}, "at most 1024 rows"),
        ({}, "runs on CUDA tensors"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(*operands(**changes))


def test_weights_that_cannot_be_read_where_they_are_are_refused() -> None:
    for weight in (torch.zeros(17)[1:], torch.zeros(4, 4).t()):
        with pytest.raises(ValueError, match="contiguous and begin at a multiple of 16"):
            address_table([weight] * 8)
