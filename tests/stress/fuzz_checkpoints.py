"""Damaged and hostile checkpoints: each must be refused in one line (or load, where the damage is
harmless), and nothing else may happen.

    python -m tests.stress.fuzz_checkpoints --cases 100000 --seed 0

Case i of a seed is always the same file or folder. Cases run in child processes, so that a crash is
noticed, under a limit of memory, a time limit per case, and an audit hook that reports code,
imports, processes, sockets and writing while a file is being read.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 5000
MEMORY = (
    160 << 20
)  # bytes beyond what the process had before the first case: the files here are below 2 MB
SECONDS = 20  # per case; the slowest, a million opcodes, take about one
CONFIG = {
    "image_size": 2,
    "channels": 1,
    "patch_size": 1,
    "hidden_size": 4,
    "depth": 1,
    "depth_min": 1,
    "depth_group": 1,
    "num_heads": 1,
    "mlp_ratio": 1.0,
    "num_classes": 1,
}
FORBIDDEN = frozenset(
    [
        "exec",
        "compile",
        "import",
        "marshal.loads",
        "code.__new__",
        "pickle.find_class",
        "ctypes.dlopen",
        "builtins.input",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.spawn",
        "os.posix_spawn",
        "os.kill",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.link",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
        "socket.__new__",
        "socket.connect",
    ]
)
STARVED = ("MemoryError", "allocate", "enough memory")  # refusals that came only from the limit
OPCODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes)
NUMBERS = (
    b"\xff" * 4,
    b"\x00" * 4,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\x01\x00\x00\x00",
    struct.pack("<Q", 1 << 62),
    b"\xff" * 8,
)


@dataclass
class Summary:
    refused: int = 0
    loaded: int = 0
    peak: int = 0  # bytes of resident memory, beyond what the process had before
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = self.refused + self.loaded + len(self.failures)
        counts = f"{self.refused} refused, {self.loaded} loaded, {len(self.failures)} failures"
        return f"{total} cases: {counts}, at most {self.peak >> 20} MiB more memory"


def fuzz(cases: int, seed: int, start: int = 0, archives: float = 0.3) -> Summary:
    """Runs the cases `start` to `start + cases` of a seed in child processes and gathers what
    happened."""
    total = Summary()
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    for first in range(start, start + cases, CHUNK):
        count = min(CHUNK, start + cases - first)
        command = [
            sys.executable,
            __file__,
            "--cases",
            str(count),
            "--start",
            str(first),
            "--seed",
            str(seed),
            "--archives",
            str(archives),
            "--child",
        ]
        try:
            child = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=600 + count,
            )
            part = Summary(**json.loads(child.stdout.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            part = Summary(
                failures=[
                    f"cases {first} to {first + count - 1}: no end after {600 + count} seconds"
                ]
            )
        except (IndexError, ValueError, TypeError):
            part = Summary(
                failures=[
                    f"cases {first} to {first + count - 1}: exit status {child.returncode}:"
                    f" {child.stderr[-2000:]}"
                ]
            )
        total = Summary(
            total.refused + part.refused,
            total.loaded + part.loaded,
            max(total.peak, part.peak),
            total.failures + part.failures,
        )
        print(f"... {total}", file=sys.stderr, flush=True)
    return total


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def dictionary(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def dtype(
    kind: bytes = text("f4"),
    order: bytes = text("<"),
    rest: bytes = b"NNN" + integer(-1) * 2 + integer(0),
) -> bytes:
    return call("numpy", "dtype", kind, b"\x89", b"\x88") + b"(" + integer(3) + order + rest + b"tb"


def array(shape: bytes, kind: bytes, data: bytes) -> bytes:
    state = b"(" + integer(1) + shape + kind + b"\x89" + data + b"tb"
    return (
        call(
            "numpy._core.multiarray",
            "_reconstruct",
            named("numpy", "ndarray"),
            integer(0) + b"\x85",
            b"C\x01b",
        )
        + state
    )


def parameters() -> dict[str, object]:
    """A whole network of width 4, as nested dicts of float32 arrays."""
    from odelt_fast.checkpoints.reference import parameter_names
    from odelt_fast.config import DiTConfig

    config, draw, tree = DiTConfig(**CONFIG), np.random.default_rng(0), {}  # type: ignore[arg-type]
    shapes = {
        "LabelEmbedder_0/Embed_0/embedding": (2, 4),
        "BlockEmbedder_0/Embed_0/embedding": (2, 4),
        "PatchEmbed_0/Conv_0/kernel": (1, 1, 1, 4),
    }
    widths = {"DiTBlock_0/Dense_0": 24, "FinalLayer_0/Dense_0": 8, "FinalLayer_0/Dense_1": 1}
    for path in [name for names in parameter_names(config).values() for name in names]:
        *parents, leaf = path.split("/")
        rows, width = (
            256 if "Timestep" in path and "Dense_0" in path else 4,
            widths.get("/".join(parents), 4),
        )
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = draw.standard_normal(
            shapes.get(path, (rows, width) if leaf == "kernel" else (width,)), dtype=np.float32
        )
    return tree


def peer_tensors() -> dict[str, Any]:
    """A whole SiT of width 4 and one block, by its own names."""
    import torch

    from odelt_fast.model import position_table

    block, torch_linear = "blocks.0", {}
    sizes = {
        "t_embedder.mlp.0": (4, 256), "t_embedder.mlp.2": (4, 4), f"{block}.attn.qkv": (12, 4),
        f"{block}.attn.proj": (4, 4), f"{block}.mlp.fc1": (4, 4), f"{block}.mlp.fc2": (4, 4),
        f"{block}.adaLN_modulation.1": (24, 4), "final_layer.linear": (2, 4),
        "final_layer.adaLN_modulation.1": (8, 4), "x_embedder.proj": (4, 1, 1, 1),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, size in sizes.items():
        torch_linear[f"{name}.weight"] = torch.randn(size, generator=generator)
        torch_linear[f"{name}.bias"] = torch.randn(size[:1], generator=generator)
    table = torch.randn(2, 4, generator=generator)
    return {
        "pos_embed": position_table(2, 2, 4)[None],
        "y_embedder.embedding_table.weight": table,
        **torch_linear,
    }


class Bases:
    """The sound files that cases are made from."""

    def __init__(self) -> None:
        import torch

        from odelt_fast.checkpoints.folder import save_model
        from odelt_fast.config import DiTConfig
        from odelt_fast.model import DiT

        tree = parameters()
        self.pickles = []
        for protocol in (2, 3, 4, 5):
            data = pickle.dumps(
                {
                    "params_ema": tree,
                    "step": np.int64(3),
                    "_timestamp": 1.5,
                    "opt_state": (1 << 70, b"x", [{}]),
                },
                protocol,
            )
            self.pickles.append((data, [position for _, _, position in pickletools.genops(data)]))
        self.archives = []
        state = collections.OrderedDict(peer_tensors())
        state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
        options = argparse.Namespace(model="SiT-S/2", image_size=256)
        for content in (state, {"ema": state, "model": {}, "opt": [state], "args": options}):
            file = io.BytesIO()
            torch.save(content, file)
            self.archives.append(file.getvalue())
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            save_model(DiT(DiTConfig(**CONFIG)), folder)  # type: ignore[arg-type]
            self.config, self.weights = (
                Path(folder, name).read_bytes() for name in ("config.json", "model.safetensors")
            )


def mutate(draw: random.Random, data: bytes, positions: list[int], snippets: list[bytes]) -> bytes:
    """One to four kinds of damage, mostly where the structure is."""
    result = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = (
            draw.choice(positions) + draw.choice((0, 0, 1, 2))
            if draw.random() < 0.8
            else draw.randrange(len(data))
        )
        kind = draw.randrange(9)
        if kind == 0:
            del result[at:]
        elif kind == 1:
            result[at : at + 1] = bytes(
                [(result[at] if at < len(result) else 0) ^ 1 << draw.randrange(8)]
            )
        elif kind == 2:
            result[at : at + 1] = draw.randbytes(1)
        elif kind == 3:
            result[at:at] = draw.randbytes(draw.randint(1, 9))
        elif kind == 4:
            del result[at : at + draw.randint(1, 40)]
        elif kind == 5:
            source = draw.randrange(len(data))
            result[at:at] = data[source : source + draw.randint(1, 200)]
        elif kind == 6:
            number = draw.choice(NUMBERS)
            result[at + 1 : at + 1 + len(number)] = number
        elif kind == 7:
            result[at : at + 1] = bytes([draw.choice(OPCODES)])
        else:
            result[at:at] = draw.choice(snippets)
    return bytes(result)


def attacks(canary: str) -> list[bytes]:
    """Pickle fragments that leave one value on the stack and, when unpickled, would make the file
    `canary`."""
    shell, python = text(f"touch {canary}"), text(f"open({canary!r}, 'w')")
    return [
        call("os", "system", shell),
        call("posix", "system", shell),
        call("builtins", "eval", python),
        call("builtins", "exec", python),
        call("__builtin__", "eval", python),
        call("builtins", "__import__", text("antigravity")),
        call("subprocess", "Popen", b"(" + text("touch") + text(canary) + b"l"),
        call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
        + b"("
        + shell
        + b"tR",
        call("numpy", "load", text(canary), b"N", b"\x88"),
        call("torch", "load", text(canary)),
        call("ctypes", "CDLL", text(canary)),
        call("pathlib", "Path.touch", call("pathlib", "Path", text(canary))),
        b"(" + shell + b"ios\nsystem\n",
        b"(cos\nsystem\n" + shell + b"o",
        b"cos\nsystem\n" + shell + b"\x85R",
        named("os", "system") + shell + b"\x85\x81",
        named("os", "system") + shell + b"\x85}\x92",
        call("numpy._core.multiarray", "_reconstruct", named("os", "system"), shell, b"C\x01b")
        + shell
        + b"b",
        call(
            "jax._src.array",
            "_reconstruct_array",
            named("os", "system"),
            shell + b"\x85",
            b")",
            b")",
        ),
        call(
            "copyreg",
            "_reconstructor",
            named("subprocess", "Popen"),
            named("builtins", "object"),
            b"N",
        )
        + dictionary({"args": shell})
        + b"b",
        call("flax.core.frozen_dict", "FrozenDict", call("os", "system", shell)),
        call("_codecs", "encode", call("os", "system", shell), text("latin1")),
        b"Pevil\n",
        text("evil") + b"Q",
        b"\x82\x01",
        b"\x97",
    ]


def hostile_pickle(draw: random.Random, attack: bytes) -> bytes:
    """A checkpoint that is made to hurt: code, giant sizes, false types and shapes, deep nesting,
    shared parts."""
    giant = draw.choice((1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64, 1 << 900, -1, -(1 << 63), 0))
    size = struct.pack("<Q", draw.choice((1 << 62, (1 << 64) - 1, 1 << 63, 1 << 33)))
    shape, data = integer(1) + b"\x85", b"C\x04abcd"
    kinds = (
        *map(text, ("O8", "O", "U1", "S4", "V4", "f4,f4", "M8[s]", "f16", "", "x" * 5000)),
        b"N",
        integer(4),
        attack,
        b"](" + attack + b"e",
    )
    orders = (text("?"), text(""), b"N", b"]", integer(1), attack)
    states = (b"", b"N", b"}}}", b"N" * 50, dtype() + b"NN", attack)
    shapes = (b"N", b"]", b")", b"(\x88t", b"(G?\xf0" + b"\x00" * 6 + b"t", text("x"), attack)
    contents = (b"N", b"C\x03abc", b"](" + attack + b"e", text("abcd"), b"\x96" + size)
    values = [
        attack,
        dictionary({"PatchEmbed_0": attack}),
        dictionary({"PatchEmbed_0": dictionary({"Conv_0": dictionary({"kernel": attack})})}),
        array(b"(" + integer(giant) * draw.randint(1, 40) + b"t", dtype(), data),
        array(b"(" + integer(1) * draw.randint(0, 40) + b"t", dtype(), data),
        array(draw.choice(shapes), dtype(), data),
        array(shape, dtype(draw.choice(kinds)), data),
        array(shape, dtype(text("f4"), draw.choice(orders)), data),
        array(shape, dtype(text("f4"), text("<"), draw.choice(states)), data),
        array(shape, draw.choice((attack, named("numpy", "float32"), text("f4"), b"N")), data),
        array(shape, dtype(), draw.choice(contents)),
        call(
            "numpy._core.numeric",
            "_frombuffer",
            data,
            dtype(),
            integer(giant) + b"\x85",
            draw.choice((text("C"), text("K"), attack)),
        ),
        call(
            "numpy._core.numeric",
            "_frombuffer",
            data,
            dtype(),
            shape,
            text("K"),
            draw.choice((b")", integer(giant) + b"\x85")),
        ),
        call(
            "numpy._core.multiarray", "scalar", dtype(draw.choice((text("f4"), text("O")))), attack
        ),
        draw.choice((b"\x8e", b"\x8d", b"\x96", b"\x95")) + size + b"abc",
        draw.choice((b"B", b"X", b"T", b"\x8b"))
        + draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"))
        + b"abc",
        b"\x8b" + struct.pack("<I", 5000) + b"\x7f" * 5000,
        b"r\xff\xff\xff\xff" + b"j\xff\xff\xff\x7f",
        # Nested doubling: 2^n leaves in a few bytes per level, as tuples, lists, dicts, keys and in
        # themselves.
        b")" + b"2\x86" * draw.choice((10, 60, 3000)),
        b"]\x94"
        + b"".join(
            b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(draw.randint(10, 200))
        ),
        b"}\x94"
        + b"".join(
            b"}(X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i]) + b"u\x94"
            for i in range(40)
        ),
        b"}" + b")" + b"2\x86" * 50 + b"Ns",
        b"}]Ns",
        b"}}Ns",
        b"}" + attack + b"Ns",
        b"}\x94X\x01\x00\x00\x00ah\x00s",
        b"]\x94h\x00a",
        b"\x94".join(
            [dictionary({str(i): b"}" for i in range(200)})]
            + [b"0" + dictionary({str(i): b"h\x00" for i in range(200)})] * 3
        ),
    ]
    if draw.random() < 0.004:
        deep = draw.choice((1000, 1_000_000))
        pair = b"X\x01\x00\x00\x00a}"
        values = [
            *(
                opcode * deep
                for opcode in (b"(", b"}", b"N", b"]\x94", b"(]", b"}\x94", b")\x94", b"\x8f")
            ),
            b"(" * deep + b"t" * deep,
            b")" + b"\x85" * deep,
            b"]" * deep + b"a" * (deep - 1),
            b"}" + text("a") + b")" + b"\x85" * deep + b"s",
            named("a", "b") + b")R" * deep,
            b"}" + pair * (deep // 10) + b"s" * (deep // 10),
        ]
    value = draw.choice(values)
    tree = draw.choice(
        (
            b"}" + text("params_ema") + value + b"s",
            value,
            b"}" + text("train_state") + value + b"s",
            b"(" + value + b"t",
            b"}" + text("params_ema") + call("flax.core.frozen_dict", "FrozenDict", value) + b"s",
        )
    )
    return b"\x80" + bytes([draw.choice((2, 4, 5, 5, 5))]) + tree + b"."


def hostile_config(draw: random.Random, config: bytes) -> bytes:
    values: dict[str, object] = json.loads(config)
    kind = draw.randrange(6)
    if kind == 0:
        return mutate(
            draw,
            config,
            list(range(len(config))),
            [b"NaN", b"1e999", b"{", b'"depth": 2,', b"9" * 5000, b"\xff", b"[" * 3000],
        )
    if kind == 1:
        deep = draw.choice((10, 2000, 200_000))
        return draw.choice(
            (
                b"[" * deep,
                b'{"a":' * deep,
                b"[" * deep + b"]" * deep,
                b"",
                b"null",
                b"[]",
                b"3",
                b'""',
                b" " * (1 << 21),
            )
        )
    if kind == 2:
        return config.replace(b"{", b'{"depth": 1,', 1)
    for _ in range(draw.randint(1, 3)):
        values[draw.choice([*values, "extra", ""])] = draw.choice(
            (
                None,
                True,
                -1,
                0,
                1,
                2,
                3,
                4,
                8,
                1024,
                4096,
                65536,
                10_000_000,
                1 << 70,
                10**400,
                0.5,
                1e308,
                -0.0,
                "",
                "x" * 9999,
                [],
                [1],
                {},
                {"a": 1},
            )
        )
    return json.dumps(values).encode()


def hostile_weights(draw: random.Random, weights: bytes) -> bytes:
    length = int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    kind = draw.randrange(8)
    if kind == 0:
        return mutate(
            draw, weights, list(range(8 + length)), [b"{", b'"', b"NaN", b"F64", b"[0,0]", b"-1"]
        )
    if kind == 1:
        lie = draw.choice(
            (
                0,
                1,
                length - 1,
                length + 1,
                len(weights),
                1 << 24,
                100_000_000,
                1 << 40,
                (1 << 64) - 1,
            )
        )
        return struct.pack("<Q", lie) + weights[8:]
    if kind == 2:
        body = bytearray(body)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(0, len(body) - 4, 4)
            body[at : at + 4] = draw.choice(
                (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", draw.randbytes(4))
            )
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.sample(names, 2)
    numbers: tuple[object, ...] = (
        0,
        1,
        -1,
        4,
        1 << 31,
        1 << 40,
        1 << 62,
        (1 << 64) - 1,
        1 << 70,
        0.5,
        None,
        "4",
        [],
    )
    if kind == 3:
        offsets = header[name]["data_offsets"]
        offsets[draw.randrange(2)] = draw.choice(
            (*numbers, offsets[0] + 1, offsets[1] + 1, header[other]["data_offsets"][0])
        )
    elif kind == 4:
        header[name]["shape"] = draw.choice(
            (
                [],
                [1 << 40, 1 << 40],
                header[name]["shape"][::-1],
                [0],
                [draw.choice(numbers)],
                None,
                [1] * 5000,
            )
        )
    elif kind == 5:
        header[name]["dtype"] = draw.choice(
            (
                "F64",
                "F16",
                "BF16",
                "I32",
                "I64",
                "U8",
                "BOOL",
                "F8_E4M3",
                "C64",
                "object",
                "",
                None,
                4,
            )
        )
    elif kind == 6:
        change = draw.randrange(5)
        if change == 0:
            del header[name]
        elif change == 1:
            header["blocks.1.qkv.weight\n" * draw.choice((1, 1000))] = header.pop(name)
        elif change == 2:
            header[name], header[other] = header[other], header[name]
        elif change == 3:
            header["__metadata__"] = draw.choice(
                ({"a": 1}, None, [], {"config_sha256": "0"}, {"a": "b" * 100_000})
            )
        else:
            header |= {
                str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(draw.choice((1, 1000)))
            }
    data = json.dumps(header).encode()
    if kind == 7:
        data = draw.choice(
            (
                data[:-1] + b"," + data[1:],
                data + b" " * (17 << 16),
                b"[" * 200_000,
                b'{"a":' * 200_000,
                b"null",
                b"\xff" * 8,
                b"",
            )
        )
    return struct.pack("<Q", len(data)) + data + bytes(body) + draw.choice((b"",) * 9 + (b"x",))


def hostile_archive(draw: random.Random, archive: bytes, snippets: list[bytes]) -> bytes:
    """A damaged file of torch.save: its bytes, the pickle in a sound archive, or how members are
    stored."""
    if draw.random() < 0.3:
        # Names, headers and the directory at the end, mostly.
        marks = [at for at in range(len(archive) - 1) if archive[at : at + 2] == b"PK"]
        near = [mark + draw.randrange(60) for mark in marks]
        return mutate(draw, archive, near, [b"PK\x01\x02" + b"\x00" * 42, b"PK\x05\x06"])
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for member in source.infolist():
            name, content = member.filename, source.read(member)
            kind = draw.random()
            if name.endswith("data.pkl"):
                positions = [position for _, _, position in pickletools.genops(content)]
                content = mutate(draw, content, positions, snippets) if kind < 0.9 else content
            elif kind < 0.02:
                content = draw.choice((b"", content[:-3], content * 2, b"big"))
            elif kind < 0.03:
                name = draw.choice(("../x", "/etc/passwd", "archive/data.pkl", "x" * 3000, "?"))
            elif kind < 0.04:
                member.compress_type = zipfile.ZIP_DEFLATED
            elif kind < 0.05:
                continue
            target.writestr(name, content, member.compress_type)
    return result.getvalue()


def write_case(
    draw: random.Random, bases: Bases, folder: Path, canary: str, archives: float
) -> str:
    """Writes one case and returns its file's name: a pickle, a file of torch.save, or the
    configuration of a model folder."""
    kind = draw.random()
    if kind < archives:
        archive = hostile_archive(draw, draw.choice(bases.archives), attacks(canary))
        (folder / "checkpoint.pt").write_bytes(archive)
        return "checkpoint.pt"
    kind = (kind - archives) / (1 - archives)
    if kind < 0.75:
        snippets = attacks(canary)
        data = (
            hostile_pickle(draw, draw.choice(snippets))
            if kind < 0.25
            else mutate(draw, *draw.choice(bases.pickles), snippets)
        )
        (folder / "checkpoint.pkl").write_bytes(data)
        return "checkpoint.pkl"
    damage = draw.randrange(3)
    (folder / "config.json").write_bytes(
        hostile_config(draw, bases.config) if damage != 1 else bases.config
    )
    (folder / "model.safetensors").write_bytes(
        hostile_weights(draw, bases.weights) if damage != 0 else bases.weights
    )
    return "config.json"


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way can swallow it."""


def run_cases(cases: int, seed: int, start: int, archives: float) -> Summary:
    """Runs cases in this process, which must be a child: it gets limits and a hook that never go
    away."""
    import resource
    import signal

    import torch

    from odelt_fast import CheckpointError, convert_reference_checkpoint, load_model
    from odelt_fast.checkpoints.peers import convert_peer_checkpoint

    events: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if not watching:
            return
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if writes or event in FORBIDDEN:
            events.append(f"{event} {arguments!r}"[:200])

    def alarm(*_: object) -> None:
        raise TooSlow

    torch.set_num_threads(1)
    bases = Bases()
    summary = Summary()
    with tempfile.TemporaryDirectory() as name:
        folder, canary = Path(name), str(Path(name, "canary"))
        (folder / "checkpoint.pkl").write_bytes(bases.pickles[0][0])
        (folder / "config.json").write_bytes(bases.config)
        (folder / "model.safetensors").write_bytes(bases.weights)
        readers: dict[str, Callable[[], object]] = {
            "checkpoint.pkl": lambda: convert_reference_checkpoint(
                folder / "checkpoint.pkl", 1, 1, 1, 2
            ),
            "checkpoint.pt": lambda: convert_peer_checkpoint(
                folder / "checkpoint.pt", "sit", num_heads=1
            ),
            "config.json": lambda: load_model(folder),
        }
        for archive in bases.archives:
            (folder / "checkpoint.pt").write_bytes(archive)
            readers["checkpoint.pt"]()
        readers["checkpoint.pkl"]()
        readers["config.json"]()
        # Loaded at their first use: the code of names in zip archives, flax's format.
        "".encode("cp437")
        with contextlib.suppress(ImportError):
            import msgpack  # noqa: F401
        sys.addaudithook(hook)
        signal.signal(signal.SIGALRM, alarm)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        for index in range(start, start + cases):
            draw = random.Random(f"{seed}:{index}")
            case = write_case(draw, bases, folder, canary, archives)
            problem, refused = "", False
            signal.alarm(SECONDS)
            watching = True
            try:
                readers[case]()
            except CheckpointError as error:
                message, refused = str(error), True
                if (
                    "\n" in message
                    or len(message) > 1000
                    or not message.isprintable()
                    or any(word in message for word in STARVED)
                ):
                    problem = f"refused with {message[:500]!r}"
            except (Exception, TooSlow) as error:
                problem = f"{type(error).__name__}: {str(error)[:500]}"
            watching = False
            signal.alarm(0)
            if events or os.path.exists(canary):
                problem += f" something happened: {events or canary}"
                events.clear()
                Path(canary).unlink(missing_ok=True)
            if problem:
                summary.failures.append(f"case {index} of seed {seed}: {problem}")
            else:
                summary.refused += refused
                summary.loaded += not refused
    summary.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--archives", type=float, default=0.3, help="share of torch.save's files")
    parser.add_argument("--start", type=int, default=0, help="index of the first case")
    parser.add_argument("--child", action="store_true", help="run in this process and print JSON")
    options = parser.parse_args()
    if options.child:
        print(
            json.dumps(
                vars(run_cases(options.cases, options.seed, options.start, options.archives))
            )
        )
        return 0
    summary = fuzz(options.cases, options.seed, options.start, options.archives)
    for failure in summary.failures[:20]:
        print(failure)
    print(summary)
    return bool(summary.failures)


if __name__ == "__main__":
    sys.exit(main())
