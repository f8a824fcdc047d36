"""What is wrong with a model folder or a checkpoint, in one line."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from odelt_fast.files import one_line, problem_of


class CheckpointError(ValueError):
    """A model folder or checkpoint that cannot be read or written; one line says what is wrong."""


def check_finite(name: str, tensor: Tensor) -> None:
    """CheckpointError naming `name` if a value of the tensor is infinite or NaN."""
    if tensor.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist())):
        raise CheckpointError(
            f"{name} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}"
        )


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the file at `path` becomes a CheckpointError that names it."""
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
        RuntimeError,
        SafetensorError,
    ) as error:
        name, problem = one_line(repr(str(path))), problem_of(path, error)
        raise CheckpointError(f"{name}: {problem}") from None
