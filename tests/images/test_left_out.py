"""What lies in a folder of images is read, or said to be left out: nothing is dropped silently."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from odelt_fast import cli
from odelt_fast.images import open_source, pixels
from tests.images.test_images import as_pixels, encode, picture
from tests.images.test_latents import fast_dit, repa


@pytest.fixture
def silent():
    """Nothing is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_no_ending_of_a_format_that_pillow_decodes_is_dropped(tmp_path, silent):
    endings = {
        "TIFF": "tif TIFF",
        "JPEG": "jfif jpe JPG",
        "JPEG2000": "jp2 j2k",
        **{
            kind: kind.lower() for kind in ("GIF", "BMP", "WEBP", "PPM", "TGA", "DIB", "ICO", "PCX")
        },
        "PNG": "png apng",
        "MPO": "mpo",
    }
    kinds = {f"0.{ending}": kind for kind, names in endings.items() for ending in names.split()}
    (tmp_path / "cat").mkdir()
    for name, kind in kinds.items():
        picture(3, (16, 16)).save(tmp_path / "cat" / name, kind)
    (tmp_path / "cat" / "without_ending").write_bytes(encode(picture(3, (16, 16))))
    source = open_source(str(tmp_path))
    assert len(source) == len(kinds) + 1
    kept = ("TIFF", "BMP", "PPM", "TGA", "DIB", "PCX", "PNG")
    lossless = [row for row, name in enumerate(sorted(kinds)) if kinds[name] in kept]
    expected = np.broadcast_to(as_pixels(picture(3, (16, 16))), (len(lossless), 3, 16, 16))
    np.testing.assert_allclose(source.read_many(lossless)[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_an_animation_or_several_pages_the_first_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert pixels.decode_image(content, None, 3)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "JPEG", "PNG"])
def test_every_format_is_turned_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    image = picture(2, (2, 1)).resize((12, 6))
    content = encode(image, kind, exif=exif, **options)
    upright = pixels._turn(image, orientation)
    assert pixels.inspect_image(content)[:2] == upright.size
    expected = np.asarray(pixels.cropped(upright, None)).transpose(2, 0, 1).astype(int)
    decoded = pixels.decode_image(content, None, 3)
    assert np.abs(decoded - expected).max() <= (30 if kind == "JPEG" else 0)


def test_values_without_known_black_and_white_are_named_and_not_turned_to_black(tmp_path):
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "0.png")
    for name, dtype in (("float.tif", np.float32), ("whole.tif", np.int32)):
        Image.fromarray(np.eye(8).astype(dtype)).save(tmp_path / "a" / name)
    Image.fromarray(np.full((8, 8), 0xABCD, np.uint16)).save(tmp_path / "a" / "short.tif")
    picture(1).convert("LAB").save(tmp_path / "a" / "lab.tif")
    with pytest.warns(UserWarning, match=r"2 of 5 images left out: a/float.tif \(32-bit values"):
        source = open_source(str(tmp_path))
    assert sorted(source.skipped) == ["a/float.tif", "a/whole.tif"]
    np.testing.assert_allclose(source.read(2)[0], 0xAB / 127.5 - 1, atol=1e-6)


def mixed_folder(root: Path) -> Path:
    """Two classes: 3 images, one file that does not decode, 6 others."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        picture(1).save(root / name / "0.png")
    picture(2).save(root / "a" / "1.tif")
    (root / "a" / "bad.gif").write_bytes(b"GIF89a, or not")
    for name in ("a/x.heic", "a/y.HEIC", "b/notes.txt", "b/LICENSE", "labels.csv"):
        (root / name).write_bytes(b"something else")
    (root / "b" / ".0.png").write_bytes(b"hidden")
    (root / "b" / "gone.png").symlink_to(root / "nothing.png")
    (root / "c").symlink_to(root / "nowhere")
    return root


def test_what_is_left_out_is_counted_by_kind_and_what_does_not_decode_is_named(tmp_path):
    with pytest.warns(UserWarning, match="left out") as caught:
        assert len(open_source(str(mixed_folder(tmp_path)))) == 3
    (line,) = (str(warning.message) for warning in caught)
    assert line.startswith("1 of 4 images left out: a/bad.gif (")
    beside = line.split("; 8 others left out beside the images: ")[1]
    assert sorted(beside.split(", ")) == sorted(
        ["2 .heic", "2 linked to nothing", "1 .txt", "1 .csv", "1 without ending", "1 hidden"]
    )


def test_a_class_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class folder .*a has no images \(only 3 .heic\)"):
        open_source(str(tmp_path))


def test_images_beside_the_folders_of_splits_are_no_secret(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        picture(1).save(tmp_path / split / "a" / "0.png")
    picture(1).save(tmp_path / "lost.png")
    with pytest.raises(ValueError, match=r"outside its class folders, such as lost.png"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("names", [("Training", "Dev"), ("train", "validation", "Testing")])
def test_folders_of_splits_are_no_classes_whatever_they_are_called(tmp_path, names, silent):
    for name in names:
        (tmp_path / name / "a").mkdir(parents=True)
        picture(1).save(tmp_path / name / "a" / "0.png")
    for split in ("train", "validation"):
        source = open_source(str(tmp_path), split=split)
        assert (len(source), source.class_names) == (1, ("a",))


def test_folders_of_splits_beside_others_are_told_and_not_taken_for_classes(tmp_path):
    for name in ("train/a", "val/a", "extra/a"):
        (tmp_path / name).mkdir(parents=True)
        picture(1).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"splits \(train, val\) and others, such as extra"):
        open_source(str(tmp_path))
    (tmp_path / "extra").rename(tmp_path / "training")
    with pytest.raises(
        ValueError, match=r"several sub-folders for the split 'train'; it has train"
    ):
        open_source(str(tmp_path))


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    for place in ("store/sub", "data/a/deep", "data/b"):
        (tmp_path / place).mkdir(parents=True)
    for seed, name in enumerate(
        ("store/0.png", "store/sub/1.png", "data/a/deep/2.png", "data/b/3.png")
    ):
        picture(seed).save(tmp_path / name)
    data = tmp_path / "data"
    (data / "a" / "more").symlink_to(tmp_path / "store")
    (data / "c").symlink_to(tmp_path / "store", target_is_directory=True)
    (data / "b" / "one.png").symlink_to(tmp_path / "store" / "0.png")
    for loop, target in (("a/up", data), ("a/top", "/"), ("store", data / "b"), ("self", "self")):
        place = tmp_path / "store" / "sub" / "loop" if loop == "store" else data / loop
        place.symlink_to(target)
    with pytest.warns(UserWarning, match="left out beside the images") as caught:
        source = open_source(str(data))
    assert "2 linked to a folder that is read already" in str(caught[0].message)
    assert "1 linked to nothing" in str(caught[0].message)
    names = [source._store.name(row) for row in range(len(source))]
    assert names == [
        *("a/deep/2.png", "a/more/0.png", "a/more/sub/1.png", "a/more/sub/loop/3.png"),
        *("a/more/sub/loop/one.png", "b/3.png", "b/one.png"),
        *("c/0.png", "c/sub/1.png", "c/sub/loop/3.png", "c/sub/loop/one.png"),
    ]
    assert source.labels.tolist() == [0] * 5 + [1] * 2 + [2] * 4


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a" / "locked").mkdir(parents=True)
    picture(1).save(tmp_path / "a" / "0.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot be read: .*locked"):
        open_source(str(tmp_path))


def test_one_process_of_several_says_it(tmp_path, monkeypatch, silent):
    mixed_folder(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert len(open_source(str(tmp_path))) == 3


@pytest.mark.parametrize("command", ["train", "stats", "evaluate", "encode"])
def test_every_command_says_it_once(tmp_path, command, monkeypatch):
    mixed_folder(tmp_path / "data")
    shape = ("hidden-size=16", "num-heads=2", "channels=1", "num-classes=2")
    small = ["--allow-few-samples", "--quiet", "--features", "digits"]
    options = {
        "train": ["--steps=1", "--output-dir=run", *(f"--model.{value}" for value in shape)],
        "stats": ["--out=s.npz", "--image-size=8", *small],
        "evaluate": ["--num-images=4", "--seeds=1", "--steps=1", "--depths=4", "--out=e", *small],
        "encode": ["--out=latents", "--vae=./nowhere"],
    }
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="1 of 4 images left out: a/bad.gif") as caught:
        code = cli.main([command, "--data", "data", *options[command]])
    assert code == (2 if command == "encode" else 0)  # there is no such autoencoder
    assert sum("left out" in str(warning.message) for warning in caught) == 1


def test_commands_say_it_in_one_line(tmp_path):
    mixed_folder(tmp_path / "data")
    command = ["stats", "--data", "data", "--features", "digits", "--image-size", "8", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "odelt_fast.cli", *command, "--allow-few-samples"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "left out" in line)
    assert line.startswith("warning: 1 of 4 images left out: a/bad.gif")
    assert "2 .heic" in line
    assert "left out" not in done.stdout
    assert "of 3 images of data" in done.stdout


def test_latents_of_other_projects_say_what_is_left_out_and_follow_links(tmp_path, silent):
    repa(tmp_path / "repa", [0, 1, 2, 1, 0])
    folder = tmp_path / "repa" / "vae-sd"
    (folder / "00000").rename(tmp_path / "elsewhere")
    (folder / "00000").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(str(tmp_path / "repa"))) == 5
    (tmp_path / "elsewhere" / "img-mean-std-00000003.npy").unlink()
    (tmp_path / "elsewhere" / "img00000003.png").write_bytes(b"")
    message = "2 others left out beside the latents: 1 .png, 1 label without latents"
    with pytest.warns(UserWarning, match=message):
        assert len(open_source(str(tmp_path / "repa"))) == 4
    fast_dit(tmp_path / "dit", 4)
    features = tmp_path / "dit" / "x_features"
    assert len(open_source(str(tmp_path / "dit"))) == 4
    (features / "2.npy").rename(features / "2.npz")
    message = "2 others left out beside the latents: 1 .npz, 1 label without latents"
    with pytest.warns(UserWarning, match=message):
        assert len(open_source(str(tmp_path / "dit"))) == 3


# Good PNGs that Pillow refuses


def large_texts() -> dict[str, dict]:
    texts = {}
    for name, zipped in (("text", False), ("zipped text", True)):
        texts[name] = PngImagePlugin.PngInfo()
        texts[name].add_text("Comment", "x" * 2_000_000, zip=zipped)
        texts["international " + name] = PngImagePlugin.PngInfo()
        texts["international " + name].add_itxt("Comment", "ü" * 2_000_000, zip=zipped)
    texts["much text"] = PngImagePlugin.PngInfo()
    for i in range(80):
        texts["much text"].add_text(f"Comment {i}", "x" * 1_000_000, zip=True)
    profile = np.random.default_rng(0).bytes(2_000_000)
    made = {name: {"pnginfo": info} for name, info in texts.items()}
    return made | {
        "profile": {"icc_profile": profile},
        "plain profile": {"icc_profile": b"0" * 2**21},
    }


@pytest.mark.parametrize("name", large_texts())
def test_a_png_with_megabytes_of_text_or_profile_is_good(name, tmp_path, silent):
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "0.png", **large_texts()[name])
    np.testing.assert_allclose(
        open_source(str(tmp_path)).read(0)[0], as_pixels(picture(1)), atol=1e-6
    )
    np.testing.assert_array_equal(
        pixels.decode_image((tmp_path / "a" / "0.png").read_bytes(), None, 3),
        np.asarray(picture(1)).transpose(2, 0, 1),
    )


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_other_formats_with_a_large_profile_are_good(kind):
    content = encode(picture(1), kind, icc_profile=b"0" * 2_000_000)
    assert pixels.inspect_image(content) == (8, 8, False)
    assert pixels.decode_image(content, None, 3).shape == (3, 8, 8)


def test_text_after_the_pixels_and_damaged_text_cost_no_image():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 2_000_000, zip=True)
    chunk = b"zTXtComment\0\0" + zlib.compress(b"x" * 2_000_000)
    content = encode(picture(1))
    end = content.index(b"IEND") - 4
    text = (len(chunk) - 4).to_bytes(4) + chunk
    for checksum in (zlib.crc32(chunk), 0):
        late = content[:end] + text + checksum.to_bytes(4) + content[end:]
        assert pixels.inspect_image(late) == (8, 8, False)
        assert pixels.decode_image(late, None, 3).shape == (3, 8, 8)


def test_the_turn_that_a_text_tells_is_kept():
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    info.add_text("Comment", "x" * 2_000_000, zip=True)
    content = encode(picture(1, (8, 4)), pnginfo=info)
    assert pixels.inspect_image(content)[:2] == (4, 8)


@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "webp", "jp2", "ppm"])
def test_hostile_sizes_stay_bounded_in_every_format(suffix, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / f"0.{suffix}")
    picture(1, (40, 40)).save(tmp_path / "a" / f"1.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match=r"1 of 2 images left out: a/1\.\w+ \(40x40 pixels"):
        assert len(open_source(str(tmp_path))) == 1


def test_a_png_of_an_endless_text_is_not_held_in_memory(tmp_path):
    """A sparse file: 8 GiB that would be read."""
    path = tmp_path / "0.png"
    content = encode(picture(1))
    with path.open("wb") as file:
        file.write(content[:33] + (2**31 - 1).to_bytes(4) + b"tEXt")
        file.truncate(8 << 30)
    with pytest.raises(ValueError, match="larger than"):
        pixels.decode_image(str(path), None, 3)
