"""Models and data that are not square, from training to pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odelt_fast import Sampler, load_model
from odelt_fast.cli import main
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.existing import measure_existing
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.images.shards import LatentWriter
from odelt_fast.model import DiT
from odelt_fast.train.loop import Trainer
from odelt_fast.train.run import train
from tests.helpers import engine_cases
from tests.helpers.small_model import random_model
from tests.helpers.training import SMALL, small_run

WIDE = replace(SMALL, image_size=(8, 12), num_classes=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of several sizes, brighter to the right or to the left."""
    root = tmp_path_factory.mktemp("data")
    for label, sign in (("a", 1), ("b", -1)):
        (root / label).mkdir()
        for i, (width, height) in enumerate([(24, 16), (30, 16), (24, 20), (12, 8)] * 2):
            ramp = np.linspace(0, 255, width)[::sign]
            pixels = np.repeat(ramp[None], height, 0).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(small_run(folder, model=WIDE, data=str(data), checkpointing_steps=4))


def test_a_run_leaves_a_model_of_its_shape(trained: Path) -> None:
    assert json.loads((trained / "config.json").read_text())["image_size"] == [8, 12]
    model = load_model(trained)
    assert model.config == WIDE
    assert model.positions.shape == (4 * 6, 16)
    assert Sampler(model, steps=1)(3, seed=1).shape == (3, 1, 8, 12)


def test_a_run_of_its_shape_continues_bitwise(trained: Path, data: Path) -> None:
    config = small_run(trained, model=WIDE, data=str(data))
    again = Trainer(config)
    assert again.resume(str(trained / "checkpoint-4"))
    for _ in range(4):
        again.step()
    last = load_model(trained).state_dict()
    assert all(torch.equal(weight, last[name]) for name, weight in again.ema_weights.items())


def test_its_images_keep_their_shape(data: Path, tmp_path: Path) -> None:
    """The part of 3:2 in the middle, not a square stretched."""
    trainer = Trainer(small_run(tmp_path, model=WIDE, data=str(data)))
    images, labels = trainer.loader.source.read_many(range(len(trainer.loader.source)))
    assert images.shape == (16, 1, 8, 12)
    slopes = np.diff(images.mean((1, 2)), axis=1).mean(1)
    for slope, label in zip(slopes, labels):
        assert slope * (1 - 2 * label) == pytest.approx(2 / 12, rel=0.25)
    remark = trainer.loader.source.remark or ""
    assert "brought to 12x8 (the centred part of that shape, resized)" in remark


def test_pictures_and_measures_have_its_shape(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sample", "--model", str(trained), "--device", "cpu", "--steps", "1", "--quiet"]
    npz = tmp_path / "x.npz"
    files = ["--out", str(tmp_path / "x.png"), "--npz", str(npz)]
    assert main([*common, *files, "--num-images", "4"]) == 0
    with np.load(npz) as arrays:
        assert arrays["arr_0"].shape == (4, 8, 12, 1)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > picture.height
    known = tmp_path / "known.png", tmp_path / "mask.png"
    for i, path in enumerate(known):
        pixels = np.zeros((8, 12), np.uint8)
        pixels[:, :6] = 255 * i
        Image.fromarray(pixels).save(path)
    masked = ["--init-image", str(known[0]), "--mask", str(known[1])]
    assert main([*common, *masked, "--npz", str(npz), "--num-images", "30"]) == 0
    with np.load(npz) as arrays:
        assert (arrays["arr_0"][:, :, 6:] == 0).all()
    assert main([*common, "--invert", str(known[0]), "--npz", str(npz)]) == 0
    with np.load(npz) as arrays:
        assert arrays["noise"].shape == (1, 8, 12, 1)
    capsys.readouterr()

    class Features(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    torch.jit.script(Features()).save(str(tmp_path / "f.pt"))
    by = {"features": str(tmp_path / "f.pt"), "trust_features": True}
    real = np.full((20, 8, 12, 1), 9, np.uint8)
    real[::2] = 99
    np.savez(tmp_path / "real.npz", real)
    settings = Evaluation(data=str(tmp_path / "real.npz"), metrics=("frechet",), **by)
    measured = measure_existing(
        tmp_path / "real.npz", settings, tmp_path / "out", show=False, device="cpu"
    )
    assert list(measured["metrics"].values()) == [pytest.approx(0, abs=1e-4)]
    assert "20 images of 12x8 pixels" in (tmp_path / "out" / "results.md").read_text()
    with pytest.raises(ValueError, match="takes images of 8x8, not 12x8"):
        measure_existing(
            tmp_path / "real.npz", replace(settings, features="digits"), tmp_path / "o", show=False
        )


@pytest.mark.parametrize("size", [(8, 12), (12, 4)])
def test_the_network_is_that_of_a_square_model_at_other_sides(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """The same weights give the same velocities, in the engine too."""
    square, other = random_model(), random_model(image_size=size)
    x = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 10])
    with torch.no_grad():
        assert torch.equal(other(x, 0.3, 2, labels), square(x, 0.3, 2, labels))
    engine_cases.run_fused_on_the_cpu(monkeypatch)
    images = [
        Sampler(other, depth=2, steps=3, guidance_scale=2, backend=backend)(3, labels, seed=5)
        for backend in ("eager", "fused", "auto")
    ]
    assert images[0].shape == x.shape
    for each in images[1:]:
        torch.testing.assert_close(each, images[0], rtol=0, atol=1e-5)


def test_latents_and_teachers_of_other_shapes_are_refused(data: Path, tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path / "latents", 4, 8, ["a", "b"])
    writer.append(np.zeros((2, 2, 2, 4, 8, 8), np.float32), np.array([0, 1]))
    writer.finish()
    latents = small_run(
        tmp_path / "run", model=replace(WIDE, channels=4), data=str(tmp_path / "latents")
    )
    with pytest.raises(ValueError, match=r"image_size 8, .*\(8, 12\): set --model.image-size 8"):
        Trainer(latents)
    DiT(replace(WIDE, image_size=(12, 8), sampling="flow")).save_pretrained(tmp_path / "teacher")
    distilled = small_run(
        tmp_path / "run",
        model=WIDE,
        data=str(data),
        objective="consistency-distillation",
        init_from=str(tmp_path / "teacher"),
    )
    with pytest.raises(ValueError, match=r"teacher has image_size .*: set --model.image-size 12 8"):
        Trainer(distilled)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 9), "image_size (8, 9) is not a multiple of patch_size 2"),
        ((8, 0), "each of image_size must be"),
        ((8, 8, 8), "a side, or height and width"),
        ((8, 5000), "each of image_size must be"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_are_refused(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DiTConfig.from_dict({"image_size": list(size)})
    assert DiTConfig.from_dict({"image_size": [8, 8]}) == DiTConfig(image_size=8)


def test_the_option_takes_one_number_or_two(data: Path, tmp_path: Path) -> None:
    options = "--model.hidden-size 16 --model.num-heads 2 --model.depth 4 --model.depth-min 2"
    options += " --model.depth-group 2 --model.num-classes 2 --train-batch-size 16 --steps 1"
    options += f" --sampling-steps 0 --log-with --data {data} --output-dir {tmp_path / 'run'}"
    assert main(["train", "--model.image-size", "8", "12", *options.split()]) == 0
    assert load_model(tmp_path / "run").config.image_shape == (1, 8, 12)
