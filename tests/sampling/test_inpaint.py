"""Images of which a part is known: the path that it is put back on, engine and model alike, the
options, and what is refused."""

from __future__ import annotations

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
from odelt_fast.sampling.inpaint import inpaint
from odelt_fast.sampling.noise import stack_noise
from tests.helpers import engine_cases
from tests.helpers.small_model import latent_model, random_model


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


def picture(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def left_half(height: int = 8, width: int = 8) -> Tensor:
    """True in the left half, where it is drawn."""
    return torch.arange(width).expand(height, width) < width // 2


def seen_by(sampler: Sampler) -> list[tuple[float, Tensor]]:
    """Times and states at which the sampler's model is asked from now on."""
    seen, network = [], sampler.network

    def watched(x: Tensor, t: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((float(t[0]), x.clone()))
        return network(x, t, *rest, **options)

    sampler.network = watched
    return seen


@pytest.mark.parametrize(
    "solver", ["euler", "heun2", "rk4", "fixed:dopri5", "torchdiffeq:rk4", "torchdiffeq:euler"]
)
def test_the_known_part_is_on_the_path_at_every_evaluation(model: DiT, solver: str) -> None:
    """At stages between the steps too, and it is the image's at the end, to the last bit."""
    image, mask = picture(1, 8, 8), left_half()
    sampler = Sampler(model, depth=2, steps=3, solver=solver, backend="eager")
    seen = seen_by(sampler)
    images = inpaint(sampler, image, mask, 5, seed=7)
    noise = stack_noise(7, range(5), (1, 8, 8))
    assert len(seen) == sampler.stats["evaluations_per_image"] >= 3
    for t, state in seen:
        path = (1 - t) * noise + t * image
        torch.testing.assert_close(state[..., 4:], path[..., 4:], rtol=0, atol=1e-6)
    assert torch.equal(images[..., 4:], image[..., 4:].expand(5, 1, 8, 4))
    assert (images[..., :4] - image[..., :4]).abs().min() > 0


def test_the_rest_is_euler_s_with_the_known_part_in_view(model: DiT) -> None:
    """Step by step by hand, with guidance; what is drawn depends on what is kept."""
    image, mask = picture(1, 8, 8), left_half()
    sampler = Sampler(model, depth=4, steps=4, guidance_scale=1.5, backend="eager")
    labels = torch.tensor([1, 2, 3])
    images = inpaint(sampler, image, mask, 3, labels, seed=3)
    noise = stack_noise(3, range(3), (1, 8, 8))
    x, null = noise, torch.full((3,), 10)
    with torch.no_grad():
        for i in range(4):
            x = torch.where(mask, x, (1 - i / 4) * noise + i / 4 * image)
            label, nothing = (model(x, i / 4, 2, y, depth=4) for y in (labels, null))
            x = x + (nothing + 1.5 * (label - nothing)) / 4
    torch.testing.assert_close(images, torch.where(mask, x, image), rtol=0, atol=1e-5)
    other = inpaint(sampler, -image, mask, 3, labels, seed=3)
    assert (images - other)[..., :4].abs().max() > 1e-3


def test_an_image_depends_on_its_seed_and_index_alone(model: DiT) -> None:
    image, mask = picture(1, 8, 8), left_half()
    many = inpaint(Sampler(model, steps=2, batch_size=2), image, mask, 5, seed=1)
    few = inpaint(Sampler(model, steps=2, batch_size=5), image, mask, 3, seed=1)
    torch.testing.assert_close(many[:3], few, rtol=0, atol=1e-6)
    assert torch.isfinite(inpaint(Sampler(model), picture(1, 4, 12), left_half(4, 12), 2)).all()


@pytest.mark.parametrize("sampling", ["shortcut", "flow", "live_reflow", "mean_flow"])
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 3, "solver": "heun2"}], ids=str)
def test_the_engine_draws_what_the_model_draws(
    monkeypatch: pytest.MonkeyPatch, sampling: str, options: dict[str, Any]
) -> None:
    model = engine_cases.random_model(sampling=sampling)
    image, mask = picture(2, 8, 8), left_half()
    engine_cases.run_fused_on_the_cpu(monkeypatch)
    eager, fused = (
        inpaint(
            Sampler(model, depth=4, guidance_scale=2, backend=backend, **options), image, mask, 3
        )
        for backend in ("eager", "fused")
    )
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-5)
    assert torch.equal(fused[..., 4:], image[..., 4:].expand(3, 2, 8, 4))


def test_latents_are_decoded_at_the_end() -> None:
    latents, mask = picture(4, 4, 4), left_half(4, 4)
    decoded = []

    def decoder(x: Tensor) -> Tensor:
        decoded.append(x)
        return x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    images = inpaint(Sampler(latent_model(), decoder=decoder), latents, mask, 2)
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(decoded[0][..., 2:], latents[..., 2:].expand(2, 4, 4, 2))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sampling": "consistency"}, {}, "consistency model has no straight path"),
        ({"sampling": "diffusion"}, {}, "diffusion model has no straight path"),
        ({}, {"solver": "dopri5"}, r"dopri5 chooses its own steps.*euler"),
        ({}, {"solver": "torchdiffeq:dopri8"}, "chooses its own steps"),
    ],
    ids=str,
)
def test_what_has_no_path_or_no_equal_steps_is_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    sampler = Sampler(random_model(**changes), **options)
    with pytest.raises(ValueError, match=message):
        inpaint(sampler, picture(1, 8, 8), left_half())


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (picture(3, 8, 8), left_half(), r"image must have shape \(1, H, W\)"),
        (picture(8, 8), left_half(), "image must have shape"),
        (picture(1, 8, 9), left_half(8, 9), "multiples of 2"),
        (picture(1, 8, 8), left_half(8, 6), r"the image's size \(8, 8\), not \(8, 6\)"),
        (picture(1, 8, 8) * torch.nan, left_half(), "not finite"),
        (picture(1, 8, 8), torch.ones(8, 8), "all of the image"),
        (picture(1, 8, 8), torch.zeros(8, 8), "nothing is to be drawn"),
    ],
    ids=[f"case{i}" for i in range(7)],
)
def test_images_and_masks_that_do_not_fit_are_refused(
    model: DiT, image: Tensor, mask: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inpaint(Sampler(model), image, mask)


# The command


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A picture and a mask of eight pixels a side, white where it is drawn, and some others."""
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    white = np.where(left_half(), 255, 0).astype(np.uint8)
    for name, array in {
        "x": pixels,
        "mask": white,
        "wide": np.zeros((8, 12), np.uint8),
        "white": np.full((8, 8), 255, np.uint8),
    }.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return {path.stem: str(path) for path in tmp_path.glob("*.png")}


def test_sample_keeps_the_black_part_of_the_mask(files: dict[str, str], tmp_path: Path) -> None:
    out = ["--npz", str(tmp_path / "out.npz"), "--num-images", "3", "--steps", "2", "--quiet"]
    known = ["--init-image", files["x"], "--mask", files["mask"], "--device", "cpu"]
    assert main(["sample", *out, *known, "--labels", "3"]) == 0
    with np.load(tmp_path / "out.npz") as arrays:
        images, labels = arrays["arr_0"][..., 0], arrays["arr_1"]
    original = np.asarray(Image.open(files["x"]))
    assert (images[:, :, 4:] == original[:, 4:]).all()
    assert (images[:, :, :4] != original[:, :4]).any(axis=(1, 2)).all()
    assert labels.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--init-image {x}", "--init-image and --mask go together"),
        ("--mask {mask}", "--init-image and --mask go together"),
        ("--init-image {x} --mask {wide}", "--mask {wide} has 12x8 pixels, the model makes 8x8"),
        ("--init-image {wide} --mask {mask}", "--init-image {wide} has 12x8 pixels"),
        ("--init-image {x} --mask {white}", "all of the image is to be drawn"),
        ("--init-image {broken} --mask {mask}", "--init-image {broken} cannot be read"),
        ("--init-image {x}s --mask {mask}", "--init-image {x}s cannot be read"),
        ("--init-image {x} --mask {mask} --solver dopri5", "dopri5 chooses its own steps"),
        ("--init-image {x} --mask {mask} --interpolate 1 2", "--interpolate and --init-image"),
    ],
)
def test_sample_refuses_what_does_not_fit(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["sample", "--device", "cpu", *arguments.format(**files).split()]) == 2
    error = capsys.readouterr().err
    assert message.format(**files) in error
    assert error.count("\n") == 1


def test_sample_says_that_latents_need_an_encoder(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(latent_model(), tmp_path / "model")
    known = ["--init-image", files["x"], "--mask", files["mask"], "--npz", str(tmp_path / "x.npz")]
    assert main(["sample", "--model", str(tmp_path / "model"), "--device", "cpu", *known]) == 2
    assert "there is no encoder here" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()
