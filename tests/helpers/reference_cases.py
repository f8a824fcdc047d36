"""Recorded input and output of the reference implementation, from ODELT_REFERENCE_DIR (default: the
cases kept beside this file)."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast.checkpoints.reference import rename_parameters
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT

FOLDER = Path(
    os.environ.get("ODELT_REFERENCE_DIR") or Path(__file__).parents[1] / "data" / "reference"
)


class Case:
    """One recorded file: arrays by name, images turned from NHWC to NCHW."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.arrays = dict(np.load(path, allow_pickle=False))

    def dictionary(self, name: str) -> dict[str, Any]:
        return ast.literal_eval(str(self.arrays[name]))

    @property
    def config(self) -> DiTConfig:
        values = self.dictionary("config")
        length, step = values.pop("depth_wise", 1) > 0, not values.pop("ignore_dt", False)
        return DiTConfig(**values, length_conditioned=length, step_conditioned=step)

    def tensor(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[name])
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor

    def parameters(self, prefix: str = "params") -> dict[str, np.ndarray]:
        return {
            name.removeprefix(f"{prefix}/"): array
            for name, array in self.arrays.items()
            if name.startswith(f"{prefix}/")
        }

    def model(self, prefix: str = "params", config: DiTConfig | None = None) -> DiT:
        model = DiT(config or self.config)
        model.load_state_dict(rename_parameters(self.parameters(prefix), model.config))
        return model.eval()


@cache
def load_case(path: Path) -> Case:
    return Case(path)


def model_cases() -> list[Path]:
    return sorted(FOLDER.glob("model_*.npz"))


def quantities(pattern: str) -> list:
    """Parameters (path, name) of the recorded arrays of models whose whole name fits."""
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in model_cases()
        for name in load_case(path).arrays
        if re.fullmatch(pattern, name)
    ]


def depth_of(name: str) -> int | None:
    """The depth that an array's name holds; 0 there is all blocks."""
    return int(re.search(r"depth(\d+)", name)[1]) or None  # type: ignore[index]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, log2_steps, y of a model's case."""
    return case.tensor("x"), case.tensor("t"), case.tensor("dt_base"), case.tensor("y")


def training_cases() -> list[Path]:
    return sorted(FOLDER.glob("training*.npz"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, in float64."""
    actual, expected = actual.double(), expected.double()
    return (
        torch.linalg.vector_norm(actual - expected)
        / torch.linalg.vector_norm(expected).clamp_min(1e-30)
    ).item()
