"""`odelt-fast encode`: images through a VAE of diffusers to latents that training reads."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from odelt_fast.cli import main
from odelt_fast.images import open_source


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL that makes latents an eighth of the image's side."""
    torch.manual_seed(0)
    block = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        latent_channels=4, scaling_factor=0.2, **block, **kinds
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    return tmp_path / "images"


def test_latents_are_the_posteriors_of_the_vae(
    vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents"
    command = [
        "encode",
        "--data",
        str(images),
        "--vae",
        str(vae),
        "--image-size",
        "32",
        "--out",
        str(out),
        "--batch-size",
        "4",
    ]
    assert main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{images}: 2 classes (0 cat, 1 dog)\n")
    assert "6 images of 2 classes" in said
    latents, source = open_source(out), open_source(images, image_size=32, channels=3)
    assert (len(latents), latents.channels, latents.image_size, latents.class_names) == (
        6,
        4,
        4,
        ("cat", "dog"),
    )
    assert latents.labels.tolist() == source.labels.tolist()
    model = diffusers.AutoencoderKL.from_pretrained(str(vae))
    for flip in (False, True):
        pixels = torch.from_numpy(source.read_many(np.arange(6), [flip] * 6)[0])
        with torch.no_grad():
            means = 0.2 * model.encode(pixels).latent_dist.mean
        found = latents.read_many(np.arange(6), [flip] * 6)[0]
        np.testing.assert_allclose(found, means.numpy(), rtol=2e-3, atol=2e-4)  # stored in float16
    assert main([*command, "--device", "cpu"]) == 0  # a finished folder stays as it is


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--vae": "/nowhere"}, "cannot be loaded"),
        ({"--data": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"--batch-size": "0"}, "--batch-size must be a whole number of at least 1"),
        ({"--device": "cuda"}, "no CUDA GPU"),
    ],
)
def test_mistake_is_one_line(
    vae: Path,
    images: Path,
    tmp_path: Path,
    changes: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes.get("--device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = {
        "--data": str(images),
        "--vae": str(vae),
        "--image-size": "32",
        "--out": str(tmp_path / "out"),
        "--device": "cpu",
    } | changes
    assert main(["encode", *[text for pair in options.items() for text in pair]]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
