"""The sampling measurements: workloads, sampled by several variants in turn.

Each variant's samples are checked before it is timed. Variants: eager, fused, fused-fp8, compile
and auto are the Sampler's backends; max-autotune and reduce-overhead are torch.compile's modes on
the same network, with the Euler update after each evaluation; jax is the paper's reference in a
process of its own (jax_peer.py). All take noise that lies on the device and are timed from the call
to the finished result. Weights are random in every tensor, because zeros multiply faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.model import DiT
from odelt_fast.operation import Operation, step_index
from odelt_fast.sampling.sampler import Sampler

from .ceilings import evaluation_bytes, evaluation_flops, floor_seconds
from .jax_peer import JaxPeer
from .look import profile_rows
from .measure import (
    Record,
    Timer,
    check_error,
    dtype_name,
    exact_float32,
    host_timer,
    measured,
    peak_memory,
    reason_in,
    relative_error,
    release,
    synchronize,
    take_turns,
)

MODES = ("max-autotune", "reduce-overhead")
FP8_BOUND = 4e-2  # relative, of fp8's samples to float32's
# Eager's own error, or that of a few roundings where eager is luckier: what any order of summation
# may lose.
LEAST_BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
# Images times steps: larger workloads differ from a checked one in the number of steps only.
CHECKED_WORK = 512

CONFIGS = PRESETS | {"tiny": DiTConfig(image_size=8, hidden_size=32, num_heads=2, num_classes=10)}

Inputs = Record  # of a Sampler's call: "noise" and "labels"


@dataclass(frozen=True)
class Workload:
    """What is sampled, and by which variants.

    scale: of the network's last projection, whose random weights make a field that hardly bends.
    """

    network: str
    operation: Operation
    batch: int
    dtype: torch.dtype
    variants: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def config(self) -> DiTConfig:
        return CONFIGS[self.network]

    @property
    def depth(self) -> int:
        return self.config.check_depth(self.operation.depth)

    @property
    def work(self) -> int:
        """Images times steps."""
        return self.batch * (self.operation.steps or 1)

    @property
    def key(self) -> str:
        how = self.operation
        dial = f"{how.solver} {how.rtol:g}" if how.adaptive else f"T={how.steps}"
        return f"{self.network} {dtype_name(self.dtype)} batch {self.batch} l={self.depth} {dial}"

    def record(self) -> Record:
        """As the "cell" of results."""
        return {
            "network": self.network,
            "depth": self.depth,
            "steps": self.operation.steps or 1,
            "batch": self.batch,
            "dtype": dtype_name(self.dtype),
            "variants": list(self.variants),
            "solver": self.operation.solver,
            "tolerance": self.operation.rtol,
            "scale": self.scale,
        }

    def model(self, device: torch.device, dtype: torch.dtype | None = None) -> DiT:
        return random_model(self.config, self.depth, dtype or self.dtype, device, self.scale)

    def inputs(self, device: torch.device) -> Inputs:
        """Noise (B, C, H, W) float32 and labels (B,), different as far as there are classes."""
        config, generator = self.config, torch.Generator().manual_seed(1)
        shape = (self.batch, *config.image_shape)
        noise = torch.randn(shape, generator=generator).to(device)
        return {"noise": noise, "labels": np.arange(self.batch) % config.num_classes}


def dopri5(depth: int, tolerance: float = 1e-2) -> Operation:
    return Operation(depth=depth, solver="dopri5", steps=None, rtol=tolerance, atol=tolerance)


def random_model(
    config: DiTConfig, depth: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> DiT:
    """A network with the weights of `depth` alone, random in every tensor.

    The zero-initialised ones and biases too.
    """
    torch.manual_seed(0)
    with device, torch.no_grad():
        model = DiT(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.startswith("final_layer"):
                parameter.normal_(0, 0.02)
        model.get_parameter("final_layer.out.weight").mul_(scale)
    return model.truncate(depth).to(dtype).eval().requires_grad_(False)


def weight_bytes(model: DiT) -> dict[str, int]:
    """Bytes of the live blocks and of everything else (the ends), as the model holds them."""
    blocks, total = (
        sum(weight.nbytes for weight in module.parameters()) for module in (model.blocks, model)
    )
    return {"blocks": blocks, "ends": total - blocks, "live_blocks": len(model.blocks)}


def sampler_call(
    model: DiT, load: Workload, variant: str, inputs: Inputs
) -> tuple[Callable[[], Tensor], Sampler]:
    """The Sampler of a variant; ValueError where its backend or precision cannot run."""
    backend, _, precision = variant.partition("-")
    sampler = Sampler.of(
        model, load.operation, backend=backend, precision=precision or None, batch_size=load.batch
    )
    return partial(sampler, **inputs), sampler


def true_samples(model: DiT, load: Workload, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What variants are checked by: the eager model's samples, and float32's, as float64."""
    wide = load.model(inputs["noise"].device, torch.float32)
    with exact_float32():
        exact = sampler_call(wide, load, "eager", inputs)[0]().double()
    return sampler_call(model, load, "eager", inputs)[0](), exact


def compiled_call(model: DiT, load: Workload, mode: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Euler's method around the network compiled in `mode` for these shapes alone.

    All that does not depend on x is made beforehand.
    """
    network = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    noise, steps = inputs["noise"], load.operation.steps or 1
    device, size = noise.device, 1 / steps
    index = torch.full((1,), float(step_index("shortcut", steps)), device=device)
    times = [torch.full((1,), i * size, device=device) for i in range(steps)]
    y = torch.from_numpy(inputs["labels"]).to(device)

    def call() -> Tensor:
        x = noise
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=256):
            for t in times:
                torch.compiler.cudagraph_mark_step_begin()
                x = torch.add(x, network(x, t, index, y, depth=load.depth), alpha=size)
        return x

    return call


def check(variant: str, dtype: torch.dtype, got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Relative error of a variant's samples to float32's.

    Raises:
        ValueError: above twice that of eager in the same dtype (fp8: FP8_BOUND).
    """
    bound = max(2 * relative_error(eager, exact), LEAST_BOUND[dtype])
    if variant.endswith("-fp8"):
        bound = FP8_BOUND
    return check_error(relative_error(got, exact), bound, " to float32")


def measure_workload(
    load: Workload,
    device: torch.device,
    ceilings: Mapping[str, float],
    seconds: float,
    refused: Mapping[str, str],
    peer: JaxPeer | None = None,
    profiled: bool = False,
) -> Iterator[Record]:
    """Every variant's samples, setup, error and peak memory; or the reason why it did not run.

    Setup is the first call: compilation, preparation, capture.

    Args:
        refused: why a variant must not be measured.
        profiled: gives, after the times, also what one call of each of the Sampler's backends ran.
    """
    config, depth, steps = load.config, load.depth, load.operation.steps or 1
    model, inputs = load.model(device), load.inputs(device)
    checked = not load.operation.adaptive and load.work <= CHECKED_WORK
    if checked:
        eager, exact = true_samples(model, load, inputs)
    timers: dict[str, Timer] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, Record] = {}
    for variant in load.variants:
        row = rows[variant] = {"evaluations": float(steps)}
        start = time.perf_counter()
        with reason_in(row):
            if variant in refused:
                raise ValueError(refused[variant])
            if variant == "jax":
                assert peer
                row["setup_s"] = peer.build(config, depth, steps, load.batch, load.dtype)
                timers[variant] = peer.timed
                continue
            if variant in MODES:
                call = compiled_call(model, load, variant, inputs)
                call()  # its graph is captured on the second call
            else:
                call, sampler = sampler_call(model, load, variant, inputs)
            got = call()
            synchronize(device)
            row["setup_s"] = time.perf_counter() - start
            if variant not in MODES:
                row["evaluations"] = float(sampler.stats["evaluations_per_image"])
                row["explain"] = {name: str(value) for name, value in sampler.explain().items()}
                calls[variant] = call
            if checked:
                row["relative_error"] = check(variant, load.dtype, got, eager, exact)
            row["peak_bytes"] = peak_memory(call, device) if device.type == "cuda" else None
            timers[variant] = host_timer(call, device)
    operations = evaluation_flops(config, depth, load.batch)
    traffic = evaluation_bytes(config, depth, load.batch, load.dtype)
    least = 3 if load.work > CHECKED_WORK else 7
    for variant, row in measured(take_turns(timers, seconds * len(timers), least)).items():
        evaluation = row["median_s"] / rows[variant]["evaluations"]
        floor = floor_seconds(operations, traffic, load.dtype, ceilings)
        if variant.endswith("-fp8"):
            floor = floor_seconds(operations, traffic / 2, torch.float8_e4m3fn, ceilings)
        rows[variant] |= row | {
            "per_evaluation_s": evaluation,
            "images_per_s": load.batch / row["median_s"],
            "tflops": operations / evaluation / 1e12,
            "floor_s": floor,
            "share_of_floor": floor / evaluation,
        }
    yield {"cell": load.record(), "flops": operations, "checked": checked, "variants": rows}
    for variant in calls.keys() & timers.keys() if profiled else ():
        yield {"profiles": {variant: profile_rows(calls[variant], device)}}


def measure_memory(load: Workload, device: torch.device, refused: Mapping[str, str]) -> Record:
    """Bytes of the weights, and the peak of a whole life over an empty device, by variant.

    A life: loading, preparing, capturing, sampling. refused as in `measure_workload`.
    """
    rows: dict[str, Record] = {}
    inputs, cuda = load.inputs(device), device.type == "cuda"

    def life(variant: str, row: Record) -> None:
        model = load.model(device)
        row["weights"] = weight_bytes(model)
        if cuda:  # the full-size float32 weights were a step on the way
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        call, _ = sampler_call(model, load, variant, inputs)
        call()
        call()
        if cuda:
            row["held_bytes"] = torch.cuda.memory_allocated(device)
            row["reserved_bytes"] = torch.cuda.memory_reserved(device)

    for variant in load.variants:
        release(device)
        row = rows[variant] = {}
        with reason_in(row):
            if variant in refused:
                raise ValueError(refused[variant])
            row["peak_bytes"] = peak_memory(partial(life, variant, row), device)
    release(device)
    return {"cell": load.record(), "variants": rows}
