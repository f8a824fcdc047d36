"""Distances between sets of images: the reference's recordings, closed forms, the libraries that
define them, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from odelt_fast.evaluation.features import (
    BUNDLED,
    bundled_for,
    load_features,
    quantized,
    resize_8_bit,
    resize_and_clip,
)
from odelt_fast.evaluation.metrics import (
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    kept_rows,
    kernel_distance,
    moments_of,
    precision_recall,
    read_statistics,
    write_statistics,
)
from odelt_fast.evaluation.small_features import SmallConfig, SmallNetwork, save_features
from odelt_fast.sampling.pictures import to_uint8
from tests.helpers.metric_cases import features, inception_input, inception_weights, logits

DATA = Path(__file__).parents[1] / "data"
LIBRARIES = json.loads((DATA / "metrics_libraries.json").read_text())


def statistics(rows: np.ndarray) -> Statistics:
    return moments_of([rows], rows.shape[1]).statistics()


# Frechet distance and moments


def test_frechet_distance_is_the_recorded_one() -> None:
    case = np.load(DATA / "reference" / "training.npz", allow_pickle=False)
    ours = frechet_distance(statistics(case["fid/acts1"]), statistics(case["fid/acts2"]))
    assert abs(ours / float(case["fid/value"]) - 1) < 1e-6


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Diagonal: sum (m - n)^2 + (s - r)^2. Commuting: the same in any common basis. Equal: 0."""
    draw = np.random.default_rng(0)
    m, n = draw.normal(size=(2, 6))
    s, r = draw.uniform(0.5, 3, size=(2, 6))
    expected = ((m - n) ** 2).sum() + ((s - r) ** 2).sum()
    basis = np.linalg.qr(draw.normal(size=(6, 6)))[0]
    for turn in (np.eye(6), basis):
        a = Statistics(turn @ m, turn @ np.diag(s**2) @ turn.T)
        b = Statistics(turn @ n, turn @ np.diag(r**2) @ turn.T)
        assert abs(frechet_distance(a, b, offset=0) / expected - 1) < 1e-10
        assert (
            abs(frechet_distance(a, b) / expected - 1) < 1e-5
        )  # the reference's offset of 1e-6 costs a little
        assert abs(frechet_distance(a, a, offset=0)) < 1e-10


def test_frechet_distance_survives_singular_covariances() -> None:
    """Features that never vary: S_a of rank 1 against S_b = 4 S_a leaves (2 - 1)^2 of its one
    eigenvalue."""
    direction = np.ones(5) / 5**0.5
    a, b = (
        Statistics(np.zeros(5), scale * np.outer(direction, direction)) for scale in (9.0, 36.0)
    )
    assert abs(frechet_distance(a, b, offset=0) - 9) < 1e-6


def test_moments_are_numpy_s_for_any_partition() -> None:
    rows = features("real") + 1000  # far from 0: sums of squares would lose six digits
    for size in (1, 7, 300):
        found = moments_of((rows[i : i + size] for i in range(0, 300, size)), 12).statistics()
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-12)


def test_merged_moments_are_those_of_the_whole() -> None:
    rows = features("real")
    one, two = moments_of([rows[:100]], 12), moments_of([rows[100:150], rows[150:]], 12)
    one.merge(two)
    one.merge(Moments(12))
    whole = statistics(rows)
    np.testing.assert_allclose(one.statistics().mean, whole.mean, rtol=0, atol=1e-14)
    np.testing.assert_allclose(one.statistics().covariance, whole.covariance, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: moments_of([features("real")[:12]], 12).statistics(),
            "12 images are too few for the covariance of 12 features",
        ),
        (lambda: moments_of([features("real")[:1]], 12).statistics(allow_few=True), "too few"),
        (
            lambda: Moments(12).update(np.full((3, 12), np.nan)),
            "features of image 0 are not finite",
        ),
        (lambda: Moments(12).update(np.zeros((3, 11))), r"must be \(N, 12\)"),
        (lambda: Moments(12).merge(Moments(3)), "cannot be merged"),
        (
            lambda: frechet_distance(
                statistics(features("real")), statistics(features("real")[:, :5])
            ),
            "two feature networks",
        ),
        (lambda: kernel_distance(features("real"), features("real")), "subsets of 1000"),
        (
            lambda: kernel_distance(features("real"), features("real")[:, :5], subset_size=9),
            r"must be \(N, 5\)",
        ),
        (lambda: precision_recall(features("real")[:3], features("real")), "more than 3 images"),
        (lambda: inception_score([logits()[:4]], 4), "10 splits"),
    ],
)
def test_metrics_refuse(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_few_samples_are_allowed_on_request() -> None:
    assert np.isfinite(
        moments_of([features("real")[:12]], 12).statistics(allow_few=True).covariance
    ).all()


# The libraries' own


def test_kid_is_that_of_torch_fidelity_and_torchmetrics() -> None:
    ours = kernel_distance(features("generated"), features("real"), subsets=1, subset_size=300)[0]
    assert abs(ours - LIBRARIES["kid_torch_fidelity"]) < 1e-12
    assert abs(ours - LIBRARIES["kid_torchmetrics"]) < 1e-12


def test_kid_subsets_estimate_the_whole() -> None:
    mean, deviation = kernel_distance(
        features("generated"), features("real"), subsets=50, subset_size=100
    )
    assert abs(mean - LIBRARIES["kid_torchmetrics"]) < 3 * deviation / 50**0.5
    assert kernel_distance(features("generated"), features("real"), subsets=3, subset_size=50)[
        0
    ] == pytest.approx(
        kernel_distance(features("generated"), features("real"), subsets=3, subset_size=50)[0],
        abs=0,
    )


def test_precision_and_recall_are_torch_fidelity_s() -> None:
    """Shares of 300 images: equal means that not one image is counted otherwise."""
    precision, recall = precision_recall(features("generated"), features("real"))
    assert round(300 * precision) == round(300 * LIBRARIES["precision"])
    assert round(300 * recall) == round(300 * LIBRARIES["recall"])


@pytest.mark.parametrize("size", [1, 20, 203])
def test_inception_score_is_torch_fidelity_s(size: int) -> None:
    rows = logits()
    found = inception_score((rows[i : i + size] for i in range(0, len(rows), size)), len(rows))
    np.testing.assert_allclose(found, LIBRARIES["inception_score"], rtol=1e-12)


def test_kept_rows_are_evenly_spread() -> None:
    assert kept_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert kept_rows(10, most=4).tolist() == [0, 2, 5, 7]


# Preparing images


def test_resize_and_clip_are_the_recorded_ones() -> None:
    case = np.load(DATA / "reference" / "fid_resize.npz", allow_pickle=False)
    ours = (
        resize_and_clip(torch.from_numpy(case["images"]).permute(0, 3, 1, 2))
        .permute(0, 2, 3, 1)
        .numpy()
    )
    assert np.abs(ours - case["resized_and_clipped"]).max() < 1e-5
    assert np.abs(case["images"]).max() > 2  # clipping before resizing would differ


def test_resize_of_8_bits_is_tensorflow_s() -> None:
    small = torch.from_numpy(
        np.random.default_rng(5).integers(0, 256, (1, 1, 5, 6)).astype(np.float32)
    )
    ours = resize_8_bit(small / 127.5 - 1, size=13)[0, 0] * 128 + 128
    torch.testing.assert_close(
        ours, torch.tensor(LIBRARIES["tensorflow_resize"]), rtol=0, atol=1e-4
    )


def test_8_bits_are_those_of_written_pictures() -> None:
    images = torch.linspace(-1.2, 1.2, 3 * 16 * 16).reshape(1, 3, 16, 16)
    assert (quantized(images).permute(0, 2, 3, 1).numpy() == to_uint8(images)).all()


# Feature networks


def test_inception_is_torch_fidelity_s(tmp_path: Path) -> None:
    """The same weights under the same names give the same features, from .pth and from
    .safetensors."""
    state = {name: torch.from_numpy(array) for name, array in inception_weights().items()}
    torch.save(state, tmp_path / "inception.pth")
    network = load_features("inception", inception_weights=tmp_path / "inception.pth")
    pixels = torch.from_numpy(inception_input()).float()
    pooled, unbiased = network.function((pixels - 128) / 128)
    expected = torch.tensor(LIBRARIES["inception_features"])
    torch.testing.assert_close(
        pooled[0, ::64], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    expected = torch.tensor(LIBRARIES["inception_logits"])
    torch.testing.assert_close(
        unbiased[0, ::64], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    assert network.distance == "FID"
    save_file(state, tmp_path / "inception.safetensors")
    assert load_features(tmp_path / "inception.safetensors").fingerprint == network.fingerprint


def test_missing_inception_weights_say_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"--inception-weights FILE .*{tmp_path}"):
        load_features("inception")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_networks_are_small_named_and_good(name: str) -> None:
    from safetensors import safe_open

    import odelt_fast

    path = Path(odelt_fast.__file__).parent / "models" / "features" / f"{name}.safetensors"
    assert path.stat().st_size <= 2_000_000
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["held_out_accuracy"]) > (0.98 if name != "cifar10" else 0.4)
    network = load_features(name)
    assert network.distance == f"{name}-features Frechet distance"
    assert bundled_for(network.channels, network.image_size or 0) == name
    with pytest.raises(ValueError, match="takes images of"):
        network(torch.zeros(1, network.channels, 16, 16))


def test_digits_network_knows_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 10 == 9
    images = torch.from_numpy((digits.images[held_out] / 8 - 1).astype(np.float32))[:, None]
    rows, classes = load_features("digits")(images)
    assert rows.shape == (held_out.sum(), 64)
    assert classes is not None
    assert (classes.argmax(1).numpy() == digits.target[held_out]).mean() > 0.98


def small_network(path: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    network = SmallNetwork(replace(SmallConfig("tiny-features", 8, 3, (4, 6), 5), **changes)).eval()
    save_features(network, path, {"held_out_accuracy": "0"})
    return path


def test_own_network_by_path_and_grey_images(tmp_path: Path) -> None:
    network = load_features(small_network(tmp_path / "tiny.safetensors"))
    grey = torch.rand(2, 1, 8, 8) * 2 - 1
    rows, _ = network(grey)
    torch.testing.assert_close(rows, network(grey.expand(-1, 3, -1, -1))[0])
    assert rows.shape == (2, 6)
    torch.testing.assert_close(network(3 * grey)[0], network((3 * grey).clamp(-1, 1))[0])
    assert not torch.equal(network(grey, "adm")[0], rows)


def bomb(path: Path) -> None:
    path.write_bytes(pickle.dumps(pytest.fail, protocol=2))


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (bomb, "weights.pth", "not a file of weights"),
        (bomb, "network.pt", "is a program"),
        (
            lambda path: path.write_bytes(b"\xff" * 100),
            "network.safetensors",
            "network.safetensors",
        ),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "network.safetensors", "missing"),
        (
            lambda path: save_file({"x": torch.zeros(1)}, path, {"odelt_fast_features": "[1]"}),
            "network.safetensors",
            "no configuration",
        ),
        (lambda path: torch.save([1, 2], path), "weights.pth", "state dict"),
    ],
)
def test_hostile_feature_networks_are_refused(
    tmp_path: Path, write: Callable[[Path], None], name: str, message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / name)


def test_feature_networks_of_absurd_size_or_values_are_refused(tmp_path: Path) -> None:
    path = small_network(tmp_path / "tiny.safetensors")
    state, huge = (
        load_file(path),
        json.dumps(
            {
                "name": "x-features",
                "image_size": 8,
                "channels": 3,
                "widths": [10**6],
                "num_classes": 5,
            }
        ),
    )
    save_file(state, tmp_path / "huge.safetensors", {"odelt_fast_features": huge})
    with pytest.raises(ValueError, match="1 to 4096"):
        load_features(tmp_path / "huge.safetensors")
    right = json.dumps(
        {"name": "x-features", "image_size": 8, "channels": 3, "widths": [4, 6], "num_classes": 5}
    )
    state["head.bias"] = torch.full_like(state["head.bias"], torch.nan)
    save_file(state, tmp_path / "nan.safetensors", {"odelt_fast_features": right})
    with pytest.raises(ValueError, match="head"):
        load_features(tmp_path / "nan.safetensors")


# Statistics files


def test_statistics_files_round_trip_and_take_those_of_others(tmp_path: Path) -> None:
    given = replace(statistics(features("real")), notes={"features": "tiny-features"})
    with (tmp_path / "ours.npz").open("wb") as file:
        write_statistics(file, given)
    found = read_statistics(tmp_path / "ours.npz")
    assert (found.mean == given.mean).all()
    assert (found.covariance == given.covariance).all()
    assert found.notes["features"] == "tiny-features"
    np.savez(tmp_path / "jax.npz", mu=given.mean.astype(np.float32), sigma=given.covariance)
    assert frechet_distance(read_statistics(tmp_path / "jax.npz"), given) < 1e-5


def npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def terabytes(path: Path) -> None:
    """An entry that says it is a mean of 10^14 numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        header = (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000,), }".ljust(117)
            + b"\n"
        )
        for name in ("mu", "sigma"):
            archive.writestr(
                f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"nothing"), "no statistics file"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "not a zip file"),
        (lambda path: npz(path, mu=np.zeros(3)), "mu and sigma"),
        (lambda path: npz(path, mu=np.zeros(3), sigma=np.eye(4)), "covariance"),
        (lambda path: npz(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "finite"),
        (lambda path: npz(path, mu=np.zeros(3), sigma=np.triu(np.ones((3, 3)))), "symmetric"),
        (lambda path: npz(path, mu=np.zeros(3), sigma=-np.eye(3)), "diagonal"),
        (lambda path: npz(path, mu=np.array(["a", "b"]), sigma=np.eye(2)), "real numbers"),
        (
            lambda path: npz(path, mu=np.array([pytest.fail], object), sigma=np.eye(1)),
            "no statistics file",
        ),
        (terabytes, "no statistics file"),
    ],
)
def test_wrong_statistics_files_are_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    write(tmp_path / "stats.npz")
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(tmp_path / "stats.npz")
    assert "\n" not in str(caught.value)
    assert "stats.npz" in str(caught.value)
