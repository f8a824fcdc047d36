"""Model and data -> tables: images over depths, steps and seeds, their features, what they cost.

Noise and labels belong to (seed, image index), and batches to image indices, so that the number of
processes changes nothing but the order in which batches are made. Running again in the same folder
(`folder.Folder`) goes on where the last run ended, however it ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.generation.processes import Processes
from odelt_fast.generation.shards import Shards
from odelt_fast.generation.streams import ahead
from odelt_fast.model import DiT
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler

from .cells import Cell, plan_cells
from .comparison import Reference, compare
from .folder import Folder
from .inputs import Inputs
from .machine import environment
from .measuring import PeakMemory, timed
from .metrics import check_features
from .results import FORMAT, summarise
from .settings import Evaluation


class Evaluator:
    """Runs an evaluation in a folder. Every process of a run makes one with the same arguments.

    Args:
        settings: what is measured.
        out: the folder.
        device: of this process ("auto": a GPU if there is one).
        dtype: the model's (None: float32).
        show: progress on stderr, of the first process.

    Raises:
        ValueError: for settings that do not go together, for a folder that holds another
            evaluation, and for data, statistics or networks that do not fit, before anything is
            generated.
    """

    def __init__(
        self,
        settings: Evaluation,
        out: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        show: bool = True,
    ) -> None:
        self.processes = Processes.of_this_run(device)
        self.device, self.dtype, self.show = self.processes.device, dtype or torch.float32, show
        shallow = min(settings.depths, default=None)
        model = load_model(settings.model, depth=shallow)
        self.settings, self.config = settings, model.config
        self.cells = plan_cells(settings, self.config)
        self.inputs = Inputs.of(settings, self.config, self.device, model.trained_on)
        self.network = self.inputs.real.network
        self.folder = Folder(Path(out), self.processes, settings.batch_size)
        self.folder.bind(self.inputs.bound(self.dtype))

    def run(self) -> dict[str, Any]:
        """Generates what is missing.

        Returns:
            The results, also written to results.json and results.md (nothing in processes after
            the first).
        """
        with self.folder.alone(self.cells):
            return self._run()

    def _run(self) -> dict[str, Any]:
        reference = self.inputs.real.reference(self.folder, self.show)
        self.memory = PeakMemory(self.device)
        waiting = [cell for cell in self.cells if not self.folder.record(cell).exists()]
        self.processes.barrier()
        model: DiT | None = None
        sampler: Sampler | None = None
        with self._progress(waiting) as advance:
            for cell in waiting:
                if model is None or model.max_depth != cell.depth:
                    model = sampler = None  # frees the last one first
                    self.memory.release()
                    model = load_model(self.settings.model, self.device, self.dtype, cell.depth)
                sampler = cell.sampler(model, self.settings)
                files = self._files(cell)
                self._generate(cell, sampler, files, advance)
                self.processes.barrier()
                if self.processes.index == 0:
                    self.folder.write_record(cell, self._measure(cell, sampler, files, reference))
                    files.delete()
                    self._write_results()
                self.processes.barrier()
        return self._write_results() if self.processes.index == 0 else {}

    def _missing(self, files: Shards) -> list[int]:
        return files.missing(self.processes.index, self.processes.count)

    def _files(self, cell: Cell) -> Shards:
        return self.folder.batches(cell.key, self.settings.num_images)

    def _generate(
        self, cell: Cell, sampler: Sampler, files: Shards, advance: Callable[[float], object]
    ) -> None:
        """Makes this process's missing batches; noise is drawn ahead, while the device is busy."""
        todo = self._missing(files)
        cost = cell.cost(self.config)  # of a batch, whose images are equally many
        advance(cost * (files.count - len(todo) * self.processes.count))

        def draw(batch: int) -> Tensor:
            return self.inputs.noise(cell.seed, files.images(batch))

        for batch, noise in ahead(todo, draw):
            arrays = self._batch(sampler, noise.to(self.device), cell.seed, files.images(batch))
            files.write(batch, warm=np.array(batch != todo[0]), **arrays)
            advance(cost * self.processes.count)

    def _batch(
        self, sampler: Sampler, noise: Tensor, seed: int, images: range
    ) -> dict[str, np.ndarray]:
        """What is kept of a batch: features, labels, cost; where wanted, logits and images."""
        labels, decoder = self.inputs.labels(seed, images), self.inputs.decoder
        samples, seconds, peak = self._timed(sampler, noise, labels, seed, images.start)
        pictures = samples if decoder is None else decoder(samples)
        features, logits = self.network(pictures, self.settings.protocol)
        arrays = {
            "features": check_features(features.cpu().numpy()),
            "labels": labels,
            "seconds": np.array(seconds),
            "evaluations": np.array(sampler.stats["evaluations"]),
            "peak": np.array(peak),
        }
        if logits is not None and {"inception_score", "recognised"} & set(self.settings.metrics):
            arrays["logits"] = logits.cpu().numpy()
        if self.settings.npz:
            arrays["images"] = to_uint8(pictures)
        return arrays

    def _timed(
        self, sampler: Sampler, noise: Tensor, labels: np.ndarray, seed: int, first: int
    ) -> tuple[Tensor, float, int]:
        """Samples of a batch, seconds on an idle device, peak bytes (-1: unknown)."""
        self.memory.start()
        make = partial(sampler, noise=noise, labels=labels, seed=seed, first_image=first)
        return *timed(make, self.device), self.memory.peak()

    def _measure(
        self, cell: Cell, sampler: Sampler, files: Shards, reference: Reference | None
    ) -> dict[str, Any]:
        """The record of a cell whose batches are all there."""
        settings = self.settings
        if settings.npz:
            samples = self.folder.path / "samples" / f"{cell.key}.npz"
            files.write_npz(samples, "images", "labels")
        seconds, warm, peaks, evaluations = (
            [part.item() for part in files.parts(name)]
            for name in ("seconds", "warm", "peak", "evaluations")
        )
        full = [
            taken
            for batch, taken in enumerate(seconds)
            if warm[batch] and len(files.images(batch)) == settings.batch_size
        ]
        if not full:  # too few for a warm one: once more, of images that nothing is measured of
            images = range(settings.num_images, settings.num_images + settings.batch_size)
            noise = self.inputs.noise(cell.seed, images).to(self.device)
            again = noise, self.inputs.labels(cell.seed, images), cell.seed, images.start
            full = [self._timed(sampler, *again)[1] for _ in range(2)][1:]
        compared = settings.metrics, self.network, reference
        return {
            **cell.record(),
            "live_blocks": cell.live_blocks(self.config),
            "evaluations": sum(evaluations) / settings.num_images,
            "metrics": compare(files, *compared, allow_few=settings.allow_few_samples),
            "latency": float(np.median(full)),
            "peak_memory": max(peaks) if max(peaks) >= 0 else None,
        }

    @contextlib.contextmanager
    def _progress(self, waiting: Sequence[Cell]) -> Iterator[Callable[[float], object]]:
        """A bar on stderr with the time left, in blocks of the network: cells differ in cost."""
        total = sum(cell.cost(self.config) * self._files(cell).count for cell in waiting)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
        hidden = None if self.show and self.processes.index == 0 else True
        with tqdm(total=total, bar_format=form, leave=False, disable=hidden) as bar:
            yield lambda cost: bar.update(min(cost, total - bar.n))

    def _write_results(self) -> dict[str, Any]:
        done = self.folder.records(self.cells)
        results = {
            "format": FORMAT,
            "complete": len(done) == len(self.cells),
            "settings": self.settings.to_dict(),
            "model": self.config.to_dict(),
            "model_sha256": self.inputs.model_sha256,
            "features": self.network.record(),
            "environment": environment(self.device, self.dtype, self.processes.count),
            "rows": summarise(done),
        }
        self.folder.write_results(results)
        return results
