"""What a machine is asked: each question one step, in the order in which nine minutes answer most.

Cells are named as `Workload.key` has them, with the variant that is measured beside eager.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from odelt_fast.engine.plans import DEFAULT, PLANS
from odelt_fast.operation import Operation

from . import correctness, kernel_table, look
from .ceilings import measure_ceilings
from .correctness import PART, kernel_keys, of_variant
from .jax_peer import JaxPeer
from .kernel_speed import measure_kernel
from .measure import Record, nvidia_smi
from .sampling import CONFIGS, Workload, compiled_call, dopri5, measure_memory, measure_workload
from .scope import GRIDS, SCALE, Scope, table3, workloads
from .solver_speed import measure_proof, measure_race
from .steps import Log, MissingError, Step, elsewhere
from .tune import make_tuner, tune

MINUTES = 9.0  # what the phases' marks divide
CEILINGS, LIBRARIES = "look: ceilings", "look: libraries"
WORKSPACE = {"CUBLASLT_WORKSPACE_SIZE": "32768"}  # KiB; Hopper's default is the same of cuBLAS
# What max-autotune chose while other steps shared the card must not be what it is measured with.
CHOOSE_ANEW = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
Refused = Mapping[str, str]


@dataclass(frozen=True)
class Phase:
    """Steps, how many of them run at once, and the second of nine minutes at which they stop."""

    until_s: float
    workers: int
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    """All steps for a device.

    Args:
        log: holds the ceilings, once they are known.
        folder: of the tuning table.
        reference: checkout of the paper's code, and a Python that can run it.
    """

    scope: Scope
    device: torch.device
    log: Log
    folder: Path
    reference: tuple[Path, str] | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def longest_s(self) -> float:
        """After which a measurement hangs: networks are slow on a CPU."""
        return 150 if self.cuda else 1200

    def phases(self, only: Sequence[str]) -> list[Phase]:
        """In their order; of steps that match one of the patterns, and what these stand on."""
        phases = [
            Phase(25, 1, self.looked_at()),
            Phase(165, 8 if self.cuda else 1, [*self.warm(), *self.checks()]),
            Phase(300, 1, list(self.cells())),
            Phase(450, 1, list(self.compiled())),
            Phase(510, 1, [*self.workspaces(), *self.tuning()]),
            Phase(540, 1, list(self.adaptive())),
            Phase(540, 1, list(self.others())),
        ]
        every = {step.key: step for phase in phases for step in phase.steps}
        wanted = {key for key in every if any(fnmatch.fnmatch(key, each) for each in only)}
        wanted |= {name for key in wanted for name in chain(*every[key].stands_on.values())}
        if not all(key.startswith((PART, "look")) for key in wanted):
            wanted.add(CEILINGS)
        chosen = [
            replace(phase, steps=[trusted(step) for step in phase.steps if step.key in wanted])
            for phase in phases
        ]
        # What a phase had no time for comes again at the end.
        last = {step.key: step for phase in chosen for step in phase.steps}
        return [*chosen[:-1], replace(chosen[-1], steps=list(last.values()))]

    def looked_at(self) -> list[Step]:
        scope, device = self.scope, self.device
        batches = 1, scope.batches[-1]
        attention = partial(look.attention, CONFIGS[scope.network], batches, scope.dtype, device)
        libraries = partial(look.libraries, self.cuda)
        counts = [step for step in self.checks() if step.key == correctness.key("while graph")]
        return [
            Step(LIBRARIES, libraries, 300, look.machine(), background=True),
            Step("look: attention", attention, 60),
            Step(CEILINGS, self.measure_ceilings, 60),
            *counts,
        ]

    def measure_ceilings(self, _: Refused) -> Iterator[Record]:
        yield {"ceilings": measure_ceilings(self.device, self.scope.seconds)}
        yield {"nvidia_smi": nvidia_smi()}  # the clocks of a busy card

    def ceilings(self) -> dict[str, float]:
        """As found before, else measured now."""
        found: dict[str, float] = self.log.result(CEILINGS).get("ceilings", {})
        return found or measure_ceilings(self.device, self.scope.seconds)

    def checks(self) -> list[Step]:
        quick = self.scope.network == "tiny"
        steps = correctness.checks(self.cuda, self.scope.cases, quick)
        needing = map(correctness.key, ("while graph", "adaptive"))
        return [replace(step, after=LIBRARIES) if step.key in needing else step for step in steps]

    def cell(self, batch: int, depth: int, steps: int = 0) -> Workload:
        """Of the grid's network, by default of the steps that are compared: few, and soon over."""
        operation = Operation(depth=depth, steps=steps or self.scope.steps[1])
        return Workload(self.scope.network, operation, batch, self.scope.dtype)

    def timed(
        self,
        part: str,
        load: Workload,
        *variants: str,
        note: str = "",
        profiled: bool = False,
        **options: Any,
    ) -> Step:
        """Variants in turn; the last gives its name to the step."""
        load = replace(load, variants=variants)
        adaptive = load.operation.adaptive
        stands_on = {each: of_variant(each, adaptive, self.cuda) for each in variants}
        run = partial(self.time, load, profiled)
        key = f"{part}: {load.key} {variants[-1]}{note}"
        return Step(key, run, self.longest_s, stands_on=stands_on, **options)

    def time(self, load: Workload, profiled: bool, refused: Refused) -> Iterator[Record]:
        measured = load, self.device, self.ceilings(), self.scope.seconds, refused
        if "jax" not in load.variants:
            yield from measure_workload(*measured, profiled=profiled)
            return
        if self.reference is None:
            raise MissingError("the JAX reference: give a checkout of it by --reference-dir")
        with closing(JaxPeer(*self.reference)) as peer:
            yield from measure_workload(*measured, peer)

    def memory(self, part: str, load: Workload, *variants: str) -> Step:
        load = replace(load, variants=variants)
        stands_on = {each: of_variant(each, False, self.cuda) for each in variants}

        def run(refused: Refused) -> Iterator[Record]:
            yield measure_memory(load, self.device, refused)

        return Step(f"{part}: memory {load.key}", run, self.longest_s, stands_on=stands_on)

    def cells(self) -> Iterator[Step]:
        """Alone on the card, most telling first."""
        scope = self.scope
        low, high, batch = min(scope.depths), max(scope.depths), scope.batches[-1]
        ours, *lossy = scope.variants
        for part, count, depth in (
            ("latency", 1, high), ("latency", 1, low), ("throughput", batch, high)
        ):  # fmt: skip
            yield self.timed(part, self.cell(count, depth), "eager", ours, profiled=True)
        for count, variant in ((count, each) for count in (batch, 1) for each in lossy):
            yield self.timed("peers", self.cell(count, high), "eager", variant, profiled=True)
        yield self.timed("latency", self.cell(1, low, 1), "eager", ours)
        for depth in (high, low):
            yield self.timed("latency", self.cell(1, depth, scope.steps[-1]), "eager", ours)

    def compared(self) -> list[tuple[Workload, str]]:
        """(cell, mode of torch.compile): the mode that compiles fastest first."""
        loads = [
            Workload(network, Operation(depth=depth, steps=self.scope.steps[1]), batch, dtype)
            for dtype in (self.scope.dtype,)
            for network, batch, depth in self.scope.peers
        ]
        return [(load, mode) for mode in reversed(self.scope.modes) for load in loads]

    def compiled(self) -> Iterator[Step]:
        for load, mode in self.compared():
            env = CHOOSE_ANEW if mode == "max-autotune" else {}
            yield self.timed("peers", load, self.scope.variants[0], mode, env=env)

    def warm(self) -> Iterator[Step]:
        """Fills Inductor's and Triton's caches while the checks run."""
        measured = {step.key for step in self.compiled() if self.log.settled(step)}
        for load, mode in self.compared():
            if f"peers: {load.key} {mode}" not in measured:
                run = partial(self.compile_once, load, mode)
                yield Step(f"look: warm {load.key} {mode}", run, 300, look.machine())

    def compile_once(self, load: Workload, mode: str, _: Refused) -> Iterator[Record]:
        import torch._inductor.config as inductor

        inductor.autotune_local_cache = False  # nor what single kernels chose meanwhile
        inputs = load.inputs(self.device)
        compiled_call(load.model(self.device), load, mode, inputs)()
        yield {}

    def workspaces(self) -> Iterator[Step]:
        """One cell with cuBLASLt's own workspace and with a larger one."""
        load = self.cell(1, max(self.scope.depths))
        for note, env in ((" default", {}), (" 32 MiB", WORKSPACE)):
            yield self.timed("workspace", load, self.scope.variants[0], note=note, env=env)

    def tuning(self) -> Iterator[Step]:
        networks, samples = self.scope.tuned
        of = {
            "linear triton": correctness.LINEAR,
            "float8 triton": correctness.FLOAT8,
            "specialized": correctness.SPECIALIZED,
            "attention triton": ("attention",),
            **{f"plan {name}": correctness.BLOCKS for name in PLANS if name != DEFAULT},
            "plan whole": correctness.WHOLE,
        }
        stands_on = {name: kernel_keys(*names) for name, names in of.items()} if self.cuda else {}
        for network in networks:
            run = partial(self.tune, network, samples)
            yield Step(f"tuning: {network}", run, 300, stands_on=stands_on)

    def tune(self, network: str, samples: Sequence[int], refused: Refused) -> Iterator[Record]:
        tuner, out = make_tuner(self.device, refused), self.folder / "tuning.json"
        for count, _ in enumerate(tune(tuner, CONFIGS[network], out, samples), 1):
            yield {"entries": count}

    def adaptive(self) -> Iterator[Step]:
        depth = max(self.scope.depths)
        load = Workload(self.scope.network, dopri5(depth), 1, self.scope.dtype, scale=SCALE)
        yield self.timed("solvers", load, "eager", self.scope.variants[0])
        yield from self.solved(load)

    def solved(self, load: Workload) -> Iterator[Step]:
        """A race, and the proof last: profilers have crashed at what it looks at."""
        scope, device = self.scope, self.device
        stands_on = {"": of_variant(scope.variants[0], True, self.cuda)}

        def race(_: Refused) -> Iterator[Record]:
            yield measure_race(load, device, scope.seconds, scope.inductor)

        def proof(_: Refused) -> Iterator[Record]:
            yield measure_proof(load, device)

        for name, run in (("race", race), ("proof", proof)):
            key = f"solvers: {name} {load.key}"
            yield Step(key, run, self.longest_s, stands_on=stands_on)

    def others(self) -> Iterator[Step]:
        """Everything else that is measured for good."""
        scope = self.scope
        yield from self.kernels()
        for part in ("latency", "throughput", "xl"):
            loads = list(workloads(part, scope))
            for load, variant in ((load, each) for load in loads for each in scope.variants):
                if not (load.operation.adaptive and variant.endswith("-fp8")):
                    yield self.timed(part, load, "eager", variant)
            for load in loads:
                if load.operation.steps == scope.steps[0]:
                    yield self.memory(part, load, "eager", *scope.variants)
        for load in table3(scope):
            yield self.timed("solvers", load, scope.variants[0])
            if load.operation.steps == max(scope.steps):
                yield self.memory("solvers", load, scope.variants[0])
        load = Workload(scope.network, dopri5(max(scope.depths)), scope.batches[-1], scope.dtype)
        yield from self.solved(replace(load, scale=SCALE))
        for network, batch, depth in scope.peers if self.cuda or self.reference else ():
            operation = Operation(depth=depth, steps=scope.steps[1])
            load = Workload(network, operation, batch, scope.dtype)
            yield self.timed("peers", load, scope.variants[0], "jax")
        yield Step("training: DiT-B/2", self.train, 2 * self.longest_s,
                   stands_on={"": (correctness.key("training"),)})  # fmt: skip

    def kernels(self) -> Iterator[Step]:
        """Each kernel of the table at the shapes of each network."""
        scope = self.scope
        try:
            found = elsewhere(kernel_names, scope.kernels, scope.dtype, self.cuda)
        except ImportError:  # which each of them will say
            found = [["all"] for _ in scope.kernels]
        for (network, batch), names in zip(scope.kernels, found):
            for number, name in enumerate(names):
                stands_on = {"triton": correctness.of_kernel(name)} if self.cuda else {}
                run = partial(self.measure_kernel, network, batch, number)
                key = f"kernels: {network} batch {batch} {name}"
                yield Step(key, run, self.longest_s, stands_on=stands_on)

    def measure_kernel(
        self, network: str, batch: int, number: int, refused: Refused
    ) -> Iterator[Record]:
        scope = self.scope
        case = list(kernel_table.cases(CONFIGS[network], batch, scope.dtype, self.cuda))[number]
        shape = scope.dtype, self.device, self.ceilings(), scope.seconds
        yield measure_kernel(case, *shape, scope.inductor, refused)

    def train(self, _: Refused) -> Iterator[Record]:
        correctness.need("tyro", "accelerate")
        from .training_speed import Options, measure

        options, network = Options(), "DiT-B/2"
        if self.scope.network == "tiny":
            options, network = Options(rounds=1), "tiny"
        yield {"rows": measure(options, self.device.type, self.longest_s, CONFIGS[network])}


def trusted(step: Step) -> Step:
    """A measurement without the engine's check of itself: it has checks of its own, and time."""
    if step.key.startswith((PART, "look")):
        return step
    return replace(step, env={**step.env, "ODELT_FAST_SELFCHECK": "off"})


def kernel_names(
    shapes: Sequence[tuple[str, int]], dtype: torch.dtype, cuda: bool
) -> list[list[str]]:
    """Of the kernel table's cases at some (network, batch)."""
    made = (kernel_table.cases(CONFIGS[each], batch, dtype, cuda) for each, batch in shapes)
    return [[case.name for case in cases] for cases in made]


def make_plan(grid: str, kind: str, log: Log, reference: tuple[Path, str] | None) -> Plan:
    """The plan of a grid for "cuda" or "cpu"."""
    return Plan(GRIDS[grid], torch.device(kind), log, log.path.parent, reference)
