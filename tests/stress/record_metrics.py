"""Records what torchmetrics and torch-fidelity make of some features: `python -m
tests.stress.record_metrics` writes data/metrics_libraries.json.

Kept as a recording because both import torchvision, whose CUDA build does not load beside a CPU
build of torch. Where torchvision cannot be imported, empty modules stand in for it: what is
recorded does not use it. Needs torchmetrics, torch-fidelity and lightning-utilities.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.metric_cases import features, inception_input, inception_weights, logits

PATH = Path(__file__).parents[1] / "data" / "metrics_libraries.json"


class Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class EmptyTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] == "torchvision"
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.meta_path.insert(0, EmptyTorchvision())
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, real = (torch.from_numpy(features(name)) for name in ("generated", "real"))
    recorded: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torchmetrics", "torch-fidelity", "torch")}
    }
    # Subsets as large as the sets: their choice, which is random in either library, changes
    # nothing.
    whole = {"kid_subsets": 1, "kid_subset_size": len(real), "rng_seed": 0, "verbose": False}
    recorded["kid_torch_fidelity"] = kid_features_to_metric(generated, real, **whole)[
        "kernel_inception_distance_mean"
    ]
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=len(real))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    recorded["kid_torchmetrics"] = metric.compute()[0].item()
    both = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    recorded["precision"], recorded["recall"] = both["precision"], both["recall"]
    score = isc_features_to_metric(torch.from_numpy(logits()), splits=10, shuffle=False)
    recorded["inception_score"] = [score["inception_score_mean"], score["inception_score_std"]]

    weights = PATH.with_suffix(".pth")
    state = {name: torch.from_numpy(array) for name, array in inception_weights().items()}
    torch.save(state, weights)
    try:
        strict, torch.nn.Module.load_state_dict = (
            torch.nn.Module.load_state_dict,
            lambda self, state: strict(self, state, strict=False),
        )
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], str(weights)
        )
    finally:
        torch.nn.Module.load_state_dict = strict
        weights.unlink()
    with torch.inference_mode():
        pooled, unbiased = network(torch.from_numpy(inception_input()))
    recorded["inception_features"] = pooled[0, ::64].tolist()
    recorded["inception_logits"] = unbiased[0, ::64].tolist()
    small = torch.from_numpy(
        np.random.default_rng(5).integers(0, 256, (1, 1, 5, 6)).astype(np.float32)
    )
    recorded["tensorflow_resize"] = interpolate_bilinear_2d_like_tensorflow1x(
        small, size=(13, 13), align_corners=False
    )[0, 0].tolist()
    PATH.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
