"""The command line: what it writes, how it refuses, and what it loads."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from odelt_fast import __version__
from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.cli import main
from odelt_fast.commands import env
from odelt_fast.commands.options import choose_dtype
from odelt_fast.files import write_whole
from odelt_fast.sampling.noise import drawn_labels
from odelt_fast.sampling.pictures import image_grid, to_uint8
from odelt_fast.sampling.sampler import Sampler
from tests.helpers.small_model import random_model

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
PATHS = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}


def save_random(folder: Path, **changes: object) -> str:
    return str(save_model(random_model(**{"depth": 6, **changes}), folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder, which must hold nothing but what it was asked to
    write."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sample_writes_the_sampler_s_images(
    model: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--depth 4 --steps 2 --num-images 5 --seed 3 --guidance-scale 1.5 --labels 4 7 --dtype"
        " float32 --batch-size 2"
    )
    assert (
        main(["sample", "--model", model, *options.split(), "--out", "a.png", "--npz", "a.npz"])
        == 0
    )
    sampler = Sampler(load_model(model), depth=4, steps=2, guidance_scale=1.5)
    expected = to_uint8(sampler(5, labels=[4, 7, 4, 7, 4], seed=3))
    arrays = np.load("a.npz")
    assert arrays["arr_0"].dtype == np.uint8
    assert (
        np.abs(arrays["arr_0"].astype(int) - expected).max() <= 1
    )  # another batch size may round differently
    assert arrays["arr_1"].tolist() == [4, 7, 4, 7, 4]
    assert Image.open("a.png").tobytes() == image_grid(arrays["arr_0"]).tobytes()
    assert files(workdir) == ["a.npz", "a.png"]
    said = capsys.readouterr()
    assert "a.npz and a.png: 5 images" in said.out
    assert "depth 4 (4 of 6 blocks), 2 steps of euler" in said.out
    assert "4 evaluations" in said.out
    assert not said.err


def test_json_is_one_object_and_describes_the_run(
    model: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "sample",
                "--model",
                model,
                "--json",
                "--num-images",
                "3",
                "--dtype",
                "float32",
                "--steps",
                "1",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    expected = {
        "files": ["samples.png"],
        "num_images": 3,
        "depth": 6,
        "live_blocks": 6,
        "steps": 1,
        "evaluations": 3,
        "dtype": "float32",
    }
    assert expected.items() <= told.items()
    assert told["seconds_per_image"] > 0
    assert files(workdir) == ["samples.png"]


def test_labels_in_the_arrays_are_those_drawn_from_the_seed(model: str, workdir: Path) -> None:
    assert (
        main(
            [
                "sample",
                "--model",
                model,
                "--npz",
                "only.npz",
                "--steps",
                "1",
                "--seed",
                str(2**64 - 1),
            ]
        )
        == 0
    )
    assert np.load("only.npz")["arr_1"].tolist() == drawn_labels(2**64 - 1, range(16), 10).tolist()
    assert files(workdir) == ["only.npz"]


def test_latents_are_written_as_they_are_and_never_as_a_picture(
    tmp_path: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = save_random(tmp_path / "latents", channels=4)
    command = ["sample", "--model", latents, "--num-images", "2", "--dtype", "float32"]
    assert main([*command, "--npz", "z.npz"]) == 0
    expected = Sampler(load_model(latents))(2).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.load("z.npz")["arr_0"], expected, atol=1e-5)
    assert main(command) == 2
    assert "--npz" in capsys.readouterr().err
    assert files(workdir) == ["z.npz"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--depth 5", "2, 4, 6"),
        ("--depth 0", "2, 4, 6"),
        ("--depth two", "--depth"),
        ("--steps 0", "--steps must be at least 1"),
        ("--steps -4", "--steps must be at least 1"),
        ("--num-images 0", "--num-images must be at least 1"),
        ("--num-images 100000000000000", "--npz"),
        ("--num-images 100000000000000 --npz a.npz", "no memory"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--seed -1", "from 0 to 2^64 - 1"),
        ("--seed 18446744073709551616", "from 0 to 2^64 - 1"),
        ("--labels 99", "from 0 to 9, 10 is the null label"),
        ("--labels 1 2 3 --num-images 2", "3 labels for 2 images"),
        ("--labels three", "--labels"),
        ("--guidance-scale nan", "finite"),
        ("--solver heun9", "euler"),
        ("--dtype int8", "bfloat16"),
        ("--device tpu", "cuda"),
        ("--model nothing-like-this", "bundled"),
        ("--model .", "config.json"),
        ("--temperature 2", "has no '--temperature'"),
        ("--depht 4 --step 4 --num 3", "perhaps --depth"),
        ("extra", "has no 'extra'"),
        ("--out missing/a.png", "no folder"),
        ("--out .", "is a folder"),
        ("--out a.docx", ".png"),
        ("--out a", ".png"),
        ("--out a.bufr", "BUFR"),
        ("--out /proc/a.png", "cannot be written"),
        ("--out /dev/full/a.png", "no folder"),
        ("--npz a.npy", ".npz"),
        ("--npz missing/a.npz", "no folder"),
        (f"--out {'a' * 300}.png", "too long"),
    ],
)
def test_a_mistake_in_sample_is_explained_briefly(
    model: str, workdir: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    given = options.split() if "--model" in options else ["--model", model, *options.split()]
    assert main(["sample", *given]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) <= 12
    assert not said.out
    assert files(workdir) == []


def test_cuda_without_a_gpu_is_refused_and_auto_never_is(
    model: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = torch.cuda.is_available()
    assert main(["sample", "--model", model, "--device", "cuda"]) == (0 if there else 2)
    assert there or "no CUDA GPU" in capsys.readouterr().err
    assert main(["sample", "--model", model, "--device", "auto"]) == 0


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(save_random(tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["label_embed.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    assert main(["sample", "--model", str(folder)]) == 2
    assert "label_embed.weight" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    assert main(["sample", "--model", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert files(workdir) == []


def test_samples_that_overflow_leave_the_old_picture(
    tmp_path: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(save_random(tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    weights["final_layer.out.weight"] *= 1e38
    save_file(weights, folder / "model.safetensors")
    Path("samples.png").write_bytes(b"old")
    assert main(["sample", "--model", str(folder), "--dtype", "float32"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert files(workdir) == ["samples.png"]
    assert Path("samples.png").read_bytes() == b"old"


def test_a_failed_write_leaves_the_old_file_and_no_other(workdir: Path) -> None:
    Path("a.npz").write_bytes(b"old")

    def fail(file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"a\.npz cannot be written: No space left"):
        write_whole(Path("a.npz"), fail)
    assert Path("a.npz").read_bytes() == b"old"
    assert files(workdir) == ["a.npz"]


def test_a_link_is_written_through_and_devices_are_left_alone(
    model: str, workdir: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.png").write_bytes(b"old")
    Path("link.png").symlink_to(tmp_path / "elsewhere.png")
    Path("device.png").symlink_to("/dev/null")
    assert main(["sample", "--model", model, "--steps", "1", "--out", "link.png"]) == 0
    assert Path("link.png").is_symlink()
    assert Image.open(tmp_path / "elsewhere.png").format == "PNG"
    assert main(["sample", "--model", model, "--steps", "1", "--out", "device.png"]) == 2
    assert files(workdir) == ["device.png", "link.png"]


def test_interrupting_ends_with_130_and_no_file(
    model: str,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tqdm, "update", lambda bar, count=1: signal.raise_signal(signal.SIGINT))
    assert main(["sample", "--model", model, "--steps", "1000"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert files(workdir) == []


def test_convert_makes_a_folder_that_samples(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = next(iter(sorted(REFERENCE.glob("checkpoint_*.pkl"))))
    recorded = np.load(REFERENCE / f"{checkpoint.stem.replace('checkpoint', 'model')}.npz")
    config = ast.literal_eval(str(recorded["config"]))
    shape = [
        f"--{name.replace('_', '-')}={config[name]}"
        for name in ("num_heads", "depth_min", "depth_group", "image_size")
    ]
    command = ["convert", str(checkpoint), *shape]
    assert main([*command, "--out", "converted"]) == 0
    said = capsys.readouterr().out
    names = {name for name in recorded.files if name.startswith("params/")}
    names -= {"params/Embed_0/embedding"}  # written by the reference and read by nothing
    assert f"{sum(recorded[name].size for name in names):,} parameters" in said
    assert f"hidden_size={config['hidden_size']}" in said
    assert main(["sample", "--model", "converted", "--npz", "a.npz", "--steps", "1"]) == 0
    assert (
        main([*command, "--out", "converted", "--weights", "raw", "--no-step-conditioned"]) == 0
    )  # a model folder may be replaced
    assert not load_model("converted").config.step_conditioned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("absent.pkl --out new", "does not exist"),
        (". --out new", "is not a file"),
        ("broken.pkl --out new", "broken.pkl"),
        ("broken.pkl --out full", "holds other files"),
        ("broken.pkl --out broken.pkl", "is not a folder"),
        ("broken.pkl --out /proc/new", "cannot be written"),
        ("broken.pkl", "--out"),
        ("broken.pkl --out new --weights best", "ema"),
    ],
)
def test_a_mistake_in_convert_is_explained_briefly(
    workdir: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    Path("broken.pkl").write_bytes(b"\x80\x04not a pickle")
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    assert main(["convert", *options.split()]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) <= 12
    assert files(workdir) == ["broken.pkl", "full"]


def test_plot_grid_draws_every_cell(
    model: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "plot",
                "grid",
                "--model",
                model,
                "--out",
                "g.png",
                "--depths",
                "2",
                "4",
                "--steps",
                "2",
                "1",
            ]
        )
        == 0
    )
    cell = image_grid(np.zeros((10, 8, 8, 1), np.uint8), columns=5)
    width, height = Image.open("g.png").size
    assert width > 2 * cell.width
    assert height > 2 * cell.height
    assert main(["plot", "grid", "--model", model, "--out", "g.png", "--depths", "3"]) == 2
    assert "2, 4, 6" in capsys.readouterr().err
    assert files(workdir) == ["g.png"]


def test_env_names_versions_and_the_dtype_of_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert str(choose_dtype("auto", "cpu")).removeprefix("torch.") in said
    assert choose_dtype("float16", "cpu") == torch.float16
    for package in ("triton", "flash-attn", "xformers"):
        assert f"\n{package} " in said
    assert said.count("untested here") >= 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["smaple"],
        ["train", "--bogus"],
        ["--steps", "4"],
        ["plot", "gird"],
        ["sample", "--steps"],
    ],
)
def test_an_unknown_command_is_explained_briefly(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert 0 < len(said.err.splitlines()) <= 12
    assert not said.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"odelt-fast {__version__}\n"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["train", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = python(
        f"import sys; from odelt_fast.cli import main; code = main({arguments})\n"
        "heavy = {'torch', 'numpy', 'scipy', 'PIL', 'huggingface_hub'}\n"
        "print(sorted(heavy & sys.modules.keys())); sys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    assert "usage: odelt-fast" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_cold_sample_loads_nothing_heavy_but_torch(model: str) -> None:
    code = (
        f"import sys; from odelt_fast.cli import main; code = main(['sample', '--model', {model!r},"
        " '--depth', '4', '--steps', '1'])\nheavy = {'scipy', 'torchdiffeq', 'huggingface_hub',"
        " 'sklearn', 'accelerate', 'datasets', 'diffusers', 'torch._dynamo'}\nprint(sorted(heavy"
        " & sys.modules.keys())); sys.exit(code)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "odelt_fast.cli", "sample", "--help"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_is_one_line_in_every_command(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        raise error

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == 2
    said = "error: not enough memory: draw fewer images, or lower --batch-size\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(env, "run", lambda options: {}["a bug of our own"])
    with pytest.raises(KeyError):
        main(["env"])
