"""log p of images: exact where it is known, unbiased probes, what it depends on, quantised data,
and the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from odelt_fast import Sampler, load_model
from odelt_fast.cli import main
from odelt_fast.images import open_source
from odelt_fast.model import DiT
from odelt_fast.sampling.likelihood import (
    Likelihood,
    dequantise,
    log_likelihood,
    quantisation_step,
    with_divergence,
)
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.probability_flow import BETA_MAX, BETA_MIN, LAST_TIME
from tests.helpers import small_model

TIGHT = {"solver": "dop853", "rtol": 1e-8, "atol": 1e-8}


def random_model(std: float = 0.1, **changes: object) -> DiT:
    return small_model.random_model(std, **{"image_size": 4, **changes})


def gaussian(size: int = 6) -> tuple[Any, torch.distributions.MultivariateNormal]:
    """The velocity field whose flow carries N(0, I) to N(mean, S) along x_t = (1-t) x_0 + t x_1,
    and that N(mean, S).

    v(t, x) = mean + (t S - (1-t) I) C^-1 (x - t mean) with C = (1-t)^2 I + t^2 S, the covariance of
    x_t.
    """
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator) * 0.6
    mean, covariance, eye = (
        torch.linspace(-1, 2, size).double(),
        root @ root.T + 0.1 * torch.eye(size),
        torch.eye(size).double(),
    )

    def field(t: float | Tensor, x: Tensor, log2_steps: int) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1)
        matrix = (t * covariance - (1 - t) * eye) @ torch.linalg.inv(
            (1 - t) ** 2 * eye + t**2 * covariance
        )
        return mean + (matrix @ (x - t[..., 0] * mean)[..., None])[..., 0]

    return field, torch.distributions.MultivariateNormal(mean, covariance)


def measure(field: Any, x: Tensor, probes: Tensor | None, **options: Any) -> Likelihood:
    columns = 1 if probes is None else len(probes)
    start = torch.cat([x, x.new_zeros(len(x), columns)], 1)
    solution = solve(
        with_divergence(field, x.shape[1:], probes),
        start,
        7,
        t0=1.0,
        t1=0.0,
        **{**TIGHT, **options},
    )
    return Likelihood.of_flow(solution, x.shape[1:], probes is None)


def test_log_p_of_a_gaussian_is_the_known_one() -> None:
    field, exact = gaussian()
    x = torch.cat([exact.sample((4,)), exact.mean[None], exact.mean[None] + 5])
    for options in (TIGHT, {"solver": "fixed:dopri5", "steps": 60}):
        found = measure(field, x, None, **options)
        torch.testing.assert_close(found.log_prob, exact.log_prob(x), rtol=0, atol=1e-6)
        assert (found.error == 0).all()
    # The flow of a Gaussian is affine: back at t = 0 the samples are whitened.
    white = (found.noise[:4] ** 2).sum(1) - (
        (x[:4] - exact.mean) @ torch.linalg.inv(exact.covariance_matrix) * (x[:4] - exact.mean)
    ).sum(1)
    torch.testing.assert_close(white, torch.zeros(4).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_says_its_error(kind: str) -> None:
    field, exact = gaussian()
    x = exact.sample((3,))
    e = torch.randn(100, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    probes = e if kind == "gaussian" else e.sign()
    found = measure(field, x, probes, rtol=1e-4, atol=1e-4)
    off = (found.log_prob - exact.log_prob(x)).abs()
    assert (off < 4 * found.error).all()
    # One probe's variance is 2 |A|^2 (Gaussian) or that without the diagonal of A, the symmetric
    # part of the integrated Jacobian.
    single = found.error * math.sqrt(100)
    assert (single > 0.1).all()
    few = measure(field, x, probes[:25], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few.error * 5, single, rtol=0.5, atol=0)
    assert measure(field, x, probes[:1], rtol=1e-3, atol=1e-3).error.isnan().all()


def test_the_whole_path_on_a_diffusion_model_that_sees_constant_noise() -> None:
    """dx/dt = beta/2 (x - c/sigma) is affine: log p_1(x) = log N(x_0) - D/2 * integral of beta,
    whatever c is."""
    model = random_model(sampling="diffusion")
    torch.nn.init.zeros_(model.final_layer.out.weight)
    torch.nn.init.constant_(model.final_layer.out.bias, 0.3)
    sampler = Sampler(model, solver="rk4", steps=40)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 20
    found = log_likelihood(sampler, x, probes=3)
    held = 1 - LAST_TIME
    integral = (
        BETA_MIN * (1 - held)
        + 0.5 * (BETA_MAX - BETA_MIN) * (1 - held**2)
        + held * (BETA_MIN + (BETA_MAX - BETA_MIN) * held)
    )
    known = (
        torch.distributions.Normal(0.0, 1.0).log_prob(found.noise).flatten(1).sum(1)
        - 16 * integral / 2
    )
    # beta is linear in t, which the solver integrates exactly, but for its hold at the last 1e-3 of
    # time.
    torch.testing.assert_close(found.log_prob, known, rtol=0, atol=2e-3)
    assert (found.error < 1e-9).all()  # a probe of +-1 is exact for a multiple of the identity
    assert sampler.stats["evaluations_needed"] == [160] * 3
    assert sampler.stats["status"] == ["done"] * 3


def test_guided_divergence_is_that_of_the_guided_field() -> None:
    model, x = random_model().double(), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    from odelt_fast.operation import Operation
    from odelt_fast.sampling.velocity import VelocityField

    def rate(scale: float | None) -> Tensor:
        field = with_divergence(
            VelocityField(model, Operation(depth=4, guidance_scale=scale), torch.tensor([1, 2])),
            (1, 4, 4),
            None,
        )
        return field(0.3, torch.cat([x.flatten(1), x.new_zeros(2, 1)], 1), 7)[:, -1]

    torch.testing.assert_close(rate(2.5), rate(0) + 2.5 * (rate(1) - rate(0)), rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: VelocityField(model, Operation(depth=4), torch.tensor([1, 2]))(0.3, z, 7), x
    )
    traces = torch.stack([jacobian[i].reshape(16, 2, 16)[:, i].trace() for i in range(2)])
    torch.testing.assert_close(rate(None), traces, rtol=1e-9, atol=1e-9)
    assert traces.abs().min() > 1e-3


def test_an_image_s_likelihood_depends_on_seed_and_index_alone() -> None:
    model, x = random_model(), torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = [0, 3, 10, 3, 5]

    def measured(
        rows: slice = slice(None), batch_size: int | None = None, **options: Any
    ) -> Tensor:
        sampler = Sampler(
            model, depth=2, solver="bosh3", rtol=1e-2, atol=1e-2, batch_size=batch_size
        )
        return log_likelihood(
            sampler, x[rows], labels[rows], probes=2, **{"seed": 4, **options}
        ).log_prob

    whole = measured()
    assert torch.equal(whole, measured())
    for batch_size in (1, 2):
        torch.testing.assert_close(measured(batch_size=batch_size), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        measured(slice(3, 5), first_image=3), whole[3:], rtol=1e-5, atol=1e-5
    )
    for other in (measured(seed=5), measured(first_image=1), measured(probe="gaussian")):
        assert ((other - whole).abs() > 1e-4).all()
    assert not model.training


def test_a_trained_model_knows_digits_from_shuffled_ones() -> None:
    source = open_source("digits")
    images, labels = source.read_many(range(2))
    step = quantisation_step(source)
    x = dequantise(torch.from_numpy(images), step)
    sampler = Sampler(load_model("digits", depth=4), depth=4, solver="rk4", steps=4)
    exact = log_likelihood(sampler, x, labels, probes=None)
    probed = log_likelihood(sampler, x, labels, probes=24)
    assert ((probed.log_prob - exact.log_prob).abs() < 4 * probed.error).all()
    torch.testing.assert_close(probed.noise, exact.noise)
    bits = exact.bits_per_dimension(step)
    assert ((bits > 0) & (bits < 6)).all()  # 4.1 if every level were as probable
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = log_likelihood(sampler, x.flatten(2)[:, :, order].view_as(x), labels, probes=4)
    assert (shuffled.bits_per_dimension(step) > bits + 1).all()


def test_bits_per_dimension() -> None:
    """A uniform density over 256 levels costs 8 bits."""
    density = torch.full((2,), -48 * math.log(256 / 127.5), dtype=torch.float64)
    flat = Likelihood(density, torch.zeros(2), torch.zeros(2, 3, 4, 4), torch.zeros(2))
    torch.testing.assert_close(flat.bits_per_dimension(1 / 127.5), torch.full((2,), 8.0).double())
    torch.testing.assert_close(
        flat.bits_per_dimension(1 / 127.5) - flat.bits_per_dimension(),
        torch.full((2,), math.log2(127.5)).double(),
    )


def test_dequantisation_is_uniform_and_belongs_to_the_image() -> None:
    images = torch.zeros(40, 3, 8, 8)
    noisy = dequantise(images, 1 / 8, seed=2)
    assert noisy.abs().max() < 1 / 16
    assert kstest((noisy.flatten().numpy() * 8 + 0.5), "uniform").pvalue > 1e-3
    assert torch.equal(dequantise(images[7:9], 1 / 8, seed=2, first_image=7), noisy[7:9])
    assert not torch.equal(dequantise(images, 1 / 8, seed=3), noisy)
    assert np.abs(np.corrcoef(noisy[:2].flatten(1).numpy())[0, 1]) < 0.3


def test_levels_of_sources(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8), 100).save(tmp_path / "a" / "one.png")
    assert quantisation_step(open_source(tmp_path)) == 1 / 127.5
    digits = open_source("digits")
    step, (images, _) = quantisation_step(digits), digits.read_many(range(50))
    assert np.array_equal(np.unique(images), np.arange(-1, 1 + step, step))
    assert quantisation_step(open_source("digits", image_size=16)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes must be a whole number of at least 1, not 0"),
        ({"probes": True}, "not True"),
        ({"probe": "normal"}, "rademacher, gaussian, not 'normal'"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2^64 - 1, not -1"),
        ({"labels": [1]}, "1 labels for 2 images"),
        ({"labels": 11}, "label 11 is not allowed"),
        ({"images": torch.zeros(0, 1, 4, 4)}, "at least one image"),
        ({"images": torch.full((2, 1, 4, 4), math.nan)}, "not finite (images 0, 1 of 2)"),
        ({"images": torch.zeros(2, 3, 4, 4)}, "does not fit"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        log_likelihood(
            Sampler(random_model(), solver="dopri5"),
            **{"images": torch.zeros(2, 1, 4, 4), **options},
        )


def test_a_consistency_model_has_no_likelihood() -> None:
    with pytest.raises(
        ValueError, match="a consistency model predicts the data and has no velocity"
    ):
        log_likelihood(Sampler(random_model(sampling="consistency")), torch.zeros(1, 1, 4, 4))


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [
        "likelihood",
        "--depth",
        "4",
        "--num-images",
        "3",
        "--solver",
        "rk4",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main([*given, "--npz", "a.npz"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"bits per dimension: 3 images of digits under digits\nlog p .*0.125 apart; p\(x \|"
        r" class\)",
        text,
    )
    with np.load("a.npz") as arrays:
        sizes = {name: arrays[name].shape for name in arrays}
        assert sizes == {
            "log_prob": (3,),
            "error": (3,),
            "bits_per_dimension": (3,),
            "labels": (3,),
            "noise": (3, 8, 8, 1),
        }
        assert arrays["labels"].tolist() == [0, 1, 2]
        known = arrays["log_prob"]
    source = open_source("digits")
    x = dequantise(torch.from_numpy(source.read_many(range(3))[0]), 1 / 8)
    again = log_likelihood(
        Sampler(load_model("digits", depth=4), depth=4, solver="rk4", steps=3), x, [0, 1, 2]
    )
    np.testing.assert_allclose(known, again.log_prob, rtol=1e-12)
    assert main([*given, "--json", "--null-label", "--probe", "gaussian", "--probes", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["num_images"],
        told["levels_apart"],
        told["probes"],
        told["evaluations_per_image"],
    ) == (3, 0.125, 2, 12)
    assert math.isfinite(told["bits_per_dimension"])
    for options, message in (
        ("--probes 0", "--probes must be at least 1, not 0"),
        ("--data nowhere", "nowhere"),
        ("--depth-schedule 0:4", "leave one out"),
        ("--npz a.txt", "must end in .npz"),
        ("--seed -1", "--seed must be a whole number from 0"),
    ):
        assert main([*given, *options.split()]) == 2
        assert message in capsys.readouterr().err
