"""What a choice stands on: the profile of a model on this machine, and the table of its quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.machine import model_hash, this_machine
from odelt_fast.operation import Operation

from .planner import Candidate, Choice, best, candidates
from .profile import Profile, default_path, profile_command, read_profile
from .quality import FILE_NAME, Quality, read_quality

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Evidence:
    """A profile and a table of quality (None: not measured) of the model `name`.

    weights: the hash of its files.
    """

    name: str
    profile: Profile
    quality: Quality | None
    weights: str

    def candidates(self, **asked: Any) -> list[Candidate]:
        """`planner.candidates` of these: batch, precision, guidance_scale, metric."""
        return candidates(self.profile, self.quality, weights=self.weights, **asked)

    def choose(
        self, max_latency: float | None = None, max_memory: float | None = None, **asked: Any
    ) -> Choice:
        """`planner.best` of `candidates(**asked)`: limits in seconds a batch and in bytes."""
        return best(self.candidates(**asked), max_latency, max_memory)


def find_evidence(
    name: str,
    device: str | torch.device = "cpu",
    profile: str | Path | None = None,
    quality: str | Path | None = None,
) -> Evidence:
    """The evidence for a model on a device of this machine.

    Args:
        name: of the model: folder, bundled name, Hub id.
        device: what it runs on.
        profile: file of a profile (None: that of the cache folder).
        quality: folder or results.json of an evaluation (None: quality.json in the model's folder,
            if there is one).

    Raises:
        ValueError: with what to run, where there is no profile; for files of other machines or
            models.
    """
    from odelt_fast.checkpoints.folder import read_config

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
    _check_depths({m.operation for m in found.measurements}, config, path)
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
    """The best way to sample within a deadline, for a caller with one for each request.

    Only operations of one depth and equal steps are considered, in whose batches no image waits for
    a slower one. The files are read once, here; a call is a look into a table, and safe in threads.

    Args:
        name, device, profile, quality: as for `find_evidence`.
        precision, metric: as for `planner.candidates`.

    Returns:
        A function (images, guidance scale or None, seconds) -> Operation that draws so many images
        at once in at most so many seconds. It raises ValueError where nothing can be chosen (never
        evaluated at that guidance scale, more images than were profiled), and BudgetError, which is
        one and whose `nearest` is the fastest candidate, where the time does not suffice.

    Raises:
        ValueError: as `find_evidence` does.
    """
    evidence = find_evidence(name, device, profile, quality)

    @lru_cache(256)
    def uniform(images: int, guidance_scale: float | None) -> list[Candidate]:
        found = evidence.candidates(
            batch=images, precision=precision, guidance_scale=guidance_scale, metric=metric
        )
        return [
            candidate
            for candidate in found
            if not candidate.operation.adaptive and candidate.operation.depth is not None
        ]

    return lambda images, guidance_scale, seconds: (
        best(uniform(images, guidance_scale), seconds).operation
    )


def find_quality(
    name: str, config: DiTConfig, weights: str, path: str | Path | None = None
) -> Quality | None:
    """The table of quality that is given, or of the model's folder, or None.

    ValueError for one of another model.
    """
    from odelt_fast.checkpoints.lookup import find_folder

    if path is None and not (find_folder(name) / FILE_NAME).is_file():
        return None
    found = read_quality(find_folder(name) / FILE_NAME if path is None else path)
    found.check(config, weights)
    _check_depths(found.rows, config, found.path)
    return found


def _check_depths(operations: Iterable[Operation], config: DiTConfig, path: Path) -> None:
    """ValueError unless the model has them all: files may name any."""
    try:
        for operation in operations:
            schedule: Any = operation.depth_schedule or ((0.0, operation.depth),)
            for _, depth in schedule:
                config.check_depth(depth)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
