"""Uploading a finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from odelt_fast.checkpoints.lookup import CONFIG_NAME, WEIGHTS_NAME
from odelt_fast.files import one_line

from .card import CARD_NAME
from .config import TrainConfig


def find_repository(config: TrainConfig) -> str:
    """Makes the repository of the run on the Hub, or finds it, before the first step; returns its
    id. ValueError if it cannot be had."""
    from huggingface_hub import HfApi

    name = config.hub_model_id or config.output_dir.name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the client's own errors, its HTTP library's and the system's
        raise ValueError(
            f"--push-to-hub: no repository {name!r} can be had ({one_line(error)}): log in with hf"
            " auth login"
        ) from None


def upload(folder: Path, repository: str) -> None:
    """Uploads the model of a finished run. ValueError, with the run as it is, where the Hub does
    not take it."""
    from huggingface_hub import HfApi

    files = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME]
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message="EMA weights of odelt-fast",
        )
    except Exception as error:
        again = f"hf upload {repository} {folder} . --include {' '.join(files)}"
        raise ValueError(
            f"the run is complete in {folder}, but its upload failed ({one_line(error)}): try again"
            f" with {again}"
        ) from None
