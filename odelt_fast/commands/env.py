"""`odelt-fast env`: what is here and what would be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from odelt_fast import __version__

from .options import dtype_name


@dataclass(frozen=True)
class Command:
    """Show versions, devices, the dtype that auto would choose, and which backends, attentions and
    extras can run, or why not."""

    json: bool = False
    """Print one JSON object instead of text."""


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    found = facts()
    if options.json:
        print(json.dumps(found))
        return
    print(
        "odelt-fast {odelt-fast}, python {python}, torch {torch}, numpy {numpy}".format_map(
            found["versions"]
        )
    )
    print(f"cpu: {found['cpu']['threads']} threads, --dtype auto is {found['cpu']['dtype']}")
    for index, card in enumerate(found["cuda"]):
        print(f"cuda:{index}: {card['name']}, --dtype auto is {card['dtype']}")
        print(f"  backend fused: {card['fused']}")
        for name, status in card["attention"].items():
            print(f"  attention {name}: {status}")
    if not found["cuda"]:
        print("no CUDA GPU: auto is the model itself; backend fused and its attentions need one")
    for line in (*found["packages"], *found["native"]):
        print(line)
    for extra, missing in found["extras"].items():
        hint = f"not installed ({', '.join(missing)}): pip install 'odelt-fast[{extra}]'"
        print(f"extra {extra}: {hint if missing else 'installed'}")
    print(f"bundled models: {', '.join(found['bundled_models']) or 'none'}")


def facts() -> dict[str, Any]:
    """What the text and the JSON say."""
    import platform

    import numpy as np
    import torch

    from odelt_fast.checkpoints.lookup import bundled_models
    from odelt_fast.engine.availability import (
        describe_attentions,
        describe_package,
        device_unavailable,
    )
    from odelt_fast.engine.native import cpu_ops, while_graph

    def card(index: int) -> dict[str, Any]:
        device = torch.device("cuda", index)
        reason = device_unavailable(device)
        return {
            "name": torch.cuda.get_device_name(index),
            "dtype": dtype_name("auto", "cuda"),
            "fused": "available" if reason is None else f"not available: {reason}",
            "attention": describe_attentions(device, torch.bfloat16, 64),
        }

    versions = {
        "odelt-fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {
        "versions": versions,
        "cpu": {"threads": torch.get_num_threads(), "dtype": dtype_name("auto", "cpu")},
        "cuda": [card(index) for index in range(torch.cuda.device_count())],
        "packages": [describe_package(package) for package in ("triton", "flash-attn", "xformers")],
        "native": [cpu_ops.describe(), while_graph.describe()],
        "extras": missing_packages(),
        "bundled_models": list(bundled_models()),
    }


def missing_packages() -> dict[str, list[str]]:
    """Extra of this package -> the packages of it that are not installed.

    Empty if this package itself is not installed (run from its sources).
    """
    import importlib.metadata
    import re

    def absent(package: str) -> bool:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return True
        return False

    missing: dict[str, list[str]] = {}
    if absent("odelt-fast"):
        return missing
    for line in importlib.metadata.requires("odelt-fast") or []:
        found = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"]", line)
        if found and found[1] != "odelt-fast" and found[2] not in ("dev", "test"):
            missing.setdefault(found[2], []).extend([found[1]] if absent(found[1]) else [])
    return missing
