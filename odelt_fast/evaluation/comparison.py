"""Generated images against real ones: statistics of the real ones, metrics of the generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from odelt_fast.files import write_whole
from odelt_fast.generation.shards import Shards
from odelt_fast.images import ImageSource

from .features import FeatureNetwork
from .metrics import (
    Moments,
    Statistics,
    check_features,
    frechet_distance,
    inception_score,
    kept_rows,
    kernel_distance,
    moments_of,
    precision_recall,
    read_statistics,
    write_statistics,
)

_KID_SUBSET = 1000


@dataclass(frozen=True)
class Reference:
    """Statistics of all real images, and features (N, D) of some (`kept_rows`) for the rest."""

    statistics: Statistics
    features: np.ndarray | None


def features_of(
    source: ImageSource, images: range, network: FeatureNetwork, protocol: str, device: torch.device
) -> np.ndarray:
    """Features (n, D) float32 of some images of a source, finite."""
    pixels, _ = source.read_many(images)
    return check_features(network(torch.from_numpy(pixels).to(device), protocol)[0].cpu().numpy())


def statistics_of(
    source: ImageSource,
    network: FeatureNetwork,
    protocol: str,
    device: torch.device,
    *,
    batch_size: int = 128,
    allow_few: bool = False,
    advance: Callable[[int], object] = lambda images: None,
) -> Statistics:
    """Statistics of all images of a source, in constant memory.

    advance(n) is called when n more images are done.
    """
    moments = Moments(network.dimensions)
    for first in range(0, len(source), batch_size):
        images = range(first, min(first + batch_size, len(source)))
        moments.update(features_of(source, images, network, protocol, device))
        advance(len(images))
    return described(moments.statistics(allow_few=allow_few), network, protocol)


def described(statistics: Statistics, network: FeatureNetwork, protocol: str) -> Statistics:
    """The statistics with notes of what made them, which `check_statistics` compares."""
    by = {"features": network.name, "features_sha256": network.fingerprint, "protocol": protocol}
    return replace(statistics, notes={**statistics.notes, **by})


def check_statistics(
    statistics: Statistics, name: str, network: FeatureNetwork, protocol: str
) -> None:
    """ValueError for statistics of another network or protocol.

    Other programs' files say nothing of them, but have a width.
    """
    if len(statistics.mean) != network.dimensions:
        raise ValueError(
            f"{name} is of {len(statistics.mean)} features, {network.name} has"
            f" {network.dimensions}: they cannot be compared"
        )
    notes = statistics.notes
    if notes.get("features_sha256", network.fingerprint) != network.fingerprint:
        raise ValueError(
            f"{name} was made with other weights ({notes.get('features', 'unnamed')}) than those of"
            f" {network.name} here"
        )
    if notes.get("protocol", protocol) != protocol:
        raise ValueError(f"{name} was made under the protocol {notes['protocol']}, not {protocol}")


def stored_reference(folder: Path) -> Reference:
    """What `merge_reference` wrote."""
    return Reference(
        read_statistics(folder / "reference.npz"),
        np.load(folder / "reference_features.npy", allow_pickle=False),
    )


def merge_reference(
    files: Shards, folder: Path, network: FeatureNetwork, protocol: str, allow_few: bool
) -> None:
    """reference_features.npy and reference.npz from the features of all batches.

    The second says that both are there.
    """
    statistics = described(_statistics(files, network, allow_few), network, protocol)
    kept = files.rows("features", kept_rows(files.num_images))
    write_whole(folder / "reference_features.npy", lambda file: np.save(file, kept))
    write_whole(folder / "reference.npz", lambda file: write_statistics(file, statistics))
    files.delete()


def _statistics(files: Shards, network: FeatureNetwork, allow_few: bool) -> Statistics:
    moments = moments_of(files.parts("features"), network.dimensions)
    return moments.statistics(allow_few=allow_few)


def compare(
    files: Shards,
    metrics: Sequence[str],
    network: FeatureNetwork,
    reference: Reference | None,
    *,
    allow_few: bool = False,
) -> dict[str, float]:
    """Every metric of `settings.METRICS` that is wanted, by the name that tables show.

    files, the batches of generated images, hold `features` and, for inception_score and recognised,
    `logits` and `labels`. KID is over 100 subsets of at most 1000 images.
    """
    found: dict[str, float] = {}
    if "frechet" in metrics:
        assert reference is not None
        statistics = _statistics(files, network, allow_few)
        found[network.distance] = frechet_distance(statistics, reference.statistics)
    if {"kid", "precision_recall"} & set(metrics):
        assert reference is not None
        assert reference.features is not None
        rows, real = files.rows("features", kept_rows(files.num_images)), reference.features
        if "kid" in metrics:
            size = min(_KID_SUBSET, len(rows), len(real))
            found["KID"], _ = kernel_distance(rows, real, subset_size=size)
        if "precision_recall" in metrics:
            found["precision"], found["recall"] = precision_recall(rows, real)
    if "inception_score" in metrics:
        found["inception score"], _ = inception_score(files.parts("logits"), files.num_images)
    if "recognised" in metrics:
        pairs = zip(files.parts("logits"), files.parts("labels"))
        right = sum((logits.argmax(1) == labels).sum() for logits, labels in pairs)
        found["recognised"] = float(right / files.num_images)
    return found
