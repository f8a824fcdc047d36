"""Values checked: whole numbers, numbers, text of strangers, times and amounts of memory as people
write them (20ms, 2GB)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Size = int | tuple[int, int]  # of images: the side of squares, or height and width
SECONDS = {"us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int, if it is a whole number (numpy's too) from least to most.

    Raises:
        ValueError: for anything else, truth values included.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, not {shown(value)}")
    return number


def check_size(name: str, value: Any, most: int) -> Size:
    """`value` as the size of images, if it is one: a side, or height and width (a list, too), from
    1 to most. Equal ones become a side; else ValueError."""
    if not isinstance(value, (tuple, list)):
        return whole(name, value, 1, most)
    if len(value) != 2:
        raise ValueError(f"{name} must be a side, or height and width, not {shown(value)}")
    height, width = (whole(f"each of {name}", side, 1, most) for side in value)
    return height if height == width else (height, width)


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def show_size(size: Size) -> str:
    """As Pillow and viewers have it: width x height."""
    height, width = sides(size)
    return f"{width}x{height}"


def device_of(name: str) -> torch.device:
    """The device of --device (cpu, cuda or auto). ValueError for a GPU that is not there."""
    import torch

    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here: use --device cpu or auto")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def dtype_of(value: Any) -> torch.dtype:
    """A floating-point torch.dtype, or one by name: "float16", "torch.float16", "fp16", "half".

    Raises:
        ValueError: for anything else.
    """
    import torch

    short = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    name = str(value).removeprefix("torch.")
    name = short.get(name, name) if isinstance(value, str | torch.dtype) else ""
    if name not in ("float16", "bfloat16", "float32", "float64"):
        given = value if isinstance(value, torch.dtype) else shown(value)
        raise ValueError(f"dtype {given} cannot be used: use float16, bfloat16, float32 or float64")
    found: torch.dtype = getattr(torch, name)
    return found


def check_seed(value: Any, name: str = "seed") -> int:
    """`value` as an int, if it is a seed: a whole number in [0, 2^64); else ValueError."""
    try:
        return whole(name, value, 0, 2**64 - 1)
    except ValueError:
        raise ValueError(
            f"{name} must be a whole number from 0 to 2^64 - 1, not {shown(value)}"
        ) from None


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """`value`, if it is one of `allowed`; else ValueError that lists them."""
    if not any(
        value is option or (isinstance(value, str) and value == option) for option in allowed
    ):
        listed = ", ".join(map(str, allowed))
        many = "one of " if len(allowed) > 1 else ""
        raise ValueError(f"{name} must be {many}{listed}, not {shown(value)}")
    return value


def unknown_option(command: str, argument: str, names: Iterable[str]) -> ValueError:
    """The error for an argument that names no option of a command.

    Args:
        names: of the command's options, as their fields are called; the nearest are proposed.
    """
    import difflib

    option = argument.split("=")[0]
    known = [f"--{name.replace('_', '-')}" for name in names]
    near = difflib.get_close_matches(option.replace("_", "-"), known)
    hint = f", perhaps {' or '.join(near)}" if near else ""
    return ValueError(f"{command} has no {option!r}{hint}: see {command} --help")


def is_finite(value: Any) -> bool:
    """Whether value is a finite number; truth values are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def number(name: str, value: Any, least: float = -1e300, most: float = 1e300) -> float:
    """value as a float, if it is a number from least to most; else ValueError."""
    if not is_finite(value) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def text(name: str, value: Any, most: int = 300) -> str:
    """value, if it is printable text of at most `most` characters; else ValueError."""
    if not isinstance(value, str) or not value or len(value) > most or not value.isprintable():
        raise ValueError(
            f"{name} must be printable text of 1 to {most} characters, not {shown(value)}"
        )
    return value


def shown(value: Any) -> str:
    """A value from a file in an error message: printable, of at most 60 characters."""
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to write the longest ones
        return "a huge number"
    said = "".join(c if c.isprintable() else " " for c in repr(value)[:200])
    return said if len(said) <= 60 else said[:57] + "..."


def parse_seconds(text: str) -> float:
    """Seconds that "20ms", "1.5 s" mean. ValueError without a unit, for other units, and for what
    is not above 0."""
    return _amount(text, SECONDS, ("us", "ms", "s", "min"), "20ms")


def parse_memory(text: str) -> int:
    """Bytes that "2GB" (10^9), "512MiB" (2^20) mean; capitals do not matter. ValueError as for
    `parse_seconds`."""
    least = _amount(
        text, {unit.lower(): size for unit, size in BYTES.items()}, tuple(BYTES), "2GB", fold=True
    )
    return max(1, math.floor(least))


def _amount(
    text: str,
    units: dict[str, float] | dict[str, int],
    names: tuple[str, ...],
    example: str,
    fold: bool = False,
) -> float:
    found = re.fullmatch(
        r"\s*(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE]([+-]?\d{1,2}))?\s*([^\W\d]{0,5})\s*", text
    )
    unit = found[3].lower() if found and fold else found[3] if found else ""
    if not found or unit not in units:
        raise ValueError(
            f"must be a number and a unit ({', '.join(names)}), such as {example}, not"
            f" {text[:60]!r}"
        )
    amount = float(found[1]) * 10.0 ** int(found[2] or 0) * units[unit]
    if not amount > 0:
        raise ValueError(f"must be above 0, not {text[:60]!r}")
    return amount


def show_seconds(value: float) -> str:
    """Seconds with three digits and the unit that suits them."""
    for limit, size, unit in ((1e-3, 1e-6, "us"), (1, 1e-3, "ms")):
        if value < 0.9995 * limit:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s" if value < 999.5 else f"{value:.0f} s"


def show_memory(value: float | None) -> str:
    """Bytes with three digits and a unit of thousands."""
    if value is None:
        return "unknown"
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if value >= 0.9995 * size:
            return (
                f"{value / size:.3g} {unit}"
                if value < 999.5 * size
                else f"{value / size:.0f} {unit}"
            )
    return f"{value:.0f} B"
