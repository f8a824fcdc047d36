"""What DiT's save_pretrained and push_to_hub do: the conventions of huggingface_hub.

DiT does not inherit from PyTorchModelHubMixin, because importing it costs every start 0.2 s; its
push is run as it is when a model is pushed. Loading and saving are the package's own (`folder`),
which trust no file and never leave half a model behind; the files are the mixin's: config.json,
model.safetensors and README.md, the model card.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import save_model
from .model_card import PICTURE_NAME, model_card

if TYPE_CHECKING:
    from odelt_fast.model import DiT


def save_with_card(
    model: DiT,
    folder: str | Path,
    repo_id: str,
    facts: Mapping[str, Any] | None = None,
    unused: Sequence[str] = (),
) -> None:
    """Writes a model folder, and a model card into it unless it has one.

    Args:
        facts: arguments of `model_card`, and picture: the file of a PNG picture to show.
        unused: options that were given and that saving does not have: the first is refused.
    """
    for name in unused:
        advice = "it goes with push_to_hub=True, if it is one of its options"
        if name in ("variant", "dtype", "torch_dtype"):
            advice = "save_model(model, folder, dtype='float16') stores weights in half precision"
        elif name in ("max_shard_size", "safe_serialization"):
            advice = "weights are one file, model.safetensors"
        raise ValueError(f"save_pretrained has no {name}: {advice}")
    folder = save_model(model, folder)
    facts = dict(facts or {})
    picture = facts.pop("picture", None)
    if picture is not None:
        if Path(picture).suffix.lower() != ".png":
            raise ValueError(f"picture must be the file of a PNG picture, not {str(picture)!r}")
        shutil.copyfile(picture, folder / PICTURE_NAME)
    card = folder / "README.md"
    if not card.exists():
        facts = {"repo_id": repo_id, "has_picture": (folder / PICTURE_NAME).is_file(), **facts}
        card.write_text(model_card(model.config, **facts), encoding="utf-8")


def push(model: DiT, repo_id: str, **options: Any) -> str:
    """Uploads what `save_pretrained` writes, as the mixin does; the commit's URL."""
    from huggingface_hub import PyTorchModelHubMixin

    facts = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
    upload: Any = PyTorchModelHubMixin.push_to_hub
    return upload(model, repo_id, model_card_kwargs=facts, **options)
