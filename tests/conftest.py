"""What all test files share: processes that run them, an empty cache, and the native operators,
built from their sources once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

_GIVEN = os.environ.get("ODELT_FAST_CACHE")
os.environ["ODELT_FAST_STRICT"] = "1"  # `auto` hides no fault of our own from a test
os.environ.setdefault("ODELT_FAST_SELFCHECK", "off")  # test_selfcheck.py has it on
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one core for each process
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist has it ignored


@pytest.hookimpl(optionalhook=True)  # a machine that is lent has no pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole folders are divided between processes, file by file; single files run in this one."""
    if not all(Path(argument).is_dir() for argument in config.args):
        return 0
    cores = min(os.cpu_count() or 1, 4)
    return cores if cores > 1 else 0


@pytest.fixture(scope="session", autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user of this machine has built or measured changes no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODELT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _exact_convolutions() -> None:
    """Float32 results that others are held to are float32's on a GPU too: cuDNN's default is
    TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the session's own, one for all its processes, or that which the environment
    names."""
    if not _GIVEN and "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "native"
    return Path(_GIVEN or tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def native_cache(native_folder: Path) -> Iterator[Path]:
    """The cache folder with the CPU library in it, used for the tests of one module: elsewhere
    samplers run as nobody built it."""
    from odelt_fast.engine.native.build import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODELT_FAST_CACHE", str(native_folder))
        reason = load("cpu")
        if reason is not None:
            pytest.fail(f"the CPU operators cannot be built: {reason}")
        yield native_folder
