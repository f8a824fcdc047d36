"""Sizes of images; times and amounts of memory as people write them."""

from __future__ import annotations

import pytest

from odelt_fast.checks import (
    check_size,
    parse_memory,
    parse_seconds,
    show_memory,
    show_seconds,
    show_size,
    sides,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20ms", 0.02),
        ("1.5 s", 1.5),
        ("250us", 2.5e-4),
        (" 2min", 120),
        (".5s", 0.5),
        ("1e-2s", 0.01),
        ("3µs", 3e-6),
    ],
)
def test_times_are_read(text: str, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("100kb", 10**5), ("7 B", 7)],
)
def test_amounts_of_memory_are_read(text: str, value: int) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "20",
        "ms",
        "-1ms",
        "0ms",
        "nan s",
        "inf s",
        "1 ms 2",
        "1e999s",
        "٣ furlongs",
        "9" * 30 + "s",
        "1,5s",
        "1\x00s",
    ],
)
def test_other_texts_are_no_quantities(text: str) -> None:
    for read in (parse_seconds, parse_memory):
        with pytest.raises(ValueError, match="must be") as told:
            read(text)
        assert str(told.value).isprintable()


def test_quantities_are_shown_with_the_unit_that_suits() -> None:
    assert [show_seconds(value) for value in (2.5e-6, 0.00099951, 0.0204, 0.9996, 75, 12345)] == [
        "2.5 us",
        "1 ms",
        "20.4 ms",
        "1 s",
        "75 s",
        "12345 s",
    ]
    assert [show_memory(value) for value in (12, 1999, 999_960, 2.5e9, None)] == [
        "12 B",
        "2 KB",
        "1 MB",
        "2.5 GB",
        "unknown",
    ]


def test_sizes_are_sides_or_heights_and_widths() -> None:
    assert [check_size("size", value, 64) for value in (8, [8, 12], (8, 8))] == [8, (8, 12), 8]
    assert (sides(8), sides((8, 12))) == ((8, 8), (8, 12))
    assert (show_size(8), show_size((8, 12))) == ("8x8", "12x8")
    for value in (0, 65, (8, 65), (8,), (8, 8, 8), (8, "12"), "8", True, (True, 8), None):
        with pytest.raises(ValueError, match="size must be"):
            check_size("size", value, 64)
