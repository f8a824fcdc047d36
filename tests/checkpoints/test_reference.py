"""Reference checkpoints: exact conversion, every way in which arrays are pickled, and refusals of
what is damaged or hostile."""

from __future__ import annotations

import ast
import collections
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odelt_fast.checkpoints.errors import CheckpointError
from odelt_fast.checkpoints.pickle_records import Global, Text, as_array, read_records
from odelt_fast.checkpoints.reference import (
    config_from_parameters,
    convert_reference_checkpoint,
    parameter_names,
    rename_parameters,
)
from odelt_fast.config import DiTConfig
from odelt_fast.model import DiT
from tests.stress import fuzz_checkpoints

REFERENCE = Path(
    os.environ.get("ODELT_REFERENCE_DIR", Path(__file__).parents[1] / "data" / "reference")
)
RECORDED = sorted(REFERENCE.glob("checkpoint_*.pkl"))
ARGUMENTS: dict[str, Any] = {"num_heads": 2, "depth_min": 1, "depth_group": 1, "image_size": 4}


text, integer, named, call, dictionary = (
    getattr(fuzz_checkpoints, name) for name in ("text", "integer", "named", "call", "dictionary")
)


def make_parameters(
    depth: int = 2, hidden: int = 8, mlp: int = 32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random parameters of the reference's network, by flax path, with channels 3, patch 2, 5
    classes."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "Embed_0/embedding": (256, 1),
        "PatchEmbed_0/Conv_0/kernel": (2, 2, 3, hidden),
        "PatchEmbed_0/Conv_0/bias": (hidden,),
        "LabelEmbedder_0/Embed_0/embedding": (6, hidden),
        "BlockEmbedder_0/Embed_0/embedding": (depth + 1, hidden),
    }
    dense = {"FinalLayer_0/Dense_0": (hidden, 2 * hidden), "FinalLayer_0/Dense_1": (hidden, 12)}
    for i in range(2):
        dense |= {
            f"TimestepEmbedder_{i}/Dense_0": (256, hidden),
            f"TimestepEmbedder_{i}/Dense_1": (hidden, hidden),
        }
    for i in range(depth):
        dense |= {f"DiTBlock_{i}/Dense_0": (hidden, 6 * hidden)} | {
            f"DiTBlock_{i}/Dense_{j}": (hidden, hidden) for j in range(1, 5)
        }
        dense |= {
            f"DiTBlock_{i}/MlpBlock_0/Dense_0": (hidden, mlp),
            f"DiTBlock_{i}/MlpBlock_0/Dense_1": (mlp, hidden),
        }
    for name, shape in dense.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def nest(parameters: dict[str, Any], kind: type = dict) -> Any:
    tree = kind()
    for path, value in parameters.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, kind())
        node[leaf] = value
    return tree


def write(path: Path, parameters: dict[str, Any], protocol: int = 5, **others: Any) -> Path:
    path.write_bytes(pickle.dumps({"params_ema": nest(parameters), **others}, protocol))
    return path


def assert_same_weights(model: DiT, parameters: dict[str, np.ndarray]) -> None:
    """By the definition of the renaming, written out again, independent of the code under test."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.testing.assert_array_equal(
        state["patch_embed.weight"],
        np.einsum("pqio->oipq", parameters["PatchEmbed_0/Conv_0/kernel"]),
    )
    np.testing.assert_array_equal(
        state["length_embed.weight"], parameters["BlockEmbedder_0/Embed_0/embedding"]
    )
    for i in range(model.config.depth):
        block = {
            name: parameters[f"DiTBlock_{i}/{name}"]
            for name in ("Dense_2/kernel", "Dense_1/kernel", "Dense_3/kernel")
        }
        np.testing.assert_array_equal(
            state[f"blocks.{i}.qkv.weight"], np.vstack([kernel.T for kernel in block.values()])
        )
        np.testing.assert_array_equal(
            state[f"blocks.{i}.mlp_out.bias"], parameters[f"DiTBlock_{i}/MlpBlock_0/Dense_1/bias"]
        )
    expected = rename_parameters(parameters, model.config)
    assert state.keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def recorded_model(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(
        path.with_name(path.stem.replace("checkpoint_", "model_") + ".npz"), allow_pickle=False
    ) as file:
        arrays = {name: file[name] for name in file.files if name != "config"}
        return ast.literal_eval(str(file["config"])), arrays


def test_there_are_recorded_checkpoints() -> None:
    assert RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_checkpoints_convert_exactly(path: Path) -> None:
    config, arrays = recorded_model(path)
    arguments = {
        name: config[name] for name in ("num_heads", "depth_min", "depth_group", "image_size")
    }
    model = convert_reference_checkpoint(
        path, step_conditioned=not config.get("ignore_dt", False), **arguments
    )
    for name in (
        "channels",
        "patch_size",
        "hidden_size",
        "depth",
        "num_heads",
        "mlp_ratio",
        "num_classes",
        "image_size",
    ):
        assert getattr(model.config, name) == config[name], name
    assert model.config.length_conditioned == bool(config["depth_wise"])
    assert not model.training
    expected = rename_parameters(
        {name[7:]: array for name, array in arrays.items() if name.startswith("params/")},
        model.config,
    )
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    raw = convert_reference_checkpoint(path, weights="raw", **arguments)
    assert not any(
        torch.equal(tensor, expected[name])
        for name, tensor in raw.state_dict().items()
        if name.endswith("weight")
    )


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_checkpoints_compute_the_recorded_velocities(path: Path) -> None:
    config, arrays = recorded_model(path)
    arguments = {
        name: config[name] for name in ("num_heads", "depth_min", "depth_group", "image_size")
    }
    model = convert_reference_checkpoint(path, **arguments)
    x, t, index, y = (torch.from_numpy(arrays[name]) for name in ("x", "t", "dt_base", "y"))
    velocities = {
        name: array for name, array in arrays.items() if name.startswith("velocity_depth")
    }
    assert velocities
    for name, expected in velocities.items():
        depth = (
            int(name.removeprefix("velocity_depth")) if model.config.length_conditioned else None
        )
        with torch.no_grad():
            got = model(x.permute(0, 3, 1, 2), t, index, y, depth=depth).permute(0, 2, 3, 1)
        # Both are float32 sums of some hundred terms of order one, in another order.
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["C", "F", "sliced", "axes", ">f4", "f8"])
def test_every_form_of_numpy_array_is_read(tmp_path: Path, protocol: int, form: str) -> None:
    parameters = make_parameters()
    change = {
        "C": lambda a: a,
        "F": np.asfortranarray,
        "sliced": lambda a: np.repeat(a, 2, axis=0)[::2],
        "axes": lambda a: (
            np.ascontiguousarray(a.transpose(1, 0, *range(2, a.ndim))).transpose(
                1, 0, *range(2, a.ndim)
            )
            if a.ndim > 1
            else a
        ),
        ">f4": lambda a: a.astype(">f4"),
        "f8": lambda a: a.astype("f8"),
    }[form]
    write(tmp_path / "x.pkl", {name: change(array) for name, array in parameters.items()}, protocol)
    assert_same_weights(convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), parameters)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_names_of_numpy_1_are_read(tmp_path: Path, protocol: int) -> None:
    parameters = make_parameters()
    data = write(tmp_path / "x.pkl", parameters, protocol).read_bytes()
    if protocol == 2:
        old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    else:
        old = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = b"\x80\x04" + old[2:].replace(
            old[2:11], b"", 1
        )  # the length of the first frame is no longer true
    assert old != data
    (tmp_path / "x.pkl").write_bytes(old)
    assert_same_weights(convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), parameters)


@pytest.mark.parametrize("kind", ["f2", "bfloat16", ">bfloat16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, kind: str) -> None:
    rounded, records = {}, {}
    for name, array in make_parameters().items():
        if kind == "f2":
            content, dtype = array.astype("<f2"), fuzz_checkpoints.dtype(text("f2"))
            rounded[name] = content.astype(np.float32)
        else:
            order = kind[0] if kind[0] == ">" else "<"
            content = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(order + "u2")
            dtype = fuzz_checkpoints.dtype(named("ml_dtypes", "bfloat16"), text(order))
            rounded[name] = (content.astype(np.uint32) << 16).view(np.float32)
        shape = b"(" + b"".join(map(integer, array.shape)) + b"t"
        data = content.tobytes()
        records[name] = fuzz_checkpoints.array(
            shape, dtype, b"B" + len(data).to_bytes(4, "little") + data
        )
    (tmp_path / "x.pkl").write_bytes(
        b"\x80\x04" + dictionary({"params_ema": encode(nest(records))}) + b"."
    )
    assert_same_weights(convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), rounded)


def encode(tree: Any) -> bytes:
    return (
        dictionary({key: encode(value) for key, value in tree.items()})
        if isinstance(tree, dict)
        else tree
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: Any) -> Any:
    """Lets pickle.dumps write `value` under the name of something that is not installed."""
    value.__module__, value.__qualname__, value.__name__ = module, name, name
    parts = module.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    holder = types.ModuleType(module)
    setattr(holder, name, value)
    monkeypatch.setitem(sys.modules, module, holder)
    return value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_jax_arrays_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    rebuild = stand_in(monkeypatch, "jax._src.array", "_reconstruct_array", lambda *arguments: None)

    class JaxArray:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __reduce__(self) -> tuple[Any, ...]:
            function, arguments, state = self.array.__reduce__()
            return rebuild, (function, arguments, state, {"weak_type": False, "named_shape": {}})

    parameters = make_parameters()
    write(
        tmp_path / "x.pkl", {name: JaxArray(array) for name, array in parameters.items()}, protocol
    )
    monkeypatch.undo()
    assert_same_weights(convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), parameters)


@pytest.mark.parametrize("style", ["reduce", "slots", "attributes", "ordered", "defaultdict"])
def test_dict_like_objects_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    class FrozenDict:
        def __init__(self, values: Any) -> None:
            self._dict, self._hash = values, None

        def __reduce_ex__(self, protocol: int) -> Any:
            if style == "reduce":
                return FrozenDict, (self._dict,)
            return object.__reduce_ex__(self, protocol)

    class SlottedFrozenDict:
        __slots__ = ("_dict", "_hash")

        def __init__(self, values: Any) -> None:
            self._dict, self._hash = values, None

    kinds: dict[str, Any] = {
        "ordered": collections.OrderedDict,
        "defaultdict": lambda values: collections.defaultdict(dict, values),
    }
    frozen = SlottedFrozenDict if style == "slots" else FrozenDict
    kind = kinds.get(style) or stand_in(monkeypatch, "flax.core.frozen_dict", "FrozenDict", frozen)
    parameters = make_parameters()
    tree = kind({key: kind(value) for key, value in nest(parameters).items()})
    data = {"train_state": kind({"params": None, "params_ema": tree, "step": 3, 7: "ignored"})}
    for protocol in (2, 5):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol))
        assert_same_weights(
            convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), parameters
        )


def test_optimizer_state_of_any_kind_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stand_in(
        monkeypatch,
        "optax._src.transform",
        "ScaleByAdamState",
        collections.namedtuple("ScaleByAdamState", "count mu nu"),
    )
    parameters = make_parameters()
    others = {
        "opt_state": (
            state(np.int32(3), {}, {}),
            {1, 2},
            frozenset("a"),
            -(1 << 100),
            object(),
            {(1, 2): bytearray(b"x")},
            slice(1),
        )
    }
    for protocol in (2, 3, 4, 5):
        write(tmp_path / "x.pkl", parameters, protocol, **others, step=np.int64(5), _timestamp=1.5)
        assert_same_weights(
            convert_reference_checkpoint(tmp_path / "x.pkl", **ARGUMENTS), parameters
        )


def test_the_right_tree_is_chosen(tmp_path: Path) -> None:
    ema, raw = make_parameters(seed=0), make_parameters(seed=1)
    path = write(tmp_path / "x.pkl", ema, params=nest(raw))
    assert_same_weights(convert_reference_checkpoint(path, **ARGUMENTS), ema)
    assert_same_weights(convert_reference_checkpoint(str(path), **ARGUMENTS, weights="raw"), raw)
    path.write_bytes(pickle.dumps({"params": nest(raw), "params_ema": None}))
    with pytest.raises(
        CheckpointError,
        match="no 'params_ema' in the file, only 'params', 'params_ema'; pass weights='raw'",
    ):
        convert_reference_checkpoint(path, **ARGUMENTS)
    with pytest.raises(ValueError, match="'ema' or 'raw', not 'best'"):
        convert_reference_checkpoint(path, **ARGUMENTS, weights="best")


@pytest.mark.parametrize(
    ("hidden", "mlp"), [(8, 32), (8, 1), (12, 37), (44, 100), (172, 687), (96, 255)]
)
def test_the_mlp_ratio_gives_the_width_back(hidden: int, mlp: int) -> None:
    parameters = make_parameters(1, hidden, mlp)
    config = config_from_parameters(parameters, 1, 1, 1, 4, True)
    assert (config.hidden_size, config.mlp_size, config.depth, config.num_classes) == (
        hidden,
        mlp,
        1,
        5,
    )
    assert rename_parameters(parameters, config)["blocks.0.mlp_in.weight"].shape == (mlp, hidden)


def test_every_parameter_is_named_once() -> None:
    parameters = make_parameters()
    names = parameter_names(config_from_parameters(parameters, 2, 1, 1, 4, True))
    paths = [path for sources in names.values() for path in sources]
    assert sorted(paths) == sorted(parameters.keys() - {"Embed_0/embedding"})
    assert (
        names.keys()
        == DiT(config_from_parameters(parameters, 2, 1, 1, 4, True)).state_dict().keys()
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "problem"),
    [
        ({"DiTBlock_1/Dense_2/kernel": None}, {}, "DiTBlock_1/Dense_2/kernel is missing"),
        ({"PatchEmbed_0/Conv_0/kernel": None}, {}, "PatchEmbed_0/Conv_0/kernel is missing"),
        ({"PatchEmbed_0/Conv_0/kernel": np.zeros((2, 4, 3, 8), "f4")}, {}, "square"),
        ({"PatchEmbed_0/Conv_0/kernel": np.zeros((2, 2, 3), "f4")}, {}, "not 4 dimensions"),
        ({"PatchEmbed_0/Conv_0/kernel": np.zeros((2, 2, 0, 8), "f4")}, {}, "channels must be"),
        ({"DiTBlock_7/Dense_0/bias": np.zeros(48, "f4")}, {}, "3 rows, 3 blocks need 4"),
        (
            {"BlockEmbedder_0/Embed_0/embedding": np.zeros((4, 8), "f4")},
            {},
            "4 rows, 2 blocks need 3",
        ),
        ({"Other_0/kernel": np.zeros(3, "f4")}, {}, "Other_0/kernel is no parameter"),
        ({"new\nline": np.zeros(3, "f4")}, {}, "new line is no parameter"),
        (
            {"FinalLayer_0/Dense_1/kernel": np.zeros((8, 13), "f4")},
            {},
            r"FinalLayer_0/Dense_1/kernel has shape \(8, 13\).*imply \(8, 12\)",
        ),
        (
            {"DiTBlock_0/Dense_1/bias": np.full(8, np.nan, "f4")},
            {},
            "DiTBlock_0/Dense_1/bias.*not finite",
        ),
        (
            {"DiTBlock_0/Dense_0/bias": np.full(48, -np.inf, "f2")},
            {},
            "DiTBlock_0/Dense_0/bias.*not finite",
        ),
        (
            {"DiTBlock_0/Dense_0/bias": np.full(48, 1e300)},
            {},
            "DiTBlock_0/Dense_0/bias.*not finite",
        ),
        (
            {"DiTBlock_0/Dense_0/bias": np.zeros(48, "i4")},
            {},
            "DiTBlock_0/Dense_0/bias is not of float16",
        ),
        (
            {"DiTBlock_0/Dense_0/bias": np.array([None] * 48)},
            {},
            "DiTBlock_0/Dense_0/bias is not of float16",
        ),
        ({"DiTBlock_0/Dense_0/bias": [0.0] * 48}, {}, "DiTBlock_0/Dense_0/bias is not an array"),
        ({"DiTBlock_0/Dense_0/bias": np.zeros(48, "f4,f4")}, {}, "DiTBlock_0/Dense_0/bias"),
        ({"a/b/c/d/e/f/g/h/i": np.zeros(1, "f4")}, {}, "nested deeper"),
        ({}, {"num_heads": 3}, "not a multiple of num_heads 3"),
        ({}, {"num_heads": 0}, "num_heads"),
        ({}, {"depth_min": 3}, "depth_min 3 is above depth 2"),
        ({}, {"depth_group": 3}, None),
        ({}, {"depth_min": 1, "depth_group": 4}, "depth 2 is not depth_min"),
        ({}, {"image_size": 5}, "image_size 5 is not a multiple of patch_size 2"),
        ({}, {"image_size": "4"}, "image_size"),
        ({}, {"step_conditioned": 1}, "step_conditioned"),
    ],
)
def test_files_and_arguments_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], problem: str | None
) -> None:
    parameters = {
        name: array for name, array in {**make_parameters(), **changes}.items() if array is not None
    }
    write(tmp_path / "x.pkl", parameters)
    with pytest.raises(CheckpointError, match=problem or "depth") as caught:
        convert_reference_checkpoint(tmp_path / "x.pkl", **{**ARGUMENTS, **arguments})
    assert str(caught.value).isprintable()


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name, problem in (
        ("none", "no such file"),
        ("", "not a file"),
        ("fifo", "not a file"),
        ("empty", "empty"),
        ("a\0b", "no such file|null"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            convert_reference_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (b"", "end of the file"),
        (b"N", "end of the file"),
        (b".", "nothing on the stack"),
        (b"\x00.", "opcode 0x00"),
        (b"\x8e" + (1 << 62).to_bytes(8, "little"), "4611686018427387904 bytes wanted"),
        (b"\x95" + (1 << 62).to_bytes(8, "little"), "a frame ends after the file"),
        (b"\x8b\xff\xff\xff\x7f", "an integer of 2147483647 bytes"),
        (b"h\x05.", "memo 5 is not set"),
        (b"t.", "no mark"),
        (b"N\x87.", "without enough elements"),
        (b"}(Nu.", "a key without a value"),
        (b"X\x01\x00\x00\x00\xff.", "decode"),
        (b"NN\x93.", "no string"),
        (b"cos", "a name without an end"),
        (b"Pid\n.", "opcode 0x50"),
        (b"NQ.", "opcode 0x51"),
        (b"\x82\x01.", "opcode 0x82"),
        (b"\x97.", "opcode 0x97"),
        (b"(" * 1_000_000 + b".", "too many opcodes"),
        (b"N.", "no dict of parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_pickles_that_are_refused(tmp_path: Path, tail: bytes, problem: str) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + tail)
    with pytest.raises(CheckpointError, match=problem):
        convert_reference_checkpoint(tmp_path / "x.pkl")


@pytest.mark.parametrize("head", [b"\x80\x01", b"\x80\x06", b"PK\x03\x04", b"(dp0\n."])
def test_other_formats_are_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(head + b"N." * 50)
    with pytest.raises(CheckpointError, match="not a pickle of protocol 2 to 5"):
        convert_reference_checkpoint(tmp_path / "x.pkl")


def test_records_are_inert(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for attack in fuzz_checkpoints.attacks(str(canary)):
        with pytest.raises(ValueError, match=r"is not an array|opcode"):
            as_array(read_records(memoryview(b"\x80\x05" + attack + b".")))
        (tmp_path / "x.pkl").write_bytes(
            b"\x80\x05" + dictionary({"params_ema": dictionary({"a": attack})}) + b"."
        )
        with pytest.raises(CheckpointError):
            convert_reference_checkpoint(tmp_path / "x.pkl")
    assert not canary.exists()
    assert "antigravity" not in sys.modules


def test_values_are_parsed_as_pickle_does() -> None:
    value = {
        "a": [
            1,
            -1,
            300,
            -(1 << 80),
            1.5,
            None,
            True,
            (),
            (1,),
            (1, 2, 3),
            (1, 2, 3, 4),
            b"x",
            "é\ud800",
            {"b": []},
        ]
    }
    for protocol in (2, 4, 5):
        if protocol > 2:
            assert read_records(memoryview(pickle.dumps(value, protocol))) == value
        assert read_records(memoryview(pickle.dumps(value["a"][:11], protocol))) == value["a"][:11]
    long = read_records(memoryview(pickle.dumps(["é" * 5000, b"x" * 5000], 4)))
    assert long == [Text(memoryview("é".encode() * 5000)), b"x" * 5000]
    assert read_records(memoryview(pickle.dumps(os.getcwd, 4))) == Global("posix", "getcwd")
    assert read_records(memoryview(pickle.dumps({(1, 2): 3, 4: 5, "a": 6}, 4))) == {"a": 6}


@pytest.mark.parametrize("fragment", ["twins", "empty", "cycle"])
def test_shared_parts_do_not_explode(tmp_path: Path, fragment: str) -> None:
    """A few bytes per level that stand for 200^7 parameters, or for endless ones."""
    if fragment == "cycle":
        tree = b"}\x94" + b"(" + text("a") + b"h\x00u"
    else:
        leaf = (
            b"}"
            if fragment == "empty"
            else fuzz_checkpoints.array(
                integer(1) + b"\x85", fuzz_checkpoints.dtype(), b"C\x04abcd"
            )
        )
        tree = leaf + b"\x94"
        for level in range(7):
            tree += b"0" + dictionary({str(i): b"h" + bytes([level]) for i in range(200)}) + b"\x94"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x05" + b"}" + text("params_ema") + tree + b"s.")
    with pytest.raises(
        CheckpointError, match=r"more parameters than the file can hold|nested deeper"
    ):
        convert_reference_checkpoint(tmp_path / "x.pkl")


def test_one_array_under_many_names_does_not_multiply_memory(tmp_path: Path) -> None:
    array = np.zeros(1 << 18, np.float32)
    path = write(tmp_path / "x.pkl", {f"{i}/bias": array for i in range(20_000)})
    assert path.stat().st_size < 3 << 20
    with pytest.raises(CheckpointError, match="more parameters than the file can hold"):
        convert_reference_checkpoint(path)


def test_the_position_table_is_not_made_for_a_lie(tmp_path: Path) -> None:
    """Widths of 65536 that only two small tables have: refused by shape, before a table of that
    width is made."""
    parameters = make_parameters(1)
    parameters["PatchEmbed_0/Conv_0/kernel"] = np.zeros((1, 1, 1, 65536), np.float32)
    config = config_from_parameters(parameters, 1, 1, 1, 4096, True)
    with pytest.raises(CheckpointError, match="imply"):
        rename_parameters(parameters, config)


def test_rename_refuses_what_does_not_fit() -> None:
    parameters = make_parameters()
    config = config_from_parameters(parameters, 2, 1, 1, 4, True)
    with pytest.raises(
        CheckpointError, match="DiTBlock_1/Dense_0/bias is no parameter of this network"
    ):
        rename_parameters(parameters, DiTConfig(**{**config.to_dict(), "depth": 1}))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="BlockEmbedder_0/Embed_0/embedding is no parameter"):
        rename_parameters(
            parameters, DiTConfig(**{**config.to_dict(), "length_conditioned": False})
        )  # type: ignore[arg-type]
    before = {name: array.copy() for name, array in parameters.items()}
    for tensor in rename_parameters(parameters, config).values():
        tensor.zero_()
    assert all(np.array_equal(array, before[name]) for name, array in parameters.items())


def test_fuzzed_checkpoints_are_refused_or_load() -> None:
    summary = fuzz_checkpoints.fuzz(cases=1500, seed=1)
    assert summary.failures == []
    assert summary.refused + summary.loaded == 1500
    assert summary.loaded > 10
    assert summary.refused > 1000
