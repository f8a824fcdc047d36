"""What a checkpoint holds of a run, written and read: whole, by the main process, or, of sharded
weights, every process its part, in the background."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from odelt_fast.checkpoints.folder import save_model
from odelt_fast.files import one_line
from odelt_fast.model import DiT

from .checkpoints import (
    STATE_NAME,
    check_run,
    checkpoints,
    is_damage,
    make_room,
    model_of,
    read_state,
    recover,
    set_aside,
    state_of,
    unfinished,
    written_whole,
)
from .config import TrainConfig
from .ema import PowerAverages
from .sharding import refresh, scatter
from .shards import BackgroundWriter, read_by_accelerate, read_shards

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDS = "shards"
_SCALER = "scaler.pt"


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        weights, ema_weights: of the two networks, by name; in shards, or whole.
        extras: further networks, whole in every process.
    """

    model: DiT
    ema: DiT
    weights: dict[str, Tensor]
    ema_weights: dict[str, Tensor]
    optimizer: Any
    power: PowerAverages
    extras: Sequence[DiT]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by names of their own, sharing their memory."""
        found = {f"model.{name}": weight for name, weight in self.weights.items()}
        found |= {f"ema.{name}": weight for name, weight in self.ema_weights.items()}
        for width, average in self.power.averages.items():
            found |= {f"power-{width:g}.{name}": tensor for name, tensor in average.items()}
        for number, network in enumerate(self.extras):
            values = network.state_dict().items()
            found |= {f"extra-{number}.{name}": tensor for name, tensor in values}
        states = self.optimizer.optimizer.state
        for name, weight in self.weights.items():
            if not states[weight]:  # as AdamW's first step makes them
                states[weight]["step"] = torch.zeros((), device=weight.device)
                for moment in ("exp_avg", "exp_avg_sq"):
                    states[weight][moment] = torch.zeros_like(weight)
            for key, tensor in states[weight].items():
                found[f"optimizer.state.{name}.{key}"] = tensor
        return {name: tensor.detach() for name, tensor in found.items()}

    def read(self, folder: Path) -> None:
        """Takes what a checkpoint holds, whoever wrote it: one process or many."""
        tensors = self.tensors()
        if (folder / SHARDS).is_dir():
            read_shards(folder / SHARDS, tensors)
        else:
            if (folder / "optimizer_0").is_dir():  # sharded weights, of a version before
                read_by_accelerate(folder, tensors)
            else:
                live = ("model.", "optimizer.")
                mine = {name: each for name, each in tensors.items() if name.startswith(live)}
                scatter(_live(folder, self.weights), mine)
            scatter(load_file(folder / "ema" / "model.safetensors"), self.ema_weights)
            self.power.load(folder)
            for number, network in enumerate(self.extras):
                network.load_state_dict(_load(folder / f"custom_checkpoint_{number}.pkl"))
        refresh(self.ema)


def _live(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the live network and its optimizer, whole, as accelerate wrote them."""
    stored = load_file(folder / "model.safetensors")
    found = {f"model.{name.removeprefix('module.')}": each for name, each in stored.items()}
    states = _load(folder / "optimizer.bin")["state"]
    for number, name in enumerate(weights):
        for key, tensor in states.get(number, {}).items():
            found[f"optimizer.state.{name}.{key}"] = tensor
    return found


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


class Saver:
    """Writes the checkpoints of a run, and goes on from them. Every process must call its
    methods.

    Attributes:
        seconds: that training has waited for the last checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        contents: Contents,
        batch: Mapping[str, int],
        sharded: bool,
    ) -> None:
        self.accelerator, self.config, self.contents = accelerator, config, contents
        self.batch, self.seconds = batch, 0.0
        self._background = BackgroundWriter(config.collective_timeout) if sharded else None

    def save(self, steps: int, skipped: int, metadata: Mapping[str, str]) -> Path:
        """Writes checkpoint-N of N finished steps and deletes the ones beyond the limit; of sharded
        weights, returns while it is being written.

        Raises:
            ValueError: the disk refuses; in the background, it did.
        """
        begin = time.perf_counter()
        self.wait()
        folder = self.config.output_dir / f"checkpoint-{steps}"
        values = {"finished_steps": steps, "skipped_steps": skipped, "batch": dict(self.batch)}
        values["objective"] = self.config.objective
        if self._background is None:
            self._save_whole(folder, values, metadata)
            self._tell(folder, begin)
        else:
            scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
            self._background.start(
                self.contents.tensors(),
                unfinished(folder) / SHARDS,
                lambda: self._shards_written(folder, values, scaler, begin),
            )
        self.seconds = time.perf_counter() - begin
        return folder

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole; ValueError if it cannot be."""
        if self._background is None:
            return
        error = self._background.wait()
        # The main process, which is the first, says it best.
        told = self._gathered("" if error is None else one_line(error, 1000))
        if problem := next(filter(None, told), ""):
            raise ValueError(problem) from error

    def _tell(self, folder: Path, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.accelerator.print(f"{folder.name} is whole, {seconds:.2g} s after its step")

    def _save_whole(
        self, folder: Path, values: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        main, partial = self.accelerator.is_main_process, unfinished(folder)
        limit = self.config.checkpoints_total_limit
        with written_whole(folder, limit) if main else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial), safe_serialization=True)
            self.contents.power.save(partial, main)
            self.accelerator.wait_for_everyone()
            if main:
                save_model(self.contents.ema, partial / "ema", metadata=metadata)
                state = state_of(partial, sizes=True, **values)
                (partial / STATE_NAME).write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _shards_written(
        self, folder: Path, values: Mapping[str, Any], scaler: Any, begin: float
    ) -> Iterator[None]:
        """Makes the folder of shards that are written inside whole, in the main process."""
        if not self.accelerator.is_main_process:
            yield
            return
        partial, model = unfinished(folder), self.contents.model
        with written_whole(folder, self.config.checkpoints_total_limit):
            yield
            if scaler is not None:
                torch.save(scaler, partial / _SCALER)
            state = state_of(
                partial,
                sizes=True,
                model=model.config.to_dict() | model.trained_on.to_dict(),
                ema_widths=list(self.config.ema_widths),
                **values,
            )
            (partial / STATE_NAME).write_text(json.dumps(state))
        self._tell(folder, begin)

    def resume(self, name: str) -> dict[str, Any]:
        """Takes what a checkpoint-N folder holds, or the newest whole one for `latest`; returns its
        state, empty when `latest` finds none. Later checkpoints of the run are set aside.

        Raises:
            ValueError: it is no checkpoint, damaged, of another network or objective, or of another
                run than the one in the output folder.
        """
        latest, output_dir = name == "latest", self.config.output_dir
        if latest:
            if self.accelerator.is_main_process:
                recover(output_dir)
            self.accelerator.wait_for_everyone()
            folders = checkpoints(output_dir)[::-1]
        else:
            folders = [Path(name)]
            if not (folders[0] / STATE_NAME).is_file():
                raise ValueError(
                    f"{name} is not a checkpoint folder: give one named checkpoint-N, or latest"
                )
            if folders[0].resolve().parent != output_dir.resolve():
                self.make_room()
        for folder in folders:
            problem, state = "", {}
            try:
                state = read_state(folder)
                check_run(folder, state, self.contents.model.config, self.config.objective)
                self._load(folder, state)
            except Exception as error:
                if not is_damage(error):
                    raise
                problem = one_line(error)
            # What one process cannot read, none takes.
            problem = next(filter(None, self._gathered(problem)), "")
            if not problem:
                break
            said = f"{folder} is damaged ({problem})"
            if not latest:
                raise ValueError(f"{said}: give another, or latest")
            self.accelerator.print(f"{said}: left out")
        else:
            if folders:
                raise ValueError(f"every checkpoint in {output_dir} is damaged")
            return {}
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"goes on from {folder}")
        if self.accelerator.is_main_process:
            step = int(state["finished_steps"])
            later = self.contents.power.snapshots_after(output_dir, step)
            if aside := set_aside(output_dir, step, later):
                self.accelerator.print(
                    f"back at step {step}: what the run had after it is in {aside}"
                )
        return state

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        before = model_of(folder, state)[1]
        if conflict := before.conflict(self.contents.model.trained_on):
            raise ValueError(
                f"{folder} was trained on {conflict}: resume with the data it began with"
            )
        self.contents.power.check(folder, state.get("ema_widths"))
        self.contents.read(folder)
        scaler = self.accelerator.scaler
        if scaler is not None and (folder / _SCALER).is_file():
            scaler.load_state_dict(_load(folder / _SCALER))

    def _gathered(self, text: str) -> list[str]:
        """That of every process."""
        from accelerate.utils import gather_object

        found: list[str] = gather_object([text])
        return found

    def make_room(self) -> None:
        """For a run that does not go on with the one in its folder; ValueError if there is one and
        it is not to be overwritten."""
        folder = self.config.output_dir
        snapshots = self.contents.power.snapshots_after(folder, -1)
        make_room(folder, self.config.overwrite_output_dir, snapshots)
        if not self.config.overwrite_output_dir:
            set_aside(folder, 0, snapshots)  # of a run without a checkpoint
