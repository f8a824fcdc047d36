"""Probability paths of Table 1 of the paper: Gaussian p_t(x|z) from noise at t = 0 to data at t =
1, and their velocity (equation 4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odelt_fast.checks import number
from odelt_fast.solvers.probability_flow import LAST_TIME, vp_schedule

Pair = tuple[Tensor, Tensor]  # a value and its derivative in time


class Path(ABC):
    """p_t(x|z) = N(mean, std^2). z is (x0, x1), or x1 alone: then x0 is not looked at.

    Times t are (B,) in [0, 1]; x0 (noise), x1 (data), noise and x are (B, C, H, W), or of any shape
    that starts with B. Everything stays in the dtype that comes in and is finite on the whole of
    [0, 1]. Training draws t from [0, last_time].
    """

    last_time: ClassVar[float] = 1.0
    # Whether sigma is above 0 although z holds x0: then a sample needs noise independent of x0.
    extra_noise: ClassVar[bool] = False

    @abstractmethod
    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        """mu_t(z) and d mu_t(z) / dt, each of the shape of x1."""

    def std(self, t: Tensor) -> Pair:
        """sigma_t and d sigma_t / dt, each (B,); 0 unless a path says otherwise."""
        return torch.zeros_like(t), torch.zeros_like(t)

    def sample(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = mu_t + sigma_t noise; noise None: x0, of paths whose z is x1 alone."""
        return self._of(0, t, x0, x1, noise)

    def velocity(self, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor | None = None) -> Tensor:
        """The field of equation 4, u_t(x|z) = (x - mu) sigma'/sigma + mu', at `sample`: sigma'
        noise + mu', which needs no division by sigma."""
        return self._of(1, t, x0, x1, noise)

    def _of(self, order: int, t: Tensor, x0: Tensor, x1: Tensor, noise: Tensor | None) -> Tensor:
        spread = as_rows(self.std(t)[order], x1) * (x0 if noise is None else noise)
        return self.mean(t, x0, x1)[order] + spread


@dataclass(frozen=True)
class VarianceExploding(Path):
    """mu = x1, sigma falls geometrically from sigma_max at t = 0 to sigma_min at t = 1 (Song and
    Ermon 2019). Times [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"0 < sigma_min < sigma_max must hold, not {self.sigma_min} and {self.sigma_max}"
            )

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        return x1, torch.zeros_like(x1)

    def std(self, t: Tensor) -> Pair:
        rate = math.log(self.sigma_max / self.sigma_min)
        std = self.sigma_min * torch.exp(rate * (1 - t))
        return std, -rate * std


@dataclass(frozen=True)
class VariancePreserving(Path):
    """mu = alpha x1, sigma = sqrt(1 - alpha^2) with the schedule of `vp_schedule` (Ho et al. 2020).

    Times [0, LAST_TIME]: sigma' is unbounded at t = 1 and held there at its value of LAST_TIME.
    """

    last_time: ClassVar[float] = LAST_TIME

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        alpha, _, beta = vp_schedule(t)
        return as_rows(alpha, x1) * x1, as_rows(0.5 * alpha * beta, x1) * x1

    def std(self, t: Tensor) -> Pair:
        alpha, sigma, beta = vp_schedule(t.clamp(max=LAST_TIME))
        return vp_schedule(t)[1], -0.5 * alpha.square() * beta / sigma


@dataclass(frozen=True)
class FlowMatchingPath(Path):
    """mu = t x1, sigma_t = 1 - (1 - sigma) t (Lipman et al. 2023). Times [0, 1]. shortcut-models'
    paths are this one with sigma = 1e-5."""

    sigma: float = 0.01

    def __post_init__(self) -> None:
        number("sigma", self.sigma, 0, 1)

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        return as_rows(t, x1) * x1, x1

    def std(self, t: Tensor) -> Pair:
        return 1 - (1 - self.sigma) * t, torch.full_like(t, self.sigma - 1)


@dataclass(frozen=True)
class Rectified(Path):
    """mu = (1 - t) x0 + t x1, sigma = 0 (Liu et al. 2023). Times [0, 1]."""

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        return as_rows(1 - t, x1) * x0 + as_rows(t, x1) * x1, x1 - x0


@dataclass(frozen=True)
class IndependentCFM(Rectified):
    """mu = (1 - t) x0 + t x1, sigma constant (Tong et al. 2024). Times [0, 1]."""

    sigma: float = 0.01
    extra_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("sigma", self.sigma, 0, 1)

    def std(self, t: Tensor) -> Pair:
        return torch.full_like(t, self.sigma), torch.zeros_like(t)


@dataclass(frozen=True)
class Trigonometric(Path):
    """mu = cos(pi t/2) x0 + sin(pi t/2) x1, sigma = 0: variance-preserving FM (Albergo and
    Vanden-Eijnden 2023). Times [0, 1]."""

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        angle = as_rows(0.5 * math.pi * t, x1)
        cos, sin = angle.cos(), angle.sin()
        return cos * x0 + sin * x1, 0.5 * math.pi * (cos * x1 - sin * x0)


@dataclass(frozen=True)
class UnitVariance(Path):
    """Another path, seen through y_t = c x_t with c = 1/sqrt(1 + sigma_t^2), so that y_0 is close
    to unit noise however large sigma is.

    A variance-exploding model trained on y starts from the same noise as every other model and
    needs no scaling of its input.
    """

    path: Path

    def mean(self, t: Tensor, x0: Tensor, x1: Tensor) -> Pair:
        scale, change = (as_rows(value, x1) for value in self._scale(t))
        mean, derivative = self.path.mean(t, x0, x1)
        return scale * mean, change * mean + scale * derivative

    def std(self, t: Tensor) -> Pair:
        (scale, change), (std, derivative) = self._scale(t), self.path.std(t)
        return scale * std, change * std + scale * derivative

    def _scale(self, t: Tensor) -> Pair:
        """c and dc/dt."""
        std, derivative = self.path.std(t)
        scale = torch.rsqrt(1 + std.square())
        return scale, -std * derivative * scale**3


def training_path(name: str, sigma: float) -> Path:
    """The path that a training run names. Unit noise is where all of them start.

    Args:
        sigma: of flow-matching and independent.

    Raises:
        ValueError: there is no such path.
    """
    paths: dict[str, Path] = {
        "rectified": Rectified(),
        "flow-matching": FlowMatchingPath(sigma),
        "independent": IndependentCFM(sigma),
        "trigonometric": Trigonometric(),
        "variance-preserving": VariancePreserving(),
        "variance-exploding": UnitVariance(VarianceExploding()),
    }
    if name not in paths:
        raise ValueError(f"no path {name!r}: use one of {', '.join(paths)}")
    return paths[name]


def as_rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to be multiplied with `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
