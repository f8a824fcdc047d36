"""Probability paths: derivatives, equation 4 as an ODE, end points, and the probability-flow ODE of
the diffusion baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from odelt_fast.solvers.probability_flow import LAST_TIME, probability_flow_velocity, vp_schedule
from odelt_fast.train.paths import (
    FlowMatchingPath,
    IndependentCFM,
    Path,
    Rectified,
    Trigonometric,
    UnitVariance,
    VarianceExploding,
    VariancePreserving,
    as_rows,
    training_path,
)

PATHS = [
    VarianceExploding(),
    VarianceExploding(0.1, 3.0),
    VariancePreserving(),
    FlowMatchingPath(),
    FlowMatchingPath(1e-5),
    FlowMatchingPath(0.0),
    Rectified(),
    IndependentCFM(),
    IndependentCFM(0.3),
    Trigonometric(),
    UnitVariance(VarianceExploding()),
]
NAMES = (
    "rectified",
    "flow-matching",
    "independent",
    "trigonometric",
    "variance-preserving",
    "variance-exploding",
)
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def condition(batch: int = 6, shape: tuple[int, ...] = (2, 3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """x0, x1, noise in float64."""
    return tuple(torch.from_numpy(np.random.default_rng(5).standard_normal((3, batch, *shape))))


def equation_4(path: Path, t: Tensor, x: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """u_t(x|z) = (x - mu) sigma'/sigma + mu'; mu' where the path is the point mu."""
    (mean, mean_derivative), (std, std_derivative) = path.mean(t, x0, x1), path.std(t)
    ratio = torch.where(std > 0, std_derivative / std.where(std > 0, 1), 0)
    return (x - mean) * as_rows(ratio, x1) + mean_derivative


def times(path: Path, count: int = 6) -> Tensor:
    return torch.linspace(0, path.last_time, count, dtype=torch.float64)


@every_path
def test_derivatives_are_those_of_automatic_differentiation(path: Path) -> None:
    x0, x1, _ = condition()
    t = times(path)
    _, mean = torch.func.jvp(
        lambda t: path.mean(t, x0, x1)[0] + 0 * as_rows(t, x1), (t,), (torch.ones_like(t),)
    )
    _, std = torch.func.jvp(lambda t: path.std(t)[0] + 0 * t, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.mean(t, x0, x1)[1], mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(path.std(t)[1], std, rtol=1e-10, atol=1e-12)


@every_path
def test_equation_4_transports_a_sample_of_the_start_to_its_quantile_at_the_end(path: Path) -> None:
    """x(0) = mu_0 + sigma_0 eps ends at mu_1 + sigma_1 eps: the field moves every quantile of
    p_0(.|z) to the same one of p_1(.|z)."""
    x0, x1, noise = (tensor[:1, :, 0, 0] for tensor in condition())
    last = (
        path.last_time if path.std(torch.ones(1))[0] > 0 or path.last_time < 1 else 1 - 1e-6
    )  # the field is singular where sigma -> 0

    def field(t: float, x: np.ndarray) -> np.ndarray:
        time = torch.tensor([t], dtype=torch.float64)
        return equation_4(path, time, torch.from_numpy(x)[None], x0, x1)[0].numpy()

    start, end = (
        path.sample(torch.tensor([t], dtype=torch.float64), x0, x1, noise)[0].numpy()
        for t in (0.0, last)
    )
    solution = solve_ivp(field, (0, last), start, method="DOP853", rtol=1e-12, atol=1e-12)
    assert solution.success
    assert np.abs(solution.y[:, -1] - end).max() < 1e-8


@every_path
def test_velocity_of_a_sample_is_equation_4_there(path: Path) -> None:
    x0, x1, noise = condition()
    t = times(path)
    x = path.sample(t, x0, x1, noise)
    inside = path.std(t)[0] > 0
    expected = path.velocity(t, x0, x1, noise)
    found = equation_4(path, t, x, x0, x1)
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("path", "starts_with", "start_std", "ends_with", "end_std"),
    [
        (VarianceExploding(), (0, 1), 50.0, (0, 1), 0.01),
        (VariancePreserving(), (0, math.exp(-5.025)), math.sqrt(1 - math.exp(-10.05)), (0, 1), 0.0),
        (FlowMatchingPath(0.02), (0, 0), 1.0, (0, 1), 0.02),
        (Rectified(), (1, 0), 0.0, (0, 1), 0.0),
        (IndependentCFM(0.3), (1, 0), 0.3, (0, 1), 0.3),
        (Trigonometric(), (1, 0), 0.0, (0, 1), 0.0),
    ],
    ids=repr,
)
def test_end_points_of_table_1(
    path: Path, starts_with: tuple, start_std: float, ends_with: tuple, end_std: float
) -> None:
    x0, x1, _ = condition()
    for t, (a, b), std in (
        (torch.zeros(6), starts_with, start_std),
        (torch.ones(6), ends_with, end_std),
    ):
        torch.testing.assert_close(
            path.mean(t.double(), x0, x1)[0], a * x0 + b * x1, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            path.std(t.double())[0], torch.full((6,), std).double(), rtol=1e-6, atol=1e-12
        )


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 3)])
def test_everything_is_finite_on_the_closed_interval(
    path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x0, x1, noise = (tensor.to(dtype) for tensor in condition(6, shape))
    t = torch.tensor([0, 1e-7, 0.3, 0.9999, 1 - 2**-24, 1], dtype=dtype)
    x = path.sample(t, x0, x1, noise)
    for found in (x, path.velocity(t, x0, x1, noise)):
        assert found.shape == x1.shape
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
    assert torch.isfinite(path.std(t)[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_training_paths_start_at_unit_noise_and_end_at_the_data(name: str) -> None:
    """Whatever path a model is trained on, the sampler starts it with standard Gaussian noise."""
    path = training_path(name, 0.01)
    generator = torch.Generator().manual_seed(0)
    x0, x1, noise = torch.randn(3, 20_000, 4, generator=generator, dtype=torch.float64).unbind()
    extra = noise if path.extra_noise else x0
    start = path.sample(torch.zeros(20_000).double(), x0, x1, extra)
    assert start.mean().abs() < 0.02
    assert start.std().item() == pytest.approx(1, abs=0.02)
    end = path.sample(torch.ones(20_000).double(), x0, x1, extra)
    assert (end - x1).square().mean().sqrt() < 0.0102


def test_signal_and_noise_of_the_variance_preserving_path_sum_to_one() -> None:
    alpha, sigma, beta = vp_schedule(torch.linspace(0, 1, 100, dtype=torch.float64))
    torch.testing.assert_close(
        alpha.square() + sigma.square(), torch.ones(100).double(), rtol=1e-14, atol=0
    )
    # DDPM's and DiT's 1000 betas, 1e-4 to 0.02: their product of (1 - beta) is alpha^2 at the noisy
    # end.
    discrete = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    assert math.log(alpha[0] ** 2) == pytest.approx(math.log(discrete), rel=0.01)
    assert (beta[0], beta[-1]) == (pytest.approx(20), pytest.approx(0.1))


def test_probability_flow_velocity_is_the_path_s_for_a_network_that_knows_the_noise() -> None:
    path = VariancePreserving()
    x0, x1, noise = condition()
    t = times(path)
    x = path.sample(t, x0, x1, noise)
    torch.testing.assert_close(
        probability_flow_velocity(noise, x, t),
        path.velocity(t, x0, x1, noise),
        rtol=1e-9,
        atol=1e-9,
    )
    assert torch.equal(
        probability_flow_velocity(noise, x, 0.25),
        probability_flow_velocity(noise, x, torch.full((6,), 0.25).double()),
    )
    assert torch.equal(
        probability_flow_velocity(noise, x, 1.0), probability_flow_velocity(noise, x, LAST_TIME)
    )
    assert probability_flow_velocity(noise.bfloat16(), x.bfloat16(), t).dtype == torch.bfloat16


def test_probability_flow_ode_samples_a_gaussian() -> None:
    """Data N(m, s^2): the noise in x_t has a closed form, and the ODE must carry unit noise to that
    Gaussian, quantile by quantile."""
    m, s = 0.7, 0.3

    def field(t: float, x: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(x)[:, None]
        alpha, sigma, _ = vp_schedule(torch.tensor(t, dtype=torch.float64).clamp(max=LAST_TIME))
        noise = sigma * (state - alpha * m) / (alpha**2 * s**2 + sigma**2)
        return probability_flow_velocity(noise, state, t)[:, 0].numpy()

    quantiles = np.linspace(-2, 2, 5)
    alpha, sigma, _ = (
        value.item() for value in vp_schedule(torch.tensor(0.0, dtype=torch.float64))
    )
    start = alpha * m + math.sqrt(alpha**2 * s**2 + sigma**2) * quantiles
    end = solve_ivp(field, (0, 1), start, rtol=1e-9, atol=1e-9).y[:, -1]
    assert np.abs(end - (m + s * quantiles)).max() < 1e-3  # rates are held for the last thousandth


def test_wrong_values_are_refused() -> None:
    for mistake in (
        lambda: VarianceExploding(2.0, 1.0),
        lambda: FlowMatchingPath(-0.1),
        lambda: IndependentCFM(math.nan),
    ):
        with pytest.raises(ValueError, match="sigma"):
            mistake()
    with pytest.raises(ValueError, match="rectified"):
        training_path("straight", 0.01)
