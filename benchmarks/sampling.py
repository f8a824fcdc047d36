"""Cells of the sampling measurements: a network, l, T and a batch, sampled by several variants in
turn, each checked before it is timed.

Variants: eager, fused, fused-fp8, compile and auto are the Sampler's backends; max-autotune and
reduce-overhead are torch.compile's modes on the same network, with the Euler update after each
evaluation; jax is the paper's reference in a process of its own (jax_peer.py). All take noise that
lies on the device and are timed from the call to the finished result. Weights are random in every
tensor, because zeros multiply faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ceilings import evaluation_bytes, evaluation_flops, floor_seconds
from benchmarks.jax_peer import JaxPeer
from benchmarks.measure import (
    Timer,
    host_timer,
    peak_memory,
    release,
    summary,
    synchronize,
    take_turns,
)
from odelt_fast import PRESETS, DiT, DiTConfig, Sampler

BACKENDS = {
    "eager": "eager",
    "fused": "fused",
    "fused-fp8": "fused",
    "compile": "compile",
    "auto": "auto",
}
MODES = ("max-autotune", "reduce-overhead")
FP8_BOUND = 4e-2  # relative, of fp8's samples to float32's
# Eager's own error, or that of a few roundings where eager is luckier: what any order of summation
# may lose.
LEAST_BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
CHECKED_WORK = (
    512  # images times steps: larger cells differ from a checked one in the number of steps only
)

CONFIGS = PRESETS | {"tiny": DiTConfig(image_size=8, hidden_size=32, num_heads=2, num_classes=10)}


@dataclass(frozen=True)
class Cell:
    """One configuration. solver "euler" takes `steps` steps; an adaptive one chooses by `tolerance`
    and `steps` is of no effect. scale: of the network's last projection, whose random weights make
    a field that hardly bends."""

    network: str
    depth: int
    steps: int
    batch: int
    dtype: torch.dtype
    variants: tuple[str, ...]
    solver: str = "euler"
    tolerance: float = 1e-2
    scale: float = 1.0

    @property
    def key(self) -> str:
        how = f"T={self.steps}" if self.solver == "euler" else f"{self.solver} {self.tolerance:g}"
        return (
            f"{self.network} {str(self.dtype).removeprefix('torch.')} batch {self.batch}"
            f" l={self.depth} {how}"
        )

    def record(self) -> dict[str, Any]:
        return asdict(self) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "variants": list(self.variants),
        }


def random_model(
    config: DiTConfig, depth: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> DiT:
    """A network with the weights of `depth` alone, random in every tensor, the zero-initialised
    ones and biases too."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.startswith("final_layer"):
                parameter.normal_(0, 0.02)
        model.final_layer.out.weight.mul_(scale)  # type: ignore[operator]
    return model.truncate(depth).to(dtype).eval().requires_grad_(False)


def weight_bytes(model: DiT) -> dict[str, int]:
    """Bytes of the live blocks and of everything else (the ends), as the model holds them."""
    blocks = sum(weight.numel() * weight.element_size() for weight in model.blocks.parameters())
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {"blocks": blocks, "ends": total - blocks, "live_blocks": len(model.blocks)}


def inputs(cell: Cell, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Noise (B, C, H, W) float32 and labels (B,), all of them different as far as there are
    classes."""
    config = CONFIGS[cell.network]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(
        cell.batch, config.channels, config.image_size, config.image_size, generator=generator
    )
    return noise.to(device), np.arange(cell.batch) % config.num_classes


def sampler_call(
    model: DiT, cell: Cell, variant: str, noise: Tensor, labels: np.ndarray
) -> tuple[Callable[[], Tensor], Sampler]:
    """The Sampler of a variant; ValueError where its backend or precision cannot run."""
    sampler = Sampler(
        model, cell.depth, cell.steps, cell.solver, rtol=cell.tolerance, atol=cell.tolerance, backend=BACKENDS[variant],
        precision="fp8" if variant.endswith("-fp8") else None, batch_size=cell.batch,
    )  # fmt: skip
    return lambda: sampler(noise=noise, labels=labels), sampler


def compiled_call(
    model: DiT, cell: Cell, mode: str, noise: Tensor, labels: np.ndarray
) -> Callable[[], Tensor]:
    """Euler's method around the network compiled in `mode` for these shapes alone; all that does
    not depend on x is made beforehand."""
    network = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    device, size = noise.device, 1 / cell.steps
    index = torch.full((1,), float(min(cell.steps.bit_length() - 1, 7)), device=device)
    times = [torch.full((1,), i * size, device=device) for i in range(cell.steps)]
    y = torch.from_numpy(labels).to(device)

    def call() -> Tensor:
        x = noise
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=256):
            for t in times:
                torch.compiler.cudagraph_mark_step_begin()
                x = torch.add(x, network(x, t, index, y, depth=cell.depth), alpha=size)
        return x

    return call


def check(variant: str, cell: Cell, got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Relative error of a variant's samples to float32's; ValueError above twice that of eager in
    the same dtype (fp8: FP8_BOUND)."""

    def error(x: Tensor) -> float:
        return float(torch.linalg.vector_norm(x.double() - exact) / torch.linalg.vector_norm(exact))

    found, bound = (
        error(got),
        FP8_BOUND if variant.endswith("-fp8") else max(2 * error(eager), LEAST_BOUND[cell.dtype]),
    )
    if not found <= bound:  # NaN fails too
        raise ValueError(
            f"its samples are wrong: relative error {found:.2e} to float32, at most {bound:.2e} is"
            " allowed"
        )
    return found


def measure_cell(
    cell: Cell,
    device: torch.device,
    ceilings: dict[str, float],
    seconds: float,
    peer: JaxPeer | None,
) -> dict[str, Any]:
    """Every variant's samples, setup (first call: compilation, preparation, capture), error, peak
    memory; or the reason it did not run."""
    config = CONFIGS[cell.network]
    model = random_model(config, cell.depth, cell.dtype, device, cell.scale)
    noise, labels = inputs(cell, device)
    checked = cell.solver == "euler" and cell.steps * cell.batch <= CHECKED_WORK
    exact = eager = None
    if checked:
        wide = random_model(config, cell.depth, torch.float32, device, cell.scale)
        exact = sampler_call(wide, cell, "eager", noise, labels)[0]().double()
        del wide
        eager = sampler_call(model, cell, "eager", noise, labels)[0]()
    timers: dict[str, Timer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for variant in cell.variants:
        row = rows[variant] = {"evaluations": float(cell.steps)}
        start = time.perf_counter()
        try:
            if variant == "jax":
                if peer is None:
                    raise ValueError("no --reference-dir was given")
                row["setup_s"] = peer.build(config, cell.depth, cell.steps, cell.batch, cell.dtype)
                timers[variant] = peer.timed
                continue
            if variant in MODES:
                call = compiled_call(model, cell, variant, noise, labels)
            else:
                call, sampler = sampler_call(model, cell, variant, noise, labels)
            got = call()
            got = call() if variant in MODES else got  # its graph is captured on the second call
            synchronize(device)
            row["setup_s"] = time.perf_counter() - start
            if variant not in MODES:
                row["evaluations"] = float(sampler.stats["evaluations_per_image"])
                row["explain"] = {name: str(value) for name, value in sampler.explain().items()}
            if checked and exact is not None and eager is not None:
                row["relative_error"] = check(variant, cell, got, eager, exact)
            row["peak_bytes"] = peak_memory(call, device) if device.type == "cuda" else None
            timers[variant] = host_timer(call, device)
        # a compiler's or an allocator's fault has any type; the other variants are still to be
        # measured
        except Exception as error:
            row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    least = 3 if cell.steps * cell.batch > CHECKED_WORK else 7
    operations, traffic = (
        evaluation_flops(config, cell.depth, cell.batch),
        evaluation_bytes(config, cell.depth, cell.batch, cell.dtype),
    )
    for variant, taken in (
        take_turns(timers, seconds * len(timers), least) if timers else {}
    ).items():
        row = rows[variant] | {"samples_s": taken} | summary(taken)
        evaluation = row["median_s"] / row["evaluations"]
        fp8 = variant.endswith("-fp8")
        floor = floor_seconds(
            operations, traffic / (1 + fp8), torch.float8_e4m3fn if fp8 else cell.dtype, ceilings
        )
        rows[variant] = row | {
            "per_evaluation_s": evaluation,
            "images_per_s": cell.batch / row["median_s"],
            "tflops": operations / evaluation / 1e12,
            "floor_s": floor,
            "share_of_floor": floor / evaluation,
        }
    if peer:
        peer.forget()
    return {"cell": cell.record(), "flops": operations, "checked": checked, "variants": rows}


def measure_memory(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Bytes of the weights, and the peak of a whole life (loading, preparing, capturing, sampling)
    over an empty device, by variant."""
    rows: dict[str, dict[str, Any]] = {}
    noise, labels = inputs(cell, device)
    for variant in cell.variants:
        release(device)
        row = rows[variant] = {}
        try:

            def life(variant: str = variant, row: dict[str, Any] = row) -> None:
                model = random_model(CONFIGS[cell.network], cell.depth, cell.dtype, device)
                row["weights"] = weight_bytes(model)
                if device.type == "cuda":  # the full-size float32 weights were a step on the way
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                call, _ = sampler_call(model, cell, variant, noise, labels)
                call()
                call()
                row["held_bytes"] = (
                    torch.cuda.memory_allocated(device) if device.type == "cuda" else None
                )
                row["reserved_bytes"] = (
                    torch.cuda.memory_reserved(device) if device.type == "cuda" else None
                )

            row["peak_bytes"] = peak_memory(life, device)
        except Exception as error:  # as above
            row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    release(device)
    return {"cell": cell.record(), "variants": rows}
