"""from_pretrained, save_pretrained, push_to_hub: the files and habits of huggingface_hub's mixin,
and a push to a stand-in for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import load, save_file

from odelt_fast import CheckpointError, DiT, DiTConfig, Sampler, load_model
from odelt_fast.checkpoints.model_card import model_card
from odelt_fast.config import PRESETS
from odelt_fast.sampling.pictures import image_grid, to_uint8
from tests.helpers.hub_server import running_hub

CONFIG = DiTConfig(
    image_size=4, hidden_size=16, depth=3, depth_min=1, depth_group=1, num_heads=2, num_classes=3
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    network = DiT(CONFIG).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return network


class Mixed(DiT, PyTorchModelHubMixin):
    """The same network with the mixin's own methods."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)

    save_pretrained, push_to_hub = (
        PyTorchModelHubMixin.save_pretrained,
        PyTorchModelHubMixin.push_to_hub,
    )
    from_pretrained = classmethod(PyTorchModelHubMixin.from_pretrained.__func__)


def equal(one: DiT, other: DiT) -> bool:
    weights = one.state_dict(), other.state_dict()
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


def test_a_round_trip_gives_bitwise_equal_images(model: DiT, tmp_path: Path) -> None:
    assert model.save_pretrained(tmp_path / "model") is None
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    again = DiT.from_pretrained(tmp_path / "model")
    assert equal(model, again)
    assert not again.training
    assert type(again) is DiT
    images = (
        Sampler(network, depth=2, steps=2)(4, seed=1)
        for network in (model, again, load_model(tmp_path / "model"))
    )
    first, *others = images
    assert all(torch.equal(first, other) for other in others)


def test_the_files_are_those_of_the_mixin(model: DiT, tmp_path: Path) -> None:
    """Classes with huggingface_hub's mixin itself read what DiT wrote, and DiT reads what they
    wrote."""
    model.save_pretrained(tmp_path / "ours")
    theirs = Mixed.from_pretrained(tmp_path / "ours")
    assert equal(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(model, DiT.from_pretrained(tmp_path / "theirs"))


def test_loading_options(model: DiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert (
        DiT.from_pretrained(tmp_path, dtype=torch.bfloat16, map_location="cpu").dtype
        == torch.bfloat16
    )
    assert len(DiT.from_pretrained(str(tmp_path), depth=1).blocks) == 1
    assert DiT.from_pretrained("digits", depth=4).config.num_classes == 10
    with pytest.raises(CheckpointError, match="cannot be had from the Hub"):
        DiT.from_pretrained("user/nowhere", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(TypeError, match="revison is no option of loading a model"):
        DiT.from_pretrained("digits", revison="main")


def test_a_truncated_model_is_not_saved(model: DiT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a truncated model cannot be saved"):
        model.truncate(1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="config must be the model's own"):
        model.save_pretrained(tmp_path / "model", config=PRESETS["digits"])
    assert not (tmp_path / "model").exists()


def sharded(model: DiT, folder: Path, second: str) -> None:
    """A folder with the weights in two files, the second under any name."""
    names = sorted(model.state_dict())
    files = dict.fromkeys(names[::2], "model-00001-of-00002.safetensors") | dict.fromkeys(
        names[1::2], second
    )
    folder.mkdir(parents=True)
    for file in set(files.values()):
        save_file(
            {name: model.state_dict()[name] for name in names if files[name] == file}, folder / file
        )
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def test_shards_are_read_from_the_folder_and_from_nowhere_else(model: DiT, tmp_path: Path) -> None:
    sharded(model, tmp_path / "inside", "model-00002-of-00002.safetensors")
    assert equal(model, DiT.from_pretrained(tmp_path / "inside"))
    for number, name in enumerate(
        (
            "../outside.safetensors",
            str(tmp_path / "outside.safetensors"),
            "sub/../../outside.safetensors",
        )
    ):
        (tmp_path / f"leaves{number}" / "sub").mkdir(parents=True)
        sharded(
            model,
            tmp_path / f"leaves{number}" / "model",
            name if name.startswith("/") else "../outside.safetensors",
        )
        index = tmp_path / f"leaves{number}" / "model" / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("../outside.safetensors", name))
        with pytest.raises(
            CheckpointError, match=r"is no name of a \.safetensors file in the folder"
        ):
            DiT.from_pretrained(tmp_path / f"leaves{number}" / "model")


def test_a_card_has_the_table_of_costs_and_numbers_only_if_measured(
    model: DiT, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "plain")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert (card.data.library_name, card.data.license) == ("odelt-fast", None)
    assert "pytorch_model_hub_mixin" in card.data.tags
    assert (
        "| l = 3 | 1 | 1/32 | 1/128 |\n| l = 2 | 1/1.5 | 1/48 | 1/192 |\n| l = 1 | 1/3 | 1/96 |"
        " 1/384 |" in card.text
    )
    assert "easured" not in card.text
    assert "grid.png" not in card.text
    grid = tmp_path / "drawn.png"
    image_grid(to_uint8(torch.zeros(4, 1, 8, 8))).save(grid)
    facts = {
        "quality": {(3, 4): "FID 5.0", (1, 1): "FID 9.5"},
        "measured": "50 000 images",
        "license": "mit",
        "picture": grid,
    }
    model.save_pretrained(tmp_path / "measured", repo_id="user/model", model_card_kwargs=facts)
    card = ModelCard.load(tmp_path / "measured" / "README.md")
    assert card.data.license == "mit"
    assert (
        "| l = 3 | FID 5.0, 1 | not measured, 1/4 |\n| l = 1 | not measured, 1/3 | FID 9.5, 1/12 |"
        in card.text
    )
    assert "Measured: 50 000 images" in card.text
    assert 'load_model("user/model", depth=1)' in card.text
    assert "](grid.png)" in card.text
    assert (tmp_path / "measured" / "grid.png").read_bytes() == grid.read_bytes()


def test_a_card_that_is_there_is_kept(model: DiT, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_counts_the_blocks_that_run() -> None:
    text = model_card(PRESETS["DiT-XL/2"], repo_id="user/xl")
    assert "| l = 28 | 1 | 1/32 | 1/128 |\n| l = 20 | 1/1.5 |" in text  # 24 and 16 blocks
    assert "| l = 12 | 1/3 |" in text  # 8 blocks
    config = DiTConfig(depth=12, depth_min=4, depth_group=8)
    assert "| l = 4 | 0 | 0 | 0 |" in model_card(
        config, repo_id="user/model"
    )  # no whole group of blocks runs


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"quality": {(3, 4): "FID 5"}}, "quality needs measured"),
        ({"quality": {(4, 4): "FID 5"}, "measured": "so"}, "depth 4 is not allowed"),
        ({"quality": {(3, 0): "FID 5"}, "measured": "so"}, "at 0 steps"),
    ],
)
def test_a_card_refuses_numbers_that_cannot_be(facts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_card(CONFIG, repo_id="user/model", **facts)


CLIENT = """
import sys, torch
from odelt_fast import DiT, Sampler, load_model

folder = sys.argv[1]
model = DiT.from_pretrained(folder)
push = {"token": "hf_none", "commit_message": "first", "model_card_kwargs": {"license": "mit"}}
print(model.push_to_hub("user/first", **push))
print(model.save_pretrained(folder, push_to_hub=True, repo_id="user/second", token="hf_none"))
models = (model, DiT.from_pretrained("user/first"), load_model("user/second", depth=3))
images = [Sampler(m, steps=1)(2, seed=0) for m in models]
assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
again = DiT.from_pretrained("user/first", local_files_only=True, revision="main", depth=1)
assert len(again.blocks) == 1
try:
    DiT.from_pretrained("user/third")
except ValueError as error:
    print(error)
"""
PIPELINE_CLIENT = """
import sys, torch
from diffusers import DiffusionPipeline
from odelt_fast import OdeltPipeline, load_model

pipe = OdeltPipeline(load_model(sys.argv[1]))
pipe.push_to_hub("user/pipe", token="hf_none")
ours = OdeltPipeline.from_pretrained("user/pipe")
code = {"custom_pipeline": "pipeline", "trust_remote_code": True}
theirs = DiffusionPipeline.from_pretrained("user/pipe", **code)
images = [p([0, 2], depth=2, seed=1, output_type="latent").images for p in (pipe, ours, theirs)]
assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
load_model("user/pipe", depth=1)
print("equal")
"""


def client(code: str, folder: Path, home: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose Hub is at `url`: huggingface_hub takes its address at import."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        cwd=ROOT,
    )


def test_a_push_arrives_and_can_be_downloaded(model: DiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    with running_hub() as hub:
        done = client(CLIENT, tmp_path / "model", tmp_path / "home", hub.url)
    assert done.returncode == 0, done.stderr
    first, second, refused = done.stdout.splitlines()
    assert first.startswith(f"{hub.url}/user/first/commit/")
    assert second.startswith(f"{hub.url}/user/second/commit/")
    assert "'user/third' is no folder here and cannot be had from the Hub" in refused
    for files in (hub.repositories["user/first"], hub.repositories["user/second"]):
        assert files.keys() == {"README.md", "config.json", "model.safetensors"}
        weights = load(files["model.safetensors"])
        assert all(
            torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()
        )
    card = hub.repositories["user/first"]["README.md"].decode()
    assert 'license: "mit"' in card
    assert 'load_model("user/first", depth=1)' in card


def test_a_pushed_pipeline_can_be_downloaded_with_and_without_its_own_code(
    model: DiT, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    model.save_pretrained(tmp_path / "model")
    with running_hub() as hub:
        done = client(PIPELINE_CLIENT, tmp_path / "model", tmp_path / "home", hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
    assert {"model_index.json", "pipeline.py", "transformer/model.safetensors"} <= hub.repositories[
        "user/pipe"
    ].keys()
