"""What the compile gate compiles: one @triton.jit function with one signature, one set of constants
and one launch configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, as a launch on the card would make it.

    name: unique across the project, e.g. "linear/gelu/bf16/128x256x64". fn: the @triton.jit
    function. signature: argument name -> type, in the function's order, e.g. {"x_ptr": "*bf16",
    "rows": "i32", "BLOCK": "constexpr"}. constexprs: argument name -> value of every argument whose
    type is "constexpr". divisible: indices of the arguments (all arguments counted, constants too)
    that are divisible by 16 at run time. options: further compiler options, e.g. {"launch_pdl":
    True}. arches: the targets that this case is shipped for. vector_bytes: widest access that
    global memory must show in the PTX (16: ld.global.v4.b32, cp.async 16 or a TMA); 0 = no demand.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    divisible: tuple[int, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, object] = field(default_factory=dict)
    arches: tuple[int, ...] = (80, 90, 100)
    vector_bytes: int = 16

    def __post_init__(self) -> None:
        names = tuple(self.signature)
        expected = tuple(self.fn.arg_names)
        if names != expected:
            raise ValueError(
                f"compile case {self.name}: signature names {names} are not the function's"
                f" {expected}"
            )
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constants != set(self.constexprs):
            raise ValueError(
                f"compile case {self.name}: constexprs {sorted(self.constexprs)} are not"
                f" {sorted(constants)}"
            )
        if any(not 0 <= index < len(names) for index in self.divisible):
            raise ValueError(
                f"compile case {self.name}: divisible {self.divisible} is outside"
                f" 0..{len(names) - 1}"
            )


def overlap_options(pdl: bool) -> dict[str, Any]:
    """Fields of a case that is compiled for programmatic dependent launch, which sm_90 brought;
    none without it."""
    return {"options": {"launch_pdl": True}, "arches": (90, 100)} if pdl else {}
