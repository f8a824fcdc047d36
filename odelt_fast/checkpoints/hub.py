"""from_pretrained, save_pretrained and push_to_hub of a model: the conventions of huggingface_hub's
PyTorchModelHubMixin.

DiT does not inherit from the mixin, because importing it costs every start 0.2 s; its push is run
as it is when a model is pushed. Loading and saving are the package's own (`checkpoint`), which
trust no file and never leave half a model behind; the files are the mixin's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odelt_fast.checkpoints.model_card import PICTURE_NAME, model_card
from odelt_fast.config import DiTConfig

if TYPE_CHECKING:
    import torch

    from odelt_fast.model import DiT


class HubModel:
    """Base of DiT. A saved folder holds config.json, model.safetensors and README.md, the model
    card."""

    config: DiTConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        depth: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> DiT:
        """The model of a folder, a bundled name or a Hub id, in eval mode on the device
        `map_location`; see `load_model` for dtype, depth, errors. What follows `depth` says how a
        Hub id is downloaded, as everywhere in huggingface_hub."""
        from odelt_fast import load_model

        download = {"revision": revision, "token": token, "cache_dir": cache_dir}
        download |= {"force_download": force_download, "local_files_only": local_files_only}
        return load_model(
            pretrained_model_name_or_path, map_location, dtype, depth, download=download
        )

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        *,
        config: DiTConfig | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the model as `save_model` does, and a model card unless the folder has one;
        returns the commit's URL if it was pushed.

        model_card_kwargs: arguments of `model_card` (measured quality, licence, ...), and picture:
        the file of a picture (PNG) to show. repo_id: where push_to_hub=True pushes it; by default
        the folder's name. Errors: those of `save_model`; ValueError for a `config` other than the
        model's.
        """
        from odelt_fast import save_model

        if config is not None and config != self.config:
            raise ValueError("config must be the model's own: the weights belong to it")
        folder = save_model(self, save_directory)
        facts = dict(model_card_kwargs or {})
        picture = facts.pop("picture", None)
        if picture is not None:
            if Path(picture).suffix.lower() != ".png":
                raise ValueError(f"picture must be the file of a PNG picture, not {str(picture)!r}")
            shutil.copyfile(picture, folder / PICTURE_NAME)
        repo = repo_id or folder.name
        card = folder / "README.md"
        if not card.exists():
            facts = {"repo_id": repo, "has_picture": (folder / PICTURE_NAME).is_file(), **facts}
            card.write_text(model_card(self.config, **facts), encoding="utf-8")
        if not push_to_hub:
            return None
        return self.push_to_hub(repo, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes to the Hub and returns the commit's URL; makes the
        repository if there is none.

        options: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns,
        delete_patterns, model_card_kwargs.
        """
        from huggingface_hub import PyTorchModelHubMixin

        facts = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        push: Any = PyTorchModelHubMixin.push_to_hub
        return push(self, repo_id, model_card_kwargs=facts, **options)
