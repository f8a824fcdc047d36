"""What every benchmark under pytest shares: the device, its ceilings, and the record that goes into
extra_info."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.measure import device_record


def pytest_xdist_auto_num_workers() -> int:
    """None: measurements run alone."""
    return 0


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> dict[str, float]:
    return measure_ceilings(device, 0.5)


@pytest.fixture(scope="session")
def record(ceilings: dict[str, float]) -> dict[str, Any]:
    return device_record() | {"ceilings": ceilings}
