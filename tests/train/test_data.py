"""What a run trains on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from odelt_fast.images.shards import LatentWriter
from odelt_fast.train import main
from odelt_fast.train.data import open_images
from odelt_fast.train.loop import Trainer
from tests.helpers.training import SMALL, small_run
from tests.images.test_images import as_pixels, picture

PLAIN = ["--train-batch-size", "16", "--sampling-steps", "0", "--steps", "1"]
SHAPE = {"hidden-size": 16, "num-heads": 2, "depth": 4, "depth-min": 2, "depth-group": 2}


def mixed_sizes(folder, count=10):
    """Ten classes with two images each: of 10x8 and 12x20."""
    for i in range(count):
        (folder / str(i)).mkdir(parents=True)
        picture(i, (10, 8)).save(folder / str(i) / "0.png")
        picture(i, (12, 20)).save(folder / str(i) / "1.png")
    return str(folder)


def test_images_of_mixed_sizes_are_brought_to_the_models_which_is_said_once(tmp_path, capsys):
    data = mixed_sizes(tmp_path / "data")
    options = [f"--model.{name}={value}" for name, value in SHAPE.items()]
    options += ["--data", data, "--output-dir", str(tmp_path / "run"), "--model.channels", "3"]
    assert main.main([*PLAIN, *options]) == 0
    said = capsys.readouterr()
    sentence = (
        f"the images of {data} are of 10x8 and other sizes, brought to 8x8 (the centred square,"
        " resized)"
    )
    assert (said.out + said.err).count(sentence) == 1


def test_images_are_cropped_and_then_resized(tmp_path):
    run = small_run(tmp_path, data=mixed_sizes(tmp_path / "data"), model=replace(SMALL, channels=3))
    images = open_images(run)
    assert images.image_shape == (3, 8, 8)
    square = picture(1, (10, 8)).crop((1, 0, 9, 8))
    np.testing.assert_allclose(images.read(2)[0], as_pixels(square), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "side", "said"),
    [(1, 8, "made grey"), (3, 8, None), (3, 16, "of 8x8, brought to 16x16"), (1, 4, "8x8.*grey")],
)
def test_colours_and_sizes_become_those_of_the_model(tmp_path, channels, side, said):
    for i in range(2):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        picture(i).save(tmp_path / "data" / str(i) / "0.png")
    model = replace(SMALL, channels=channels, image_size=side, num_classes=2)
    images = Trainer(small_run(tmp_path, data=str(tmp_path / "data"), model=model)).loader.source
    assert images.image_shape == (channels, side, side)
    if said is None:
        assert images.remark is None
    else:
        assert re.search(said, images.remark)


def test_digits_take_the_models_size(tmp_path):
    source = Trainer(small_run(tmp_path, model=replace(SMALL, image_size=16))).loader.source
    assert source.image_shape == (1, 16, 16)
    assert source.remark == (
        "the images of digits are of 8x8, brought to 16x16 (the centred square, resized)"
    )
    assert Trainer(small_run(tmp_path)).loader.source.remark is None


def test_images_are_no_latents(tmp_path):
    run = small_run(tmp_path, data=mixed_sizes(tmp_path / "data"), model=replace(SMALL, channels=4))
    with pytest.raises(ValueError, match=r"1 or 3 for images .* not 4: .* odelt-fast encode"):
        Trainer(run)


def test_latents_are_never_resized(tmp_path):
    writer = LatentWriter(tmp_path / "latents", 4, 4, ("a", "b"), copies=1)
    writer.append(np.zeros((2, 1, 2, 4, 4, 4), np.float32), np.array([0, 1]))
    writer.finish()
    model = replace(SMALL, channels=4, num_classes=2)
    with pytest.raises(ValueError, match=r"have image_size 4, this run's .* --model.image-size 4"):
        Trainer(small_run(tmp_path, data=str(tmp_path / "latents"), model=model))
