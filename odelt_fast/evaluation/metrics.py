"""Distances between sets of images, from their features: Frechet (FID), kernel (KID), precision and
recall, inception score.

Everything is computed in float64 from features (N, D). Moments are streamed: memory does not grow
with N, and parts made anywhere merge into the moments of the whole. KID, precision and recall need
features themselves, of at most `KEPT` images, evenly spread (`kept_rows`).

torchmetrics and torch-fidelity define KID, precision/recall and the inception score; tests hold
ours to numbers recorded from them (tests/stress/record_metrics.py). They are not called here: they
want whole sets of features in memory, draw from global random states, and import torchvision.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from odelt_fast.files import one_line

OFFSET = 1e-6  # on the diagonal of both covariances, in the Frechet distance of the reference
KEPT = 10_000
_LARGEST = 1 << 14  # feature dimensions that a statistics file may have
_UNREADABLE = (  # what numpy and zipfile raise for files of anybody's making
    *(OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile),
)


class Moments:
    """Count, mean and scatter matrix sum (x - mean)(x - mean)^T of rows x (D,) seen so far,
    float64, by Chan's pairwise update.

    The result depends on the partition into updates and their order, and on nothing else.
    """

    def __init__(self, dimensions: int) -> None:
        self.count, self.mean = 0, np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions))

    def update(self, features: np.ndarray) -> None:
        """Adds rows (B, D). ValueError for other widths, and for values that are not finite."""
        rows = check_features(features, len(self.mean)).astype(np.float64)
        if not len(rows):
            return
        other = Moments(0)
        other.count, other.mean = len(rows), rows.mean(0)
        rows -= other.mean
        other.scatter = rows.T @ rows
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Adds all that `other` has seen."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"moments of {len(other.mean)} and of {len(self.mean)} features cannot be merged"
            )
        total = self.count + other.count
        if not total:
            return
        difference = other.mean - self.mean
        self.scatter += other.scatter + np.outer(difference, difference) * (
            self.count * other.count / total
        )
        self.mean = self.mean + difference * (other.count / total)
        self.count = total

    def statistics(self, *, allow_few: bool = False) -> Statistics:
        """Mean and covariance (over count - 1, as np.cov). ValueError for 1 row, and, unless
        allowed, for no more rows than features."""
        dimensions = len(self.mean)
        if self.count < 2 or (self.count <= dimensions and not allow_few):
            raise ValueError(
                f"{self.count} images are too few for the covariance of {dimensions} features: take"
                f" more than {max(1, dimensions)}, or, if you know what the number then means,"
                " --allow-few-samples"
            )
        return Statistics(
            self.mean, self.scatter / (self.count - 1), {"num_images": str(self.count)}
        )


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64. notes: what is known of their making
    (features, fingerprint, protocol)."""

    mean: np.ndarray
    covariance: np.ndarray
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mean, covariance = self.mean, self.covariance
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            raise ValueError(
                f"statistics must be a mean (D,) and a covariance (D, D), not {mean.shape} and"
                f" {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("statistics must be finite")
        spread = max(np.abs(np.diag(covariance)).max(), 1e-12)
        if (
            np.abs(covariance - covariance.T).max() > 1e-3 * spread
            or np.diag(covariance).min() < -1e-3 * spread
        ):
            raise ValueError(
                "the covariance of statistics must be symmetric, with a diagonal of at least 0"
            )


def check_features(features: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Features (N, D) as they came. ValueError for another shape or width, and for values that are
    not finite."""
    features = np.asarray(features)
    if features.ndim != 2 or (dimensions is not None and features.shape[1] != dimensions):
        raise ValueError(f"features must be (N, {dimensions or 'D'}), not {features.shape}")
    wrong = np.flatnonzero(~np.isfinite(features).all(1))
    if len(wrong):
        raise ValueError(
            f"the features of image {wrong[0]} are not finite ({len(wrong)} images): are the images"
            " finite?"
        )
    return features


def moments_of(parts: Iterable[np.ndarray], dimensions: int) -> Moments:
    """Moments of rows that come in parts."""
    moments = Moments(dimensions)
    for part in parts:
        moments.update(part)
    return moments


def frechet_distance(a: Statistics, b: Statistics, offset: float = OFFSET) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr((S_a + e I)(S_b + e I))^(1/2), e = offset.

    It is the reference's; other FIDs have e = 0. The trace of the root is the sum of the roots of
    the eigenvalues of R^T (S_b + e I) R with R R^T = S_a + e I: the eigenvalues of the product, but
    of a symmetric matrix, so that they are real and, rounding aside, not negative.

    Raises:
        ValueError: for statistics of two widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: they"
            " are of two feature networks"
        )
    identity = offset * np.eye(len(a.mean))
    values, vectors = np.linalg.eigh((a.covariance + a.covariance.T) / 2 + identity)
    root = vectors * np.sqrt(values.clip(0))
    inner = root.T @ ((b.covariance + b.covariance.T) / 2 + identity) @ root
    roots = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0))
    difference = a.mean - b.mean
    return float(
        difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots.sum()
    )


def kernel_distance(
    generated: np.ndarray,
    real: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """KID: the unbiased MMD^2 with the kernel (x y / D + 1)^3, of random subsets.

    Args:
        generated: features (N, D).
        real: features (M, D).
        subsets: how many are drawn of both.
        subset_size: rows of each.
        seed: of the draws.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: for fewer images than `subset_size`, and for features of two widths.
    """
    generated, real = _pair(generated, real)
    if min(len(generated), len(real)) < subset_size:
        raise ValueError(
            f"KID with subsets of {subset_size} needs as many images, not"
            f" {min(len(generated), len(real))}"
        )
    draw = np.random.default_rng(seed)
    values = [
        _unbiased_mmd(
            generated[draw.permutation(len(generated))[:subset_size]],
            real[draw.permutation(len(real))[:subset_size]],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        inner = a @ b.T / a.shape[1] + 1
        return np.asarray(inner * inner * inner)  # a power would take ten times as long

    count = len(x)
    within = [k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) / (count * (count - 1)) - 2 * kernel(x, y).sum() / count**2)


def precision_recall(
    generated: np.ndarray, real: np.ndarray, *, neighbours: int = 3
) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al. 2019, from features (N, D) and (M, D).

    Precision is the share of generated images within the k-th-neighbour ball of some real image,
    recall the reverse.

    Raises:
        ValueError: for k images or fewer, and for features of two widths.
    """
    generated, real = _pair(generated, real)
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} images, not"
            f" {min(len(generated), len(real))}"
        )
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(points: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    """The share of points within the ball of some centre, which reaches its k-th other centre. A
    few rows at a time, to bound memory."""
    radii = np.concatenate(
        [
            np.partition(_squared_distances(part, centres), neighbours, axis=1)[:, neighbours]
            for part in _parts(centres)
        ]
    )
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in _parts(points)]
    return float(np.concatenate(inside).mean())


def _parts(rows: np.ndarray, size: int = 1024) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)
    return np.asarray(squared.clip(0))


def inception_score(
    parts: Iterable[np.ndarray], count: int, *, splits: int = 10
) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from its mean over the images.

    In each split the score is exp(mean_i sum_k p_ik log p_ik - sum_k q_k log q_k) with q the mean
    of p; independent images need no shuffling.

    Args:
        parts: logits (n, K), in the order in which they are split.
        count: rows of all parts.
        splits: how many scores there are.

    Returns:
        Mean and standard deviation of the scores.

    Raises:
        ValueError: for fewer images than splits.
    """
    if count < splits:
        raise ValueError(f"an inception score of {splits} splits needs as many images, not {count}")
    of_row = np.searchsorted(
        [(i + 1) * count // splits for i in range(splits)], np.arange(count), side="right"
    )
    sums, negative_entropies, row = np.zeros((splits, 0)), np.zeros(splits), 0
    for part in parts:
        logs = check_features(part).astype(np.float64)
        logs -= logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        p, split = np.exp(logs), of_row[row : row + len(logs)]
        if not sums.size:
            sums = np.zeros((splits, p.shape[1]))
        np.add.at(sums, split, p)
        np.add.at(negative_entropies, split, (p * logs).sum(1))
        row += len(logs)
    sizes = np.bincount(of_row, minlength=splits)
    q = sums / sizes[:, None]
    scores = np.exp(negative_entropies / sizes - (q * np.log(q.clip(1e-300))).sum(1))
    return float(scores.mean()), float(scores.std())


def _pair(generated: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real = check_features(real).astype(np.float64)
    return check_features(generated, real.shape[1]).astype(np.float64), real


def kept_rows(count: int, most: int = KEPT) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread (data sets are often sorted by class),
    rising."""
    return np.arange(min(count, most)) * count // max(1, min(count, most))


def write_statistics(file: BinaryIO, statistics: Statistics) -> None:
    """A statistics file as jax-fid, pytorch-fid and clean-fid read them: `.npz` with mu and sigma,
    float64; notes as further strings."""
    arrays: dict[str, Any] = {key: np.array(text) for key, text in statistics.notes.items()}
    np.savez(file, mu=statistics.mean, sigma=statistics.covariance, **arrays)


def read_statistics(path: str | Path) -> Statistics:
    """Reads a statistics file (.npz with mu (D,) and sigma (D, D)). ValueError, in one line, for
    anything else; pickles are never read."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive)
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError("it must hold mu and sigma")
            mean, covariance = file["mu"], file["sigma"]
            others = {name: file[name] for name in file.files if name not in ("mu", "sigma")}
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(
                f"mu and sigma must be real numbers, not {mean.dtype} and {covariance.dtype}"
            )
        notes = {name: str(text)[:200] for name, text in others.items() if text.dtype.kind == "U"}
        return Statistics(mean.astype(np.float64), covariance.astype(np.float64), notes)
    except _UNREADABLE as error:
        raise ValueError(f"{path} is no statistics file: {one_line(error, 200)}") from None


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Before anything is unpacked: an archive of a few bytes can ask for terabytes."""
    if sum(entry.file_size for entry in archive.infolist()) > 8 * _LARGEST**2 + (1 << 20):
        raise ValueError(f"it is larger than the statistics of {_LARGEST} features")
