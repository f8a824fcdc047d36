"""The real images that generated ones are compared with, and the network that compares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from odelt_fast.checks import Size
from odelt_fast.images import ImageSource, open_source

from .comparison import (
    Reference,
    check_statistics,
    features_of,
    merge_reference,
    stored_reference,
)
from .features import FeatureNetwork, bundled_for, load_features
from .folder import Folder
from .machine import file_hash
from .metrics import Statistics, read_statistics
from .settings import COMPARING, Evaluation


@dataclass(frozen=True)
class Real:
    """What an evaluation by `settings` compares with.

    source, statistics: the real images, at the size of the generated ones, or what is known of
    them; one of the two, or none where nothing is compared.
    """

    settings: Evaluation
    network: FeatureNetwork
    source: ImageSource | None
    statistics: Statistics | None

    @classmethod
    def of(
        cls, settings: Evaluation, channels: int, size: Size, count: int, device: torch.device
    ) -> Real:
        """Opens it for `count` generated images of `channels` channels and this size.

        Raises:
            ValueError: for data, statistics or networks that do not fit, and for too few images.
        """
        network = _network(settings, channels, size, device)
        network.check_images(channels, size)
        source = statistics = None
        if settings.data is not None:
            source = open_source(
                settings.data,
                image_size=size,
                channels=channels,
                split=settings.split,
                image_column=settings.image_column,
                label_column=settings.label_column,
            )
        if settings.stats is not None:
            statistics = read_statistics(settings.stats)
            check_statistics(statistics, settings.stats, network, settings.protocol)
        _check_counts(settings, network, min(count, count if source is None else len(source)))
        return cls(settings, network, source, statistics)

    def bound(self) -> dict[str, Any]:
        """What ties a folder to it."""
        bound: dict[str, Any] = {
            "features_sha256": self.network.fingerprint,
            "features": self.network.name,
        }
        if self.settings.stats is not None:
            bound["stats_sha256"] = file_hash(Path(self.settings.stats))
        if self.source is not None:
            bound["data_images"] = len(self.source)
        return bound

    def reference(self, folder: Folder, show: bool) -> Reference | None:
        """None if no metric compares with real images.

        Their batches are shared among the processes of the folder, and resumed, as those of a cell.
        """
        settings, processes, out = self.settings, folder.processes, folder.path
        if not COMPARING & set(settings.metrics):
            return None
        if self.statistics is not None:
            return Reference(self.statistics, None)
        source, network, protocol = self.source, self.network, settings.protocol
        assert source is not None
        if not (out / "reference.npz").exists():
            files = folder.batches("reference", len(source))
            todo = files.missing(processes.index, processes.count)
            hidden = None if show else True  # None: shown on a terminal only
            for batch in tqdm(todo, desc="real images", leave=False, disable=hidden):
                by = files.images(batch), network, protocol, processes.device
                files.write(batch, features=features_of(source, *by))
            processes.barrier()
            if processes.index == 0:
                merge_reference(files, out, network, protocol, settings.allow_few_samples)
        processes.barrier()
        return stored_reference(out)


def _network(
    settings: Evaluation, channels: int, image_size: Size, device: torch.device
) -> FeatureNetwork:
    name, weights = settings.features, settings.inception_weights
    if name == "auto":
        fitting = bundled_for(channels, image_size)
        name = fitting if fitting and not weights else "inception"
    return load_features(name, device, inception_weights=weights, trust=settings.trust_features)


def _check_counts(settings: Evaluation, network: FeatureNetwork, fewest: int) -> None:
    too_few = "frechet" in settings.metrics and fewest <= network.dimensions
    if too_few and not settings.allow_few_samples:
        raise ValueError(
            f"{fewest} images are too few for the {network.dimensions} features of {network.name}:"
            f" take more than {network.dimensions}, or, if you know what the number then means,"
            " --allow-few-samples"
        )
    if fewest < 10 and set(settings.metrics) - {"frechet", "recognised"}:
        raise ValueError(
            f"{', '.join(settings.metrics)} of {fewest} images mean nothing: take at least 10"
        )
