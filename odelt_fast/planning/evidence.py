"""What a choice stands on: the profile of a model on this machine, and the table of its quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odelt_fast.config import DiTConfig
from odelt_fast.planning.planner import Choice, Point, best, candidates
from odelt_fast.planning.profile import (
    Machine,
    Operation,
    Profile,
    default_path,
    profile_command,
    read_profile,
)
from odelt_fast.planning.quality import FILE_NAME, Quality, read_quality

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Evidence:
    """A profile and a table of quality (None: not measured) that belong to the model `name` with
    the files' hash `weights`."""

    name: str
    profile: Profile
    quality: Quality | None
    weights: str

    def points(self, **asked: Any) -> list[Point]:
        """`planner.candidates` of these: batch, precision, guidance_scale, metric."""
        return candidates(self.profile, self.quality, weights=self.weights, **asked)

    def choose(
        self, max_latency: float | None = None, max_memory: float | None = None, **asked: Any
    ) -> Choice:
        """`planner.best` of `points(**asked)`: limits in seconds a batch and in bytes."""
        return best(self.points(**asked), max_latency, max_memory)


def find_evidence(
    name: str,
    device: str | torch.device = "cpu",
    profile: str | Path | None = None,
    quality: str | Path | None = None,
) -> Evidence:
    """The evidence for the model `name` (folder, bundled name, Hub id) on `device` of this machine.

    profile: its file (None: that of the cache folder). quality: folder or results.json of an
    evaluation (None: quality.json in the model's folder, if there is one). ValueError, with what to
    run, where there is no profile, and for files of other machines or models.
    """
    from odelt_fast.checkpoints.folder import read_config
    from odelt_fast.evaluation.measuring import model_hash

    config, machine, weights = read_config(name), this_machine(device), model_hash(name)
    path = default_path(machine, config) if profile is None else Path(profile)
    if not path.exists():
        given = None if profile is None else path
        raise ValueError(
            f"{name} has no profile on {machine.device}{f' in {path}' if given else ''}: run"
            f" {profile_command(name, given)}"
        )
    found = read_profile(path)
    found.check(machine, config, path)
    _check_operations({m.operation for m in found.measurements}, config, path)
    return Evidence(name, found, find_quality(name, config, weights, quality), weights)


def deadline_planner(
    name: str,
    device: str | torch.device = "cpu",
    *,
    precision: str = "float32",
    metric: str | None = None,
    profile: str | Path | None = None,
    quality: str | Path | None = None,
) -> Callable[[int, float | None, float], Operation]:
    """A function (images, guidance scale or None, seconds) -> Operation: the best depth, solver and
    steps that draw so many images at once in at most so many seconds, for a caller with a deadline
    for each request.

    Only operations of one depth and equal steps are considered, in whose batches no image waits for
    a slower one. The files are read once, here; a call is a look into a table. Arguments and
    errors: `find_evidence`, `planner.candidates`. The function raises ValueError where nothing can
    be chosen (never evaluated at that guidance scale, more images than were profiled), and
    BudgetError, which is one and whose `nearest` is the fastest candidate, where the time does not
    suffice. It is safe in threads.
    """
    evidence = find_evidence(name, device, profile, quality)

    @lru_cache(256)
    def points(images: int, guidance_scale: float | None) -> list[Point]:
        found = evidence.points(
            batch=images, precision=precision, guidance_scale=guidance_scale, metric=metric
        )
        return [
            point
            for point in found
            if point.operation.steps is not None and not point.operation.schedule
        ]

    return lambda images, guidance_scale, seconds: (
        best(points(images, guidance_scale), seconds).operation
    )


def find_quality(
    name: str, config: DiTConfig, weights: str, path: str | Path | None = None
) -> Quality | None:
    """The table of quality that is given, or of the model's folder, or None. ValueError for one of
    another model."""
    from odelt_fast.checkpoints.lookup import find_folder

    if path is None and not (find_folder(name) / FILE_NAME).is_file():
        return None
    found = read_quality(find_folder(name) / FILE_NAME if path is None else path)
    found.check(config, weights)
    _check_operations({operation for operation, _ in found.rows}, config, found.path)
    return found


def _check_operations(operations: Iterable[Operation], config: DiTConfig, path: Path) -> None:
    """ValueError unless the model can run them all: files may name any."""
    from odelt_fast.solvers.options import check_solver, is_adaptive

    try:
        for operation in operations:
            for depth in {depth for _, depth in operation.schedule} | {operation.depth}:
                config.check_depth(depth)
            adaptive = is_adaptive(check_solver(operation.solver))
            if adaptive != (operation.steps is None):
                raise ValueError(
                    f"{operation.solver} takes {'a tolerance' if adaptive else 'a number of steps'}"
                )
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def this_machine(device: str | torch.device) -> Machine:
    """What latencies on this device of this machine belong to."""
    import platform

    import torch

    from odelt_fast import __version__
    from odelt_fast.engine.availability import device_unavailable
    from odelt_fast.engine.native.build import load

    device = torch.device(device)
    versions = f"odelt-fast {__version__}, torch {torch.__version__}"
    if device.type == "cuda":
        versions += f", CUDA {torch.version.cuda}, triton {_version('triton')}"
        backend = "eager" if device_unavailable(device) else "fused"
        return Machine(torch.cuda.get_device_name(device), 0, versions, backend)
    native = load("cpu", False) is None
    return Machine(
        _cpu_name() or platform.machine() or "CPU",
        torch.get_num_threads(),
        versions,
        "native" if native else "eager",
    )


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
