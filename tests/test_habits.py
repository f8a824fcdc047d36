"""What users of diffusers and of the Hub are used to works, or is answered in one line that says
what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odelt_fast import DiT, Sampler, load_model
from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.cli import main
from odelt_fast.evaluation.features import load_features
from odelt_fast.evaluation.metrics import read_statistics
from odelt_fast.images import open_source
from odelt_fast.sampling.decoder import load_decoder
from odelt_fast.sampling.noise import stack_noise
from tests.helpers.small_model import latent_model, random_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 1234\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
LFS = "a Git LFS pointer in place of the file: fetch it with git lfs pull"
WEB = "a web page in place of the file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(random_model(), tmp_path / "model")


def small_vae() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, **blocks).eval()


def pipeline(model: DiT, **parts: Any) -> Any:
    pytest.importorskip("diffusers")
    from odelt_fast import OdeltPipeline

    pipe = OdeltPipeline(model, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one: DiT, other: DiT) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# Names of models


def test_a_checkpoint_of_training_means_its_average(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(folder, checkpoint / "ema")
    (checkpoint / "model.safetensors").write_bytes(b"the live weights, without a configuration")
    assert same(load_model(checkpoint), load_model(folder))
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(CheckpointError, match="has not left its model yet") as refused:
        load_model(tmp_path / "run")
    assert "give a checkpoint, such as" in str(refused.value)
    assert str(refused.value).endswith("run/checkpoint-10")
    sharded = tmp_path / "run" / "checkpoint-12"
    (sharded / "shards").mkdir(parents=True)
    (sharded / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a checkpoint in shards: training goes on from"):
        load_model(sharded)
    command = ["sample", "--model", str(checkpoint), "--num-images", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_model_means_its_folder(folder: Path, name: str) -> None:
    assert same(load_model(folder / name), load_model(str(folder)))


def test_other_files_are_answered_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a file: give the folder of a model") as refused:
        load_model(tmp_path / "weights.pt")
    assert "odelt-fast convert" in str(refused.value)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(folder / "model.safetensors")
    os.rename(folder / "model.safetensors", folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        CheckpointError, match="convert makes one of a checkpoint such as diffusion_pytorch_model"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(("content", "says"), [(POINTER, LFS), (PAGE, WEB), (b"", "an empty file")])
def test_what_stands_in_place_of_a_file_is_named(
    folder: Path, name: str, content: bytes, says: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_model(folder)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "says"), [(POINTER, LFS), (PAGE, WEB)])
def test_it_is_named_for_every_file_that_is_downloaded(
    tmp_path: Path, content: bytes, says: str
) -> None:
    vae = tmp_path / "vae"
    small_vae().save_pretrained(vae)
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(content)
    for ending in (".safetensors", ".pth", ".npz", ".parquet"):
        (tmp_path / f"file{ending}").write_bytes(content)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(content)
    encode = ["encode", "--data", "digits", "--vae", str(vae), "--out", str(tmp_path / "out")]

    def encoded() -> None:
        from odelt_fast.images.encode import vae_encoder

        vae_encoder(str(vae))

    for read in (
        lambda: load_decoder(vae),
        encoded,
        lambda: load_features("inception", "cpu", inception_weights=tmp_path / "file.pth"),
        lambda: load_features(str(tmp_path / "file.safetensors"), "cpu"),
        lambda: read_statistics(tmp_path / "file.npz"),
        lambda: open_source(tmp_path / "file.parquet"),
        lambda: open_source(tmp_path / "images"),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            read()
        assert "\n" not in str(refused.value)
    assert main([*encode, "--image-size", "8"]) == 2


def test_the_file_of_an_autoencoder_means_its_folder(tmp_path: Path) -> None:
    small_vae().save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 4, 4, 4)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(load_decoder(file)(latents), load_decoder(tmp_path / "vae")(latents))


# Dtypes


@pytest.mark.parametrize("name", ["float16", "torch.float16", "fp16", torch.float16])
def test_dtypes_may_be_given_by_name(folder: Path, tmp_path: Path, name: Any) -> None:
    assert load_model(folder, dtype=name).dtype == torch.float16
    assert DiT.from_pretrained(folder, dtype=name).dtype == torch.float16
    half = save_model(random_model(), tmp_path / "half", dtype=name)
    assert load_model(half).dtype == torch.float32
    assert load_model(half, dtype="auto").dtype == torch.float16
    assert load_model(folder, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "floaty", 16, torch.int8, True])
def test_a_dtype_that_cannot_be_is_answered_in_one_line(folder: Path, name: Any) -> None:
    with pytest.raises(ValueError, match="use float16, bfloat16, float32 or float64"):
        load_model(folder, dtype=name)
    with pytest.raises(ValueError, match="use float16, bfloat16, float32 or float64"):
        save_model(random_model(), folder, dtype=name)


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_a_pipeline_takes_names_of_dtypes(tmp_path: Path, option: str) -> None:
    from odelt_fast import OdeltPipeline

    pipe = pipeline(latent_model(), vae=small_vae())
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    for value, transformer, vae in (
        ("float16", torch.float16, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ({"transformer": "bf16", "default": "float32"}, torch.bfloat16, torch.float32),
    ):
        loaded = OdeltPipeline.from_pretrained(tmp_path, **{option: value})
        assert (loaded.transformer.dtype, loaded.vae.dtype) == (transformer, vae)
    with pytest.raises(ValueError, match="'floaty' cannot be used"):
        OdeltPipeline.from_pretrained(tmp_path, **{option: "floaty"})


# Calls of pipelines


def test_latents_of_a_call_are_the_noise() -> None:
    model = random_model()
    pipe, noise = pipeline(model), torch.randn(2, 1, 8, 8, generator=torch.manual_seed(3))
    images = pipe([3, 7], latents=noise, output_type="latent").images
    assert torch.equal(images, Sampler(model, steps=4)(labels=[3, 7], noise=noise))
    with pytest.raises(ValueError, match="num_images is 1, but there is noise for 2 images"):
        pipe([3], latents=noise)
    with pytest.raises(ValueError, match="have a height and width of their own"):
        pipe([3, 7], latents=noise, height=8)


def test_height_and_width_are_those_of_the_images() -> None:
    pipe = pipeline(latent_model(), vae=small_vae())
    assert pipe([0], height=16, width=12, output_type="pt", seed=1).images.shape == (1, 3, 16, 12)
    assert pipe([0], width=12, output_type="latent").images.shape == (1, 4, 4, 6)
    own = pipe([0, 1], height=8, width=8, seed=1, output_type="latent").images
    assert torch.equal(own, pipe([0, 1], seed=1, output_type="latent").images)
    model = pipe.transformer.model
    wide = Sampler(model, steps=4)(labels=[0, 1], noise=stack_noise(1, range(2), (4, 4, 6)), seed=1)
    drawn = pipe([0, 1], width=12, seed=1, output_type="latent").images
    assert torch.equal(drawn, wide)
    with pytest.raises(ValueError, match="width 13 is not a multiple of 4"):
        pipe([0], width=13)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("callback_on_step_end", print, "odelt_fast.trajectory gives the states"),
        ("callback", print, "odelt_fast.trajectory gives the states"),
        ("num_images_per_prompt", 2, "repeat the class in class_labels"),
        ("negative_prompt", "cat", "guidance_scale"),
        ("timesteps", [1, 2], "time_grid"),
        ("sigmas", [1.0], "time_grid"),
        ("eta", 0.0, "leave it out"),
        ("steps", 4, "it is called num_inference_steps"),
        ("clip_skip", 1, "allowed are latents, height, width, solver"),
    ],
)
def test_arguments_of_other_pipelines_are_answered(name: str, value: Any, says: str) -> None:
    pipe = pipeline(random_model())
    with pytest.raises(ValueError, match=f"{name} is no argument here: .*{says}") as refused:
        pipe([3], **{name: value})
    assert "\n" not in str(refused.value)


def test_other_mistakes_of_a_pipeline_are_one_line(folder: Path) -> None:
    from odelt_fast import OdeltPipeline

    for names, says in (
        ({"cat": 0}, "id2label must map classes to their names"),
        (["cat", "dog"], "id2label must map classes to their names"),
        ({10: "cat"}, "id2label has class 10: this model's are 0 to 9"),
    ):
        with pytest.raises(ValueError, match=says):
            pipeline(random_model(), id2label=names)
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
        pipeline(random_model())([3], generator=3)
    with pytest.raises(ValueError, match=r"holds no pipeline: make one, OdeltPipeline\(load_model"):
        OdeltPipeline.from_pretrained(folder)


def test_the_autoencoder_decodes_in_slices_and_tiles() -> None:
    pipe = pipeline(latent_model(), vae=small_vae())
    expected = pipe([0, 1], seed=1, output_type="pt").images
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    torch.testing.assert_close(pipe([0, 1], seed=1, output_type="pt").images, expected)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (False, True)
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling
    pixels = pipeline(random_model())
    for method in ("enable_vae_slicing", "disable_vae_tiling"):
        with pytest.raises(ValueError, match="this pipeline has no vae"):
            getattr(pixels, method)()


def test_switches_without_an_effect_say_so() -> None:
    pipe = pipeline(latent_model(), vae=small_vae())
    with pytest.warns(UserWarning, match="attention slicing has no effect on the transformer"):
        pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    with pytest.raises(ValueError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    with pytest.raises(AttributeError, match="there is no scheduler: solver"):
        _ = pipe.scheduler
    with pytest.raises(ValueError, match="there is no scheduler to set: solver"):
        pipe.scheduler = object()
    assert not hasattr(pipe, "scheduler")


def test_variants_are_saved_and_loaded(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from odelt_fast import OdeltPipeline

    pipe = pipeline(latent_model(), vae=small_vae())
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    expected = pipe([0], seed=1, output_type="pt").images
    custom = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    for loaded in (
        OdeltPipeline.from_pretrained(tmp_path, variant="fp16"),
        DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", **custom),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded([0], seed=1, output_type="pt").images, expected)
    assert same(load_model(tmp_path), pipe.transformer.model)
    with pytest.raises(ValueError, match="weights are always safetensors"):
        pipe.save_pretrained(tmp_path / "no", safe_serialization=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"variant": "fp16"}, r"save_model\(model, folder, dtype='float16'\)"),
        ({"max_shard_size": "1GB"}, "weights are one file, model.safetensors"),
        ({"private": True}, "it goes with push_to_hub=True"),
    ],
)
def test_saving_ignores_no_option(tmp_path: Path, option: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"save_pretrained has no {next(iter(option))}: {says}"):
        random_model().save_pretrained(tmp_path / "model", **option)
    assert not (tmp_path / "model").exists()


# Names of files


def test_names_that_the_output_cannot_show_do_not_end_a_command(
    folder: Path, tmp_path: Path
) -> None:
    named = tmp_path / "bilder-äß-猫"
    shutil.copytree(folder, named)
    out = tmp_path / "猫.png"
    command = [sys.executable, "-m", "odelt_fast.cli", "sample", "--model", str(named)]
    options = ["--num-images", "1", "--steps", "1", "--quiet", "--out", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\\u732b.png: 1 image of" in done.stdout
    assert Image.open(out).size == (64, 64)


def test_training_prints_such_names_too(tmp_path: Path) -> None:
    data = tmp_path / "データ"
    for name in ("猫", "犬"):
        (data / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.full((8, 8), 40 * i, np.uint8)
            Image.fromarray(pixels).save(data / name / f"{i}.png")
    code = "import sys; from odelt_fast.train.main import main; sys.exit(main())"
    shape = ["--model.image-size", "8", "--model.channels", "1", "--model.num-classes", "2"]
    small = ["--model.hidden-size", "16", "--model.num-heads", "2", "--train-batch-size", "16"]
    options = ["--data", str(data), "--steps", "1", "--output-dir", str(tmp_path / "ラン")]
    done = subprocess.run(
        [sys.executable, "-c", code, *shape, *small, *options, "--log-with"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    names = json.loads((tmp_path / "ラン" / "config.json").read_text())["id2label"]
    assert names == {"0": "犬", "1": "猫"}
