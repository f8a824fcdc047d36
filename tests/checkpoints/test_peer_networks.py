"""Peers of any size run here as their own networks do, which `peer_networks` writes anew; what is
no such network, or contradicts itself, is refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from odelt_fast import CheckpointError, convert_checkpoint, load_model
from odelt_fast.checkpoints.folder import save_model
from odelt_fast.checkpoints.peer_names import family_names
from odelt_fast.cli import main
from odelt_fast.config import Latents
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.sampling.velocity import VelocityField
from tests.checkpoints.test_peers import FILES, Case, case_of
from tests.helpers.peer_networks import PeerShape, peer_output
from tests.helpers.reference_cases import relative_error

BOUNDS = {"sit": 2e-6, "repa": 2e-6, "meanflow": 2e-6, "dit": 2e-5, "diffusers": 2e-5}
SHAPES = [
    PeerShape("sit", 6, 2, 3, 32, 3, 2, mlp_hidden=80, num_classes=1, learn_sigma=False),
    PeerShape("sit", 9, 3, 16, 60, 1, 5, mlp_hidden=222, num_classes=1001),
    PeerShape("sit", 4, 1, 1, 12, 2, 3, num_classes=2),
    PeerShape("sit", 16, 2, 4, 384, 1, 6, mlp_hidden=1536, num_classes=1000),
    PeerShape("repa", 16, 8, 4, 40, 2, 5, num_classes=37, learn_sigma=False),
    PeerShape("repa", 12, 4, 2, 20, 5, 1, mlp_hidden=53, learn_sigma=False),
    PeerShape("repa", 8, 2, 4, 768, 1, 12, mlp_hidden=3072, learn_sigma=False),
    PeerShape("meanflow", 8, 4, 4, 72, 3, 3, num_classes=3, learn_sigma=False),
    PeerShape("meanflow", 9, 3, 16, 20, 5, 5, mlp_hidden=20, learn_sigma=False),
    PeerShape("meanflow", 6, 2, 3, 8, 2, 1, num_classes=1, learn_sigma=False),
    PeerShape("dit", 6, 1, 4, 48, 2, 2, mlp_hidden=192, num_classes=5),
    PeerShape("dit", 16, 4, 3, 36, 4, 3, learn_sigma=False),
    PeerShape("diffusers", 12, 4, 3, 32, 2, 4, mlp_hidden=128, num_classes=7),
    PeerShape("diffusers", 6, 2, 4, 44, 3, 1, mlp_hidden=176, learn_sigma=False),
]


def inputs(shape: PeerShape, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x, t in [0, 1], y: the first row has the null label."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, shape.in_channels, *[shape.input_size] * 2, generator=generator)
    y = torch.randint(shape.num_classes, (rows,), generator=generator)
    y[0] = shape.num_classes
    return x, torch.rand(rows, generator=generator), y


def convert(shape: PeerShape, state: dict[str, Tensor], folder: Path, **options: Any) -> DiT:
    if shape.source == "diffusers":
        state = shape.of_diffusers(state)
    torch.save(state, folder / "x.pt")
    how = {"source": shape.source, "num_heads": shape.num_heads, "image_size": shape.input_size}
    return convert_checkpoint(folder / "x.pt", **{**how, **options})[0]


def ours_and_theirs(
    model: DiT, shape: PeerShape, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both networks' output, as the peer has it, without the variance."""
    x, t, y = inputs(shape)
    index: Any = 7
    match shape.source:
        case "sit":
            theirs = peer_output(shape, state, x, t, y)
        case "repa":
            theirs = peer_output(shape, state, x, t, y)
            t = 1 - t
        case "meanflow":
            index = torch.tensor([0, 1, 3, 6, 7])
            t = torch.tensor([1.0, 0.5, 0.75, 0.125, 0.0625])
            theirs = peer_output(shape, state, x, t, y, t - 2.0**-index)
            t = 1 - t
        case _:
            step = torch.tensor([0, 999, 500, 31, 731])
            theirs = peer_output(shape, state, x, step, y)
            t = 1 - (step + 1) / 1000
    with torch.no_grad():
        ours = model(x, t, index, y)
    negated = shape.source in ("repa", "meanflow")
    return -ours if negated else ours, theirs[:, : shape.in_channels]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peers_written_anew_are_the_recorded_ones(path: Path) -> None:
    case: Case = case_of(path)
    config, y = case.config, case["y"]
    named = family_names({name: tensor.numpy() for name, tensor in case.state.items()})
    state = {name: torch.from_numpy(values.copy()) for name, (_, values) in named.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    recorded = case["velocity" if case.source == "sit" else "output"]
    shape = PeerShape(
        case.source,
        case["x"].shape[-1],
        config["patch_size"],
        config["in_channels"],
        state["blocks.0.attn.proj.bias"].numel(),
        depth,
        case.heads,
        learn_sigma=case.source in ("sit", "dit", "diffusers"),
    )
    t = case["timestep" if "timestep" in case.arrays else "t"]
    r = case["r"] if case.source == "meanflow" else None
    theirs = peer_output(shape, state, case["x"], t, y, r)[:, : recorded.shape[1]]
    assert relative_error(recorded, theirs) < 5e-6  # float32's, of angles of up to 1000


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.source}-{s.hidden_size}")
def test_peer_of_any_size(shape: PeerShape, tmp_path: Path) -> None:
    state = shape.state()
    model = convert(shape, state, tmp_path)
    config = model.config
    assert (config.image_size, config.channels) == (shape.input_size, shape.in_channels)
    assert (config.num_classes, config.mlp_size) == (shape.num_classes, shape.mlp_hidden)
    ours, theirs = ours_and_theirs(model, shape, state)
    assert relative_error(ours, theirs) < BOUNDS[shape.source]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.source}-{s.hidden_size}")
def test_peer_guides_the_channels_that_its_project_guides(shape: PeerShape, tmp_path: Path) -> None:
    """SiT and DiT: the first three; the others: all."""
    state, (x, _, y) = shape.state(), inputs(shape)
    model, scale, step = convert(shape, state, tmp_path), 1.5, 500
    t = 1 - (step + 1) / 1000
    reversed_times = shape.source in ("repa", "meanflow")
    times = {"sit": t, "repa": 1 - t, "meanflow": 1 - t}.get(shape.source, step)
    time = torch.full((len(x),), times)
    r = time - 1 / 128 if shape.source == "meanflow" else None
    null = torch.full_like(y, shape.num_classes)
    with_label, without = (
        peer_output(shape, state, x, time, labels, r)[:, : shape.in_channels]
        for labels in (y, null)
    )
    wanted = without + scale * (with_label - without)
    if shape.source in ("sit", "dit"):
        wanted[:, 3:] = with_label[:, 3:]
    if model.config.sampling != "diffusion":  # there the field is one of velocities
        field = VelocityField(model, Operation(guidance_scale=scale), y)
        found = field(torch.full((len(x),), t), x, 7)
        assert relative_error(-found if reversed_times else found, wanted) < BOUNDS[shape.source]
    wide = shape.source in ("sit", "dit")
    assert model.config.guided_channels == (min(3, shape.in_channels) if wide else None)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_follow_from_the_width(width: int, heads: int, tmp_path: Path) -> None:
    shape = PeerShape("sit", 4, 2, 1, width, 1, heads, mlp_hidden=8)
    state = shape.state()
    model = convert(shape, state, tmp_path, num_heads=None)
    assert model.config.num_heads == heads
    ours, theirs = ours_and_theirs(model, shape, state)
    assert relative_error(ours, theirs) < 2e-6


def test_durations_survive_bfloat16(tmp_path: Path) -> None:
    """The embedder of step sizes is fitted: a fit that amplifies rounding was 50 % off there."""
    shape = PeerShape("meanflow", learn_sigma=False, hidden_size=64, num_heads=4)
    embed = convert(shape, shape.state(), tmp_path).step_embed
    indices = torch.arange(8.0)
    with torch.no_grad():
        exact = embed(indices)
        half = embed.bfloat16()(indices).float()
    assert relative_error(half, exact) < 2e-2  # two products of operands with 8 bits


def test_diffusers_own_network_and_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for sigma in (True, False):
        shape = PeerShape("diffusers", 12, 4, 4, 40, 3, 5, 160, num_classes=3, learn_sigma=sigma)
        about = {k: v for k, v in shape.configuration.items() if not k.startswith("_")}
        theirs = diffusers.DiTTransformer2DModel(**about).eval()
        missing, unknown = theirs.load_state_dict(shape.of_diffusers(shape.state()), strict=False)
        assert not missing + unknown
        vae = diffusers.AutoencoderKL(block_out_channels=(32,), scaling_factor=0.5)
        folder = tmp_path / f"pipeline-{sigma}"
        scheduler = diffusers.DDIMScheduler()
        diffusers.DiTPipeline(theirs, vae, scheduler).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        names = {"0": "cat, tom", "1": "dog", "2": "fish"}  # as DiT's own repository has them
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
        model, origin = convert_checkpoint(folder)
        x, _, y = inputs(shape)
        step = torch.tensor([0, 999, 500, 31, 731])
        with torch.no_grad():
            wanted = theirs(x, step, y).sample[:, :4]
            ours = model(x, 1 - (step + 1) / 1000, 7, y)
        assert relative_error(ours, wanted) < 2e-5
        assert model.trained_on.class_names == tuple(names.values())
        assert model.trained_on.latents == Latents(0.5)
        assert "decoder" not in origin


def test_latents_of_four_channels_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape, decoder in (
        (PeerShape("sit"), "stabilityai/sd-vae-ft-ema"),
        (PeerShape("meanflow", learn_sigma=False), "stabilityai/sd-vae-ft-mse"),
        (PeerShape("sit", in_channels=3), None),
    ):
        torch.save(shape.state(), tmp_path / "x.pt")
        out = tmp_path / f"{shape.source}-{shape.in_channels}"
        by = ["--source", shape.source, "--num-heads", "3"]
        assert main(["convert", str(tmp_path / "x.pt"), "--out", str(out), *by]) == 0
        told, card = capsys.readouterr().out, (out / "README.md").read_text()
        latents = load_model(out).trained_on.latents
        if decoder is None:
            assert latents is None
            assert "decoder" not in told + card
            continue
        assert latents is not None
        assert latents.fits(Latents(0.18215, encoder="any", encoder_sha256="0" * 64))
        assert not latents.fits(Latents(0.13025))
        assert f"--decoder {decoder}" in told
        assert decoder in card


SIT, NUM_HEADS = PeerShape("sit"), {"num_heads": 3}


def refused(content: Any, folder: Path, source: str = "sit", **options: Any) -> str:
    torch.save(content, folder / "x.pt")
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(folder / "x.pt", source, **{**NUM_HEADS, **options})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_another_source_s_is_refused(tmp_path: Path) -> None:
    sit = SIT.state()
    diffusers = PeerShape("diffusers")
    named = diffusers.of_diffusers(diffusers.state())
    assert "r_embedder" in refused(sit, tmp_path, "meanflow")
    assert "source dit" in refused(sit, tmp_path, "diffusers")
    assert "source diffusers" in refused(named, tmp_path, "dit", image_size=8)
    assert "r_embedder" in refused(PeerShape("meanflow").state(), tmp_path, "repa")


def test_a_table_of_labels_without_a_null_label(tmp_path: Path) -> None:
    """The trainer's options, or diffusers' configuration, tell the number of classes."""
    state = SIT.state()
    for options in (argparse.Namespace(num_classes=11), {"num_classes": 11}):
        content = {"model": state, "ema": state, "opt": {}, "args": options}
        assert "null label" in refused(content, tmp_path)
    shape = PeerShape("diffusers")
    named = shape.of_diffusers(shape.state())
    save_file(named, tmp_path / "diffusion_pytorch_model.safetensors")
    about = {**shape.configuration, "num_embeds_ada_norm": 11}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="null label"):
        convert_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(shape.configuration))
    assert convert_checkpoint(tmp_path)[0].config.num_classes == 10
    for option, value in (("num_heads", 2), ("image_size", 16)):
        with pytest.raises(CheckpointError, match=f"not {value}"):
            convert_checkpoint(tmp_path, **{option: value})


def test_values_that_cannot_be_are_refused_by_their_own_names(tmp_path: Path) -> None:
    state, nan = SIT.state(), float("nan")
    for name in ("blocks.1.attn.qkv.bias", "pos_embed", "final_layer.linear.bias"):
        assert name in refused({**state, name: state[name] * nan}, tmp_path)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    wrapped["module.mask_token"] = torch.zeros(1)
    assert "mask_token" in refused(wrapped, tmp_path)
    assert "num_heads" in refused(state, tmp_path, num_heads=0)
    assert "blocks.0." in refused(
        {name: t for name, t in state.items() if not name.startswith("blocks.0.")}, tmp_path
    )
    turned = state["pos_embed"].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2).contiguous()
    assert "pos_embed" in refused({**state, "pos_embed": turned}, tmp_path)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel",
                                  "PixArtTransformer2DModel"])  # fmt: skip
def test_other_networks_of_diffusers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    common: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    if name == "FluxTransformer2DModel":
        common |= {"axes_dims_rope": (4, 4, 8), "num_single_layers": 1, "in_channels": 4}
        common |= {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    elif name == "PixArtTransformer2DModel":
        common |= {"cross_attention_dim": 32, "caption_channels": 8, "sample_size": 8}
    else:
        common |= {"joint_attention_dim": 8, "caption_projection_dim": 32, "sample_size": 8}
        common |= {"pooled_projection_dim": 8}
    network = getattr(diffusers, name)(**common)
    network.save_pretrained(tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=f"_class_name '{name}'"):
        convert_checkpoint(tmp_path)
    said = refused(dict(network.state_dict()), tmp_path, "auto")
    assert "text" in said


def test_where_it_came_from_is_kept(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, origin = convert_checkpoint(
        _written(SIT.state(), tmp_path / "SiT-tiny.pt"), "sit", **NUM_HEADS
    )
    folder = save_model(model, tmp_path / "out", metadata=origin)
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = file.metadata()
    assert "SiT" in kept["converted_from"]
    assert kept["converted_file"] == "SiT-tiny.pt"


def _written(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path
