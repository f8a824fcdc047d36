"""What the tests of the engine share: random models, and Samplers that run the fused backend with plain PyTorch operators on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from odelt_fast import backends, fused
from odelt_fast.config import DiTConfig
from odelt_fast.engine import Engine
from odelt_fast.graphs import GraphCache
from odelt_fast.model import DiT

SMALL = {"image_size": 8, "channels": 2, "hidden_size": 32, "depth": 6, "depth_min": 2, "depth_group": 2, "num_heads": 2, "num_classes": 10}


def random_model(**changes: object) -> DiT:
    """A model in which every weight matters: none is zero."""
    model = DiT(DiTConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def run_fused_on_the_cpu(monkeypatch: pytest.MonkeyPatch, graphs: Callable[[], GraphCache | None] = lambda: None) -> None:
    """From here on the Sampler's fused backend runs on CPU models, with the reference operators; without graphs unless some are given."""

    def reference(model: DiT, attention: str = "auto", precision: str | None = None) -> tuple[Engine, Any]:
        return Engine(model, attention, precision, kind="reference"), graphs()

    monkeypatch.setattr(backends, "why_not_fused", lambda model: None)
    monkeypatch.setattr(fused, "shared_engine", reference)
