"""Averages of the weights while they are trained: the EMA, and power-function averages whose width
can be chosen afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.config import DiTConfig, TrainedOn
from odelt_fast.model import DiT

from .power_functions import exponent
from .sharding import gather, local, scatter

SNAPSHOTS = "ema-snapshots"


@torch.no_grad()
def update_average(average: list[Tensor], live: list[Tensor], weight: Tensor) -> None:
    """average <- average + weight (live - average), for each tensor. weight: a number on the
    device, 0 leaves the average as it is."""
    difference = torch._foreach_sub(live, average)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(average, difference)


def whole_model(config: DiTConfig, weights: Mapping[str, Tensor], trained_on: TrainedOn) -> DiT:
    """A network of its own with these weights, on the CPU."""
    model = DiT(config).requires_grad_(False).eval()
    model.trained_on = trained_on
    model.load_state_dict(dict(weights))
    return model


def snapshot_metadata(width: float, step: int, updates: int) -> dict[str, str]:
    """What the weights of a snapshot say of themselves; updates: steps that changed them."""
    values = {"width": f"{width:g}", "step": str(step), "updates": str(updates)}
    return {"weights": "power-ema"} | values


class PowerAverages:
    """Power-function averages of the weights (Karras et al. 2023, section 3): at update t every
    width has theta_s with weight (s^(g+1) - (s-1)^(g+1)) / t^(g+1), s = 1..t, which beta = (1 -
    1/t)^(g+1) gives step by step.

    Args:
        widths: sigma_rel, the standard deviation of these weights over time as a share of t.
        weights: name -> tensor, those of the run's start, sharded or not.
        config, trained_on: of the model that holds them.
    """

    def __init__(
        self,
        widths: Sequence[float],
        weights: Mapping[str, Tensor],
        config: DiTConfig,
        trained_on: TrainedOn = TrainedOn(),  # noqa: B008 (frozen)
    ) -> None:
        self.config, self.trained_on = config, trained_on
        self.averages = {
            width: {name: tensor.detach().clone() for name, tensor in weights.items()}
            for width in widths
        }

    def update(self, weights: list[Tensor], updates: Tensor, moved: Tensor) -> None:
        """Takes in this process's part of the weights after update number `updates`, from 1; moved
        0: this step made none."""
        for width, average in self.averages.items():
            # 1 - beta, exact to rounding where beta is near 1
            share = -torch.expm1((exponent(width) + 1) * torch.log1p(-1 / updates.clamp(min=1)))
            update_average(local(average.values()), weights, share * moved)

    def save(self, folder: Path, main: bool) -> None:
        """Writes each average, exactly, to `folder`/power-WIDTH. Every process must call it; the
        main one writes."""
        for width, model in self._models(main):
            save_model(model, folder / f"power-{width:g}")

    def check(self, folder: Path, stored: object) -> None:
        """ValueError if a width was not tracked in the run of a checkpoint; stored: those that
        were, a list, where the checkpoint says it."""
        for width in self.averages:
            file = folder / f"power-{width:g}" / "model.safetensors"
            if width not in stored if isinstance(stored, list) else not file.is_file():
                raise ValueError(
                    f"{folder} holds no average of width {width:g}: resume with the --ema-widths"
                    " that the run began with"
                )

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        for width, average in self.averages.items():
            scatter(load_file(folder / f"power-{width:g}" / "model.safetensors"), average)

    def snapshots_after(self, run: Path, step: int) -> list[Path]:
        """Those of a branch that the run leaves, of every width."""
        folders = (run / SNAPSHOTS).glob("*/step-*")
        return [path for path in folders if int(path.name.removeprefix("step-")) > step]

    def write_snapshots(self, run: Path, step: int, updates: int, main: bool) -> None:
        """Adds a snapshot of each width, a model folder, for `post_hoc`. Every process must call
        it; the main one writes.

        In float32: rounding to float16 (1e-4) would be the largest error of an average made of 20
        snapshots (3e-6).
        """
        for width, model in self._models(main):
            metadata = snapshot_metadata(width, step, updates)
            save_model(model, run / SNAPSHOTS / f"{width:g}" / f"step-{step}", metadata=metadata)

    def _models(self, main: bool) -> Iterator[tuple[float, DiT]]:
        for width, average in self.averages.items():
            whole = gather(average, main)
            if main:
                yield width, whole_model(self.config, whole, self.trained_on)
