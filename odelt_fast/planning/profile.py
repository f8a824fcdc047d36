"""Profiles: what sampling costs on a machine, measured by `odelt-fast profile`, kept as JSON, read
with suspicion.

A profile belongs to a machine (device, threads, versions, backend) and to the shape of a model (its
configuration, not its weights): the cost of equal steps does not depend on the weights. The number
of steps that an adaptive solver takes does: those measurements carry the hash of the weights that
they were made with. Files are `profiles/*.json` in the cache folder: $ODELT_FAST_CACHE, else
$XDG_CACHE_HOME/odelt-fast, else ~/.cache/odelt-fast.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from odelt_fast.checks import number, shown, text, whole
from odelt_fast.config import DiTConfig
from odelt_fast.files import cache_folder, read_object, write_whole

FORMAT = "odelt-fast profile 1"
PRECISIONS = ("float32", "bfloat16", "float16", "fp8")
Schedule = tuple[tuple[float, int], ...]  # (t, l): l from the time t on
_LIMIT = 16 << 20  # bytes of a file: 40 000 measurements
_SECONDS, _BYTES = 1e7, 2**50  # more than anyone waits for, or has


@dataclass(frozen=True)
class Operation:
    """One way to run a model: depth l and a solver with T equal steps, or one that chooses its
    steps by a tolerance (rtol and atol).

    schedule: pairs (t, l) that change the depth on the way (`Sampler(depth_schedule=)`); depth is
    then the largest of them. ValueError unless there is either a number of steps or a tolerance.
    """

    depth: int
    solver: str = "euler"
    steps: int | None = None
    tolerance: float | None = None
    schedule: Schedule = ()

    def __post_init__(self) -> None:
        whole("depth", self.depth, 1, 4096)
        text("solver", self.solver, 100)
        if (self.steps is None) == (self.tolerance is None):
            raise ValueError(
                f"an operation has either steps or a tolerance, not {self.steps!r} and"
                f" {self.tolerance!r}"
            )
        if self.steps is not None:
            whole("steps", self.steps, 1, 10**6)
        if self.schedule and max(depth for _, depth in self.schedule) != self.depth:
            raise ValueError(
                f"depth {self.depth} is not the largest of the schedule"
                f" {show_schedule(self.schedule)}"
            )
        if self.tolerance is not None:
            number("tolerance", self.tolerance, 1e-15, 1e3)

    def sampler_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Sampler` that run it."""
        depth: dict[str, Any] = (
            {"depth_schedule": list(self.schedule)} if self.schedule else {"depth": self.depth}
        )
        if self.steps is not None:
            return {**depth, "solver": self.solver, "steps": self.steps}
        return {
            **depth,
            "solver": self.solver,
            "steps": 1,
            "rtol": self.tolerance,
            "atol": self.tolerance,
        }

    def __str__(self) -> str:
        where = f"depth {show_schedule(self.schedule) if self.schedule else self.depth}"
        if self.steps is None:
            return f"{where}, {self.solver} at tolerance {self.tolerance:g}"
        return f"{where}, {self.steps} step{'' if self.steps == 1 else 's'} of {self.solver}"


def parse_schedule(text: str) -> Schedule:
    """Pairs (t, l) of "0:4,0.5:12"; ValueError for anything else."""
    try:
        pairs = [
            (float(time), int(depth))
            for time, depth in (pair.split(":") for pair in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"must be times and depths such as 0:4,0.5:12, not {text!r}") from None
    return checked_schedule(pairs)


def show_schedule(schedule: Schedule) -> str:
    """What `parse_schedule` reads, exactly."""
    return ",".join(f"{time!r}:{depth}".replace(".0:", ":") for time, depth in schedule)


def checked_schedule(pairs: Any) -> Schedule:
    """Pairs (t, l) of a file as a schedule: t from 0, rising, below 1. ValueError for anything
    else; () of none."""
    if (
        not isinstance(pairs, (list, tuple))
        or len(pairs) > 1000
        or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    ):
        raise ValueError(f"a schedule must be pairs of a time and a depth, not {shown(pairs)}")
    schedule = tuple(
        (number("time", time, 0, 1), whole("depth", depth, 1, 4096)) for time, depth in pairs
    )
    times = [time for time, _ in schedule]
    if schedule and (times[0] != 0 or any(a >= b for a, b in itertools.pairwise(times))):
        raise ValueError(f"must have times rising from 0, not {shown(times)}")
    return schedule


def effective_guidance(scale: float | None) -> float | None:
    """The scale as measurements name it: None and 1 both use the labels only."""
    return None if scale is None or scale == 1 else float(scale)


@dataclass(frozen=True)
class Measurement:
    """What one operation cost: latency, seconds of a warm call for a batch (median over rounds,
    with the 10 % and 90 % quantiles low and high), without a decoder; evaluations of the network
    for an image (guidance counts twice); peak_memory, bytes of weights, inputs and activations
    (None: not known). precision: one of PRECISIONS. weights: SHA-256 of the model, of adaptive
    solvers."""

    operation: Operation
    batch: int
    precision: str
    guidance_scale: float | None
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
        return self.operation, self.batch, self.precision, self.guidance_scale, self.weights

    def holds_for(self, guidance_scale: float | None, weights: str | None) -> bool:
        """Whether it tells the cost at this scale and of these weights. Equal steps cost the same
        at any scale that needs two evaluations, or one; adaptive solvers were measured at one
        scale, with some weights (None: those of any)."""
        scale = effective_guidance(guidance_scale)
        if self.operation.steps is not None:
            return (scale in (None, 0)) == (self.guidance_scale in (None, 0))
        return scale == self.guidance_scale and weights in (None, self.weights)


@dataclass(frozen=True)
class Machine:
    """What latencies belong to: device by name, threads (0 on a GPU), versions of what computes,
    backend that `auto` takes."""

    device: str
    threads: int
    versions: str
    backend: str


@dataclass(frozen=True)
class Profile:
    """The measurements of one machine and one shape of model. model: the name that it was measured
    under, for people."""

    machine: Machine
    config: DiTConfig
    model: str
    measurements: tuple[Measurement, ...] = ()

    def adding(self, measurements: Iterable[Measurement]) -> Profile:
        """With these, in place of older ones of the same."""
        kept = {found.key: found for found in self.measurements} | {
            found.key: found for found in measurements
        }
        return replace(self, measurements=tuple(kept.values()))

    def batches(self, precision: str, guidance_scale: float | None = None) -> list[int]:
        """Batch sizes that were measured."""
        return sorted(
            {
                m.batch
                for m in self.measurements
                if m.precision == precision and m.holds_for(guidance_scale, m.weights)
            }
        )

    def check(self, machine: Machine, config: DiTConfig, path: Path) -> None:
        """ValueError naming the first thing that it was measured with and that is another here."""
        for name, mine in {**asdict(machine), "model": config}.items():
            theirs = self.config if name == "model" else getattr(self.machine, name)
            if mine != theirs:
                what = (
                    "of another model"
                    if name == "model"
                    else f"with {name} {theirs!r}, here it is {mine!r}"
                )
                raise ValueError(
                    f"{path} was measured {what}: measure again with"
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
    """The file of a machine and model in the cache folder; its name changes with everything that
    the profile is keyed by."""
    key = json.dumps([asdict(machine), config.to_dict()], sort_keys=True)
    name = re.sub(r"\W+", "-", machine.device, flags=re.ASCII).strip("-").lower()[:60]
    return (
        cache_folder() / "profiles" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    )


def write_profile(profile: Profile, path: Path) -> None:
    """Writes it whole or not at all; makes the folder."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "machine": asdict(profile.machine),
        "model": profile.model,
        "config": profile.config.to_dict(),
    }
    values["measurements"] = [_flat(measurement) for measurement in profile.measurements]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    write_whole(path, lambda file: file.write(json.dumps(values, indent=1).encode() + b"\n"))


def read_profile(path: Path) -> Profile:
    """The profile in a file; ValueError of one line for anything else."""
    try:
        values = read_object(path, _LIMIT)
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {shown(values.get('format'))}, not {FORMAT!r}")
        machine, config, found = (
            values.get(name) for name in ("machine", "config", "measurements")
        )
        if (
            not isinstance(machine, dict)
            or not isinstance(config, dict)
            or not isinstance(found, list)
        ):
            raise ValueError("machine and config must be objects, measurements a list")
        threads = whole("threads", machine.get("threads"), 0, 4096)
        named = {name: text(name, machine.get(name)) for name in ("device", "versions", "backend")}
        read = Profile(
            Machine(threads=threads, **named),
            DiTConfig.from_dict(config),
            text("model", values.get("model"), 4096),
            tuple(map(_measurement, found)),
        )
        if len({measurement.key for measurement in read.measurements}) != len(read.measurements):
            raise ValueError("a measurement occurs twice")
        return read
    except FileNotFoundError:
        raise ValueError(f"there is no profile {path}") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is no profile of odelt-fast: {' '.join(str(error).split())[:200]}"
        ) from None


def _flat(measurement: Measurement) -> dict[str, Any]:
    values = asdict(measurement)
    return {**values.pop("operation"), **values}


def _measurement(values: Any) -> Measurement:
    """A measurement of a file, every value checked."""
    names = {
        "depth",
        "solver",
        "steps",
        "tolerance",
        "batch",
        "precision",
        "guidance_scale",
        "latency",
        "low",
        "high",
        "rounds",
        "schedule",
    }
    names |= {"evaluations", "peak_memory", "weights"}
    if not isinstance(values, Mapping) or values.keys() != names:
        raise ValueError(f"a measurement must have {', '.join(sorted(names))}, not {shown(values)}")
    scale, memory, weights = values["guidance_scale"], values["peak_memory"], values["weights"]
    if values["precision"] not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(PRECISIONS)}, not {shown(values['precision'])}"
        )
    if weights is not None and not (
        isinstance(weights, str) and re.fullmatch("[0-9a-f]{64}", weights)
    ):
        raise ValueError(f"weights must be a SHA-256, not {shown(weights)}")
    schedule = checked_schedule(values["schedule"])
    operation = Operation(
        values["depth"], values["solver"], values["steps"], values["tolerance"], schedule
    )
    if (operation.steps is None) != (weights is not None):
        raise ValueError("weights go with a tolerance, and only with one")
    low, latency, high = (
        number(name, values[name], 1e-9, _SECONDS) for name in ("low", "latency", "high")
    )
    if not low <= latency <= high:
        raise ValueError(f"latency {latency:g} is not between low {low:g} and high {high:g}")
    return Measurement(
        operation,
        whole("batch", values["batch"], 1, 10**7),
        values["precision"],
        None if scale is None else number("guidance_scale", scale, -1e6, 1e6),
        latency,
        low,
        high,
        whole("rounds", values["rounds"], 1, 10**6),
        number("evaluations", values["evaluations"], 0.5, 1e9),
        None if memory is None else whole("peak_memory", memory, 0, _BYTES),
        weights,
    )
