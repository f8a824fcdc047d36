"""Where a run's model came from, in its metadata and on its model card."""

from __future__ import annotations

from pathlib import Path

from odelt_fast.checkpoints.folder import read_config, read_metadata
from odelt_fast.checkpoints.model_card import model_card
from odelt_fast.config import DiTConfig
from odelt_fast.files import one_line

from .config import TrainConfig

CARD_NAME = "README.md"
_KEPT = ("converted_from", "converted_file", "decoder")  # of the model that a run starts from


def origin_of(config: TrainConfig) -> dict[str, str]:
    """The objective, the model that the run starts from, whose it was, and how it got its lengths:
    strings for `save_model`."""
    origin: dict[str, str] = {"objective": config.objective}
    if config.init_from is None:
        return origin
    before, known = read_config(config.init_from), read_metadata(config.init_from)
    local = Path(config.init_from)  # of a folder, its name: where it lies is nobody's business
    origin["init_from"] = one_line(local.name if local.exists() else config.init_from, 100)
    origin |= {name: known[name] for name in _KEPT if name in known}
    model = config.model_config()
    if model.length_conditioned and not before.length_conditioned:
        wiring = model.inner_step if config.wiring is None else config.wiring
        origin |= {"wiring": wiring, "length_teacher": config.length_teacher}
    if model.step_conditioned and not before.step_conditioned:
        origin["step_embedder"] = "silent"
    return origin


def describe(model: DiTConfig, made: dict[str, str]) -> str:
    """The card's paragraph on the training: made are the metadata of the model."""
    text = f"Trained for {made['step']} steps with objective {made['objective']}; EMA weights."
    if "init_from" not in made:
        return text
    text += f" Started from `{made['init_from']}`"
    if "converted_from" in made:
        text += f", converted from `{made.get('converted_file', '')}` of {made['converted_from']}"
    if "wiring" in made:
        taught = "the frozen model" if made["length_teacher"] == "init" else "the EMA network"
        lengths = ", ".join(map(str, model.depths))
        text += f", which got the lengths {lengths} in {made['wiring']} wiring, taught by {taught}"
    text += "."
    if "step_embedder" in made:
        text += " It knew no step sizes: its step embedder started silent."
    if "decoder" in made:
        text += f" `--decoder {made['decoder']}` makes pictures of its latents."
    return text


def write_card(folder: Path, model: DiTConfig, made: dict[str, str]) -> None:
    """The model card of a finished run, in place of an earlier run's."""
    text = model_card(model, repo_id=folder.name, description=describe(model, made))
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
