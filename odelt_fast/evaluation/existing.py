"""Metrics of images that exist already, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from odelt_fast.generation.processes import Processes
from odelt_fast.images import ImageSource, open_source

from .comparison import compare
from .features import FeatureNetwork
from .folder import Folder
from .machine import environment, files_fingerprint
from .metrics import check_features
from .real import Real
from .results import FORMAT
from .settings import COMPARING, Evaluation

# The settings that have an effect on them.
APPLYING = (
    *("data", "split", "image_column", "label_column", "stats", "metrics", "features"),
    *("inception_weights", "trust_features", "protocol", "batch_size", "allow_few_samples"),
)


def measure_existing(
    samples: str | Path,
    settings: Evaluation,
    out: str | Path,
    *,
    device: str = "auto",
    show: bool = True,
) -> dict[str, Any]:
    """Compares images with the real ones of `settings`, of which only APPLYING have an effect.

    A run that was interrupted goes on in the same folder, while the files of the samples stay as
    they were. Every process of a run calls it with the same arguments.

    Args:
        samples: a folder of images, or what else `open_source` opens (.npz, .parquet).
        out: the folder of results.json and results.md.
        device, show: as of `Evaluator`.

    Returns:
        The results (nothing in processes after the first).

    Raises:
        ValueError: for samples, data, statistics or networks that do not fit, for too few images,
            and for a folder that holds another evaluation.
    """
    path = Path(samples).expanduser()
    source, processes = _open(path, settings), Processes.of_this_run(device)
    real = Real.of(settings, source.channels, source.image_size, len(source), processes.device)
    applying = {name: getattr(settings, name) for name in APPLYING}
    applying |= {"metrics": [*settings.metrics], "samples": str(samples)}  # as JSON has them
    facts = {"samples_fingerprint": files_fingerprint(path), "device": processes.device.type}
    bound = applying | facts | real.bound()
    for name in ("inception_weights", "trust_features"):  # the network has a fingerprint
        del bound[name]
    folder = Folder(Path(out), processes, settings.batch_size)
    folder.bind(bound)
    with folder.alone(()):
        if (folder.path / "results.json").exists():
            return dict(json.loads((folder.path / "results.json").read_text()))
        reference = real.reference(folder, show)
        files = folder.batches("samples", len(source))
        todo = files.missing(processes.index, processes.count)
        hidden = None if show else True  # None: shown on a terminal only
        for batch in tqdm(todo, desc="samples", leave=False, disable=hidden):
            arrays = _measured(
                source, files.images(batch), real.network, settings, processes.device
            )
            files.write(batch, **arrays)
        processes.barrier()
        if processes.index:
            return {}
        few = settings.allow_few_samples
        results = {
            "format": FORMAT,
            "complete": True,
            "settings": applying | {"num_images": len(source)},
            "samples": {
                "image_size": source.image_size,
                "channels": source.channels,
                "left_out": len(source.skipped),
            },
            "features": real.network.record(),
            "environment": environment(processes.device, torch.float32, processes.count),
            "metrics": compare(files, settings.metrics, real.network, reference, allow_few=few),
        }
        folder.write_results(results)
        files.delete()
        return results


def _open(path: Path, settings: Evaluation) -> ImageSource:
    if not path.exists():
        raise ValueError(
            f"--samples {path} does not exist: give a folder of images, or an .npz file with arr_0"
        )
    metrics = set(settings.metrics)
    if not COMPARING & metrics and (settings.data or settings.stats):
        raise ValueError(
            f"{' and '.join(settings.metrics)} compare with no real images: leave --data and"
            " --stats out"
        )
    # Which column of a table has the labels is asked only where they are needed.
    source = open_source(path.absolute(), label_column=None if "recognised" in metrics else "")
    if source.channels not in (1, 3):
        raise ValueError(
            f"--samples {path} are latents of {source.channels} channels: decode them first"
        )
    if "recognised" in metrics and source.num_classes == 1:
        raise ValueError(
            "recognised needs the classes of --samples: a folder for each, or arr_1 of an .npz"
        )
    return source


def _measured(
    source: ImageSource,
    images: range,
    network: FeatureNetwork,
    settings: Evaluation,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Features of a batch, and, where metrics want them, logits and labels."""
    pixels, labels = source.read_many(images)
    features, logits = network(torch.from_numpy(pixels).to(device), settings.protocol)
    arrays = {"features": check_features(features.cpu().numpy())}
    if {"inception_score", "recognised"} & set(settings.metrics):
        if logits is None:
            raise ValueError(
                f"{network.name} has no classes: inception_score and recognised need some"
            )
        arrays |= {"logits": logits.cpu().numpy(), "labels": labels}
    return arrays
