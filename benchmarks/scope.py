"""What is measured on each kind of device: networks, depths, steps, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, starmap

import torch

from odelt_fast.operation import Operation

from .sampling import MODES, Workload, dopri5
from .tune import SAMPLES

# Random weights at which Dopri5 takes 32 evaluations at 1e-2 and 50 at 1e-4 (DiT-S/2), near the
# paper's 33 to 34 and 71 to 72.
SCALE = 30.0


@dataclass(frozen=True)
class Scope:
    """What is measured on one kind of device.

    Tuples of (network, batch) or (network, batch, depth). variants: beside eager. modes:
    torch.compile's; inductor: whether single kernels are compiled by it. cases: random ones of each
    kernel. tuned: networks, and for how many samples; seconds: of each variant.
    """

    network: str
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    xl: tuple[str, int, tuple[int, ...]]
    kernels: tuple[tuple[str, int], ...]
    peers: tuple[tuple[str, int, int], ...]
    tuned: tuple[tuple[str, ...], tuple[int, ...]]
    variants: tuple[str, ...] = ("auto",)
    dtype: torch.dtype = torch.float32
    depths: tuple[int, ...] = (4, 8, 12)
    adaptive: tuple[float, ...] = (1e-2,)
    modes: tuple[str, ...] = MODES
    inductor: bool = True
    cases: int = 4
    seconds: float = 1.0


GRIDS = {
    "full": Scope(
        network="DiT-B/2",
        steps=(1, 4, 128),
        batches=(8, 128),
        xl=("DiT-XL/2", 64, (12, 20, 28)),
        kernels=(("DiT-B/2", 1), ("DiT-B/2", 128), ("DiT-XL/2", 64)),
        peers=(
            *(("DiT-B/2", batch, depth) for batch in (1, 128) for depth in (12, 4)),
            ("DiT-XL/2", 64, 28),
        ),
        tuned=(("DiT-B/2", "DiT-XL/2"), SAMPLES),
        variants=("fused", "fused-fp8"),
        dtype=torch.bfloat16,
        adaptive=(1e-2, 1e-4),
        cases=12,
    ),
    "reduced": Scope(
        network="DiT-S/2",
        steps=(1, 4),
        batches=(4,),
        xl=("DiT-B/2", 1, (4, 12)),
        kernels=(("DiT-S/2", 1),),
        peers=(("DiT-S/2", 1, 4),),
        tuned=(("DiT-S/2",), (1,)),
    ),
    "tiny": Scope(
        network="tiny",
        depths=(4, 12),
        steps=(1, 2),
        batches=(2,),
        xl=("tiny", 1, (4,)),
        kernels=(("tiny", 1),),
        peers=(("tiny", 2, 4),),
        tuned=(("tiny",), (1, 2)),
        modes=MODES[-1:],
        inductor=False,
        cases=1,
        seconds=0.05,
    ),
}


def workloads(part: str, scope: Scope) -> Iterator[Workload]:
    """Those of latency, throughput and xl, without variants; the long ones last."""
    network, depths, counts = scope.network, scope.depths, scope.steps
    batches = (1,) if part == "latency" else scope.batches
    if part == "xl":
        network, batch, depths = scope.xl
        batches, counts = (batch,), scope.steps[:2]
    for batch, depth, steps in product(batches, depths, counts):
        yield Workload(network, Operation(depth=depth, steps=steps), batch, scope.dtype)
    if part == "throughput":
        for operation in starmap(dopri5, product(depths, scope.adaptive)):
            yield Workload(network, operation, batches[-1], scope.dtype)


def table3(scope: Scope) -> Iterator[Workload]:
    """Longest first, as in the paper; fixed steps before adaptive ones."""
    for depth in sorted(scope.depths, reverse=True):
        equal = [Operation(depth=depth, steps=steps) for steps in sorted(scope.steps) if steps > 1]
        for operation in (*equal, *(dopri5(depth, tolerance) for tolerance in scope.adaptive)):
            yield Workload(scope.network, operation, scope.batches[-1], scope.dtype, scale=SCALE)
