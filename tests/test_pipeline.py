"""The diffusers pipeline: DiTPipeline's conventions, the Sampler's images, bitwise round trips, and
the package without diffusers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from odelt_fast import DiT, DiTConfig, Sampler, load_model

if TYPE_CHECKING:
    from odelt_fast import OdeltPipeline

SMALL = {
    "image_size": 4,
    "hidden_size": 16,
    "depth": 2,
    "depth_min": 1,
    "depth_group": 1,
    "num_heads": 2,
    "num_classes": 3,
}
ROOT = Path(__file__).resolve().parent.parent


def small_model(**changes: Any) -> DiT:
    """A network of random weights in every tensor."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**SMALL, **changes})).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def pipeline(model: DiT, **parts: Any) -> OdeltPipeline:
    pytest.importorskip("diffusers")
    from odelt_fast import OdeltPipeline

    pipe = OdeltPipeline(model, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_vae() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, **blocks).eval()


@pytest.fixture(scope="module")
def digits() -> DiT:
    return load_model("digits")


@pytest.fixture
def pixels(digits: DiT) -> OdeltPipeline:
    names = ["zero, nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return pipeline(digits, id2label=dict(enumerate(names)))


@pytest.fixture
def latents() -> OdeltPipeline:
    return pipeline(small_model(), vae=small_vae())


def test_a_call_takes_what_dit_pipeline_takes_and_depth(pixels: OdeltPipeline) -> None:
    from diffusers import DiTPipeline

    theirs, ours = (
        list(inspect.signature(kind.__call__).parameters) for kind in (DiTPipeline, type(pixels))
    )
    assert ours[: len(theirs)] == theirs
    assert "depth" in ours


def test_a_generator_gives_the_noise_that_diffusers_would_draw(
    pixels: OdeltPipeline, digits: DiT
) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    noise = randn_tensor((2, 1, 8, 8), generator=torch.manual_seed(5))
    expected = Sampler(digits, depth=4, steps=1)(labels=[3, 7], noise=noise)
    images = pixels(
        [3, 7], depth=4, num_inference_steps=1, generator=torch.manual_seed(5), output_type="pt"
    ).images
    assert torch.equal(images, (expected / 2 + 0.5).clamp(0, 1))


def test_one_generator_for_each_image_makes_images_independent_of_the_batch(
    pixels: OdeltPipeline,
) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pixels([3, 7], generator=generators, output_type="latent").images
    alone = pixels([7], generator=torch.Generator().manual_seed(2), output_type="latent").images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        pixels([3, 7], generator=generators[:1])


def test_a_seed_gives_the_images_of_the_sampler(pixels: OdeltPipeline, digits: DiT) -> None:
    expected = Sampler(digits, depth=8, steps=2)(2, [3, 7], seed=9)
    assert torch.equal(
        pixels([3, 7], depth=8, num_inference_steps=2, seed=9, output_type="latent").images,
        expected,
    )
    with pytest.raises(ValueError, match="generator and seed are both given"):
        pixels([3], seed=1, generator=torch.manual_seed(1))


def test_without_generator_the_global_one_is_used(pixels: OdeltPipeline) -> None:
    torch.manual_seed(4)
    first, second = (pixels([3], output_type="pt").images for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(pixels([3], output_type="pt").images, first)
    assert not torch.equal(first, second)


def test_guidance_above_one_guides_and_below_uses_the_labels_alone(
    pixels: OdeltPipeline, digits: DiT
) -> None:
    def drawn(scale: float | None) -> torch.Tensor:
        return pixels(
            [3, 7], guidance_scale=scale, num_inference_steps=2, seed=1, output_type="latent"
        ).images

    for scale, same in ((None, None), (0.0, None), (0.5, None), (1.0, None), (2.5, 2.5)):
        assert torch.equal(
            drawn(scale), Sampler(digits, steps=2, guidance_scale=same)(2, [3, 7], seed=1)
        )
    assert not torch.equal(drawn(2.5), drawn(1.0))


def test_output_types(pixels: OdeltPipeline) -> None:
    kinds = {kind: pixels([3, 7], seed=1, output_type=kind) for kind in ("pil", "np", "pt")}
    pictures, arrays, tensors = (kinds[kind].images for kind in ("pil", "np", "pt"))
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 2
    assert arrays.shape == (2, 8, 8, 1)
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert 0 <= arrays.min() < arrays.max() <= 1
    assert (
        np.abs(np.stack([np.asarray(picture) for picture in pictures]) - arrays[..., 0] * 255).max()
        <= 0.5 + 1e-3
    )
    (alone,) = pixels([3, 7], seed=1, output_type="pt", return_dict=False)
    assert torch.equal(alone, tensors)
    tensors += 1  # whoever gets a tensor may write into it


def test_latents_are_decoded(latents: OdeltPipeline) -> None:
    raw = latents([0, 1, 2], seed=1, output_type="latent").images
    with torch.no_grad():
        expected = (latents.vae.decode(raw / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    decoded = latents([0, 1, 2], seed=1, output_type="pt", batch_size=2).images
    assert decoded.shape == (3, 3, 8, 8)
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-3)
    assert [picture.mode for picture in latents([0], seed=1).images] == ["RGB"]
    with pytest.raises(ValueError, match="4 channels are latents: give the pipeline a vae"):
        pipeline(small_model())([0])
    with pytest.raises(ValueError, match="takes latents of shape"):
        pipeline(small_model(channels=1), vae=small_vae())([0])


def test_names_of_classes(pixels: OdeltPipeline) -> None:
    assert pixels.get_label_ids(["three", "nought", "zero"]) == [3, 0, 0]
    assert pixels.get_label_ids("seven") == [7]
    with pytest.raises(ValueError, match="'eleven' names no class of this pipeline"):
        pixels.get_label_ids(["one", "eleven"])


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_saved_pipeline_gives_bitwise_equal_images(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    from odelt_fast import OdeltPipeline

    pipe = request.getfixturevalue(kind)
    pipe.save_pretrained(tmp_path)
    ours = OdeltPipeline.from_pretrained(tmp_path)
    custom = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True
    )
    rebuilt = OdeltPipeline(
        load_model(tmp_path), pipe.vae
    )  # the transformer's folder is that of any model
    for other in (ours, custom, rebuilt):
        other.set_progress_bar_config(disable=True)
        images, again = (
            p([0, 2], depth=1 if kind == "latents" else 4, seed=3, output_type="pt").images
            for p in (pipe, other)
        )
        assert torch.equal(images, again)
    assert ours.labels == custom.labels == pipe.labels
    assert (ours.vae is None) == (kind == "pixels")


def test_the_exported_file_holds_one_pipeline_class(pixels: OdeltPipeline, tmp_path: Path) -> None:
    from diffusers.utils.dynamic_modules_utils import find_pipeline_class

    pixels.save_pretrained(tmp_path)
    scope: dict[str, Any] = {}
    exec((tmp_path / "pipeline.py").read_text(), scope)
    module = type(
        "module", (), {name: value for name, value in scope.items() if not name.startswith("__")}
    )
    assert find_pipeline_class(module) is type(pixels)


def test_loading_runs_no_code_of_the_folder(pixels: OdeltPipeline, tmp_path: Path) -> None:
    from odelt_fast import OdeltPipeline
    from odelt_fast.pipeline import CARRIED_CODE

    pixels.save_pretrained(tmp_path)
    for file in CARRIED_CODE:
        ast.parse((tmp_path / file).read_text())
        (tmp_path / file).write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom odelt_fast.pipeline import *"
        )
    OdeltPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pipeline_computes_in_the_dtype_asked_for(latents: OdeltPipeline, tmp_path: Path) -> None:
    from odelt_fast import OdeltPipeline

    latents.save_pretrained(tmp_path)
    half = OdeltPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {half.transformer.dtype, half.vae.dtype, half.dtype} == {torch.bfloat16}
    moved = (
        latents([0, 1], seed=1, output_type="latent").images,
        latents.to(torch.bfloat16)([0, 1], seed=1, output_type="latent").images,
    )
    assert latents.transformer.dtype == torch.bfloat16
    half.set_progress_bar_config(disable=True)
    assert torch.equal(half([0, 1], seed=1, output_type="latent").images, moved[1])
    assert not torch.equal(*moved)


def test_a_pipeline_runs_the_very_model_that_it_was_given(
    pixels: OdeltPipeline, digits: DiT
) -> None:
    assert pixels.transformer.model is digits
    assert pixels.transformer.config == digits.config
    shallow = pipeline(load_model("digits", depth=4))
    assert torch.equal(
        shallow([3], depth=4, seed=1, output_type="pt").images,
        pixels([3], depth=4, seed=1, output_type="pt").images,
    )
    with pytest.raises(ValueError, match="depth 8 needs blocks that are not loaded"):
        shallow([3], depth=8)


def test_torch_compile_around_the_transformer_asks_for_the_compiled_backend(
    pixels: OdeltPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from odelt_fast import pipeline

    asked, expected = [], pixels([3], depth=4, seed=1, output_type="pt").images

    def sampler(*arguments: Any, backend: str, **options: Any) -> Sampler:
        asked.append(backend)
        return Sampler(*arguments, **options)  # compiling takes a minute

    pixels.transformer = torch.compile(pixels.transformer)
    monkeypatch.setattr(pipeline, "Sampler", sampler)
    assert torch.equal(pixels([3], depth=4, seed=1, output_type="pt").images, expected)
    assert asked == ["compile"]


@pytest.mark.parametrize("options", [{"num_inference_steps": 3}, {"solver": "dopri5"}])
def test_the_progress_bar_is_that_of_every_pipeline(
    pixels: OdeltPipeline, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    pixels([3], seed=1, **options)
    assert capfd.readouterr().err == ""
    pixels.set_progress_bar_config(disable=False, desc="drawing")
    pixels([3], seed=1, **options)
    shown = capfd.readouterr().err
    assert "drawing" in shown
    assert ("3/3" in shown) == ("solver" not in options)


def test_offloading_calls_the_hooks_of_both_parts_in_their_order(latents: OdeltPipeline) -> None:
    expected = latents([0, 1], seed=1, output_type="pt").images
    latents.enable_model_cpu_offload(device="cpu")
    assert hasattr(latents.transformer, "_hf_hook")
    order = []
    for name in ("transformer", "vae"):
        hook = getattr(latents, name)._hf_hook
        hook.pre_forward = lambda module, *rest, name=name, run=hook.pre_forward, **more: (
            order.append(name) or run(module, *rest, **more)
        )
    torch.testing.assert_close(
        latents([0, 1], seed=1, output_type="pt", batch_size=1).images,
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    assert order[0] == "transformer"
    assert "transformer" not in order[order.index("vae") :]


def test_consistency_models_take_all_their_noise_from_the_generator() -> None:
    pipe = pipeline(small_model(channels=1, sampling="consistency"))
    one, same, other = (
        pipe([0], generator=torch.manual_seed(seed), output_type="latent").images
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    noise = torch.zeros(1, 1, 4, 4)
    first, second = (
        Sampler(pipe.transformer.model)(noise=noise, labels=0, seed=seed) for seed in (0, 1)
    )
    assert not torch.equal(
        first, second
    )  # so the seed that the pipeline makes of the generator matters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": []}, "class_labels must be at least one whole number"),
        ({"class_labels": ["three"]}, "get_label_ids gives those of names"),
        ({"class_labels": [1.5]}, "class_labels must be at least one whole number"),
        ({"class_labels": [11]}, "label 11 is not allowed"),
        (
            {"class_labels": [1], "output_type": "jpeg"},
            "output_type must be one of pil, np, pt, latent, not 'jpeg'",
        ),
        ({"class_labels": [1], "depth": 5}, "depth 5 is not allowed"),
        (
            {"class_labels": [1], "num_inference_steps": 0},
            "steps must be a whole number of at least 1, not 0",
        ),
    ],
)
def test_a_mistake_is_named(pixels: OdeltPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        pixels(**arguments)
    assert "\n" not in str(refused.value)


def test_null_labels_and_single_labels_are_labels(pixels: OdeltPipeline) -> None:
    assert len(pixels(10, seed=1).images) == 1
    assert len(pixels(torch.tensor([10, 3]), seed=1).images) == 2
    assert len(pixels(np.array([10, 3, 4]), seed=1).images) == 3


def test_a_pipeline_wants_a_model(digits: DiT) -> None:
    with pytest.raises(
        ValueError, match="transformer must be a DiT, as load_model returns, not Linear"
    ):
        pipeline(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_without_diffusers_the_rest_works_and_one_line_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\nfrom odelt_fast import *\nfrom"
        " odelt_fast.cli import main\nassert main(['sample', '--num-images', '1', '--depth', '4',"
        f" '--steps', '1', '--out', {str(tmp_path / 'a.png')!r}]) == 0\ntry: from odelt_fast import"
        " OdeltPipeline\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1:] == [
        "OdeltPipeline needs diffusers: pip install 'odelt-fast[diffusers]'"
    ], done.stderr
