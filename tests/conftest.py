"""What several test files share: the native operators, built from their sources once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the session's own, or that which the environment names."""
    return Path(os.environ.get("ODELT_FAST_CACHE") or tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def native_cache(native_folder: Path) -> Iterator[Path]:
    """The cache folder with the CPU library in it, used for the tests of one module: elsewhere samplers run as nobody built it."""
    from odelt_fast import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODELT_FAST_CACHE", str(native_folder))
        reason = native.load("cpu")
        if reason is not None:
            pytest.fail(f"the CPU operators cannot be built: {reason}")
        yield native_folder
