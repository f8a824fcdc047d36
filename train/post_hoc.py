"""An average of any width, after the run: the mixture of its stored snapshots whose weights are
nearest to the wanted power function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.files import one_line
from odelt_fast.model import DiT

from .ema import SNAPSHOTS, snapshot_metadata
from .power_functions import PowerFunction, exponent, mixture


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its folder, and what its metadata hold.

    updates: steps so far that changed the weights.
    """

    folder: Path
    width: float
    step: int
    updates: int

    def metadata(self) -> dict[str, str]:
        """What the weights of such an average say of themselves."""
        return snapshot_metadata(self.width, self.step, self.updates)


def find_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, by step and width.

    Raises:
        ValueError: there are none, or one is unreadable.
    """
    snapshots = []
    for folder in (run / SNAPSHOTS).glob("*/step-*"):
        try:
            with safe_open(folder / "model.safetensors", "pt") as file:
                metadata = file.metadata() or {}
            width, step, updates = (metadata[name] for name in ("width", "step", "updates"))
            snapshots.append(Snapshot(folder, float(width), int(step), int(updates)))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} is no snapshot of a run: {one_line(error)}") from None
    if not snapshots:
        raise ValueError(
            f"{run} has no snapshots in {SNAPSHOTS}: train with --ema-widths 0.05 0.10"
        )
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.width))


def reconstruct(run: Path, width: float, step: int | None = None) -> tuple[DiT, Snapshot, float]:
    """The average of `width` at a stored step, from the snapshots up to it.

    Args:
        step: one of the stored ones; None: the last.

    Returns:
        The model, on the CPU in float32; what it is; the relative error of its weights over time.

    Raises:
        ValueError: no average has this width, or the step was not stored.
    """
    exponent(width)
    snapshots = find_snapshots(run)
    steps = sorted({snapshot.step for snapshot in snapshots})
    last = steps[-1] if step is None else step
    if last not in steps:
        near = sorted(sorted(steps, key=lambda other: abs(other - last))[:3])
        raise ValueError(
            f"step {last} has no snapshot: stored are {len(steps)} steps from {steps[0]} to"
            f" {steps[-1]}, {near} near it"
        )
    used = [snapshot for snapshot in snapshots if snapshot.step <= last and snapshot.updates > 0]
    if not used:
        raise ValueError(f"no step up to {last} changed the weights: choose a later --step")
    updates = max(snapshot.updates for snapshot in used if snapshot.step == last)
    stored = [PowerFunction(snapshot.width, snapshot.updates) for snapshot in used]
    coefficients, error = mixture(stored, PowerFunction(width, updates))
    sums: dict[str, torch.Tensor] = {}
    for snapshot, coefficient in zip(used, coefficients.tolist()):
        model = load_model(snapshot.folder)
        for name, tensor in model.state_dict().items():
            # coefficients of both signs: float32 would round their sum
            term = coefficient * tensor.double()
            sums[name] = sums[name] + term if name in sums else term
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in sums.items()})
    return model, Snapshot(run, width, last, updates), error
