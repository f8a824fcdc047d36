"""`odelt-fast env`: what is here and what would be used."""

from __future__ import annotations

from dataclasses import dataclass

from odelt_fast import __version__
from odelt_fast.commands.options import choose_dtype


@dataclass(frozen=True)
class Command:
    """Show versions, devices and the dtype that auto would choose."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    import platform

    import numpy as np
    import torch

    from odelt_fast.checkpoint import bundled_models

    print(f"odelt-fast {__version__}, python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    print(f"cpu: {torch.get_num_threads()} threads, --dtype auto is {choose_dtype('auto', 'cpu')}".replace("torch.", ""))
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, --dtype auto is {choose_dtype('auto', 'cuda')}".replace("torch.", ""))
    print(f"bundled models: {', '.join(bundled_models()) or 'none'}")
