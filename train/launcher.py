"""What `accelerate launch`, its configuration file or the environment ask of a run: an option that
is not given takes the launcher's value, and a contradiction is refused. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from odelt_fast.checks import shown, whole

from .config import TrainConfig
from .methods import Precision

_ELSEWHERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism",
}
_WORDS = {"no": "float32", "bf16": "bf16 mixed precision", "fp16": "fp16 mixed precision"}


@dataclass(frozen=True)
class Launcher:
    """Its wishes; None and False: it has none. A precision of "no", one accumulation step and no
    compilation are what launchers say when nobody told them anything: no wishes."""

    mixed_precision: Precision | None = None
    gradient_accumulation_steps: int | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    sharding: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launcher:
        """Reads the variables that accelerate reads. ValueError for wishes that training cannot
        meet."""

        def on(name: str) -> bool:
            return environment.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")

        def refuse(name: str, why: str) -> ValueError:
            value = shown(environment.get(name))
            return ValueError(f"the launcher sets {name} to {value}: {why}")

        for name, what in _ELSEWHERE.items():
            if on(name):
                raise refuse(name, f"training does not run under {what}; it shards with FSDP 2")
        name = "ACCELERATE_MIXED_PRECISION"
        precision: Any = environment.get(name, "no").lower()
        if precision not in get_args(Precision):
            raise refuse(name, f"training computes in {', '.join(get_args(Precision))}")
        name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        try:
            steps = whole(name, int(environment.get(name) or 1))
        except ValueError:
            raise refuse(name, "it must be a whole number of at least 1") from None
        name = "ACCELERATE_DYNAMO_BACKEND"
        backend = environment.get(name, "no").lower()
        if backend not in ("no", "inductor"):
            raise refuse(name, "blocks are compiled by inductor, or not at all")
        if backend == "inductor":
            name = "ACCELERATE_DYNAMO_MODE"
            if environment.get(name, "default") != "default":
                raise refuse(name, "blocks are compiled in the default mode")
            name = "ACCELERATE_DYNAMO_USE_FULLGRAPH"
            if on(name):
                raise refuse(name, "blocks are compiled with graph breaks where they need them")
        sharded = on("ACCELERATE_USE_FSDP")
        if sharded and on("FSDP_OFFLOAD_PARAMS"):
            raise refuse("FSDP_OFFLOAD_PARAMS", "weights stay on their device")
        return cls(
            None if precision == "no" else precision,
            None if steps == 1 else steps,
            backend == "inductor",
            sharded and on("FSDP_ACTIVATION_CHECKPOINTING"),
            sharded,
        )

    def check_named(self, options: Collection[str]) -> None:
        """ValueError for a flag of the command line that takes back what the launcher asks for."""
        for name in ("compile", "gradient_checkpointing"):
            option = f"--no-{name.replace('_', '-')}"
            if getattr(self, name) and option in options:
                raise ValueError(f"{option} contradicts the launcher, which asks for it")

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The options with the launcher's values where they are not given; none is None then.
        ValueError for a contradiction."""
        values: dict[str, Any] = {}
        for name, otherwise in (("mixed_precision", "no"), ("gradient_accumulation_steps", 1)):
            given, wish = getattr(config, name), getattr(self, name)
            if given is not None and wish is not None and given != wish:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{option} {given} contradicts the launcher, which asks for {wish}: leave one"
                    " out"
                )
            values[name] = given or wish or otherwise
        for name in ("compile", "gradient_checkpointing"):
            values[name] = getattr(config, name) or getattr(self, name)
        return replace(config, **values)


def runs_in(config: TrainConfig, launcher: Launcher, accelerator: Any, sharded: bool) -> str:
    """What a run computes in, in one line; config: with the launcher's values."""
    count, batch = accelerator.num_processes, config.train_batch_size
    parts = config.gradient_accumulation_steps or 1
    processes = f"{count} process{'es' if count > 1 else ''}"
    steps = f"{parts} accumulation step{'s' if parts > 1 else ''}"
    alone = " (there is one process)" if launcher.sharding else ""
    said = [
        _WORDS[config.mixed_precision or "no"],
        f"batch {batch * count * parts} ({processes} x {steps} x {batch})",
        "weights sharded (FSDP 2)" if sharded else f"weights not sharded{alone}",
        "blocks compiled" if config.compile else "blocks not compiled",
    ]
    if config.gradient_checkpointing:
        said.append("gradient checkpointing")
    if workers := config.dataloader_num_workers:
        said.append(f"batches made ahead by {workers} worker{'s' if workers > 1 else ''} each")
    asked = [each.name.replace("_", " ") for each in fields(launcher) if vars(launcher)[each.name]]
    told = f"; the launcher asks for {', '.join(asked)}" if asked else ""
    return f"runs on {accelerator.device.type} in {', '.join(said)}{told}"
