"""The small runs that the tests of training share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from odelt_fast.config import DiTConfig
from odelt_fast.train.config import TrainConfig
from odelt_fast.train.recipes import RECIPES

SMALL = DiTConfig(
    image_size=8,
    channels=1,
    hidden_size=16,
    depth=4,
    depth_min=2,
    depth_group=2,
    num_heads=2,
    num_classes=10,
)
SMALLER = replace(SMALL, depth=2, depth_min=1, depth_group=1)
# What accelerate says of the processes, where there is one.
ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def small_run(folder: Path, **changes: Any) -> TrainConfig:
    """A run of eight steps in `folder`, with the changes."""
    values = {
        "model": SMALL,
        "output_dir": folder,
        "steps": 8,
        "train_batch_size": 16,
        "warmup_steps": 2,
        "sampling_steps": 0,
        "log_with": (),
        "dataloader_num_workers": 0,  # on a GPU, too
    }
    return replace(RECIPES["digits"], **(values | changes))
