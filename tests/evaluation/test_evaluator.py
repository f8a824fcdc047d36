"""Evaluation: the Sampler's images, the metrics of their features, resumed and shared without a
difference; its commands and figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.cli import main
from odelt_fast.config import DiTConfig
from odelt_fast.evaluation import paper
from odelt_fast.evaluation.cells import plan_cells
from odelt_fast.evaluation.charts import Point, frontier, paper_points
from odelt_fast.evaluation.evaluator import Evaluator
from odelt_fast.evaluation.features import load_features
from odelt_fast.evaluation.metrics import frechet_distance, moments_of, read_statistics
from odelt_fast.evaluation.results import number, read_results, summarise, to_markdown
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.generation.shards import Shards
from odelt_fast.images import open_source
from odelt_fast.sampling.noise import drawn_labels
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.storage.places import Place
from tests.evaluation.test_metrics import small_network
from tests.helpers.forked import start, wait
from tests.stress.kill_evaluate import (
    check_journal,
    evaluation,
    outcome,
    random_model,
    run,
    watched_run,
)

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("finished")
    run(evaluation(model), out)
    return out


# Numbers


def test_images_and_metrics_are_those_of_the_sampler(model: str, finished: Path) -> None:
    """Every image is the Sampler's at (seed, index), and the distance is that of all features at
    once."""
    network, digits = load_features("digits"), open_source("digits")
    real = network(torch.from_numpy(digits.read_many(range(len(digits)))[0]))[0].numpy()
    reference = moments_of([real], 64).statistics()
    row = next(
        row for row in read_results(finished)["rows"] if (row["depth"], row["steps"]) == (2, 2)
    )
    for seed in (0, 1):
        images = Sampler(load_model(model), depth=2, steps=2)(num_images=120, seed=seed)
        with np.load(finished / "samples" / f"l2-euler-T2-seed{seed}.npz") as file:
            assert (file["arr_0"] == to_uint8(images)).all()
            assert (file["arr_1"] == drawn_labels(seed, range(120), 10)).all()
            labels = file["arr_1"]
        rows, logits = network(images)
        expected = frechet_distance(moments_of([rows.numpy()], 64).statistics(), reference)
        assert row["metrics"]["digits-features Frechet distance"]["values"][seed] == pytest.approx(
            expected, rel=1e-5
        )
        assert logits is not None
        assert row["metrics"]["recognised"]["values"][seed] == pytest.approx(
            (logits.argmax(1).numpy() == labels).mean(), abs=1e-12
        )


def test_rows_say_what_a_cell_cost(finished: Path) -> None:
    results = read_results(finished)
    assert results["complete"]
    assert [
        (row["depth"], row["steps"], row["evaluations"], row["live_blocks"])
        for row in results["rows"]
    ] == [
        (4, 2, 2, 4),
        (4, 1, 1, 4),
        (2, 2, 2, 2),
        (2, 1, 1, 2),
    ]
    assert all(row["latency"] > 0 and row["seeds"] == [0, 1] for row in results["rows"])


def test_markdown_is_shaped_like_tables_2_and_3(finished: Path) -> None:
    text = (finished / "results.md").read_text()
    rows = read_results(finished)["rows"]
    cells = [number(row["metrics"]["digits-features Frechet distance"]) for row in rows]
    assert f"| l = 4 | {cells[0]} | {cells[1]} |\n| l = 2 | {cells[2]} | {cells[3]} |" in text
    assert "| digits-features Frechet distance, euler | T = 2 | T = 1 |" in text
    assert "Not an FID" in text
    assert f"| 2 | euler | 1 | {cells[3]} |" in text


def test_mean_and_deviation_are_over_seeds() -> None:
    cell = {
        "solver": "euler",
        "depth": 4,
        "steps": 1,
        "tolerance": None,
        "live_blocks": 4,
        "guidance_scale": None,
        "evaluations": 1.0,
    }
    values = (1.0, 2.0, 4.0)
    cells = [
        cell | {"seed": i, "latency": 1.0, "peak_memory": i, "metrics": {"FID": value}}
        for i, value in enumerate(values)
    ]
    (row,) = summarise(cells)
    assert row["metrics"]["FID"]["mean"] == pytest.approx(np.mean(values))
    assert row["metrics"]["FID"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert row["peak_memory"] == 2
    assert summarise(cells[:1])[0]["metrics"]["FID"]["std"] is None
    assert number({"mean": 5.934, "std": 0.1}) == "5.93 ± 0.10"


def test_guided_steps_are_counted_as_the_paper_counts_them(model: str, tmp_path: Path) -> None:
    """T = 128 is 64 steps of two evaluations; T = 1 is not guided."""
    settings = evaluation(
        model,
        guidance_scale=1.5,
        paper_guidance=True,
        steps=(128, 1),
        depths=(2,),
        seeds=1,
        num_images=16,
        npz=False,
    )
    Evaluator(
        Evaluation(**{**vars(settings), "metrics": ("recognised",)}),
        tmp_path,
        device="cpu",
        show=False,
    ).run()
    rows = read_results(tmp_path)["rows"]
    assert [(row["steps"], row["evaluations"], row["guidance_scale"]) for row in rows] == [
        (128, 128, 1.5),
        (1, 1, None),
    ]
    guided = evaluation(model, guidance_scale=1.5, steps=(128,), depths=(2,))
    plain = plan_cells(guided, load_model(model).config)
    assert plain[0].sampler(load_model(model), settings).explain()["evaluations_per_image"] == 256


def test_adaptive_solvers_run_at_every_tolerance(model: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "solvers": ("euler", "bosh3"),
        "tolerances": (0.5, 0.01),
        "steps": (1,),
        "depths": (2,),
        "num_images": 20,
    }
    run(
        evaluation(model, **changes, seeds=1, allow_few_samples=True, metrics=("frechet",)),
        tmp_path,
    )
    rows = read_results(tmp_path)["rows"]
    assert [(row["solver"], row["steps"], row["tolerance"]) for row in rows] == [
        ("euler", 1, None),
        ("bosh3", None, 0.5),
        ("bosh3", None, 0.01),
    ]
    assert rows[2]["evaluations"] > rows[1]["evaluations"] > 1
    assert "| 2 | bosh3 | 0.01 |" in to_markdown(read_results(tmp_path))


def test_first_image_draws_a_part_of_a_seed(model: str) -> None:
    for kind in ("shortcut", "consistency"):
        network = load_model(model)
        object.__setattr__(network.config, "sampling", kind)
        sampler = Sampler(network, depth=2, steps=2)
        whole, part = sampler(6, seed=3), sampler(2, seed=3, first_image=4)
        torch.testing.assert_close(part, whole[4:], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="first_image"):
        sampler(2, first_image=-1)


# Going on, and several processes


def test_a_killed_evaluation_goes_on_without_a_difference(
    model: str, finished: Path, tmp_path: Path
) -> None:
    """Killed at a batch that was never finished, inside of a cell: it is the only one that is
    generated again."""
    out, journal, log = tmp_path / "out", tmp_path / "journal", tmp_path / "log"
    children = start(watched_run(evaluation(model), out, journal), 1, log)
    limit = time.monotonic() + 300
    while (
        not journal.exists() or journal.read_text().count("begun") < 21
    ):  # the third cell, batch 5
        assert time.monotonic() < limit, log.read_text()[-2000:]
        time.sleep(0.002)
    assert not wait(children, 0, log)
    partial = sorted(path.name for path in (out / "partial").glob("*/*"))
    assert partial or len(list((out / "cells").glob("*"))) >= 2
    run_on = watched_run(evaluation(model), out, journal)
    assert wait(start(run_on, 1, log), time.monotonic() + 300, log)
    assert check_journal(journal) <= 1
    assert outcome(out) == outcome(finished)


def test_two_processes_make_the_same_images_and_metrics(
    model: str, finished: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA has started in this process, which cannot be forked any more")
    settings = evaluation(model)
    assert wait(
        start(lambda: run(settings, tmp_path / "out"), 2, tmp_path / "log"),
        time.monotonic() + 300,
        tmp_path / "log",
    )
    assert outcome(tmp_path / "out") == outcome(finished)
    assert read_results(tmp_path / "out")["environment"]["processes"] == "2 processes"


def test_finished_cells_are_kept_and_new_ones_added(model: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"depths": (2,), "seeds": 1, "num_images": 70, "npz": False}
    run(evaluation(model, steps=(1,), **small), tmp_path)
    (cell,) = (tmp_path / "cells").iterdir()
    written = cell.stat().st_mtime_ns
    run(evaluation(model, steps=(2, 1), **small), tmp_path)
    assert cell.stat().st_mtime_ns == written
    assert [row["steps"] for row in read_results(tmp_path)["rows"]] == [2, 1]
    with pytest.raises(ValueError, match="holds an evaluation with num_images 70, not 80"):
        run(evaluation(model, **{**small, "num_images": 80}), tmp_path)


def test_a_folder_has_one_run_at_a_time(model: str, tmp_path: Path) -> None:
    one, two = (Evaluator(evaluation(model), tmp_path, device="cpu", show=False) for _ in range(2))
    with one.folder.alone([]), pytest.raises(ValueError, match="another evaluation is running"):
        two.run()


def test_damaged_batches_are_named(tmp_path: Path) -> None:
    files = Shards(Place(tmp_path / "cell"), 5, 2)
    assert files.missing() == [0, 1, 2]
    for batch in (0, 2):
        files.write(batch, features=np.full((len(files.images(batch)), 3), batch))
    assert files.missing() == files.missing(1, 2) == [1]
    assert files.missing(0, 2) == []
    (tmp_path / "cell" / "000001.npz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"000001\.npz cannot be read .*delete it"):
        list(files.parts("features"))


# What is refused, before anything is generated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 64}, "64 images are too few for the 64 features of digits-features"),
        ({"features": "mnist"}, "mnist-features takes images of 28x28, not 8x8"),
        ({"depths": (3,)}, "depth 3 is not allowed"),
        ({"solvers": ("eluer",)}, "eluer"),
        ({"data": None}, "either --data or --stats"),
        (
            {"data": None, "stats": "x.npz", "metrics": ("kid",)},
            "kid and precision_recall need real images",
        ),
        (
            {"data": None, "stats": "missing.npz", "metrics": ("frechet",)},
            "missing.npz is no statistics file",
        ),
        ({"metrics": ("fid",)}, "--metrics must be one of frechet"),
        ({"paper_guidance": True}, "--paper-guidance needs"),
        ({"tolerances": (0.0,)}, "--tolerances must be above 0"),
        ({"labels": "all"}, "--labels must be"),
        ({"seeds": 0}, "--seeds must be at least 1"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(
    model: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(evaluation(model, **changes), tmp_path / "out", device="cpu", show=False)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_network_or_protocol_are_refused(
    model: str, finished: Path, tmp_path: Path
) -> None:
    own = {
        "data": None,
        "stats": str(finished / "reference.npz"),
        "metrics": ("frechet",),
        "seeds": 1,
        "depths": (2,),
        "steps": (1,),
    }
    run(evaluation(model, **own), tmp_path / "same")
    with pytest.raises(ValueError, match="under the protocol reference, not adm"):
        run(evaluation(model, **own, protocol="adm"), tmp_path / "protocol")
    narrow = tmp_path / "narrow.npz"
    np.savez(narrow, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="of 5 features, digits-features has 64"):
        run(evaluation(model, **{**own, "stats": str(narrow)}), tmp_path / "narrow")
    with np.load(finished / "reference.npz") as file:
        np.savez(tmp_path / "other.npz", **{**file, "features_sha256": np.array("0" * 64)})
    with pytest.raises(ValueError, match="other weights"):
        run(evaluation(model, **{**own, "stats": str(tmp_path / "other.npz")}), tmp_path / "other")
    assert not any((tmp_path / name).exists() for name in ("protocol", "narrow", "other"))


def test_models_of_latents_need_a_decoder(tmp_path: Path) -> None:
    shape = {
        "image_size": 4,
        "channels": 4,
        "hidden_size": 16,
        "depth": 2,
        "depth_min": 1,
        "depth_group": 1,
        "num_heads": 2,
    }
    latents = random_model(tmp_path / "latents", DiTConfig(**shape, num_classes=1))
    with pytest.raises(ValueError, match="latents of 4 channels: give --decoder"):
        Evaluator(evaluation(latents), tmp_path / "out", device="cpu", show=False)


# Commands


def test_published_checkpoints_are_evaluated_like_this_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A converted reference checkpoint, an autoencoder, a statistics file: the path of Tables 2, 3
    and 6, with small ones of each."""
    diffusers = pytest.importorskip("diffusers")
    checkpoint, converted = REFERENCE / "checkpoint_tiny_g1.pkl", tmp_path / "converted"
    shape = ["--num-heads", "3", "--depth-min", "1", "--depth-group", "1", "--image-size", "8"]
    assert main(["convert", str(checkpoint), *shape, "--out", str(converted)]) == 0
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=3, **blocks)
    autoencoder.save_pretrained(tmp_path / "vae")
    features = str(small_network(tmp_path / "tiny.safetensors", image_size=16))
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "real" / label).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / "real" / label / f"{i}.png"
            )
    stats = str(tmp_path / "stats.npz")
    assert (
        main(
            [
                "stats",
                "--data",
                str(tmp_path / "real"),
                "--features",
                features,
                "--out",
                stats,
                "--device",
                "cpu",
                "--quiet",
            ]
        )
        == 0
    )
    assert read_statistics(stats).notes["num_images"] == "10"
    capsys.readouterr()
    chosen = [
        "--decoder",
        str(tmp_path / "vae"),
        "--features",
        features,
        "--stats",
        stats,
        "--depths",
        "1",
        "4",
        "--steps",
        "2",
        "1",
    ]
    small = [
        "--num-images",
        "10",
        "--batch-size",
        "4",
        "--seeds",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--quiet",
    ]
    assert (
        main(
            ["evaluate", "--model", str(converted), *chosen, *small, "--out", str(tmp_path / "out")]
        )
        == 0
    )
    assert "tiny-features Frechet distance" in capsys.readouterr().out
    rows = read_results(tmp_path / "out")["rows"]
    assert [(row["depth"], row["steps"]) for row in rows] == [(4, 2), (4, 1), (1, 2), (1, 1)]
    assert all(
        np.isfinite(row["metrics"]["tiny-features Frechet distance"]["mean"]) for row in rows
    )


def test_evaluate_explains_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: give either --data or --stats, to compare with\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pareto", "scaling", "ablation"])
def test_figures_are_drawn_of_results(
    kind: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"{kind}.png"
    paper_too = ["--paper"] if kind == "pareto" else []
    assert (
        main(
            [
                "plot",
                kind,
                "--results",
                str(finished),
                str(finished),
                "--names",
                "a",
                "b",
                "--out",
                str(out),
                *paper_too,
            ]
        )
        == 0
    )
    with Image.open(out) as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10  # not an empty page
    text = capsys.readouterr().out
    assert ("| l = 4, a |" in text) == (kind == "ablation")
    assert main(["plot", kind, "--out", str(out)]) == 2
    assert "--results" in capsys.readouterr().err


def test_frontier_keeps_what_nothing_beats() -> None:
    def point(latency: float, value: float) -> Point:
        return Point(latency, value, 4, "euler", "", None)

    found = [point(1, 9), point(2, 9), point(2, 5), point(3, 6), point(4, 2)]
    assert frontier(found) == [point(1, 9), point(2, 5), point(4, 2)]
    assert frontier(found, higher_is_better=True) == [point(1, 9)]


def test_paper_s_numbers_are_those_of_its_tables() -> None:
    """Rows that stand in two tables agree; the frontier of the paper has no 12-block Euler point
    but dopri5's."""
    for (depth, solver, at), (value, _, memory) in paper.TABLE_3.items():
        if solver == "euler":
            assert paper.TABLE_2[f"l = {depth}"][paper.STEPS.index(int(at))] == value
        assert memory == pytest.approx(depth / 12, abs=0.01)
    for depth in (8, 4):
        assert (
            paper.TABLE_4[depth, 4] == paper.TABLE_5[depth, 1 / 8] == paper.TABLE_2[f"l = {depth}"]
        )
    best = {(point.depth, point.label) for point in frontier(paper_points())}
    assert (12, "tol=0.01") in best
    assert (12, "T=128") not in best


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)
