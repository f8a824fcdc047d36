"""What a measurement belongs to: the machine that it was made on, and the files of the model."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """What latencies belong to.

    device: its name. threads: 0 on a GPU. versions: of what computes. backend: what `auto` takes.
    """

    device: str
    threads: int
    versions: str
    backend: str


def this_machine(device: str | torch.device) -> Machine:
    """What latencies on this device of this machine belong to."""
    import torch

    from odelt_fast import __version__
    from odelt_fast.engine.availability import device_unavailable
    from odelt_fast.engine.native.build import load

    device = torch.device(device)
    versions = f"odelt-fast {__version__}, torch {torch.__version__}"
    if device.type == "cuda":
        versions += f", CUDA {torch.version.cuda}, triton {package_version('triton')}"
        backend = "eager" if device_unavailable(device) else "fused"
        return Machine(torch.cuda.get_device_name(device), 0, versions, backend)
    backend = "native" if load("cpu", False) is None else "eager"
    name = processor_name() or platform.machine() or "CPU"
    return Machine(name, torch.get_num_threads(), versions, backend)


def environment(device: torch.device, dtype: torch.dtype, processes: int) -> dict[str, Any]:
    """Device, dtype, processes and versions, for a table's heading."""
    import torch

    from odelt_fast import __version__

    name = f"CPU ({torch.get_num_threads()} threads)"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": "one process" if processes == 1 else f"{processes} processes",
        "odelt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def package_version(package: str) -> str:
    """The version of an installed package, else "none"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def processor_name() -> str:
    """The processor's name, where Linux knows it, else an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_fingerprint(path: Path) -> str:
    """Changes when a file, or a file below a folder, gets another name, size or time."""
    paths = [path] if path.is_file() else path.rglob("*")
    digest = hashlib.sha256()
    for file in sorted(file for file in paths if file.is_file()):
        facts = file.stat()
        name = os.fsencode(file.relative_to(path))
        digest.update(b"%s\0%d %d\0" % (name, facts.st_size, facts.st_mtime_ns))
    return digest.hexdigest()


def model_hash(name: str) -> str:
    """SHA-256 of the files that make a model (a folder, bundled name or Hub id)."""
    from odelt_fast.checkpoints.lookup import find_folder

    folder = find_folder(name)
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()
