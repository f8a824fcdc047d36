"""The flow between two times: states on the way, images to noise and back, images between two
noises, and their options."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from odelt_fast import Sampler, save_model
from odelt_fast.cli import main
from odelt_fast.model import DiT
from odelt_fast.sampling.flow_map import flow, interpolate, invert, slerp, trajectory
from odelt_fast.sampling.noise import image_noise
from tests.helpers.small_model import random_model


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "solver", ["euler", "heun2", "dopri5", "torchdiffeq:dopri5", "torchdiffeq:rk4"]
)
def test_trajectory_leads_to_the_sampler_s_images(model: DiT, solver: str) -> None:
    sampler = Sampler(model, depth=2, solver=solver, steps=4, guidance_scale=1.5, batch_size=2)
    expected = sampler(3, seed=5)
    solution = trajectory(sampler, [0, 0.25, 0.6, 1], 3, seed=5)
    assert torch.equal(solution.x, expected)
    assert solution.trajectory.shape == (4, 3, 1, 8, 8)
    assert torch.equal(
        solution.trajectory[0],
        torch.from_numpy(np.stack([image_noise(5, i, (1, 8, 8)) for i in range(3)])),
    )
    torch.testing.assert_close(solution.trajectory[-1], expected)
    half = Sampler(model, depth=2, solver=solver, steps=1, guidance_scale=1.5, batch_size=2)
    if solver == "euler":
        part = flow(half, solution.trajectory[0], [2, 2, 2], 0, 0.25, log2_steps=2)
        same = trajectory(sampler, [0.25], 3, 2, 5)
        torch.testing.assert_close(part.x, same.trajectory[0], rtol=1e-5, atol=1e-5)


def test_states_on_the_way_are_where_the_flow_is(model: DiT) -> None:
    sampler = Sampler(model, solver="dopri5", rtol=1e-6, atol=1e-6)
    states = trajectory(sampler, [0.3, 0.7], 2, 1).trajectory
    there = flow(sampler, states[0], 1, 0.3, 0.7)
    torch.testing.assert_close(there.x, states[1], rtol=0, atol=1e-3)
    assert sampler.stats["images"] == 2
    assert (
        sampler.stats["evaluations"]
        == sum(sampler.stats["evaluations_needed"])
        == int(there.evaluations.sum())
    )


@pytest.mark.parametrize(
    "solver", ["dopri5", "bosh3", "rk4", "torchdiffeq:dopri5", "torchdiffeq:rk4"]
)
def test_inversion_comes_back_the_better_the_tighter(solver: str) -> None:
    model = random_model(std=0.2)

    def error(tolerance: float, steps: int) -> float:
        sampler = Sampler(model, solver=solver, rtol=tolerance, atol=tolerance, steps=steps)
        found = invert(sampler, pictures(), [1, 2, 10])
        torch.testing.assert_close(
            found.error, (found.images - pictures()).flatten(1).square().mean(1).sqrt()
        )
        assert sum(sampler.stats["evaluations_needed"]) == int(found.evaluations.sum())
        return found.error.max().item()

    coarse, fine = error(1e-1, 1), error(1e-5, 24)
    assert fine < 2e-4
    assert fine < coarse / 10


def test_inversion_of_an_affine_flow() -> None:
    """A diffusion model that sees no noise: dx/dt = beta x/2, so the noise is the image divided by
    exp(integral of beta/2)."""
    model = random_model(sampling="diffusion")
    torch.nn.init.zeros_(model.final_layer.out.weight)
    torch.nn.init.zeros_(model.final_layer.out.bias)
    found = invert(Sampler(model, solver="dopri5", rtol=1e-6, atol=1e-6), pictures())
    torch.testing.assert_close(
        found.noise * math.exp((0.1 + 20) / 4), pictures(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.images, pictures(), rtol=1e-3, atol=1e-3)


def test_backward_the_network_is_told_the_instantaneous_velocity(model: DiT) -> None:
    told, labels = set(), set()

    def network(x: Tensor, t: Tensor, log2_steps: Tensor, y: Tensor, depth: int) -> Tensor:
        told.update(log2_steps.tolist())
        labels.update(y.tolist())
        return model(x, t, log2_steps, y, depth=depth)

    sampler = Sampler(model, steps=2)  # whose own steps are jumps of index 1
    sampler.network = network
    assert sampler.operation.step_index("shortcut") == 1
    invert(sampler, pictures())
    assert told == {7}
    assert labels == {10}  # the null label
    trajectory(sampler, [0.5], 2, 3)
    assert told == {7, 1}


def test_interpolation_begins_and_ends_with_the_seeds_own_images(model: DiT) -> None:
    sampler = Sampler(model, steps=2)
    row = interpolate(sampler, 3, 8, 5, label=4)
    torch.testing.assert_close(row[:1], sampler(1, 4, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row[-1:], sampler(1, 4, 8), rtol=1e-5, atol=1e-5)
    steps = (row[1:] - row[:-1]).flatten(1).norm(dim=1)
    assert (steps > 0).all()
    assert (steps < (row[-1] - row[0]).norm()).all()


def test_slerp_keeps_the_length_and_turns_evenly() -> None:
    a, b = (torch.from_numpy(image_noise(seed, 0, (3, 8, 8))).double() for seed in (0, 1))
    b = b * a.norm() / b.norm()
    points = [slerp(a, b, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for point in points:
        torch.testing.assert_close(point.norm(), a.norm())
    cosines = [
        torch.dot(p.flatten(), q.flatten()) / a.norm() ** 2 for p, q in itertools.pairwise(points)
    ]
    torch.testing.assert_close(torch.stack(cosines), cosines[0].expand(4))
    assert (torch.lerp(a, b, 0.5).norm() / a.norm()) < 0.8  # what a straight line would do
    assert torch.equal(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: trajectory(s, [0.5, 0.2], 2), "run from t0 = 0.0 to t1 = 1.0"),
        (lambda s: trajectory(s, [1.5], 2), "run from"),
        (lambda s: interpolate(s, 0, 1, 1), "frames must be at least 2"),
        (lambda s: interpolate(s, -1, 1), "seed must be a whole number"),
        (lambda s: trajectory(s, [1], 2, seed=2**64), "from 0 to 2^64 - 1"),
        (lambda s: invert(s, pictures(), [1]), "1 labels for 3 images"),
        (lambda s: invert(s, pictures() * math.nan), "not finite (images 0, 1, 2 of 3)"),
        (lambda s: invert(s, pictures(0)), "at least one image"),
        (
            lambda s: invert(Sampler(random_model(sampling="consistency")), pictures()),
            "has no velocity",
        ),
        (
            lambda s: invert(
                Sampler(s.model, solver="dopri5", rtol=1e-6, atol=1e-6, max_steps=2), pictures()
            ),
            "max_steps: images 0, 1, 2 of 3",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(model: DiT, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Sampler(model, solver="dopri5"))


def test_options_of_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(save_model(random_model(), tmp_path / "model"))
    sample = ["sample", "--model", folder, "--dtype", "float32", "--quiet"]

    def size(name: str) -> tuple[int, int]:
        with Image.open(name) as picture:
            return (
                (picture.width + 2) // 66,
                (picture.height + 2) // 66,
            )  # tiles of 64 pixels with gaps of 2

    assert (
        main(
            [
                *sample,
                "--num-images",
                "2",
                "--trajectory",
                "0",
                "0.5",
                "1",
                "--out",
                "a.png",
                "--npz",
                "a.npz",
            ]
        )
        == 0
    )
    assert size("a.png") == (3, 2)
    with np.load("a.npz") as arrays:
        assert arrays["trajectory"].shape == (2, 3, 8, 8, 1)
        assert arrays["times"].tolist() == [0, 0.5, 1]
        assert arrays["arr_0"].shape == (2, 8, 8, 1)
        np.testing.assert_array_equal(
            arrays["trajectory"][1, 0], image_noise(0, 1, (1, 8, 8)).transpose(1, 2, 0)
        )
    capsys.readouterr()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save("b.png")
    assert (
        main(
            [
                *sample,
                "--invert",
                "b.png",
                "--solver",
                "dopri5",
                "--rtol",
                "1e-4",
                "--atol",
                "1e-4",
                "--npz",
                "b.npz",
            ]
        )
        == 0
    )
    assert re.search(
        r"originals, their noise, and what it becomes: error \d", capsys.readouterr().out
    )
    with np.load("b.npz") as arrays:
        np.testing.assert_allclose(
            arrays["arr_0"][0, :, :, 0], np.arange(64).reshape(8, 8) * 3, atol=1
        )
        assert arrays["error"][0] < 1e-2
        assert arrays["arr_1"].tolist() == [10]
    assert (
        main([*sample, "--invert", "digits", "--num-images", "4", "--out", "c.png", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["num_images"] == 4
    assert size("c.png") == (3, 4)
    assert (
        main(
            [*sample, "--interpolate", "3", "8", "--frames", "5", "--labels", "4", "--out", "d.png"]
        )
        == 0
    )
    assert size("d.png") == (5, 1)
    given = ["--depth-schedule", "0:2,0.5:4", "--num-images", "2", "--out", "e.png"]
    assert main([*sample, *given]) == 0
    assert "depth by schedule" in capsys.readouterr().out
    assert main([*sample, *given, "--solver", "dopri5", "--error-norm", "batch"]) == 0
    capsys.readouterr()
    for options, message in (
        (
            "--depth-schedule 0:2,0.5",
            "--depth-schedule must be times and depths such as 0:4,0.5:12, not '0:2,0.5'",
        ),
        ("--depth-schedule 0:3", "depth 3 is not allowed"),
        ("--depth-schedule 0.5:2", "rising from 0"),
        ("--depth-schedule 0:2 --depth 2", "leave one out"),
        ("--depth-schedule 0:2 --solver dopri5", "error_norm='batch'"),
        ("--trajectory 1 0", "rising times from 0 (noise) to 1 (data)"),
        ("--trajectory 0.5 --interpolate 1 2", "leave one out"),
        ("--interpolate 1 2 --frames 1", "--frames must be at least 2"),
        ("--interpolate 1 -2", "a whole number from 0 to 2^64 - 1"),
        ("--interpolate 1 2 --labels 1 2", "draws one class"),
        ("--invert nowhere.png", "nowhere.png"),
        ("--invert model/config.json", "cannot be read"),
    ):
        assert main([*sample, *options.split()]) == 2, options
        assert message in capsys.readouterr().err
