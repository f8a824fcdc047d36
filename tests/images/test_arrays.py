"""Images in .npz files: what is read, what they are brought to, and what is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odelt_fast.images import open_source


def pixels(count: int = 5, side: int = 6, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (count, side, side, channels))
    return values.astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_and_labels_are_the_arrays(tmp_path: Path, save: Any, order: str) -> None:
    images, labels = pixels(), np.array([3, 0, 1, 1, 2], np.int32)
    # Other arrays, as in ADM's reference batches, are left alone; so is one that is pickled.
    more = {"mu": np.zeros(7), "other": np.array([{}], object)}
    save(tmp_path / "x.npz", np.asarray(images, order=order), labels, **more)
    source = open_source(tmp_path / "x.npz")
    assert (source.image_shape, source.num_classes, len(source)) == ((3, 6, 6), 4, 5)
    read, classes = source.read_many([4, 0, 4], [False, True, False])
    expected = images[[4, 0, 4]].transpose(0, 3, 1, 2) / 127.5 - 1
    expected[1] = expected[1, :, :, ::-1]
    np.testing.assert_allclose(read, expected, atol=1e-6)
    assert read.dtype == np.float32
    assert classes.tolist() == [2, 3, 2]
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.read_many([4, 0, 4], [False, True, False])[0], read)


def test_they_are_brought_to_a_size_and_to_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.full((2, 8, 8, 1), 51, np.uint8))
    source = open_source(tmp_path / "x.npz", image_size=4, channels=3)
    assert source.image_shape == (3, 4, 4)
    np.testing.assert_allclose(source.read(1)[0], np.full((3, 4, 4), 51 / 127.5 - 1), atol=1e-6)
    np.savez(tmp_path / "y.npz", np.full((2, 8, 8, 3), 51, np.uint8))
    assert open_source(tmp_path / "y.npz", channels=1).read(0)[0].shape == (1, 8, 8)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    images = pixels()[:, :4]
    np.savez(tmp_path / "x.npz", images)
    source = open_source(tmp_path / "x.npz")
    assert (source.image_size, source.image_shape) == ((4, 6), (3, 4, 6))
    np.testing.assert_allclose(
        source.read(2)[0], images[2].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
    )
    assert open_source(tmp_path / "x.npz", image_size=(6, 2)).read(2)[0].shape == (3, 6, 2)
    assert open_source(tmp_path / "x.npz", image_size=(3, 3)).image_size == 3


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    """A .npy file that says that it holds uint8 of this shape."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def write_members(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": pixels()}, "arr_0"),
        ({"arr_0": pixels().astype(np.float32)}, "uint8"),
        ({"arr_0": pixels().transpose(0, 3, 1, 2)}, r"must be \(N, H, W, C\)"),
        ({"arr_0": pixels()[0]}, r"must be \(N, H, W, C\)"),
        ({"arr_0": np.array([{}], object)}, "pickled"),
        ({"arr_0": pixels(), "arr_1": np.array([0, 1])}, "arr_1 must be 5 whole numbers"),
        ({"arr_0": pixels(), "arr_1": np.zeros(5)}, "arr_1 must be 5 whole numbers"),
        ({"arr_0": pixels(), "arr_1": np.array([0, 1, -1, 2, 3])}, "labels from 0"),
        ({"arr_0": pixels(), "arr_1": np.array([0, 1, 2**40, 2, 3])}, "labels from 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as mistake:
        open_source(tmp_path / "x.npz")
    assert "\n" not in str(mistake.value)


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    """A header that asks for terabytes, a wrong checksum, an end that is cut off, no zip at all."""
    path = tmp_path / "x.npz"
    np.savez(path, pixels(50))
    whole = path.read_bytes()
    bad = bytearray(whole)
    bad[5000] ^= 1
    files = {
        "changed": bytes(bad),
        "cut": whole[: len(whole) // 2],
        "none": b"no zip",
        "empty": b"",
    }
    for name, data in files.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match="holds no images that can be read"):
            open_source(path)
        assert name
    for member in (
        npy((1 << 40, 8, 8, 3), bytes(192)),
        npy((1, 8, 8, 3), bytes(191)),
        npy((-1, 8, 8, -3), b""),
        npy((0, 8, 8, 3), b""),
        b"",
    ):
        write_members(path, arr_0=member)
        with pytest.raises(ValueError, match="holds no images that can be read"):
            open_source(path)
