"""Latents: written, resumed after a kill, sampled at each read; foreign layouts; and folders that
were made to do harm."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from odelt_fast.images import DigitsSource, open_source
from odelt_fast.images.encode import encode_images
from odelt_fast.images.shards import LatentWriter

SHAPE = (2, 2, 4, 3, 3)  # copies, mean and standard deviation, channels, side, side


class SmallEncoder(torch.nn.Module):
    """A real encoder: one strided convolution for the mean, one for the logarithm of the
    variance."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(8, channels, 2, 2, generator=generator) / 4

    def forward(self, images):
        mean, log_variance = torch.nn.functional.conv2d(images, self.weight, stride=2).chunk(
            2, dim=1
        )
        return mean, torch.exp(0.5 * log_variance)


class Mirrored(DigitsSource):
    """The first 50 digits, with leave to mirror them."""

    flippable = True

    def __init__(self) -> None:
        super().__init__()
        self.labels, self._images = self.labels[:50], self._images[:50]


def moments(count: int, seed: int = 0) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32))


def written(folder: Path, count: int = 10, shard_length: int = 4) -> np.ndarray:
    writer = LatentWriter(folder, 4, 3, ["a", "b", "c"], shard_length=shard_length)
    values = moments(count)
    writer.append(values, np.arange(count) % 3)
    writer.finish()
    return values


# Our own layout


def test_latents_are_what_was_written_in_half_precision(tmp_path):
    values = written(tmp_path)
    source = open_source(str(tmp_path))
    assert (
        len(source),
        source.channels,
        source.image_size,
        source.class_names,
        source.flippable,
    ) == (10, 4, 3, ("a", "b", "c"), True)
    latents, labels = source.read_many([9, 0, 4], [False, True, False])
    stored = values.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(
        latents, np.stack([stored[9, 0, 0], stored[0, 1, 0], stored[4, 0, 0]]) * 0.18215, rtol=1e-6
    )
    assert labels.tolist() == [0, 0, 1]
    assert sorted(path.name for path in tmp_path.glob("moments*")) == [
        "moments-00000.npy",
        "moments-00001.npy",
        "moments-00002.npy",
    ]


def test_the_posterior_is_sampled_with_the_given_noise(tmp_path):
    values = written(tmp_path).astype(np.float16).astype(np.float32)
    source, rng = open_source(str(tmp_path)), np.random.default_rng(5)
    noise = rng.standard_normal((4000, 4, 3, 3), np.float32)
    latent, _ = source.read(3, flip=True, noise=noise[0])
    np.testing.assert_allclose(
        latent, (values[3, 1, 0] + values[3, 1, 1] * noise[0]) * 0.18215, rtol=1e-5, atol=1e-6
    )
    many, _ = source.read_many([7, 3], [False, True], noise[[1, 0]])
    np.testing.assert_array_equal(many[1], latent)
    draws = source.read_many([3] * 4000, None, noise)[0] / 0.18215
    np.testing.assert_allclose(
        draws.mean(0), values[3, 0, 0], atol=5 * values[3, 0, 1].max() / 4000**0.5
    )
    np.testing.assert_allclose(draws.std(0), values[3, 0, 1], rtol=0.1)
    with pytest.raises(ValueError, match="2 indices need as many flips and noise of"):
        source.read_many([1, 2], None, noise[:1])


def test_latents_can_be_pickled_and_cannot_be_resized(tmp_path):
    written(tmp_path)
    source = open_source(str(tmp_path), image_size=3, channels=4)
    copy = pickle.loads(pickle.dumps(source))
    assert "_shards" not in vars(copy)
    np.testing.assert_array_equal(copy.read(9)[0], source.read(9)[0])
    with pytest.raises(ValueError, match="have image_size 3, which cannot be changed to 32"):
        open_source(str(tmp_path), image_size=32)


def test_encoding_mirrors_the_images_and_not_the_latents(tmp_path):
    source, encoder = Mirrored(), SmallEncoder()
    encode_images(source, encoder, tmp_path, batch_size=7, shard_length=16, progress=False)
    latents = open_source(str(tmp_path))
    images = torch.from_numpy(source.read_many(range(50))[0])
    for flip, view in ((False, images), (True, images.flip(-1))):
        read, labels = latents.read_many(range(50), [flip] * 50)
        np.testing.assert_allclose(
            read, encoder(view)[0].numpy() * 0.18215, rtol=2e-3, atol=1e-4
        )  # half precision has 11 bits
        np.testing.assert_array_equal(labels, source.labels)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.[nj]*")}
    encode_images(source, encoder, tmp_path, batch_size=7, shard_length=16, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.[nj]*")} == before


def test_a_source_that_must_not_be_mirrored_has_no_mirrored_latents(tmp_path):
    encode_images(DigitsSource(), SmallEncoder(), tmp_path, batch_size=500, progress=False)
    source = open_source(str(tmp_path))
    assert not source.flippable
    assert len(source) == 1797
    with pytest.raises(ValueError, match="no latents of mirrored images"):
        source.read(0, flip=True)


def test_a_killed_encoding_continues_at_its_last_whole_shard(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from tests.images.test_latents import Mirrored, SmallEncoder, encode_images
class Killed(SmallEncoder):
    def forward(self, images):
        if len(list(Path(sys.argv[1]).glob("moments-*.npy"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
encode_images(Mirrored(), Killed(), sys.argv[1], batch_size=1, shard_length=5, progress=False)
"""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    paths = [str(Path(__file__).resolve().parents[2]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code, str(killed)], env=environment)
    assert done.returncode == -signal.SIGKILL
    (killed / ".odelt-fast-0.npy").write_bytes(b"half")  # what a kill inside a write leaves
    with pytest.raises(ValueError, match="not finished"):
        open_source(str(killed))
    (killed / "moments-00001.npy").write_bytes(
        (killed / "moments-00001.npy").read_bytes()[:200]
    )  # what a lost power supply may leave
    before = (killed / "moments-00000.npy").stat().st_mtime_ns
    for folder in (killed, whole):
        encode_images(
            Mirrored(), SmallEncoder(), folder, batch_size=8, shard_length=5, progress=False
        )
    assert (killed / "moments-00000.npy").stat().st_mtime_ns == before
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in killed.iterdir())
    # A batch of another size may differ in the last bit of the arithmetic.
    np.testing.assert_allclose(
        open_source(str(killed)).read_many(range(50))[0],
        open_source(str(whole)).read_many(range(50))[0],
        rtol=2e-3,
    )


def test_other_settings_never_mix_with_latents_that_are_there(tmp_path):
    encode_images(Mirrored(), SmallEncoder(), tmp_path, encoder_name="first", progress=False)
    with pytest.raises(ValueError, match=r"holds other latents .*second"):
        encode_images(Mirrored(), SmallEncoder(), tmp_path, encoder_name="second", progress=False)
    with pytest.raises(ValueError, match="holds other latents"):
        encode_images(
            DigitsSource(), SmallEncoder(), tmp_path, encoder_name="first", progress=False
        )


def test_an_encoder_that_overflows_is_told_with_the_image(tmp_path):
    class Overflowing(SmallEncoder):
        def forward(self, images):
            mean, std = super().forward(images)
            mean[(images == self.target).flatten(1).all(1)] = 1e6
            return mean, std

    encoder = Overflowing()
    encoder.target = torch.from_numpy(Mirrored().read(17)[0])
    with pytest.raises(ValueError, match="image 17 that float16 cannot hold"):
        encode_images(Mirrored(), encoder, tmp_path, batch_size=50, progress=False)
    with pytest.raises(ValueError, match="must give mean and standard deviation"):
        encode_images(
            Mirrored(), lambda images: (images, images[:, :, :2]), tmp_path / "x", progress=False
        )


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written to"):
        encode_images(Mirrored(), SmallEncoder(), tmp_path / "file", progress=False)


def test_the_writer_refuses_wrong_moments_and_labels(tmp_path):
    writer = LatentWriter(tmp_path, 4, 3, ["a", "b"])
    for values, labels, message in [
        (moments(2), np.array([0, 2]), "from 0 to 1"),
        (moments(2), np.array([0, -1]), "from 0 to 1"),
        (moments(2), np.array([0.0, 1.0]), "whole numbers"),
        (moments(2)[:, :1], np.array([0, 1]), "of shape"),
        (moments(3), np.array([0, 1]), "of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.append(values, labels)
    with pytest.raises(ValueError, match="no latents were written"):
        writer.finish()


# Hostile folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no manifest of latents"),
        ({"version": 2}, "no manifest of latents"),
        ({"channels": 0}, "channels must be a whole number from 1"),
        ({"channels": True}, "channels must be"),
        ({"size": 10**12}, "size must be"),
        ({"copies": 3}, "copies must be"),
        ({"scale": 0}, "scale must be a number from"),
        ({"scale": float("nan")}, "NaN is not a number"),
        ({"scale": "0.2"}, "scale must be"),
        ({"class_names": []}, "class_names must be"),
        ({"class_names": ["a"]}, "label 1; allowed are 0 to 0"),
        ({"shards": []}, "at least one shard"),
        (
            {"shards": [{"moments": "../moments-00000.npy", "length": 4}]},
            "shard 0 must be named moments-00000.npy",
        ),
        ({"shards": [{"moments": "/etc/passwd", "length": 4}]}, "shard 0 must be named"),
        ({"shards": [{"moments": "moments-00000.npy", "length": -4}]}, "shard 0"),
        (
            {"shards": [{"moments": "moments-00000.npy", "length": 10**11}]},
            r"holds float16 \(4, 2, 2, 4, 3, 3\), not",
        ),
        ({"shards": [{"moments": "moments-00000.npy", "length": 3}]}, r"holds float16 \(4"),
        ({"channels": 2}, "holds float16"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, change, message):
    written(tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_manifests_and_shards_end_in_a_clear_error(tmp_path):
    written(tmp_path)
    manifest, shard = tmp_path / "manifest.json", tmp_path / "moments-00001.npy"
    good_manifest, good_shard = manifest.read_bytes(), shard.read_bytes()
    for content in (b"", b"[]", b"{", b"[" * 200_000, b"\xff\xfe", good_manifest[:-20]):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_source(str(tmp_path))
    manifest.write_bytes(good_manifest)
    huge = good_shard.replace(b"(4, 2, 2, 4, 3, 3), ", b"(4, 2, 2, 4, 3, 9**9)")
    for content in (
        b"",
        b"PK\x03\x04",
        good_shard[:-1],
        good_shard[:60],
        huge,
        pickle.dumps([1]),
        good_shard.replace(b"<f2", b">f2"),
    ):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"moments-00001\.npy"):
            open_source(str(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=r"moments-00001\.npy cannot be read"):
        open_source(str(tmp_path))


def test_no_damaged_header_escapes_the_clear_error(tmp_path):
    written(tmp_path)
    shard, generator = tmp_path / "moments-00000.npy", np.random.default_rng(0)
    good = np.frombuffer(shard.read_bytes(), np.uint8)
    refused = 0
    for _ in range(400):
        content = good.copy()
        content[generator.integers(0, 128, 3)] = generator.integers(0, 256, 3)
        shard.write_bytes(content.tobytes())
        try:
            open_source(str(tmp_path)).read(0)
        except ValueError:
            refused += 1
    assert refused > 300


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_pickled_arrays_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = np.array([Trap()], object)
    written(tmp_path / "ours")
    np.save(tmp_path / "ours" / "moments-00000.npy", trap, allow_pickle=True)
    fast_dit(tmp_path / "fast", 3)
    np.save(tmp_path / "fast" / "x_labels" / "1.npy", trap, allow_pickle=True)
    for folder in ("ours", "fast"):
        with pytest.raises(ValueError, match="cannot be read"):
            open_source(f"./{folder}")
    fast_dit(tmp_path / "fast", 3)
    np.save(tmp_path / "fast" / "x_features" / "1.npy", trap, allow_pickle=True)
    with pytest.warns(
        UserWarning, match=r"1 of 3 latents left out: x_features/1\.npy \(pickled objects\)"
    ):
        assert len(open_source("./fast")) == 2
    assert not (tmp_path / "trapped").exists()


# Foreign layouts


def fast_dit(folder: Path, count: int, labels=None) -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((count, 1, 4, 2, 2)).astype(np.float32)
    for name in ("x_features", "x_labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        np.save(folder / "x_features" / f"{i}.npy", values[i])
        np.save(
            folder / "x_labels" / f"{i}.npy", np.array([i % 3 if labels is None else labels[i]])
        )
    return values


def test_fast_dit_latents_are_read_as_they_are_in_numeric_order(tmp_path):
    values = fast_dit(tmp_path, 12)
    source = open_source(str(tmp_path))
    assert (source.channels, source.image_size, source.num_classes, source.flippable) == (
        4,
        2,
        3,
        False,
    )
    latents, labels = source.read_many(
        range(12), None, np.ones((12, *source.image_shape), np.float32)
    )
    np.testing.assert_array_equal(latents, values[:, 0])
    assert labels.tolist() == [i % 3 for i in range(12)]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"1\.npy has the label -1"),
        (0.5, "float64 .* not one whole number"),
        ([0, 1], "not one whole number"),
        (1 << 63, "no class"),
    ],
)
def test_wrong_labels_of_fast_dit_are_told(tmp_path, label, message):
    fast_dit(tmp_path, 3)
    np.save(tmp_path / "x_labels" / "1.npy", np.array(label))
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_fast_dit_folders_that_do_not_match_are_told(tmp_path):
    fast_dit(tmp_path, 3)
    (tmp_path / "x_labels" / "2.npy").unlink()
    with pytest.raises(ValueError, match=r"x_labels/2\.npy cannot be read"):
        open_source(str(tmp_path))
    fast_dit(tmp_path, 3)
    np.save(tmp_path / "x_features" / "1.npy", np.zeros((1, 4, 3, 3), np.float32))
    with pytest.raises(ValueError, match="different shapes"):
        open_source(str(tmp_path))
    (tmp_path / "x_features" / "1.npy").write_bytes(
        (tmp_path / "x_features" / "0.npy").read_bytes()[:-3]
    )
    with pytest.warns(UserWarning, match="truncated"):
        source = open_source(str(tmp_path))
    assert source.labels.tolist() == [0, 2]
    (tmp_path / "x_labels").rename(tmp_path / "y_labels")
    with pytest.raises(ValueError, match="x_features but no x_labels"):
        open_source(str(tmp_path))


def repa(folder: Path, labels) -> np.ndarray:
    values = np.abs(np.random.default_rng(2).standard_normal((5, 8, 2, 2))).astype(np.float32)
    (folder / "vae-sd" / "00000").mkdir(parents=True, exist_ok=True)
    for i in range(5):
        np.save(folder / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy", values[i])
    pairs = (
        None
        if labels is None
        else [[f"00000/img-mean-std-{i:08d}.npy", label] for i, label in enumerate(labels)]
    )
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return values


def test_repa_latents_are_sampled_and_scaled(tmp_path):
    values = repa(tmp_path, [0, 1, 2, 1, 0])
    for data in (tmp_path, tmp_path / "vae-sd"):
        source = open_source(str(data))
        assert source.labels.tolist() == [0, 1, 2, 1, 0]
        np.testing.assert_allclose(source.read(3)[0], values[3, :4] * 0.18215, rtol=1e-6)
        noise = np.random.default_rng(4).standard_normal((4, 2, 2), np.float32)
        sampled, _ = source.read(3, noise=noise)
        np.testing.assert_allclose(
            sampled, (values[3, :4] + values[3, 4:] * noise) * 0.18215, rtol=1e-5, atol=1e-6
        )
    repa(tmp_path, None)
    assert open_source(str(tmp_path)).num_classes == 1


def test_wrong_labels_of_repa_are_told(tmp_path):
    for labels, message in [
        ([0, 1], r"00000/img-mean-std-00000002\.npy has no label"),
        ([0, 1, "2", 1, 0], "the label '2', no whole number"),
        ([0, 1, True, 1, 0], "no whole number"),
        ([0, 1, -2, 1, 0], "has the label -2"),
    ]:
        repa(tmp_path, labels)
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path))
    for text in (
        "",
        "[]",
        "{}",
        '{"labels": 3}',
        '{"labels": ["abc"]}',
        '{"labels": [[[], 1]]}',
        "[" * 200_000,
    ):
        (tmp_path / "vae-sd" / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            open_source(str(tmp_path))
    (tmp_path / "vae-sd" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"has no dataset\.json"):
        open_source(str(tmp_path))


def test_latents_with_values_that_are_not_finite_are_replaced_and_named(tmp_path):
    values = fast_dit(tmp_path, 3)
    np.save(tmp_path / "x_features" / "1.npy", np.full((1, 4, 2, 2), np.nan, np.float32))
    source = open_source(str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"x_features/1\.npy has become unreadable \(values that are not finite\)"
    ):
        latent, label = source.read(1)
    np.testing.assert_array_equal(latent, values[2, 0])
    assert label == 2
