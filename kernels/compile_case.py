"""What the compile gate compiles: a @triton.jit function with a signature, constants and a launch.

A case is one specialisation of a kernel, as a launch on the card would make it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# How Triton's signatures write the dtypes that the kernels compute in.
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
WIDTHS = (384, 768, 1024, 1152)  # hidden sizes of the published networks: S, B, L, XL


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel.

    Args:
        name: unique across the project, e.g. "linear/small/bf16/gelu".
        fn: the @triton.jit function.
        signature: argument name -> type in the function's order, e.g. {"x_ptr": "*bf16",
            "rows": "i32", "BLOCK": "constexpr"}.
        constexprs: argument name -> value of every argument whose type is "constexpr".
        divisible: indices of the arguments (constants counted) that are divisible by 16.
        num_warps, num_stages: of the launch.
        options: further compiler options, e.g. {"launch_pdl": True}.
        arches: the targets that this case is shipped for.
        vector_bytes: widest access that global memory must show in the PTX (16: ld.global.v4.b32,
            cp.async 16 or a TMA); 0 = no demand.
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


def kernel_case(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    unaligned: Collection[str] = (),
    **launch: Any,
) -> CompileCase:
    """The case of `fn` with these constants, None for a pointer that is absent.

    Args:
        types: of the other arguments; "i32" for those that it does not name.
        unaligned: integers that may be no multiple of 16; all others are, and all pointers.
        launch: fields of `CompileCase`. The constant PDL = True implies launch_pdl from sm_90 on.

    Raises:
        ValueError: a constant is no argument of the function.
    """
    if not set(constants) <= set(fn.arg_names):
        raise ValueError(f"compile case {name}: {sorted(constants)} are not all in {fn.arg_names}")
    if constants.get("PDL"):
        launch = {"options": {"launch_pdl": True}, "arches": (90, 100)} | launch
    signature = {
        key: "constexpr" if key in constants else types.get(key, "i32") for key in fn.arg_names
    }
    divisible = tuple(
        i
        for i, (key, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and key not in unaligned)
    )
    return CompileCase(name, fn, signature, constants, divisible, **launch)
