"""Metrics of images that exist already: those of the model that made them, in both protocols,
resumed without a difference; the options that apply."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odelt_fast.cli import main
from odelt_fast.commands.evaluate import Command
from odelt_fast.evaluation import existing
from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.existing import APPLYING, measure_existing
from odelt_fast.evaluation.features import resize_8_bit, resize_and_clip
from odelt_fast.evaluation.metrics import frechet_distance, moments_of
from odelt_fast.evaluation.results import read_results
from odelt_fast.evaluation.settings import METRICS, Evaluation
from odelt_fast.images import open_source
from tests.stress.kill_evaluate import random_model

SETTINGS = Evaluation(data="digits", metrics=METRICS, batch_size=50)


def images(count: int = 120, side: int = 8, channels: int = 1) -> np.ndarray:
    values = np.random.default_rng(1).integers(0, 256, (count, side, side, channels))
    return values.astype(np.uint8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "x.npz"
    np.savez(path, images(), np.arange(120) % 10)
    return path


@pytest.fixture(scope="module")
def measured(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure_existing(samples, SETTINGS, tmp_path_factory.mktemp("out"), show=False)


def test_numbers_are_those_of_the_model_that_made_the_images(tmp_path: Path) -> None:
    """An evaluation of a model under ADM's protocol rounds its images to 8 bits, as files do."""
    settings = dataclasses.replace(
        SETTINGS, model=random_model(tmp_path / "model"), depths=(2,), steps=(2,), num_images=120,
        seeds=1, protocol="adm", npz=True,
    )  # fmt: skip
    (row,) = Evaluator(settings, tmp_path / "model_out", show=False).run()["rows"]
    (file,) = (tmp_path / "model_out" / "samples").glob("*.npz")
    found = measure_existing(file, settings, tmp_path / "out", show=False)
    assert found["metrics"].keys() == row["metrics"].keys()
    assert len(found["metrics"]) == 6
    for name, value in found["metrics"].items():
        assert value == pytest.approx(row["metrics"][name]["mean"], rel=1e-5, abs=1e-9), name


def test_class_folders_measure_as_the_same_arrays(measured: dict[str, Any], tmp_path: Path) -> None:
    for i, image in enumerate(images()):
        folder = tmp_path / "pngs" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / f"{i}.png")
    found = measure_existing(tmp_path / "pngs", SETTINGS, tmp_path / "out", show=False)
    assert found["settings"]["num_images"] == 120
    for name, value in found["metrics"].items():  # in another order
        if name != "inception score":  # of parts of the images, in their order
            assert value == pytest.approx(measured["metrics"][name], rel=1e-6, abs=1e-3), name


@pytest.mark.parametrize("protocol", ["reference", "adm"])
@pytest.mark.parametrize("against", ["data", "stats"])
def test_either_protocol_resizes_as_it_should(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, against: str
) -> None:
    """FID's own two ways to 299 x 299, against images and against their statistics."""

    class Features(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x[:, :, 40:, 40:], 100).flatten(1)

    torch.jit.script(Features()).save(str(tmp_path / "f.pt"))
    sets = {"x": images(40, 24, 3), "real": images(50, 24, 3) // 2}
    for name, values in sets.items():
        np.savez(tmp_path / f"{name}.npz", values)
    network = ["--features", str(tmp_path / "f.pt"), "--trust-features", "--protocol", protocol]
    real = ["--data", str(tmp_path / "real.npz")]
    if against == "stats":
        made = ["--out", str(tmp_path / "real_stats.npz"), "--quiet", "--device", "cpu"]
        assert main(["stats", *real, *network, *made]) == 0
        real = ["--stats", str(tmp_path / "real_stats.npz")]
    out = ["--out", str(tmp_path / "out"), "--json", "--device", "cpu"]
    capsys.readouterr()
    assert main(["evaluate", "--samples", str(tmp_path / "x.npz"), *real, *network, *out]) == 0
    (found,) = json.loads(capsys.readouterr().out)["metrics"].values()
    resize = resize_8_bit if protocol == "adm" else resize_and_clip
    a, b = (
        moments_of(
            [Features()(resize(torch.tensor(values).permute(0, 3, 1, 2) / 127.5 - 1)).numpy()], 12
        ).statistics()
        for values in sets.values()
    )
    assert found == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_an_interrupted_run_goes_on(
    samples: Path, measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, limit, original = list[range](), [2], existing._measured

    def counted(source: Any, batch: range, *rest: Any) -> Any:
        if len(made) in limit:
            raise KeyboardInterrupt
        made.append(batch)
        return original(source, batch, *rest)

    monkeypatch.setattr(existing, "_measured", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_existing(samples, SETTINGS, tmp_path, show=False)
    limit.clear()
    found = measure_existing(samples, SETTINGS, tmp_path, show=False)
    assert made == [range(50), range(50, 100), range(100, 120)]
    assert found["metrics"] == measured["metrics"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert measure_existing(samples, SETTINGS, tmp_path, show=False) == found
    assert len(made) == 3


def test_other_samples_want_another_folder(tmp_path: Path) -> None:
    """Also those that were written anew under the same name, in the same size."""
    path = tmp_path / "x.npz"
    for changed in (False, True):
        np.savez(path, 255 - images() if changed else images(), np.arange(120) % 10)
        if changed:
            with pytest.raises(ValueError, match="name another --out"):
                measure_existing(path, SETTINGS, tmp_path / "out", show=False)
        else:
            measure_existing(path, SETTINGS, tmp_path / "out", show=False)


def test_the_table_says_what_was_compared(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", str(samples), "--data", "digits", "--metrics", "frechet", "kid"]
    assert main(["evaluate", *arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "120 images of 8x8 pixels, against digits; features: digits-features" in text
    assert "**Not an FID**" in text
    assert "| digits-features Frechet distance | KID |" in text
    assert (tmp_path / "results.md").read_text() in text
    with pytest.raises(ValueError, match="of images alone"):
        read_results(tmp_path)


# Options

OTHER = [
    field for field in dataclasses.fields(Command)
    if field.name not in {"samples", "out", "device", "json", "quiet", *APPLYING}
]  # fmt: skip


@pytest.mark.parametrize("field", OTHER, ids=lambda field: field.name)
def test_options_without_effect_are_refused_by_name(
    field: Any, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, values = f"--{field.name.replace('_', '-')}", {"dtype": "float32", "model": "digits"}
    given = [option] if field.type == "bool" else [option, values.get(field.name, "7")]
    if field.name == "depth_schedules":
        given = [option, "0:4,0.5:8"]
    if field.name == "guidance_interval":
        given = [option, "0.3", "1"]
    arguments = ["--samples", str(samples), "--data", "digits", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, *given]) == 2
    error = capsys.readouterr().err
    assert f"{option} has no effect on --samples" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--samples {x}", "give either --data or --stats"),
        ("--samples {x} --data digits --stats {x}", "give either --data or --stats"),
        ("--samples {x}z --data digits", "does not exist"),
        ("--samples digits --data digits", "does not exist"),
        ("--samples {x} --data digits --metrics inception_score", "compare with no real images"),
        ("--samples {bare} --data digits --metrics frechet recognised", "needs the classes"),
        ("--samples {wide} --data digits --features digits", "takes images of 8x8, not 9x9"),
        ("--samples {few} --data digits", "too few"),
        ("--samples {x} --stats {x} --split test", "--split is of --data"),
        ("--samples {x} --data digits --features digits --inception-weights {x}", "of digits"),
    ],
)
def test_what_does_not_fit_is_refused(
    samples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    files = {"x": samples}
    for name, values in {
        "bare": images(), "wide": images(120, 9), "few": images(20)
    }.items():  # fmt: skip
        files[name] = tmp_path / f"{name}.npz"
        np.savez(files[name], values)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", *arguments.format(**files).split(), *out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_latents_are_no_samples(tmp_path: Path) -> None:
    from odelt_fast.images.shards import LatentWriter

    writer = LatentWriter(tmp_path / "latents", 4, 8, ["a"])
    writer.append(np.zeros((2, 2, 2, 4, 8, 8), np.float32), np.zeros(2, np.int64))
    writer.finish()
    with pytest.raises(ValueError, match="latents of 4 channels: decode them"):
        measure_existing(tmp_path / "latents", SETTINGS, tmp_path / "out", show=False)
    assert open_source(tmp_path / "latents").channels == 4
