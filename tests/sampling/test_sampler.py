"""Sampling: what an image depends on, guidance, integration, and refusals."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from odelt_fast.engine.compiled import compiled
from odelt_fast.model import DiT
from odelt_fast.operation import Operation, step_index
from odelt_fast.sampling.noise import STREAMS, drawn_labels, image_noise
from odelt_fast.sampling.pictures import image_grid, labelled_grid, to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.sampling.velocity import VelocityField
from odelt_fast.solvers.dispatch import solve
from odelt_fast.solvers.fixed import predict_and_renoise
from odelt_fast.solvers.probability_flow import vp_schedule
from tests.helpers.small_model import random_model


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


def test_noise_is_the_recorded_one() -> None:
    """A change here changes every picture that a seed stands for."""
    expected = [1.3630704879760742, -1.6392173767089844, -1.1712403297424316, 0.4095098376274109]
    np.testing.assert_allclose(image_noise(7, 3, (2, 2)).ravel(), expected, rtol=1e-6)
    np.testing.assert_array_equal(drawn_labels(7, range(8), 10), [7, 9, 2, 4, 1, 8, 9, 7])


def test_no_two_images_share_noise() -> None:
    """Neighbouring seeds and indices, 64-bit seeds that agree in 32 bits, streams and steps: all
    numbers differ."""
    cases = [
        (seed, index, stream, step)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for index in (0, 1, 2**32)
        for stream in STREAMS
        for step in (0, 1)
    ]
    values = np.concatenate(
        [
            image_noise(seed, index, (50,), stream, step).astype(np.float64)
            for seed, index, stream, step in cases
        ]
    )
    # float32 normals collide by chance only near 0; 3600 of them hardly ever do.
    assert len(np.unique(values)) > len(values) - 3


def test_noise_is_standard_normal() -> None:
    values = np.stack([image_noise(0, index, (64,)) for index in range(2000)])
    assert abs(values.mean()) < 0.015
    assert values.std() == pytest.approx(1, abs=0.015)
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.015


@pytest.mark.parametrize("sampling", ["shortcut", "consistency"])
@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_an_image_depends_on_seed_and_index_alone(
    sampling: str, guidance_scale: float | None
) -> None:
    model = random_model(sampling=sampling)

    def draw(count: int, batch_size: int | None) -> Tensor:
        return Sampler(model, steps=3, guidance_scale=guidance_scale, batch_size=batch_size)(
            num_images=count, seed=5
        )

    whole = draw(7, None)
    for batch_size in (1, 3, 100):
        torch.testing.assert_close(draw(7, batch_size), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(2, None), whole[:2], rtol=0, atol=1e-5)
    assert not torch.allclose(Sampler(model, steps=3)(num_images=7, seed=6), whole, atol=0.1)


def test_given_noise_and_labels_equal_the_seeds_own(model: DiT) -> None:
    noise = torch.from_numpy(np.stack([image_noise(9, i, (1, 8, 8)) for i in range(5)]))
    labels = drawn_labels(9, range(5), 10)
    torch.testing.assert_close(
        Sampler(model)(noise=noise, labels=labels), Sampler(model)(5, seed=9), rtol=0, atol=1e-6
    )


def test_drawn_labels_use_every_class_but_not_the_null_label() -> None:
    assert set(drawn_labels(0, range(300), 10).tolist()) == set(range(10))
    assert drawn_labels(0, range(3), 1).tolist() == [1, 1, 1]


def test_one_label_serves_all_and_containers_do_not_matter(model: DiT) -> None:
    sampler = Sampler(model, steps=1)
    expected = sampler(3, labels=[2, 2, 2])
    for labels in (
        2,
        np.int64(2),
        torch.tensor(2),
        (2, 2, 2),
        np.full(3, 2, np.uint8),
        torch.full((3,), 2, dtype=torch.int32),
    ):
        assert torch.equal(sampler(3, labels=labels), expected)
    assert not torch.allclose(sampler(3, labels=10), expected, atol=1e-3)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("scale", [None, 0, 1.0, 2.5, -1.0])
def test_guided_velocity(model: DiT, depth: int, scale: float | None) -> None:
    x, labels = (
        torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1, 5, 10]),
    )
    field = VelocityField(model, Operation(depth=depth, guidance_scale=scale), labels)
    with torch.no_grad():
        given, null = (model(x, 0.25, 2, y, depth=depth) for y in (labels, torch.full((3,), 10)))
        w = 1 if scale is None else scale
        torch.testing.assert_close(field(0.25, x, 2), null + w * (given - null), rtol=0, atol=1e-5)
        field(0.5, x, 2)
    assert field.evaluations == (4 if scale in (2.5, -1.0) else 2)


def test_step_index_of_every_sampling_kind() -> None:
    steps = (1, 2, 3, 4, 100, 127, 128, 1000)
    assert [step_index("shortcut", n) for n in steps] == [0, 1, 1, 2, 6, 6, 7, 7]
    assert [step_index("consistency", n) for n in steps] == [0, 1, 1, 2, 6, 6, 7, 7]
    assert {step_index("flow", n) for n in steps} == {7}
    assert [step_index("live_reflow", n) for n in steps] == [0] * 6 + [7, 7]
    assert {step_index("diffusion", n) for n in steps} == {7}


@pytest.mark.parametrize("scale", [None, 2.0])
def test_diffusion_is_sampled_by_its_probability_flow(scale: float | None) -> None:
    """With the exact noise predictor of Gaussian data (mean 0.5, deviation 0.3), unit noise flows
    to that Gaussian, guided or not."""

    def exact_noise(x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, depth: int) -> Tensor:
        alpha, sigma, _ = vp_schedule(t)
        return sigma * (x - alpha * 0.5) / ((0.3 * alpha) ** 2 + sigma**2)

    model = random_model(sampling="diffusion")
    noise = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    how = Operation(guidance_scale=scale)
    field = VelocityField(model, how, torch.zeros(4000, dtype=torch.long), exact_noise)
    end = solve(field, noise, 7, "euler", steps=500).x
    assert end.mean().item() == pytest.approx(0.5, abs=0.01)
    assert end.std().item() == pytest.approx(0.3, abs=0.01)


def test_euler_converges_with_order_one() -> None:
    """dx/dt = cos(3t) x has the solution x0 exp(sin(3)/3)."""
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    exact = x * math.exp(math.sin(3) / 3)
    errors = [
        (solve(lambda t, s, _: math.cos(3 * t) * s, x, 0, "euler", steps=n).x - exact)
        .abs()
        .max()
        .item()
        for n in (64, 128, 256)
    ]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx(
        [1, 1], abs=0.05
    )


def test_euler_asks_at_the_start_of_each_step_and_leaves_the_noise_alone() -> None:
    x, asked, done = torch.zeros(1, 1, 2, 2), [], []

    def field(t: float, state: Tensor, log2_steps: int) -> Tensor:
        asked.append((t, state[0, 0, 0, 0].item(), log2_steps))
        return torch.ones_like(state)

    assert solve(field, x, 2, "euler", steps=4, on_step=done.append).x.unique().tolist() == [1]
    assert asked == [(0, 0, 2), (0.25, 0.25, 2), (0.5, 0.5, 2), (0.75, 0.75, 2)]
    assert done == [0, 1, 2, 3]
    assert not x.any()


def test_consistency_sampling_predicts_the_data_and_renoises() -> None:
    data, noise = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), -1.0)
    asked, drawn = [], []

    def field(t: float, state: Tensor, log2_steps: int) -> Tensor:
        asked.append((t, state[0, 0, 0, 0].item()))
        return (data - state) / (1 - t)

    def fresh(i: int) -> Tensor:
        drawn.append(i)
        return (i + 1) * noise

    torch.testing.assert_close(predict_and_renoise(field, noise, 4, 2, fresh), data)
    states = [-1, 3 * 0.25 - 1 * 0.75, 3 * 0.5 - 2 * 0.5, 3 * 0.75 - 3 * 0.25]
    assert asked == [pytest.approx(pair) for pair in zip((0, 0.25, 0.5, 0.75), states)]
    assert drawn == [0, 1, 2]


def test_a_training_model_is_sampled_without_dropout_and_stays_in_training() -> None:
    model = random_model(dropout=0.5)
    expected = Sampler(model)(2)
    model.train()
    assert torch.equal(Sampler(model)(2), expected)
    assert model.training


def test_samples_are_float32_and_can_be_used_in_autograd(model: DiT) -> None:
    half = random_model().bfloat16()
    images, exact = Sampler(half)(4), Sampler(model)(4)
    assert images.dtype == exact.dtype == torch.float32
    assert 0 < (images - exact).norm() / exact.norm() < 0.03
    weight = torch.ones((), requires_grad=True)
    (images * weight).sum().backward()
    assert weight.grad is not None


def test_noise_of_another_size_is_sampled_at_that_size(model: DiT) -> None:
    noise = torch.randn(2, 1, 4, 12, generator=torch.Generator().manual_seed(0))
    images = Sampler(model, steps=1)(noise=noise, labels=[0, 10])
    with torch.no_grad():
        torch.testing.assert_close(images, noise + model(noise, 0.0, 0, torch.tensor([0, 10])))


def test_decoder_sees_every_batch_and_may_change_the_shape(model: DiT) -> None:
    sizes = []

    def decoder(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        return latents.repeat(1, 3, 2, 2)

    images = Sampler(model, decoder=decoder, batch_size=2)(5)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(images, Sampler(model)(5).repeat(1, 3, 2, 2), rtol=0, atol=1e-5)


def test_what_runs_is_explained_and_counted(model: DiT) -> None:
    sampler, advanced = Sampler(model, depth=2, steps=8, guidance_scale=3, batch_size=2), []
    told = sampler.explain()
    sampler(5, progress=advanced.append)
    assert sum(advanced) == 5 * 8
    expected = {
        "backend": "eager",
        "device": "cpu",
        "dtype": "float32",
        "depth": 2,
        "live_blocks": 2,
        "steps": 8,
        "solver": "euler",
    }
    assert expected.items() <= told.items()
    assert set(told["not_taken"]) == {"compile", "fused"}
    assert sampler.stats["evaluations_per_image"] == told["evaluations_per_image"] == 16
    assert sampler.stats["evaluations"] == 80
    assert 0 < sampler.stats["seconds"] < 60


def test_blocks_that_cannot_reach_the_output_are_not_needed() -> None:
    model = random_model(depth=5, depth_min=3)  # G = 2: depth 3 runs 2 blocks, depth 5 runs 4
    expected = Sampler(model, depth=3)(2)
    model.truncate(3)
    assert len(model.blocks) == 2
    assert torch.equal(Sampler(model)(2), expected)


def test_compiled_network_equals_the_model_at_every_depth_batch_and_step_count(model: DiT) -> None:
    """Tracing must find one graph without breaks (it would raise). C++ generation, minutes on a
    small machine, is left out."""
    network = compiled(model, "aot_eager")
    for depth, count, steps in ((4, 2, 1), (4, 2, 8), (4, 3, 8), (2, 1, 4)):
        sampler = Sampler(model, depth=depth, steps=steps, backend="compile", guidance_scale=2)
        assert sampler.explain()["backend"] == "compile"
        sampler.network = network
        torch.testing.assert_close(
            sampler(count),
            Sampler(model, depth=depth, steps=steps, guidance_scale=2)(count),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "depth 3 is not allowed: this model runs at depth 2, 4"),
        ({"depth": 0}, "2, 4"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.0}, "not 2.0"),
        ({"steps": True}, "not True"),
        ({"solver": "rk5"}, "solver must be one of euler, midpoint, heun2,"),
        ({"solver": None}, "euler"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, "not '2'"),
        (
            {"backend": "fused"},
            "backend 'fused' cannot run here: it needs an NVIDIA GPU, and the model is on cpu",
        ),
        ({"backend": "tpu"}, "auto, eager, compile, fused"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (
            {"attention": "flash"},
            (
                "attention 'flash' is for the fused backend, which does not run: it needs an"
                " NVIDIA GPU"
            ),
        ),
        (
            {"attention": "fast"},
            "attention must be one of auto, sdpa, cudnn, sdpa_flash, sdpa_efficient, flash,"
            " xformers, triton, not 'fast'",
        ),
        ({"precision": "fp8"}, "precision 'fp8' is for the fused backend"),
        ({"precision": "int8"}, "precision must be one of None, fp8, not 'int8'"),
        ({"time_grid": "cosine"}, "uniform"),
        (
            {"depth_schedule": [2, 4]},
            "depth_schedule must be a function t -> depth, or pairs (t, depth)",
        ),
        ({"rtol": -1e-3}, "rtol must be a finite number of at least 0, not -0.001"),
        ({"atol": math.inf}, "atol"),
        ({"max_steps": 0}, "max_steps"),
        ({"error_norm": "max"}, "per_sample, batch"),
        ({"decoder": 3}, "decoder must be a callable"),
    ],
)
def test_impossible_settings_are_refused(model: DiT, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(model, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be a whole number of at least 1, not 0"),
        ({"num_images": -3}, "not -3"),
        ({"num_images": 10**15}, "no memory for 1000000000000000 images"),
        ({"num_images": 10**30}, "no memory"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2^64 - 1"),
        ({"seed": 2**64}, "from 0 to 2^64 - 1"),
        ({"seed": 0.5}, "not 0.5"),
        ({"num_images": 3, "labels": [1, 2]}, "2 labels for 3 images"),
        ({"num_images": 3, "labels": []}, "0 labels for 3 images"),
        ({"num_images": 1, "labels": [[1]]}, "(1, 1) labels"),
        ({"labels": 11}, "label 11 is not allowed: labels go from 0 to 9, 10 is the null label"),
        ({"labels": -1}, "label -1"),
        ({"labels": 2**64 - 1}, "label 18446744073709551615"),
        ({"labels": 2**70}, "whole numbers from 0 to 10"),
        ({"labels": 1.0}, "whole numbers"),
        ({"labels": "cat"}, "whole numbers"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, "(N, 1, 8, 8)"),
        ({"noise": torch.zeros(2, 1, 9, 8)}, "not (2, 1, 9, 8)"),
        ({"noise": torch.zeros(1, 8, 8)}, "not (1, 8, 8)"),
        ({"noise": torch.zeros(0, 1, 8, 8)}, "not (0, 1, 8, 8)"),
        (
            {"noise": torch.zeros(2, 1, 8, 8), "num_images": 3},
            "num_images is 3, but there is noise for 2",
        ),
        ({"noise": torch.full((2, 1, 8, 8), math.inf)}, "noise holds values that are not finite"),
    ],
)
def test_impossible_requests_are_refused(model: DiT, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(model, steps=1)(**arguments)


def test_samples_that_are_not_finite_are_named() -> None:
    model = random_model()
    with torch.no_grad():
        model.label_embed.weight[4] = math.nan
    with pytest.raises(ValueError, match=r"images 1, 3 of 5"):
        Sampler(model)(5, labels=[0, 4, 1, 4, 2])


def test_pixels_are_clipped_and_rounded() -> None:
    images = torch.tensor([-9.0, -1, -0.996, 0, 0.5, 1, 9]).reshape(7, 1, 1, 1)
    assert to_uint8(images).ravel().tolist() == [0, 0, 1, 128, 191, 255, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.full((1, 1, 2, 2), math.nan))


def test_grid_places_images_row_by_row_and_enlarges_small_ones() -> None:
    images = np.zeros((5, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = [10, 20, 30, 40, 50]
    grid = image_grid(images, columns=2)
    assert grid.mode == "L"
    assert grid.size == (2 * 64 + 2, 3 * 64 + 2 * 2)
    pixels = np.asarray(grid)
    assert [int(pixels[y, x]) for y in (0, 66, 132) for x in (0, 66)][:5] == [10, 20, 30, 40, 50]
    assert (pixels[:8, :8] == 10).all()
    assert not pixels[8:64, 8:64].any()
    assert image_grid(np.zeros((1, 100, 300, 3), np.uint8)).size == (300, 100)
    assert image_grid(np.zeros((3, 8, 8, 3), np.uint8)).mode == "RGB"


@pytest.mark.parametrize("upright", [False, True])
def test_a_labelled_grid_has_its_cells_in_order_beside_names_that_are_whole(upright: bool) -> None:
    cells = [
        [np.full((1, 64, 64, 3), 40 * row + 10 * column + 1, np.uint8) for column in range(2)]
        for row in range(3)
    ]
    rows = ["a", "a long name of a method", "b"] if upright else ["l = 12", "l = 8", "l = 4"]
    pixels = np.asarray(labelled_grid(cells, rows, ["T = 4", "T = 1"], upright=upright))
    left = next(x for x in range(pixels.shape[1]) if (pixels[48:112, x] == 1).all())
    for row, column in itertools.product(range(3), range(2)):
        top, side = 48 + 72 * row, left + 72 * column
        assert (pixels[top : top + 64, side : side + 64] == 40 * row + 10 * column + 1).all()
    for row in range(3):
        assert (pixels[48 + 72 * row : 112 + 72 * row, :left] < 100).any()
    assert (pixels[:, left - 4 : left] == 255).all()  # no name runs into the pictures
    assert (pixels[:48, left:] < 100).any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 4), np.uint8), "4 channels make no picture"),
        (np.zeros((1, 8, 8, 1), np.float32), "uint8"),
        (np.zeros((0, 8, 8, 1), np.uint8), "not (0, 8, 8, 1)"),
        (np.broadcast_to(np.uint8(0), (10**6, 256, 256, 3)), "too large: write arrays with --npz"),
    ],
)
def test_what_makes_no_picture_is_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        image_grid(images)
