"""Profiles: what sampling costs on a machine, measured by `odelt-fast profile`, kept as JSON.

A profile belongs to a machine (device, threads, versions, backend) and to the shape of a model (its
configuration, not its weights): the cost of equal steps does not depend on the weights. The number
of steps that an adaptive solver takes does: those measurements carry the hash of the weights that
they were made with. Files are `profiles/*.json` in the cache folder: $ODELT_FAST_CACHE, else
$XDG_CACHE_HOME/odelt-fast, else ~/.cache/odelt-fast.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from odelt_fast.checks import number, one_of, shown, text, whole
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.machine import Machine
from odelt_fast.evaluation.operation_fields import operation_fields, read_operation
from odelt_fast.files import cache_folder, one_line, read_object, write_json
from odelt_fast.operation import Operation, effective_guidance

FORMAT = "odelt-fast profile 1"
PRECISIONS = ("float32", "bfloat16", "float16", "fp8")
_LIMIT = 16 << 20  # bytes of a file: 40 000 measurements
_SECONDS, _BYTES = 1e7, 2**50  # more than anyone waits for, or has
_FIELDS = (
    *("depth", "solver", "steps", "tolerance", "schedule", "batch", "precision", "guidance_scale"),
    *("latency", "low", "high", "rounds", "evaluations", "peak_memory", "weights"),
)
_OPTIONAL = ("guidance_interval",)


@dataclass(frozen=True)
class Measurement:
    """What an operation costs for a batch of images.

    precision: one of PRECISIONS. latency: seconds of a warm call, without a decoder, the median
    over rounds, with the 10 % and 90 % quantiles low and high. evaluations: of the network for an
    image (guidance counts twice). peak_memory: bytes of weights, inputs and activations (None: not
    known). weights: SHA-256 of the model, of adaptive solvers.
    """

    operation: Operation
    batch: int
    precision: str
    latency: float
    low: float
    high: float
    rounds: int
    evaluations: float
    peak_memory: int | None = None
    weights: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a profile holds only one measurement of."""
        return self.operation, self.batch, self.precision, self.weights

    @property
    def guidance_scale(self) -> float | None:
        """That of the operation."""
        return self.operation.guidance_scale

    def holds_for(self, guidance_scale: float | None, weights: str | None) -> bool:
        """Whether it tells the cost at this scale and of these weights (None: those of any).

        Equal steps cost the same at any scale that needs two evaluations, or one; adaptive solvers
        were measured at one scale, with some weights.
        """
        scale = effective_guidance(guidance_scale)
        if not self.operation.adaptive:
            return (scale in (None, 0)) == (self.guidance_scale in (None, 0))
        return scale == self.guidance_scale and weights in (None, self.weights)

    def fields(self) -> dict[str, Any]:
        """Its flat fields in a file."""
        values = {**vars(self), **operation_fields(self.operation)}
        return {name: values[name] for name in (*_FIELDS, *_OPTIONAL) if name in values}


@dataclass(frozen=True)
class Profile:
    """The measurements of one machine and one shape of model.

    model: the name that it was measured under, for people.
    """

    machine: Machine
    config: DiTConfig
    model: str
    measurements: tuple[Measurement, ...] = ()

    def adding(self, measurements: Iterable[Measurement]) -> Profile:
        """With these, in place of older ones of the same."""
        kept = {each.key: each for each in (*self.measurements, *measurements)}
        return replace(self, measurements=tuple(kept.values()))

    def check(self, machine: Machine, config: DiTConfig, path: Path) -> None:
        """ValueError naming the first thing that it was measured with and that is another here."""
        changes = [
            f"with {name} {theirs!r}, here it is {getattr(machine, name)!r}"
            for name, theirs in asdict(self.machine).items()
            if theirs != getattr(machine, name)
        ]
        changes += ["of another model"] * (config != self.config)
        if changes:
            raise ValueError(
                f"{path} was measured {changes[0]}: measure again with"
                f" {profile_command(self.model, path)}"
            )


def profile_command(model: str, path: Path | None = None) -> str:
    """The command that makes a profile."""
    return (
        "odelt-fast profile"
        + ("" if model == "digits" else f" --model {model}")
        + ("" if path is None else f" --profile {path}")
    )


def default_path(machine: Machine, config: DiTConfig) -> Path:
    """The file of a machine and model in the cache folder.

    Its name changes with everything that the profile is keyed by.
    """
    key = json.dumps([asdict(machine), config.to_dict()], sort_keys=True)
    name = re.sub(r"\W+", "-", machine.device, flags=re.ASCII).strip("-").lower()[:60]
    return (
        cache_folder() / "profiles" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    )


def write_profile(profile: Profile, path: Path) -> None:
    """Writes it whole or not at all; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    values = {
        "format": FORMAT,
        "machine": asdict(profile.machine),
        "model": profile.model,
        "config": profile.config.to_dict(),
        "measurements": [measurement.fields() for measurement in profile.measurements],
    }
    write_json(path, values)


def read_profile(path: Path) -> Profile:
    """The profile in a file; ValueError of one line for anything else."""
    try:
        values = read_object(path, _LIMIT)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {shown(values.get('format'))}, not {FORMAT!r}")
        machine, config, found = map(values.get, ("machine", "config", "measurements"))
        if not (isinstance(machine, dict) and isinstance(config, dict) and isinstance(found, list)):
            raise ValueError("machine and config must be objects, measurements a list")
        threads = whole("threads", machine.get("threads"), 0, 4096)
        named = {name: text(name, machine.get(name)) for name in ("device", "versions", "backend")}
        read = Profile(
            Machine(threads=threads, **named),
            DiTConfig.from_dict(config),
            text("model", values.get("model"), 4096),
            tuple(map(_measurement, found)),
        )
        if len({each.key for each in read.measurements}) != len(read.measurements):
            raise ValueError("a measurement occurs twice")
        return read
    except FileNotFoundError:
        raise ValueError(f"there is no profile {path}") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is no profile of odelt-fast: {one_line(error, 200)}") from None


def _measurement(fields: Any) -> Measurement:
    """A measurement of a file, every value checked."""
    if not isinstance(fields, Mapping) or fields.keys() - set(_OPTIONAL) != set(_FIELDS):
        raise ValueError(
            f"a measurement must have {', '.join(sorted(_FIELDS))}, not {shown(fields)}"
        )
    memory, weights = fields["peak_memory"], fields["weights"]
    one_of("precision", fields["precision"], PRECISIONS)
    if weights is not None and not re.fullmatch("[0-9a-f]{64}", text("weights", weights)):
        raise ValueError(f"weights must be a SHA-256, not {shown(weights)}")
    operation = read_operation(fields)
    if operation.adaptive != (weights is not None):
        raise ValueError("weights go with a tolerance, and only with one")
    low, latency, high = (
        number(name, fields[name], 1e-9, _SECONDS) for name in ("low", "latency", "high")
    )
    if not low <= latency <= high:
        raise ValueError(f"latency {latency:g} is not between low {low:g} and high {high:g}")
    return Measurement(
        operation,
        whole("batch", fields["batch"], 1, 10**7),
        fields["precision"],
        latency,
        low,
        high,
        whole("rounds", fields["rounds"], 1, 10**6),
        number("evaluations", fields["evaluations"], 0.5, 1e9),
        None if memory is None else whole("peak_memory", memory, 0, _BYTES),
        weights,
    )
