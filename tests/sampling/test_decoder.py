"""The decoder of latents: equal to diffusers' own, in batches, from a folder; and what it
refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from odelt_fast import Sampler
from odelt_fast.sampling.decoder import Decoder, Overlapped, load_decoder
from tests.helpers.small_model import latent_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a small AutoencoderKL, of one with a shift, and of a small AutoencoderTiny, with
    random weights."""
    diffusers = pytest.importorskip("diffusers")
    widths, place = (8, 8, 8, 8), tmp_path_factory.mktemp("autoencoders")
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }
    small = {"block_out_channels": widths, "latent_channels": 4, **blocks}
    torch.manual_seed(0)
    models = {
        "kl": diffusers.AutoencoderKL(**small),
        "shifted": diffusers.AutoencoderKL(**small, scaling_factor=0.5, shift_factor=0.25),
        "tiny": diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        ),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
    return {name: place / name for name in models}


@pytest.mark.parametrize(
    ("name", "scale", "shift"), [("kl", 0.18215, 0.0), ("shifted", 0.5, 0.25), ("tiny", 1.0, 0.0)]
)
def test_a_decoder_computes_what_diffusers_computes(
    folders: dict[str, Path], name: str, scale: float, shift: float
) -> None:
    import diffusers

    kind = diffusers.AutoencoderTiny if name == "tiny" else diffusers.AutoencoderKL
    autoencoder = kind.from_pretrained(folders[name])
    latents = torch.randn(5, 4, 6, 4, generator=torch.manual_seed(1)) * scale
    with torch.no_grad():
        expected = autoencoder.decode(latents / scale + shift).sample
    decoder = load_decoder(folders[name], batch_size=2)
    images = decoder(latents)
    assert images.shape == (5, 3, 48, 32)
    assert decoder.factor == 8
    assert images.dtype == torch.float32
    # A convolution over another number of rows may sum in another order.
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_decoder_computes_in_the_dtype_asked_for_and_gives_float32(
    folders: dict[str, Path],
) -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(1))
    exact, rough = (
        load_decoder(folders["kl"], dtype=dtype)(latents) for dtype in (None, torch.bfloat16)
    )
    assert rough.dtype == torch.float32
    error = ((rough - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.05  # bfloat16 carries 8 bits


def test_the_autoencoder_of_a_pipeline_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["kl"], tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(load_decoder(tmp_path)(latents), load_decoder(folders["kl"])(latents))


def test_a_decoder_halves_its_batch_when_memory_runs_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(7, 4, 4, 4, generator=torch.manual_seed(1))
    decoder = load_decoder(folders["kl"])
    expected, decode, sizes = decoder(latents), decoder.autoencoder.decode, list[int]()

    def scarce(part: torch.Tensor) -> object:
        sizes.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(part)

    monkeypatch.setattr(decoder.autoencoder, "decode", scarce)
    torch.testing.assert_close(decoder(latents), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(decoder.autoencoder, "decode", lambda part: scarce(latents))
    with pytest.raises(torch.OutOfMemoryError):
        decoder(latents)


def test_overlapped_decoding_keeps_the_order_and_hands_the_latents_on(
    folders: dict[str, Path],
) -> None:
    latents = torch.randn(5, 4, 4, 4, generator=torch.manual_seed(1))
    decoder = load_decoder(folders["kl"])
    overlapped = Overlapped(decoder)
    assert overlapped(latents[:2]) is not None
    handed = overlapped(latents[2:])
    assert torch.equal(handed, latents[2:])
    torch.testing.assert_close(overlapped.images(), decoder(latents), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no latents"):
        Overlapped(decoder).images()


def test_a_sampler_decodes_every_batch(folders: dict[str, Path]) -> None:
    model = latent_model(4)
    decoder = load_decoder(folders["kl"])
    latents = Sampler(model, steps=2)(num_images=3, seed=1)
    images = Sampler(model, steps=2, decoder=decoder, batch_size=2)(num_images=3, seed=1)
    assert images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(images, decoder(latents), rtol=1e-4, atol=1e-4)


def test_a_decoder_says_what_it_cannot_use(folders: dict[str, Path], tmp_path: Path) -> None:
    decoder = load_decoder(folders["kl"])
    with pytest.raises(
        ValueError, match=r"takes latents of shape \(B, 4, h, w\), not \(2, 1, 8, 8\)"
    ):
        decoder(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, not 0"):
        Decoder(decoder.autoencoder, batch_size=0)
    with pytest.raises(
        ValueError, match="must be an AutoencoderKL or AutoencoderTiny of diffusers, not Linear"
    ):
        Decoder(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match="'nowhere' cannot be loaded: it is no folder here and no Hub id"
    ):
        load_decoder("nowhere")
    with pytest.raises(ValueError, match="cannot be loaded") as empty:
        load_decoder(tmp_path)
    assert "\n" not in str(empty.value)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(
        ValueError, match="it is a UNet2DModel, not one of AutoencoderKL, AutoencoderTiny"
    ):
        load_decoder(tmp_path)


def test_a_decoder_reads_no_pickles(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["kl"], folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded") as refused:
        load_decoder(folder)
    assert "safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_diffusers_one_line_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from odelt_fast import load_decoder\n"
        "try: load_decoder('stabilityai/sd-vae-ft-mse')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (
        done.stdout == "decoding latents needs diffusers: pip install 'odelt-fast[diffusers]'\n"
    ), done.stderr


def test_the_command_line_decodes_latents(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from PIL import Image

    from odelt_fast.cli import main

    model = latent_model(8)
    model.save_pretrained(tmp_path / "model")
    picture, arrays = tmp_path / "a.png", tmp_path / "a.npz"
    command = [
        "sample",
        "--model",
        str(tmp_path / "model"),
        "--num-images",
        "4",
        "--dtype",
        "float32",
        "--quiet",
        "--out",
        str(picture),
    ]
    assert main([*command, "--decoder", str(folders["tiny"]), "--npz", str(arrays)]) == 0
    drawn = Sampler(model.eval(), decoder=load_decoder(folders["tiny"]))(4, seed=0)
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    found = np.load(arrays)["arr_0"]
    assert found.shape == (4, 64, 64, 3)
    assert np.abs(found - expected).max() <= 1
    assert Image.open(picture).size == (130, 130)
    picture.unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert (
        "4 channels make no picture: write arrays with --npz, or give the --decoder of the latents"
        in capsys.readouterr().err
    )
    assert main([*command, "--model", "digits", "--decoder", str(folders["tiny"])]) == 2
    assert "takes latents of 4 channels, the model makes 1" in capsys.readouterr().err
    assert not picture.exists()
