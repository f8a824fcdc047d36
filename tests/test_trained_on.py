"""What a model was trained on is stored with it: names of classes, which samplers, pipeline, page,
service and evaluations use, and what its latents are, which decoders are compared with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from odelt_fast import DiT, DiTConfig, Sampler, load_model
from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.cli import main
from odelt_fast.config import Latents, TrainedOn, describe_classes
from odelt_fast.images import open_source
from odelt_fast.sampling.labels import labels_from_text, labels_of_classes

CLASSES = ("bird", "cat, house cat", "dog")
TINY = ["--model.hidden-size", "16", "--model.num-heads", "2", "--model.depth", "4"]
TINY += ["--model.depth-min", "2", "--model.depth-group", "2", "--train-batch-size", "16"]
TINY += ["--sampling-steps", "0", "--log-with"]


def small_model(classes: int = 3, **changes: Any) -> DiT:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 4, "depth_min": 2, "depth_group": 2, "num_heads": 2}
    shape = {"image_size": 8, "channels": 3, "num_classes": classes} | changes
    return DiT(DiTConfig(**sizes, **shape)).eval()


def named_model(folder: Path, class_names: tuple[str, ...] = CLASSES, **changes: Any) -> str:
    """A model folder with names of classes."""
    model = small_model(len(class_names), **changes)
    torch.nn.init.normal_(model.label_embed.weight)
    torch.nn.init.normal_(model.final_layer.out.weight)
    model.trained_on = TrainedOn(class_names)
    return str(save_model(model, folder))


def class_folders(folder: Path, names: tuple[str, ...], count: int = 3, size: int = 8) -> Path:
    """Class folders of random pictures."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def train(*options: str) -> int:
    return main(["train", *TINY, "--steps", "2", *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Class folders whose names are numbers and not all of them, and a run on them."""
    place = tmp_path_factory.mktemp("run")
    data = class_folders(place / "data", ("0", "2", "10", "11"))
    shape = ["--model.image-size", "8", "--model.channels", "3", "--model.num-classes", "4"]
    options = [*shape, "--ema-widths", "0.1", "--data", str(data)]
    assert train(*options, "--output-dir", str(place / "run")) == 0
    return data, place / "run"


# Stored and read


def test_the_order_of_the_training_data_is_printed_and_stored_with_the_model(
    run: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, folder = run
    names = {"0": "0", "1": "2", "2": "10", "3": "11"}
    for model in (folder, folder / "checkpoint-2" / "ema"):
        assert json.loads((model / "config.json").read_text())["id2label"] == names
    assert load_model(folder).trained_on == TrainedOn(("0", "2", "10", "11"))
    averaged = ["ema", str(folder), "--width", "0.1", "--out", str(tmp_path / "ema")]
    assert main(averaged) == 0
    assert load_model(tmp_path / "ema").trained_on.class_names == ("0", "2", "10", "11")
    shape = ["--model.image-size", "8", "--model.channels", "3", "--model.num-classes", "4"]
    assert train(*shape, "--data", str(data), "--output-dir", str(tmp_path / "again")) == 0
    assert f"{data}: 4 classes (0 0, 1 2, 2 10, 3 11)\n" in capfd.readouterr().out


def test_a_run_is_not_resumed_with_other_classes(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = class_folders(tmp_path / "other", ("2", "0", "10", "9"))
    shape = ["--model.image-size", "8", "--model.channels", "3", "--model.num-classes", "4"]
    options = ["--data", str(other), "--output-dir", str(run[1]), "--ema-widths", "0.1"]
    assert train(*shape, *options, "--resume-from-checkpoint", str(run[1] / "checkpoint-2")) == 2
    error = capsys.readouterr().err
    was = "4 classes (0 0, 1 2, 2 10, 3 11), not 4 classes (0 0, 1 2, 2 9, 3 10)"
    assert f"checkpoint-2 was trained on {was}: resume with the data it began with" in error


def test_a_run_from_a_model_of_other_classes_takes_labels_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = named_model(tmp_path / "start", ("a", "b", "c"))
    data = class_folders(tmp_path / "data", ("b", "c", "d"))
    shape = ["--model.image-size", "8", "--model.channels", "3", "--model.num-classes", "3"]
    options = [*shape, "--data", str(data), "--init-from", start, "--label-dropout", "0.1"]
    out = tmp_path / "run"
    idle = ["--learning-rate", "0", "--weight-decay", "0", "--checkpointing-steps", "1"]
    assert train(*options, *idle, "--output-dir", str(out)) == 0
    assert "labels are taken by name, 1 of them anew" in capfd.readouterr().out
    before, after = load_model(start), load_model(out)
    assert torch.equal(after.label_embed.weight[:2], before.label_embed.weight[1:3])
    assert torch.equal(after.label_embed.weight[3], before.label_embed.weight[3])
    assert not torch.equal(after.label_embed.weight[2], before.label_embed.weight[0])
    teacher = ["--objective", "consistency-distillation", "--output-dir", str(tmp_path / "no")]
    assert train(*options, *teacher) == 2
    assert "the teacher was trained on 3 classes (0 a, 1 b, 2 c), not" in capfd.readouterr().err


def test_pairs_have_the_classes_of_the_model_that_made_them(tmp_path: Path) -> None:
    start, out = named_model(tmp_path / "start", ("a", "b", "c")), tmp_path / "run"
    options = ["--objective", "reflow", "--pairs", str(tmp_path / "pairs"), "--init-from", start]
    few = ["--num-pairs", "32", "--denoise-timesteps", "2", "--output-dir", str(out)]
    shape = ["--model.image-size", "8", "--model.channels", "3", "--model.num-classes", "3"]
    assert train(*shape, *options, *few) == 0
    assert load_model(out).trained_on == TrainedOn(("a", "b", "c"))


def test_configurations_without_names_load_and_damaged_names_are_refused(tmp_path: Path) -> None:
    folder = Path(named_model(tmp_path / "model"))
    before = load_file(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("id2label") == dict(enumerate_text(CLASSES))
    (folder / "config.json").write_text(json.dumps(values))
    assert load_model(folder).trained_on == TrainedOn()
    assert load_file(folder / "model.safetensors").keys() == before.keys()
    for names in ([], "cat", {"0": "a"}, {"0": "a", "1": "b", "3": "c"}, {"0": 1, "1": 2, "2": 3}):
        (folder / "config.json").write_text(json.dumps(values | {"id2label": names}))
        with pytest.raises(CheckpointError, match="id2label must map every label"):
            load_model(folder)
    for latents in (3, {}, {"scale": 0}, {"scale": 1, "shift": "1"}, {"scale": 1, "code": "x"}):
        (folder / "config.json").write_text(json.dumps(values | {"latents": latents}))
        with pytest.raises(CheckpointError, match="latents"):
            load_model(folder)


def enumerate_text(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(str(label), name) for label, name in enumerate(names)]


def test_names_that_are_too_long_to_store_are_left_out_and_said(tmp_path: Path) -> None:
    model = small_model(40)
    model.trained_on = TrainedOn(tuple(f"{label} {'x' * 30_000}" for label in range(40)))
    with pytest.warns(UserWarning, match="the names of 40 classes take more than 1 MiB"):
        save_model(model, tmp_path / "model")
    assert load_model(tmp_path / "model").trained_on == TrainedOn()


# Labels by name


def test_labels_are_numbers_or_names_and_several_are_separated_by_commas() -> None:
    known = TrainedOn(("tench, Tinca tinca", "crane", "crane", "sea lion", "Ärger"))
    texts = ["tench", "Tinca tinca", "tench, Tinca tinca", "sea lion,Ärger", "3,4", "1 2", "5"]
    assert labels_from_text(known, texts, 5) == [0, 0, 0, 3, 4, 3, 4, 1, 2, 5]
    mistakes = {
        "crane": "'crane' names the classes 1 and 2: give the number",
        "sea lyon": r"'sea lyon' names no class of the model \(perhaps sea lion\)",
        "6": "label '6' is not allowed: labels go from 0 to 4, 5 is the null label",
        "-1": "'-1' names no class",
        "9" * 5000: "is not allowed",
        " , ": "there is no label",
    }
    for text, says in mistakes.items():
        with pytest.raises(ValueError, match=says) as refused:
            labels_from_text(known, [text], 5)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="this model does not know the names of its classes"):
        labels_from_text(TrainedOn(), ["cat"], 5)


def test_classes_of_data_are_found_by_name_and_others_refused() -> None:
    known = TrainedOn(("a", "b", "c"))
    assert labels_of_classes(known, ("a", "c"), 3) == [0, 2]
    assert labels_of_classes(known, ("c", "b", "a"), 3) == [2, 1, 0]
    assert labels_of_classes(known, ("0", "1"), 3) == [0, 1]  # data that know numbers alone
    assert labels_of_classes(TrainedOn(), ("x", "y", "z"), 3) == [
        0,
        1,
        2,
    ]  # models of earlier versions
    assert labels_of_classes(TrainedOn(("0", "1", "10")), ("0", "10"), 3) == [0, 2]
    for ours, theirs in (
        (known, ("a", "d")),
        (known, ("0", "1", "2", "3")),
        (TrainedOn(), ("a", "c")),
        (TrainedOn(("0", "1", "2")), ("a", "b", "c")),
    ):
        with pytest.raises(ValueError, match=r"class"):
            labels_of_classes(ours, theirs, 3)


def test_many_classes_are_described_in_one_line() -> None:
    names = tuple(f"n{i:08}" for i in range(1000))
    told = describe_classes(names)
    assert told.startswith("1000 classes (0 n00000000, 1 n00000001, ")
    assert told.endswith(", 9 n00000009, ..., 999 n00000999)")
    assert "\n" not in describe_classes(("a\nb\x1b[31m",))


def test_sample_takes_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = named_model(tmp_path / "model")
    command = ["sample", "--model", model, "--num-images", "4", "--dtype", "float32", "--quiet"]
    arrays = tmp_path / "a.npz"
    for labels, expected in (
        (["dog", "cat"], [2, 1, 2, 1]),
        (["house cat"], [1] * 4),
        (["dog,0"], [2, 0, 2, 0]),
        (["2,0"], [2, 0, 2, 0]),
        (["2", "0"], [2, 0, 2, 0]),
        (["3"], [3] * 4),
    ):
        assert main([*command, "--npz", str(arrays), "--labels", *labels]) == 0
        assert np.load(arrays)["arr_1"].tolist() == expected
    capsys.readouterr()
    assert main([*command, "--npz", str(arrays), "--labels", "cow"]) == 2
    error = capsys.readouterr().err
    assert (
        "--labels: 'cow' names no class of the model (they are bird, cat, house cat, dog)" in error
    )
    assert len(error.strip().splitlines()) == 1


def test_a_number_that_names_another_class_is_said(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(run[1]), "--npz", str(tmp_path / "a.npz"), "--quiet"]
    assert main([*command, "--num-images", "1", "--labels", "2"]) == 0
    error = capsys.readouterr().err
    assert error == "--labels 2 is class number 2, named '10'; the class named 2 is number 1\n"


def test_the_pipeline_has_the_names_of_its_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from odelt_fast import OdeltPipeline

    model = load_model(named_model(tmp_path / "model"))
    pipe = OdeltPipeline(model)
    assert pipe.get_label_ids(["dog", "house cat", "cat"]) == [2, 1, 1]
    pipe.save_pretrained(tmp_path / "pipe")
    again = OdeltPipeline.from_pretrained(tmp_path / "pipe")
    assert again.labels == pipe.labels == {"bird": 0, "cat": 1, "dog": 2, "house cat": 1}
    assert again.transformer.model.trained_on.class_names == CLASSES
    own = OdeltPipeline(model, id2label={0: "x", 1: "y", 2: "z"})
    assert own.get_label_ids("y") == [1]


def test_the_service_takes_and_tells_names(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from odelt_fast.serving.service import GenerateRequest, Service

    service = Service(load_model(named_model(tmp_path / "model")))
    try:
        assert service.describe()["labels"]["names"] == list(CLASSES)

        async def labels(body: str) -> list[int]:
            wanted = GenerateRequest.model_validate_json(body)
            job, _ = service.job(wanted, "", asyncio.get_running_loop().create_future())
            assert job.labels is not None
            return job.labels.tolist()  # type: ignore[no-any-return]

        assert asyncio.run(labels('{"labels": ["dog", 0, "cat"]}')) == [2, 0, 1]
        assert asyncio.run(labels('{"labels": "dog", "num_images": 2}')) == [2, 2]
        with pytest.raises(ValueError, match="'cow' names no class of the model"):
            asyncio.run(labels('{"labels": ["cow"]}'))
    finally:
        service.batcher.stop()


def test_the_page_takes_and_tells_names(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from odelt_fast.demo.page import Page
    from odelt_fast.demo.settings import Dials, check_setting
    from odelt_fast.demo.studio import Studio

    names = ("bird", "[cat](http://x)<b>", "sea lion")
    model = load_model(named_model(tmp_path / "model", names))

    def labels(text: str) -> tuple[int, ...]:
        dials = Dials(2, 0, labels=text)
        return check_setting(model.config, 6, dials, model.trained_on).labels

    assert labels("sea lion, bird, 1") == (2, 0, 1)
    assert labels("bird 1 bird") == (0, 1, 0)
    assert labels("2 1") == (2, 1)
    with pytest.raises(ValueError, match="'cow' names no class"):
        labels("bird, cow")
    told = Page(Studio(model, num_images=1), None, None).help()
    assert "bird" in told
    assert not any(mark in told for mark in ("[cat]", "<b>", "http://"))


# Data with other classes


def evaluate(model: str, data: Path, out: Path, *options: str) -> int:
    command = ["evaluate", "--model", model, "--data", str(data), "--out", str(out), "--quiet"]
    few = ["--num-images", "12", "--allow-few-samples", "--seeds", "1", "--steps", "1"]
    network = ["--features", "cifar10", "--dtype", "float32", "--npz", "--batch-size", "12"]
    return main([*command, *few, *network, "--depths", "2", *options])


def test_evaluation_maps_classes_by_name_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = named_model(tmp_path / "model", ("a", "b", "c"), image_size=32)
    val = class_folders(tmp_path / "val", ("a", "c"), 6, 32)
    assert evaluate(model, val, tmp_path / "by-name", "--labels", "data") == 0
    assert capsys.readouterr().err == "classes by name: c is 2\n"
    [samples] = (tmp_path / "by-name" / "samples").glob("*.npz")
    assert np.load(samples)["arr_1"].tolist() == [0] * 6 + [2] * 6
    assert evaluate(model, val, tmp_path / "drawn") == 0
    said = capsys.readouterr().err
    assert f"{val} has 2 of the model's 3 classes, and --labels drawn draws them all" in said
    others = class_folders(tmp_path / "others", ("a", "x"), 6, 32)
    for labels in ("data", "drawn", "balanced"):
        assert evaluate(model, others, tmp_path / "out", "--labels", labels) == 2
        error = capsys.readouterr().err
        assert (
            f"{others} has other classes than the model: 'x' of its 2 classes (0 a, 1 x)" in error
        )
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
    flat = others / "a"
    assert evaluate(model, flat, tmp_path / "flat", "--allow-few-samples") in (0, 2)
    capsys.readouterr()
    assert evaluate(model, flat.rename(tmp_path / "pictures"), tmp_path / "flat2") in (0, 2)
    assert "classes" not in capsys.readouterr().err
    assert evaluate(model, tmp_path / "pictures", tmp_path / "o", "--labels", "data") == 2
    assert "is one folder of images, without labels" in capsys.readouterr().err


def test_images_that_are_inverted_have_their_labels_by_name(tmp_path: Path) -> None:
    model, arrays = named_model(tmp_path / "model", ("a", "b", "c")), tmp_path / "a.npz"
    command = ["sample", "--model", model, "--num-images", "4", "--steps", "1", "--quiet"]
    for names, expected in ((("b", "c"), [1, 1, 2, 2]), (("x", "y", "z"), [3] * 4)):
        data = class_folders(tmp_path / names[0], names, 2)
        assert main([*command, "--invert", str(data), "--npz", str(arrays)]) == 0
        assert np.load(arrays)["arr_1"].tolist() == expected  # 3: the null label


def test_numbered_class_folders_are_in_natural_order(tmp_path: Path) -> None:
    names = tuple(map(str, range(12)))
    data = class_folders(tmp_path / "data", names, 1)
    source = open_source(data)
    assert source.class_names == names
    assert source.labels.tolist() == list(range(12))
    prefixed = class_folders(tmp_path / "prefixed", ("class10", "class9", "class1"), 1)
    assert open_source(prefixed).class_names == ("class1", "class9", "class10")


# Latents


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small autoencoders: one, a copy of it in float16, its encoder with another decoder, one of
    other weights, of another scale, of a shift, and an imitation."""
    diffusers = pytest.importorskip("diffusers")
    place = tmp_path_factory.mktemp("vaes")
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "block_out_channels": (8, 8),
        "latent_channels": 4,
    }

    def made(seed: int, **values: float) -> Any:
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(**kinds, **values)

    models = {"one": made(0), "others": made(1), "scaled": made(0, scaling_factor=0.2)}
    models["shifted"] = made(0, shift_factor=0.1)
    models["finetuned"] = made(0)
    torch.nn.init.normal_(models["finetuned"].decoder.conv_out.weight)
    models["half"] = made(0).half()
    models["tiny"] = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for name, model in models.items():
        model.save_pretrained(place / name)
    return {name: place / name for name in models}


@pytest.fixture(scope="module")
def encoded(vaes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of two classes of pictures, and a run on them in `run` beside."""
    place = tmp_path_factory.mktemp("latents")
    data = class_folders(place / "data", ("a", "b"), 3, 16)
    command = ["encode", "--data", str(data), "--vae", str(vaes["one"]), "--image-size", "16"]
    assert main([*command, "--out", str(place / "latents"), "--device", "cpu"]) == 0
    shape = ["--model.image-size", "8", "--model.channels", "4", "--model.num-classes", "2"]
    options = [*shape, "--data", str(place / "latents"), "--output-dir", str(place / "run")]
    assert train(*options) == 0
    return place


def test_what_latents_are_goes_from_the_encoder_to_the_model(
    vaes: dict[str, Path], encoded: Path
) -> None:
    source, model = open_source(encoded / "latents"), load_model(encoded / "run")
    assert model.trained_on == TrainedOn(("a", "b"), source.latents)
    latents = source.latents
    assert latents is not None
    assert (latents.scale, latents.shift, latents.encoder) == (0.18215, 0.0, str(vaes["one"]))
    assert len(latents.encoder_sha256) == 64


@pytest.mark.parametrize(
    ("decoder", "fits"),
    [
        ("one", True),
        ("half", True),
        ("finetuned", True),
        ("tiny", True),
        ("others", False),
        ("scaled", False),
        ("shifted", False),
    ],
)
def test_a_decoder_of_other_latents_is_refused_unless_told_otherwise(
    decoder: str,
    fits: bool,
    vaes: dict[str, Path],
    encoded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from odelt_fast.sampling.decoder import load_decoder

    out = tmp_path / "a.png"
    command = ["sample", "--model", str(encoded / "run"), "--num-images", "1", "--quiet"]
    command += ["--dtype", "float32", "--out", str(out), "--decoder", str(vaes[decoder])]
    assert main(command) == (0 if fits else 2)
    assert out.exists() == fits
    error = capsys.readouterr().err
    if not fits:
        assert f"the decoder is for latents of {vaes[decoder]} (scale" in error
        assert f"the model was trained on those of {vaes['one']} (scale 0.18215)" in error
        assert len(error.strip().splitlines()) == 1
    assert main([*command, "--any-decoder"]) == 0
    model = load_model(encoded / "run")
    if not fits:
        with pytest.raises(ValueError, match="the decoder is for latents of"):
            Sampler(model, decoder=load_decoder(vaes[decoder]))
    Sampler(model, decoder=load_decoder(vaes[decoder], any_latents=True))


def test_evaluation_and_pipeline_compare_the_latents_too(
    vaes: dict[str, Path], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers

    from odelt_fast import OdeltPipeline

    run = str(encoded / "run")
    options = ["--decoder", str(vaes["others"]), "--features", "cifar10"]
    assert evaluate(run, encoded / "data", tmp_path / "out", *options) == 2
    assert "the decoder is for latents of" in capsys.readouterr().err
    tiny = small_model(3, channels=4, image_size=16)
    tiny.trained_on = TrainedOn(("a", "b", "c"), load_model(run).trained_on.latents)
    save_model(tiny, tmp_path / "tiny")
    assert evaluate(str(tmp_path / "tiny"), encoded / "data", tmp_path / "out", *options) == 2
    capsys.readouterr()
    assert (
        evaluate(
            str(tmp_path / "tiny"), encoded / "data", tmp_path / "out", *options, "--any-decoder"
        )
        == 0
    )
    model = load_model(run)
    one, other = (diffusers.AutoencoderKL.from_pretrained(vaes[name]) for name in ("one", "others"))
    pipe = OdeltPipeline(model, one)
    with pytest.raises(ValueError, match="the model was trained on those of"):
        OdeltPipeline(model, other)
    told = OdeltPipeline(model, other, any_decoder=True)
    told.save_pretrained(tmp_path / "pipe")
    assert OdeltPipeline.from_pretrained(tmp_path / "pipe").config["any_decoder"]
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0], output_type="pt").images.shape == (1, 3, 16, 16)
    pipe.vae = other
    with pytest.raises(ValueError, match="the model was trained on those of"):
        pipe([0])
    assert pipe([0], output_type="latent").images.shape == (1, 4, 8, 8)


def test_any_decoder_without_a_decoder_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sample"], ["evaluate", "--data", "digits"]):
        assert main([*command, "--any-decoder"]) == 2
        assert "--any-decoder is of --decoder, which is not given" in capsys.readouterr().err


def test_a_shift_is_taken_out_of_latents_and_put_back(
    vaes: dict[str, Path], encoded: Path, tmp_path: Path
) -> None:
    import diffusers

    from odelt_fast.sampling.decoder import load_decoder

    command = ["encode", "--data", str(encoded / "data"), "--vae", str(vaes["shifted"])]
    out = tmp_path / "latents"
    assert main([*command, "--image-size", "16", "--out", str(out), "--device", "cpu"]) == 0
    source, pixels = open_source(out), open_source(encoded / "data", image_size=16, channels=3)
    vae = diffusers.AutoencoderKL.from_pretrained(vaes["shifted"])
    with torch.no_grad():
        means = vae.encode(torch.from_numpy(pixels.read_many([0, 4])[0])).latent_dist.mean
        decoded = vae.decode(means).sample
    latents = torch.from_numpy(source.read_many([0, 4])[0])
    torch.testing.assert_close(latents, (means - 0.1) * 0.18215, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(
        load_decoder(vaes["shifted"])(latents), decoded, rtol=2e-2, atol=2e-2
    )
    again = main([*command, "--image-size", "16", "--out", str(out), "--device", "cpu"])
    assert again == 0  # a finished folder stays as it is


def test_a_run_is_not_resumed_on_other_latents(
    vaes: dict[str, Path], encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", "--data", str(encoded / "data"), "--vae", str(vaes["others"])]
    other = tmp_path / "latents"
    assert main([*command, "--image-size", "16", "--out", str(other), "--device", "cpu"]) == 0
    shape = ["--model.image-size", "8", "--model.channels", "4", "--model.num-classes", "2"]
    options = ["--data", str(other), "--output-dir", str(encoded / "run")]
    resumed = ["--resume-from-checkpoint", str(encoded / "run" / "checkpoint-2")]
    assert train(*shape, *options, *resumed) == 2
    assert "was trained on latents of" in capsys.readouterr().err


def test_latents_of_earlier_versions_are_read_and_their_encoding_continued(
    encoded: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "latents"
    shutil.copytree(encoded / "latents", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    sha, shift = manifest.pop("encoder_sha256"), manifest.pop("shift")
    assert (len(sha), shift) == (64, 0.0)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    source = open_source(folder)
    assert source.latents == Latents(0.18215, 0.0, manifest["facts"]["encoder"])
    vae = manifest["facts"]["encoder"]
    command = ["encode", "--data", str(encoded / "data"), "--vae", vae, "--image-size", "16"]
    assert main([*command, "--out", str(folder), "--device", "cpu"]) == 0


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_an_autoencoder_that_overflows_is_named_whatever_the_output(output_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from odelt_fast import OdeltPipeline

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    torch.nn.init.constant_(vae.decoder.conv_out.weight, 6e4)
    model = small_model(3, channels=4).half()
    pipe = OdeltPipeline(model, vae.half())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(
        ValueError, match="the autoencoder AutoencoderKL made values that are not finite in float16"
    ) as refused:
        pipe([0, 1], output_type=output_type)
    assert "load it in bfloat16 or float32" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.isfinite(pipe([0], output_type="latent").images).all()
    pipe.vae.to(torch.bfloat16)
    assert len(pipe([0, 1], output_type=output_type).images) == 2
