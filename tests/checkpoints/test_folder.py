"""Model folders: round trips, partial loading, atomic saving, and refusals of what is damaged or
hostile."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.checkpoints.lookup import bundled_models, find_folder
from odelt_fast.config import PRESETS, DiTConfig
from odelt_fast.model import DiT

CONFIG = DiTConfig(
    image_size=4,
    channels=2,
    patch_size=2,
    hidden_size=16,
    depth=4,
    depth_min=1,
    depth_group=1,
    num_heads=2,
    num_classes=3,
)


def make_model(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    model = DiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def velocity(model: DiT, depth: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.config.channels, 4, 4, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(x, 0.3, 2, torch.tensor([0, 3]), depth=depth)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(make_model(), tmp_path / "model")


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, remove: str = "", **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = {
        **load_file(path),
        **{name.replace("__", "."): tensor for name, tensor in tensors.items()},
    }
    state.pop(remove, None)
    save_file(state, path)


def test_round_trip_is_exact(folder: Path) -> None:
    saved, loaded = make_model(), load_model(folder)
    assert loaded.config == saved.config
    assert not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(
        torch.equal(tensor, saved.state_dict()[name])
        for name, tensor in loaded.state_dict().items()
    )
    assert torch.equal(loaded.positions, saved.positions)
    assert torch.equal(velocity(loaded), velocity(saved))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == CONFIG.to_dict()


def test_loaded_weights_can_be_trained_and_are_no_views_of_the_file(folder: Path) -> None:
    model = load_model(folder)
    before = (folder / "model.safetensors").read_bytes()
    model(torch.randn(1, 2, 4, 4), 0.5, 0, torch.tensor([1])).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None or not parameter.requires_grad
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_storage_dtype_is_not_compute_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    save_model(make_model(), tmp_path, dtype=stored, metadata={"weights": "ema", "step": "7"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("label_embed.weight").dtype == stored
        assert file.metadata()["weights"] == "ema"
        assert file.metadata()["step"] == "7"
    model = load_model(tmp_path)
    assert model.dtype == torch.float32
    expected = make_model().state_dict()
    assert all(
        torch.equal(tensor, expected[name].to(stored).float())
        for name, tensor in model.state_dict().items()
    )


def test_loads_in_the_dtype_that_is_asked_for(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.positions.dtype == torch.float32
    assert velocity(model).dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_gives_the_same_velocity_with_fewer_blocks(folder: Path, depth: int) -> None:
    model = load_model(folder, depth=depth)
    assert len(model.blocks) == depth
    assert torch.equal(velocity(model), velocity(make_model(), depth))


def test_depth_leaves_the_other_blocks_on_disk(folder: Path) -> None:
    weight = make_model().blocks[3].mlp_in.weight.detach().clone()
    weight[0, 0] = torch.nan
    edit_weights(folder, blocks__3__mlp_in__weight=weight)
    load_model(folder, depth=3)
    with pytest.raises(CheckpointError, match=r"blocks\.3\.mlp_in\.weight"):
        load_model(folder)


def test_a_depth_that_is_not_allowed_is_a_value_error(folder: Path) -> None:
    for depth in (0, 5, -1, True, 1.0, "2"):
        with pytest.raises(ValueError, match="this model runs at depth 1, 2, 3, 4") as caught:
            load_model(folder, depth=depth)  # type: ignore[arg-type]
        assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(ValueError, match="loaded for depth 2"):
        velocity(load_model(folder, depth=2), 3)


def test_dtypes_and_devices_that_cannot_be_are_value_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="int8"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="nowhere"):
        load_model(folder, device="nowhere")
    with pytest.raises(ValueError, match="complex64"):
        save_model(make_model(), folder, dtype=torch.complex64)
    with pytest.raises(ValueError, match="metadata"):
        save_model(make_model(), folder, metadata={"step": 3})  # type: ignore[dict-item]


def test_truncated_models_are_not_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncated"):
        save_model(load_model(folder, depth=2), tmp_path / "other")
    # Blocks 4 and 5 never reach the velocity: at full depth they are left out too, and the model is
    # no longer whole.
    config = DiTConfig(
        image_size=4,
        channels=2,
        hidden_size=16,
        depth=6,
        depth_min=2,
        depth_group=4,
        num_heads=2,
        num_classes=3,
    )
    save_model(make_model(config), tmp_path / "ragged")
    assert len(load_model(tmp_path / "ragged").blocks) == 6
    model = load_model(tmp_path / "ragged", depth=6)
    assert len(model.blocks) == 4
    with pytest.raises(ValueError, match="truncated"):
        save_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    state = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_imports_no_compiler(folder: Path) -> None:
    code = (
        f"import sys, odelt_fast; odelt_fast.load_model({str(folder)!r}); print('torch._dynamo' in"
        " sys.modules, 'sympy' in sys.modules)"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_conventional_models_round_trip(tmp_path: Path) -> None:
    config = DiTConfig(
        image_size=4,
        channels=2,
        hidden_size=16,
        depth=3,
        num_heads=2,
        num_classes=3,
        length_conditioned=False,
        sampling="flow",
    )
    model = load_model(save_model(make_model(config), tmp_path))
    assert model.config == config
    assert torch.equal(velocity(model), velocity(make_model(config)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("[]", "JSON object"),
        ("{" + '"a": {' * 100_000, "nested too deeply"),
        ('{"depth": 4, "depth": 4}', "twice"),
        ('{"mlp_ratio": NaN}', "NaN"),
        ('{"mlp_ratio": 1e999}', "too large"),
        ('{"mlp_ratio": 1' + "0" * 400 + "}", "too large"),
        ('{"depth": ' + "9" * 5000 + "}", "digits"),
        ('{"depht": 4}', "depht"),
        ('{"depth": "4"}', "depth"),
        ('{"hidden_size": 18}', "hidden_size"),
        ('{"sampling": {}}', "sampling"),
        ("\xff", "decode"),
        (" " * (1 << 20) + "{}", "larger"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(folder: Path, text: str, problem: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_model(folder)
    assert "config.json" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_classes": 10_000_000, "hidden_size": 65536, "num_heads": 1}, "has shape"),
        ({"depth": 1024}, "length_embed.weight has shape|is missing"),
        ({"image_size": 4096, "patch_size": 1}, "proportion"),
        ({"length_conditioned": False}, "length_embed.weight"),
        ({"mlp_ratio": 2.0}, "mlp_in"),
        ({"depth": 3}, "blocks.3"),
    ],
)
def test_configurations_that_the_weights_do_not_fit_allocate_nothing(
    folder: Path, values: dict[str, object], problem: str
) -> None:
    edit_config(folder, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=problem):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"label_embed__weight": torch.zeros(4, 15)}, r"label_embed\.weight has shape \(4, 15\)"),
        (
            {"label_embed__weight": torch.zeros(4, 16, dtype=torch.int32)},
            r"label_embed\.weight is stored as I32",
        ),
        (
            {"label_embed__weight": torch.full((4, 16), torch.inf)},
            r"label_embed\.weight holds values that are not finite",
        ),
        (
            {"label_embed__weight": torch.full((4, 16), 1e300, dtype=torch.float64)},
            r"label_embed\.weight holds values that are not finite",
        ),
        ({"blocks__4__qkv__weight": torch.zeros(2)}, r"blocks\.4\.qkv\.weight"),
        ({"line\nbreak": torch.zeros(2)}, r"line\\nbreak"),
        ({"remove": "blocks.1.qkv.bias"}, r"blocks\.1\.qkv\.bias is missing"),
    ],
)
def test_weights_that_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    edit_weights(folder, **tensors)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=problem) as caught:
        load_model(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 8) + b"{}      ",
        b"\x80\x04." + b"x" * 50,
    ],
)
def test_files_that_are_no_safetensors_are_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)


def test_half_of_a_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_special_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_model(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_model(folder)


def make_shards(folder: Path) -> dict[str, str]:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-0000{1 + name.startswith('blocks.')}-of-00002.safetensors" for name in state
    }
    for shard in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in state.items() if weight_map[name] == shard},
            folder / shard,
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return weight_map


def test_shards_are_loaded(folder: Path) -> None:
    make_shards(folder)
    assert torch.equal(velocity(load_model(folder)), velocity(make_model()))
    assert torch.equal(velocity(load_model(folder, depth=2)), velocity(make_model(), 2))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "a\0.safetensors",
        "a\\b.safetensors",
        "x.pkl",
        3,
        None,
        [],
    ],
)
def test_shard_names_that_leave_the_folder_are_refused(folder: Path, name: object) -> None:
    weight_map = {**make_shards(folder), "label_embed.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json.*is no name"):
        load_model(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "b.safetensors"}}',
        "[]",
        "{",
    ],
)
def test_bad_shard_indices_are_refused(folder: Path, index: str) -> None:
    make_shards(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shards = sorted(set(make_shards(folder).values()))
    save_file(
        {**load_file(folder / shards[1]), "label_embed.weight": torch.zeros(4, 16)},
        folder / shards[1],
    )
    with pytest.raises(CheckpointError, match=r"label_embed\.weight is in another shard"):
        load_model(folder)


def test_links_leave_the_folder_for_files_of_the_same_ending_only(
    folder: Path, tmp_path: Path
) -> None:
    os.rename(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert torch.equal(velocity(load_model(folder)), velocity(make_model()))
    os.rename(tmp_path / "elsewhere.safetensors", tmp_path / "shadow")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "shadow")
    with pytest.raises(CheckpointError, match="leaves its folder, to a file whose name does not"):
        load_model(folder)
    os.rename(tmp_path / "shadow", folder / "inside.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("inside.bin")
    assert torch.equal(velocity(load_model(folder)), velocity(make_model()))


def test_the_cache_of_the_hub_is_read_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--user--repo", "0" * 40
    snapshot = repository / "snapshots" / commit
    for part in (repository / "refs", repository / "blobs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        blob = repository / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        os.rename(folder / name, blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    assert torch.equal(velocity(load_model("user/repo")), velocity(make_model()))
    with pytest.raises(
        CheckpointError, match="'user/other' is no folder here and cannot be had from the Hub"
    ) as caught:
        load_model("user/other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "", "a/b/c", "../x", "a\0b", "x" * 5000, "user/../repo", "-a/b", "a\n/b"],
)
def test_names_that_are_nothing_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"a folder that exists, a bundled name .* or a Hub id"
    ) as caught:
        load_model(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "preset", "first_class"),
    [("cifar10", "cifar10-small", "airplane"), ("digits", "digits", "0"), ("mnist", "mnist", "0")],
)
def test_a_bundled_model_is_small_and_has_the_shape_of_its_preset(
    name: str, preset: str, first_class: str
) -> None:
    assert name in bundled_models()
    assert sum(file.stat().st_size for file in find_folder(name).iterdir()) <= 16e6
    model = load_model(name)
    assert model.config == replace(PRESETS[preset], sampling="mean_flow")
    names = model.trained_on.class_names
    assert (len(names), names[0]) == (model.config.num_classes, first_class)


def test_a_local_folder_wins_over_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    assert bundled_models() == ()
    save_model(make_model(seed=1), tmp_path / "odelt_fast" / "models" / "mine")
    (tmp_path / "odelt_fast" / "models" / "__pycache__").mkdir()
    assert bundled_models() == ("mine",)
    assert torch.equal(velocity(load_model("mine")), velocity(make_model(seed=1)))
    monkeypatch.chdir(tmp_path)
    save_model(make_model(seed=2), "mine")
    assert torch.equal(velocity(load_model("mine")), velocity(make_model(seed=2)))


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    broken = make_model(seed=1)
    with torch.no_grad():
        broken.label_embed.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"label_embed\.weight"):
        save_model(broken, folder)
    with torch.no_grad():
        broken.label_embed.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        save_model(broken, folder, dtype=torch.float16)
    assert torch.equal(velocity(load_model(folder)), velocity(make_model()))


def test_a_full_disk_leaves_the_old_model(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (0, 100, 10_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(CheckpointError, match="cannot write the model") as caught:
                save_model(make_model(seed=1), folder)
            assert "\n" not in str(caught.value)
            assert sorted(path.name for path in folder.iterdir()) == [
                "config.json",
                "model.safetensors",
            ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(velocity(load_model(folder)), velocity(make_model()))


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere"), "a\0b"):
        with pytest.raises(CheckpointError, match="cannot write the model"):
            save_model(make_model(), path)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def test_a_save_that_ends_between_its_renames_is_finished_by_readers_and_writers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def stop_at(last: int) -> None:
        calls.clear()

        def counted(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == last:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", counted)

    # The same shapes, but a velocity that differs: a mixture of the two folders would load without
    # complaint.
    other = make_model(DiTConfig(**{**CONFIG.to_dict(), "num_heads": 4}), seed=1)  # type: ignore[arg-type]
    third = make_model(DiTConfig(**{**CONFIG.to_dict(), "num_heads": 8}), seed=2)  # type: ignore[arg-type]
    stop_at(2)
    with pytest.raises(Killed):
        save_model(other, folder)
    assert torch.equal(velocity(load_model(folder)), velocity(other))
    stop_at(2)  # the first rename finishes the save before
    with pytest.raises(Killed):
        save_model(third, folder)
    assert torch.equal(velocity(load_model(folder)), velocity(other))
    monkeypatch.setattr(os, "replace", replace)
    save_model(third, folder)
    assert torch.equal(velocity(load_model(folder)), velocity(third))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


KILLS = """
import os, random, signal, sys, time
from odelt_fast.checkpoints.folder import load_model, save_model
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
import torch
torch.set_num_threads(1)
shape = dict(image_size=4, channels=2, hidden_size=64, depth=2, depth_min=1, depth_group=1)
models = [DiT(DiTConfig(**shape, num_heads=heads)) for heads in (1, 2, 4)]
for model in models:
    torch.nn.init.constant_(model.patch_embed.bias, model.config.num_heads)
random.seed(0)
folder, seen = sys.argv[1], set()
save_model(models[0], folder)
for _ in range(30):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        while True:
            save_model(random.choice(models), folder)
            os.write(writer, b"x")
    os.close(writer)
    os.read(reader, 1)
    time.sleep(random.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    model = load_model(folder)
    assert (model.patch_embed.bias == model.config.num_heads).all(), "weights of another model"
    seen.add(model.config.num_heads)
save_model(models[0], folder)
print(len(seen), *sorted(os.listdir(folder)))
"""


def test_kills_leave_a_whole_model(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    # In memory where possible: a kill loses nothing there, and flushing costs nothing.
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    ) as place:
        command = [sys.executable, "-c", KILLS, os.path.join(place, "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "config.json", "model.safetensors"]
