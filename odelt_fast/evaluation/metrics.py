"""Distances between sets of images, from their features: FID, KID, precision and recall, IS.

Everything is computed in float64 from features (N, D). Moments are streamed: memory does not grow
with N, and parts made anywhere merge into the moments of the whole. KID, precision and recall need
features themselves, of at most `KEPT` images, evenly spread (`kept_rows`).

torchmetrics and torch-fidelity define KID, precision/recall and the inception score; tests hold
ours to numbers recorded from them (tests/stress/record_metrics.py). They are not called here: they
want whole sets of features in memory, draw from global random states, and import torchvision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np

from odelt_fast.files import one_line, problem_of

OFFSET = 1e-6  # on the diagonal of both covariances, in the Frechet distance of the reference
KEPT = 10_000
NEIGHBOURS = 3  # k of precision and recall, as in their paper
_LARGEST = 1 << 14  # feature dimensions that a statistics file may have
_MOST_BYTES = 8 * _LARGEST**2 + (1 << 20)


class Moments:
    """Count, mean and scatter matrix sum (x - mean)(x - mean)^T of rows x (D,), float64.

    By Chan's pairwise update. The result depends on the partition into updates and their order, and
    on nothing else.
    """

    def __init__(self, dimensions: int) -> None:
        self.count, self.mean = 0, np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions))

    def update(self, features: np.ndarray) -> None:
        """Adds rows (B, D). ValueError for other widths, and for values that are not finite."""
        rows = check_features(features, len(self.mean)).astype(np.float64)
        if len(rows):
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
        """Mean and covariance (over count - 1, as np.cov).

        Raises:
            ValueError: for 1 row, and, unless allowed, for no more rows than features.
        """
        dimensions = len(self.mean)
        if self.count < 2 or (self.count <= dimensions and not allow_few):
            raise ValueError(
                f"{self.count} images are too few for the covariance of {dimensions} features: take"
                f" more than {max(1, dimensions)}, or, if you know what the number then means,"
                " --allow-few-samples"
            )
        notes = {"num_images": str(self.count)}
        return Statistics(self.mean, self.scatter / (self.count - 1), notes)


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64.

    notes: what is known of their making (features, fingerprint, protocol).
    """

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
        diagonal, asymmetry = np.diag(covariance), np.abs(covariance - covariance.T).max()
        if max(asymmetry, -diagonal.min()) > 1e-3 * max(np.abs(diagonal).max(), 1e-12):
            raise ValueError(
                "the covariance of statistics must be symmetric, with a diagonal of at least 0"
            )


def check_features(features: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """Features (N, D) as they came.

    Raises:
        ValueError: for another shape or width, and for values that are not finite.
    """
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
) -> tuple[float, float]:
    """KID: the unbiased MMD^2 with the kernel (x y / D + 1)^3, of random subsets.

    Args:
        generated: features (N, D).
        real: features (M, D).
        subsets: how many are drawn of both.
        subset_size: rows of each.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: for fewer images than `subset_size`, and for features of two widths.
    """
    pair = _pair(generated, real)
    fewest = min(map(len, pair))
    if fewest < subset_size:
        raise ValueError(f"KID with subsets of {subset_size} needs as many images, not {fewest}")
    draw = np.random.default_rng(0)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        inner = a @ b.T / a.shape[1] + 1
        return np.asarray(inner * inner * inner)  # a power would take ten times as long

    values = []
    for _ in range(subsets):
        x, y = (rows[draw.permutation(len(rows))[:subset_size]] for rows in pair)
        within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        across = 2 * kernel(x, y).sum() / subset_size**2
        values.append(within / (subset_size * (subset_size - 1)) - across)
    return float(np.mean(values)), float(np.std(values))


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi et al. 2019, from features (N, D) and (M, D).

    Precision is the share of generated images within the ball of some real image that reaches its
    k-th neighbour, recall the reverse; k is NEIGHBOURS.

    Raises:
        ValueError: for k images or fewer, and for features of two widths.
    """
    pair = _pair(generated, real)
    fewest = min(map(len, pair))
    if fewest <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images, not {fewest}")
    return _covered(*pair), _covered(*pair[::-1])


def _covered(points: np.ndarray, centres: np.ndarray) -> float:
    """The share of points within the ball of some centre, which reaches its k-th other centre."""

    def distances(rows: np.ndarray) -> Iterator[np.ndarray]:
        """Squared, from some rows at a time, to bound memory."""
        for first in range(0, len(rows), 1024):
            x = rows[first : first + 1024]
            squared = (x * x).sum(1)[:, None] + (centres * centres).sum(1) - 2 * (x @ centres.T)
            yield squared.clip(0)

    balls = [np.partition(part, NEIGHBOURS)[:, NEIGHBOURS] for part in distances(centres)]
    radii = np.concatenate(balls)
    return float(np.concatenate([(part <= radii).any(1) for part in distances(points)]).mean())


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
    ends = [(i + 1) * count // splits for i in range(splits)]
    of_row = np.searchsorted(ends, np.arange(count), side="right")
    sums: Any = 0
    negative_entropies, row = np.zeros(splits), 0
    for part in parts:
        logs = check_features(part).astype(np.float64)
        logs -= logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        p, split = np.exp(logs), of_row[row : row + len(logs)]
        sums = sums + np.zeros((splits, p.shape[1]))
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
    """At most `most` of `count` indices, rising, evenly spread: data sets are often sorted."""
    kept = min(count, most)
    return np.arange(kept) * count // max(1, kept)


def write_statistics(file: BinaryIO, statistics: Statistics) -> None:
    """A statistics file as jax-fid, pytorch-fid and clean-fid read them.

    `.npz` with mu and sigma, float64; notes as further strings.
    """
    notes: Any = statistics.notes
    np.savez(file, mu=statistics.mean, sigma=statistics.covariance, **notes)


def read_statistics(path: str | Path) -> Statistics:
    """Reads a statistics file (.npz with mu (D,) and sigma (D, D)); pickles are never read.

    Raises:
        ValueError: in one line, for anything else.
    """
    try:
        with ZipFile(path) as archive:  # a few bytes can ask for terabytes
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it is larger than the statistics of {_LARGEST} features")
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError("it must hold mu and sigma")
            notes = {name: file[name] for name in file.files}
        mean, covariance = notes.pop("mu"), notes.pop("sigma")
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(
                f"mu and sigma must be real numbers, not {mean.dtype} and {covariance.dtype}"
            )
        texts = {name: str(text)[:200] for name, text in notes.items() if text.dtype.kind == "U"}
        return Statistics(mean.astype(np.float64), covariance.astype(np.float64), texts)
    # numpy and zipfile raise all of these for files of anybody's making.
    except (
        OSError,
        ValueError,
        LookupError,
        EOFError,
        MemoryError,
        RuntimeError,
        BadZipFile,
    ) as error:
        problem = problem_of(Path(path), one_line(error, 200))
        raise ValueError(f"{path} is no statistics file: {problem}") from None
