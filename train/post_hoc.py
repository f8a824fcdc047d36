"""An average of any width, after the run: the mixture of its stored snapshots that is nearest to
the wanted power-function profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.files import one_line
from odelt_fast.model import DiT
from odelt_fast.train.ema import SNAPSHOTS
from odelt_fast.train.power_profile import Profile, exponent, mixture


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its folder, and what its metadata say. updates: steps so far that changed
    the weights."""

    folder: Path
    width: float
    step: int
    updates: int

    @property
    def profile(self) -> Profile:
        return self.width, self.updates


def find_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, by step and width. ValueError where there are none, or one is
    unreadable."""
    found = []
    for folder in (run / SNAPSHOTS).glob("*/step-*"):
        try:
            with safe_open(folder / "model.safetensors", "pt") as file:
                says = file.metadata() or {}
            found.append(
                Snapshot(folder, float(says["width"]), int(says["step"]), int(says["updates"]))
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} is no snapshot of a run: {one_line(error)}") from None
    if not found:
        raise ValueError(
            f"{run} has no snapshots in {SNAPSHOTS}: train with --ema-widths 0.05 0.10"
        )
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.width))


def reconstruct(run: Path, width: float, step: int | None = None) -> tuple[DiT, Snapshot, float]:
    """The average of `width` at a stored `step` (None: the last), on the CPU in float32; what it
    is; the relative error of its profile.

    Snapshots up to that step are used. ValueError for a width that no average has and a step that
    was not stored.
    """
    exponent(width)
    snapshots = find_snapshots(run)
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = sorted(sorted(steps, key=lambda other: abs(other - step))[:3])
        raise ValueError(
            f"step {step} has no snapshot: stored are {len(steps)} steps from {steps[0]} to"
            f" {steps[-1]}, {near} near it"
        )
    used = [snapshot for snapshot in snapshots if snapshot.step <= step and snapshot.updates > 0]
    if not used:
        raise ValueError(f"no step up to {step} changed the weights: choose a later --step")
    updates = max(snapshot.updates for snapshot in used if snapshot.step == step)
    coefficients, error = mixture([snapshot.profile for snapshot in used], (width, updates))
    model: DiT | None = None
    sums: dict[str, torch.Tensor] = {}
    for snapshot, coefficient in zip(used, coefficients.tolist()):
        model = load_model(snapshot.folder)
        for name, tensor in model.state_dict().items():
            term = coefficient * tensor.double()
            sums[name] = (
                sums[name] + term if name in sums else term
            )  # coefficients of both signs: float32 would round their sum
    assert model is not None
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in sums.items()})
    return model, Snapshot(run, width, step, updates), error
