"""Types of options with several values, and how help shows them."""

from typing import Annotated, Any

import tyro


def metavar(name: str) -> Any:
    """Shows an option's values in its help as `name`."""
    return tyro.conf.arg(metavar=name, help_behavior_hint="")


Ints = Annotated[tuple[int, ...], metavar("INT...")]
Floats = Annotated[tuple[float, ...], metavar("FLOAT...")]
Interval = Annotated[tuple[float, float] | None, metavar("T_LO T_HI")]
Names = Annotated[tuple[str, ...], metavar("NAME...")]
