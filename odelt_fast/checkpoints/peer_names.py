"""The names of the DiT family's tensors: other containers' names become them, whose they are is
told by them, and what belongs to another network is refused by its own name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from odelt_fast.files import one_line

# What other networks have, by their tensors' names.
_OTHERS = {
    r"\.(q|k)_norm\.|\.norm_(q|k)\.": "its attention normalises q and k",
    r"(^|\.)(double|single|joint)_(transformer_)?blocks\.|single_transformer_blocks|"
    r"context_embedder|caption_|text_|\.cross_attn\.|\.attn2\.|y_embedder\.y_proj|cap_embedder": (
        "it is conditioned on text (PixArt, SD3, Flux)"
    ),
    r"rope|freqs_cis|rotary": "it has rotary positions (LightningDiT)",
    r"\.mlp\.(w\d+|gate_proj|up_proj)\.|\.feed_forward\.": "its MLP is a SwiGLU",
    r"blocks\.\d+\.norm\d?\.weight": "its norms have weights (RMSNorm)",
}
_DIFFUSERS = {
    r"pos_embed\.proj\.": "x_embedder.proj.",
    r"pos_embed\.pos_embed$": "pos_embed",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.": "t_embedder.mlp.0.",
    r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.": "t_embedder.mlp.2.",
    r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.": "y_embedder.",
    r"transformer_blocks\.(\d+)\.norm1\.linear\.": r"blocks.\1.adaLN_modulation.1.",
    r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.": r"blocks.\1.attn.\2.",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.": r"blocks.\1.attn.proj.",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"blocks.\1.mlp.fc1.",
    r"transformer_blocks\.(\d+)\.ff\.net\.2\.": r"blocks.\1.mlp.fc2.",
    r"proj_out_1\.": "final_layer.adaLN_modulation.1.",
    r"proj_out_2\.": "final_layer.linear.",
}
_OF_DIFFUSERS = "transformer_blocks."
BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
ENDS = {
    "patch_embed": "x_embedder.proj",
    "time_embed.linear_in": "t_embedder.mlp.0",
    "time_embed.linear_out": "t_embedder.mlp.2",
    "final_layer.modulation": "final_layer.adaLN_modulation.1",
    "final_layer.out": "final_layer.linear",
}
Tensors = dict[str, tuple[str, np.ndarray]]  # the family's name -> the file's own name, the values


def family_names(named: Mapping[str, np.ndarray]) -> Tensors:
    """By the names of the DiT family's PyTorch code, whether diffusers' or flax's."""
    tensors: Tensors = {}
    for name, values in named.items():
        ours = name
        if name.startswith("net."):  # flax: kernels stand the other way round
            ours = re.sub(r"layers_(\d+)", r"\1", name.removeprefix("net."))
            ours = re.sub(r"\._flax_(linear|embedding)", "", ours)
            ours = ours.replace("h_embedder.", "r_embedder.")
            if ours.endswith(".kernel"):
                axes = (3, 2, 0, 1) if values.ndim == 4 else tuple(range(values.ndim))[::-1]
                values = values.transpose(axes)
            ours = re.sub(r"\.(kernel|embedding)$", ".weight", ours)
        for theirs, family in _DIFFUSERS.items():
            ours = re.sub(f"^{theirs}", family, ours)
        if ours in tensors:
            raise ValueError(f"{one_line(name)} is there twice")
        tensors[ours] = name, values
    _join_heads(tensors)
    _merge_embedders(tensors)
    return tensors


def _join_heads(tensors: Tensors) -> None:
    """q, k and v of diffusers, one below the other."""
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.q\.\w+", name)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in tensors for part in parts):
            own, values = zip(*(tensors.pop(part) for part in parts), strict=True)
            if len({each.shape for each in values}) > 1:
                raise ValueError(f"{one_line(own[0])} and its k and v have different shapes")
            joined = np.concatenate(values)
            tensors[name.replace(".attn.q.", ".attn.qkv.")] = own[0], joined


def _merge_embedders(tensors: Tensors) -> None:
    """diffusers keeps the embedders of time and label in every block: one, if they are equal."""
    kept = {"timestep_embedder.linear_1.": "t_embedder.mlp.0.",
            "timestep_embedder.linear_2.": "t_embedder.mlp.2.",
            "class_embedder.": "y_embedder."}  # fmt: skip
    for name in [name for name in tensors if ".norm1.emb." in name]:
        own, values = tensors.pop(name)
        rest = name.split(".norm1.emb.")[1]
        for theirs, family in kept.items():
            first = tensors.get(rest.replace(theirs, family))
            if rest.startswith(theirs) and first and not np.array_equal(first[1], values):
                raise ValueError(f"{one_line(own)} differs from block 0's: one embedder is wanted")


def detected_source(named: Mapping[str, np.ndarray]) -> str:
    """The source that the tensors' names tell."""
    if any(name.startswith(("r_embedder.", "net.h_embedder.")) for name in named):
        return "meanflow"
    if any(name.startswith(_OF_DIFFUSERS) for name in named):
        return "diffusers"
    if any(name.startswith("projectors.") for name in named):
        return "repa"
    for pattern, reason in _OTHERS.items():
        if any(re.search(pattern, name) for name in named):
            raise ValueError(f"another network: {reason}")
    if "x_embedder.proj.weight" in named:
        raise ValueError(
            "files of DiT, SiT and REPA have the same names: say whose it is, source dit, sit or"
            " repa"
        )
    raise ValueError(f"not a DiT's tensors: {one_line(', '.join(sorted(named)[:4]), 120)}")


def check_names(tensors: Tensors, source: str) -> None:
    """ValueError for what is none of the source's tensors; those of training alone are dropped."""
    known = {
        *(f"{name}.{leaf}" for name in ENDS.values() for leaf in ("weight", "bias")),
        "y_embedder.embedding_table.weight",
        "pos_embed",
    }
    if source == "meanflow":
        known |= {f"r_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    layers = "|".join(map(re.escape, BLOCK.values()))
    block = re.compile(rf"blocks\.(0|[1-9]\d{{0,3}})\.({layers})\.(weight|bias)")
    if source == "repa":
        for name in [name for name in tensors if name.startswith("projectors.")]:
            del tensors[name]
    unknown = [
        own
        for name, (own, _) in sorted(tensors.items())
        if name not in known and not block.fullmatch(name)
    ]
    for own in unknown:
        for pattern, reason in _OTHERS.items():
            if re.search(pattern, own):
                raise ValueError(f"{one_line(own)}: another network: {reason}")
    if unknown:
        raise ValueError(f"{one_line(unknown[0])}: no tensor of {source}'s")
    theirs = next((own for own, _ in tensors.values() if own.startswith(_OF_DIFFUSERS)), None)
    if theirs and source != "diffusers":
        raise ValueError(f"{one_line(theirs)} is a name of diffusers: source diffusers")
    if source == "diffusers" and not theirs:
        raise ValueError("its tensors have the names of DiT's own code: source dit")
