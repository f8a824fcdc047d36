"""Numbers as text, and markdown tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A table as markdown; `header`: the columns' names with " | " between them."""
    rule = ["---"] * len(header.split(" | "))
    lines = (" | ".join(map(str, row)) for row in ([header], rule, *rows))
    return "\n".join(f"| {line} |" for line in lines)


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def spread(row: Mapping[str, Any]) -> str:
    """Median and quantiles of a row that `measure.summary` made."""
    return f"{seconds(row['median_s'])} ({seconds(row['low_s'])} to {seconds(row['high_s'])})"


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"


def not_run(row: Mapping[str, Any], columns: int) -> tuple[str, ...]:
    """Cells of a variant that was not timed: its reason, then nothing, `columns` in all."""
    return f"did not run: {row.get('reason', 'no reason')}", *[""] * (columns - 1)
