"""Other projects' transformers run here exactly: recorded outputs of each, from every container.

ODELT_PEERS_DIR: the folder of the recorded cases (default: those kept with the tests). A file's
name begins with its peer; its `config` has the shapes, `state/` the peer's own state dict.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from odelt_fast import CheckpointError, Sampler, convert_checkpoint, load_model
from odelt_fast.cli import main
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.sampling.velocity import VelocityField
from tests.helpers.reference_cases import relative_error

FOLDER = Path(os.environ.get("ODELT_PEERS_DIR") or Path(__file__).parents[1] / "data" / "peers")
FILES = sorted(FOLDER.glob("*.npz"))
SOURCES = ("diffusers", "meanflow", "repa", "sit", "dit")
QUANTITIES = {
    "sit": r"velocity|velocity_cfg_\d+p\d+_three_channels|euler_\d+_steps",
    "repa": r"output|euler_\d+_steps",
    "meanflow": r"sample_T\d+",
    "dit": "output",
    "diffusers": "output",
}


class Case:
    """A recorded file."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path, allow_pickle=False))
        self.config: dict[str, Any] = json.loads(str(self.arrays["config"]))
        self.source = next(name for name in SOURCES if path.stem.startswith(name))
        self.heads = self.config.get("num_heads") or self.config["num_attention_heads"]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def state(self) -> dict[str, Tensor]:
        names = [name for name in self.arrays if name.startswith("state/")]
        return {name.removeprefix("state/"): self[name] for name in names}

    @property
    def options(self) -> dict[str, Any]:
        return {"source": self.source, "num_heads": self.heads, "image_size": self["x"].shape[-1]}


@cache
def case_of(path: Path) -> Case:
    return Case(path)


def write(case: Case, kind: str, folder: Path) -> Path:
    """The case's state in a container."""
    state = case.state
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "folder":
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(case.config))
        save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return folder
    content: Any = collections.OrderedDict(state)
    content._metadata = {"": {"version": 1}}
    if kind == "wrapped":
        raw = {f"module.{name}": tensor * (name == "pos_embed") for name, tensor in state.items()}
        ema = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
        options = argparse.Namespace(model="XL/2", global_seed=0)
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
        content = {"model": raw, "ema": ema, "opt": optimizer, "args": options}
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of a recorded file, by way of a .pt file."""

    @cache
    def model(path: Path) -> DiT:
        case = case_of(path)
        return convert_checkpoint(
            write(case, "pt", tmp_path_factory.mktemp(path.stem)), **case.options
        )[0]

    return model


def cases() -> list[Any]:
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in FILES
        for name in case_of(path).arrays
        if re.fullmatch(QUANTITIES[case_of(path).source], name)
    ]


def computed(model: DiT, case: Case, name: str) -> Tensor:
    """Our counterpart of a recorded quantity, as the peer gives it."""
    x, y = case["x"], case["y"]
    if match := re.fullmatch(r"euler_(\d+)_steps|sample_T(\d+)", name):
        steps = int(match[1] or match[2])
        return Sampler(model, steps=steps, backend="eager")(noise=x, labels=y)
    if match := re.fullmatch(r"velocity_cfg_(\d+)p(\d+)_three_channels", name):
        field = VelocityField(model, Operation(guidance_scale=float(f"{match[1]}.{match[2]}")), y)
        return field(case["t"], x, 7)
    if case.source == "sit":
        return model(x, case["t"], 7, y)
    if case.source == "repa":  # its time runs from data to noise, its velocity too
        return -model(x, 1 - case["t"], 7, y)
    return model(x, 1 - (case["timestep"] + 1) / 1000, 7, y)


def test_recorded_peers_are_there() -> None:
    assert {case_of(path).source for path in FILES} == set(SOURCES)


@pytest.mark.parametrize(("path", "name"), cases())
def test_peer(converted: Any, path: Path, name: str) -> None:
    case = case_of(path)
    with torch.no_grad():
        ours = computed(converted(path), case, name)
    theirs = case[name][:, : ours.shape[1]]  # without the variance
    bound = 2e-5 if case.source in ("dit", "diffusers") else 2e-6
    assert relative_error(ours, theirs) < bound


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        pytest.param(path, kind, id=f"{path.stem}-{kind}")
        for path in FILES
        for kind in ("wrapped", "safetensors", "folder")
        if kind != "folder" or case_of(path).source == "diffusers"
    ],
)
def test_peer_from_every_container(converted: Any, path: Path, kind: str, tmp_path: Path) -> None:
    case = case_of(path)
    file = write(case, kind, tmp_path)
    options = {} if kind == "folder" else case.options
    model, origin = convert_checkpoint(file, **options)
    assert model.config == converted(path).config
    for name, tensor in converted(path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert origin["weights"] == {"wrapped": "ema"}.get(kind, "unnamed")
    if kind == "wrapped":
        raw, origin = convert_checkpoint(file, **options, weights="raw")
        assert origin["weights"] == "raw"
        assert not any(raw.blocks[0].qkv.weight.flatten())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peer_by_the_command(
    converted: Any, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of(path)
    file, out = write(case, "wrapped", tmp_path), tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in case.options.items()]
    assert main(["convert", str(file), "--out", str(out), *options]) == 0
    assert "weights: ema" in capsys.readouterr().out
    model = load_model(out)
    assert model.config == converted(path).config
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in converted(path).state_dict().items()
    )
    assert "weights.pt" in (out / "README.md").read_text()
    assert Sampler(model, steps=2)(2).isfinite().all()


def flax_tree(state: dict[str, Tensor]) -> dict[str, Any]:
    """MeanFlow's state in the JAX code's own names."""
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        if name == "pos_embed":
            continue  # that code computes it
        *path, leaf = name.replace("r_embedder", "h_embedder").split(".")
        value = tensor.numpy()
        if path[0] == "y_embedder":
            path, leaf = [*path, "_flax_embedding"], "embedding"
        else:
            if leaf == "weight":
                value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
                leaf = "kernel"
            path = [f"layers_{part}" if part.isdigit() else part for part in path]
            path += [] if path[0] == "x_embedder" else ["_flax_linear"]
        node = tree
        for part in ("net", *path):
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize("container", ["pickle", "msgpack"])
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("meanflow")], ids=lambda p: p.stem
)
def test_peer_meanflow_of_jax(converted: Any, path: Path, container: str, tmp_path: Path) -> None:
    case, file = case_of(path), tmp_path / "checkpoint_100"
    tree = flax_tree(case.state)
    content = {"step": 3, "params": {"params": {}}, "ema_params": {"params": tree}}
    if container == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        msgpack = pytest.importorskip("msgpack")

        def stored(value: Any) -> Any:
            parts = value.shape, value.dtype.name, value.tobytes()
            return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))

        file.write_bytes(msgpack.packb(content, default=stored, strict_types=True))
    model, origin = convert_checkpoint(file, **case.options)
    assert origin["weights"] == "ema"
    for name, tensor in converted(path).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0, msg=name)


SIT = Case(next(path for path in FILES if path.stem.startswith("sit")))


def refused(state: Any, tmp_path: Path, **options: Any) -> str:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(tmp_path / "x.pt", **{**SIT.options, **options})
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attn.q_norm.weight", "normalises q and k"),
        ("blocks.0.norm1.weight", "RMSNorm"),
        ("feat_rope.freqs_cos", "rotary"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("blocks.0.cross_attn.q_linear.weight", "text"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "text"),
        ("double_blocks.0.img_attn.qkv.weight", "text"),
        ("projectors.0.0.weight", "no tensor of sit's"),
        ("blocks.0.extra", "no tensor of sit's"),
    ],
)
def test_other_networks_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    said = refused({**SIT.state, name: torch.zeros(2)}, tmp_path)
    assert message in said
    assert name in said


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    state, table = SIT.state, "y_embedder.embedding_table.weight"
    size = state[table].shape[1]
    assert "have the same names" in refused(state, tmp_path, source="auto")
    assert "give num_heads" in refused(state, tmp_path, num_heads=None)
    assert "blocks.1.attn.qkv.bias is missing" in refused(
        {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.qkv.bias"},
        tmp_path,
    )
    assert "null label" in refused({**state, table: torch.zeros(1000, size)}, tmp_path)
    assert "not finite" in refused({**state, table: state[table] * torch.inf}, tmp_path)
    assert "pos_embed" in refused({**state, "pos_embed": state["pos_embed"] + 0.01}, tmp_path)
    assert "positions" in refused(state, tmp_path, image_size=64)
    shape = refused({**state, "x_embedder.proj.bias": torch.zeros(size + 1)}, tmp_path)
    assert f"({size + 1},)" in shape
    strided = torch.zeros(size, size).t()[:, ::2]
    assert "contiguous" in refused({**state, "t_embedder.mlp.2.weight": strided}, tmp_path)
    whole = torch.zeros(size, dtype=torch.int64)
    assert "float16" in refused({**state, "t_embedder.mlp.2.bias": whole}, tmp_path)
    raw = refused({"model": state}, tmp_path)
    assert "no ema weights" in raw
    assert "ask for weights raw" in raw


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    def message(content: bytes, name: str = "x.pt") -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(tmp_path / name, "sit", num_heads=3)
        return str(error.value)

    torch.save(SIT.state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "num_heads" not in message((tmp_path / "old.pt").read_bytes())
    assert "Git LFS" in message(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "web page" in message(b"\n<!DOCTYPE html><html></html>")
    assert "zip" in message(b"PK\x03\x04 and nothing else")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in message((tmp_path / "script.pt").read_bytes())
    with pytest.raises(CheckpointError, match="no such file"):
        convert_checkpoint(tmp_path / "gone.pt", "sit")


def test_options_without_a_use_are_refused(tmp_path: Path) -> None:
    torch.save(SIT.state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="depth_min is for checkpoints of the reference"):
        convert_checkpoint(tmp_path / "x.pt", **SIT.options, depth_min=2)
    with pytest.raises(ValueError, match="time_frequencies"):
        convert_checkpoint(tmp_path / "x.pt", **SIT.options, time_frequencies="original")
    with pytest.raises(ValueError, match="source must be one of"):
        convert_checkpoint(tmp_path / "x.pt", "pixart")


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("diffusers")], ids=lambda p: p.stem
)
def test_diffusers_folders_that_do_not_fit(path: Path, tmp_path: Path) -> None:
    case = case_of(path)
    folder = write(case, "folder", tmp_path)
    about = folder / "transformer" / "config.json"
    model, _ = convert_checkpoint(folder, time_frequencies="original")
    assert model.config.time_period == 10000.0
    (folder / "scheduler").mkdir()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    for changes, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
    ):
        scheduler.write_text(json.dumps(changes))
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(folder)
    scheduler.unlink()
    for changes, message in (
        ({"norm_type": "rms_norm"}, "norm_type 'rms_norm'"),
        ({"sample_size": 128}, "interpolated"),
        ({"num_attention_heads": -1}, "num_attention_heads -1"),
    ):
        about.write_text(json.dumps({**case.config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(folder)
    about.write_text(json.dumps(case.config))
    state = case.state
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    state[name] = state[name] + 1
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="differs from block 0's"):
        convert_checkpoint(folder)
