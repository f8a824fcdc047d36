"""odelt-fast: train, sample and measure ODE_t(ODE_l) diffusion and flow transformers."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "DiT": "model",
    "DiTConfig": "config",
    "PRESETS": "config",
    "Sampler": "sampling.sampler",
    "load_model": "checkpoints.folder",
    "save_model": "checkpoints.folder",
    "CheckpointError": "checkpoints.errors",
    "convert_checkpoint": "checkpoints.conversion",
    "convert_reference_checkpoint": "checkpoints.reference",
    "OdeltPipeline": "pipeline",
    "deadline_planner": "planning.evidence",
    "load_decoder": "sampling.decoder",
}
__all__ = [
    "PRESETS",
    "CheckpointError",
    "DiT",
    "DiTConfig",
    "Sampler",
    "convert_checkpoint",
    "convert_reference_checkpoint",
    "deadline_planner",
    "load_decoder",
    "load_model",
    "save_model",
]

if TYPE_CHECKING:
    from odelt_fast.checkpoints.conversion import convert_checkpoint
    from odelt_fast.checkpoints.errors import CheckpointError
    from odelt_fast.checkpoints.folder import load_model, save_model
    from odelt_fast.checkpoints.reference import convert_reference_checkpoint
    from odelt_fast.config import PRESETS, DiTConfig
    from odelt_fast.model import DiT
    from odelt_fast.pipeline import OdeltPipeline as OdeltPipeline  # not in __all__: needs an extra
    from odelt_fast.planning.evidence import deadline_planner
    from odelt_fast.sampling.decoder import load_decoder
    from odelt_fast.sampling.sampler import Sampler


def __getattr__(name: str) -> object:
    # Torch costs seconds: it is loaded when something that needs it is asked for.
    if name not in _HOME:
        raise AttributeError(f"module 'odelt_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"odelt_fast.{_HOME[name]}"), name)
