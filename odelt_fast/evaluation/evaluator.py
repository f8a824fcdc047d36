"""Model and data -> tables: generation over depths, steps and seeds, features, and what each cell
of the tables cost.

Noise and labels belong to (seed, image index), and batches to image indices, so that the number of
processes changes nothing but the order in which batches are made. `OUT/settings.json` ties a folder
to what it measures; `OUT/cells/*.json` are finished cells, `OUT/partial` the batches of unfinished
ones (`batch_files`): running again goes on where the last run ended, however it ended.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from odelt_fast.checkpoints.folder import load_model
from odelt_fast.evaluation.batch_files import BatchFiles
from odelt_fast.evaluation.cells import Cell, plan_cells
from odelt_fast.evaluation.comparison import (
    Reference,
    check_statistics,
    compare,
    features_of,
    merge_reference,
    stored_reference,
)
from odelt_fast.evaluation.features import FeatureNetwork, bundled_for, load_features
from odelt_fast.evaluation.measuring import (
    PeakMemory,
    Processes,
    environment,
    file_hash,
    model_hash,
)
from odelt_fast.evaluation.metrics import Statistics, check_features, read_statistics
from odelt_fast.evaluation.results import FORMAT, summarise, to_markdown
from odelt_fast.evaluation.settings import Evaluation
from odelt_fast.files import write_whole
from odelt_fast.images import ImageSource, open_source
from odelt_fast.model import DiT
from odelt_fast.planning.profile import parse_schedule
from odelt_fast.sampling.noise import drawn_labels, image_noise
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler

_EXTENDABLE = (
    "depths",
    "depth_schedules",
    "steps",
    "solvers",
    "tolerances",
    "seeds",
    "first_seed",
    "inception_weights",
    "trust_features",
)


class Evaluator:
    """Runs an evaluation in the folder `out`. Every process of a run makes one with the same
    arguments.

    device: of this process ("auto": a GPU if there is one). dtype: the model's (None: float32).
    show: progress on stderr, of the first process. Raises ValueError for settings that do not go
    together, for a folder that holds another evaluation, and for data, statistics or networks that
    do not fit, before anything is generated.
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
        self.settings, self.out = settings, Path(out)
        self.config = load_model(
            settings.model, "cpu", depth=min(settings.depths, default=None)
        ).config
        self.model_sha256 = model_hash(settings.model)
        for schedule in map(parse_schedule, settings.depth_schedules):
            for _, depth in schedule:
                self.config.check_depth(depth)
        self.cells = plan_cells(
            settings,
            [self.config.check_depth(depth) for depth in settings.depths or self.config.depths],
        )
        self.decoder = self._decoder()
        self.channels, self.image_size = self._image_shape()
        self.network = self._network()
        self.network.check_images(self.channels, self.image_size)
        self.source = self._source()
        self.statistics = self._statistics()
        self._check_counts()
        self.out.mkdir(parents=True, exist_ok=True)
        self._bind()

    def run(self) -> dict[str, Any]:
        """Generates what is missing; results, also written to results.json and results.md
        (processes after the first return nothing)."""
        with self._alone():
            return self._run()

    def _run(self) -> dict[str, Any]:
        reference, self.memory = self._reference(), PeakMemory(self.device)
        waiting = [cell for cell in self.cells if not self._cell_path(cell).exists()]
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
                    record = self._measure(cell, sampler, files, reference)
                    self._cell_path(cell).parent.mkdir(exist_ok=True)
                    _write_json(self._cell_path(cell), record)
                    files.delete()
                    self._write_results()
                self.processes.barrier()
        return self._write_results() if self.processes.index == 0 else {}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses a second run in the same folder, and clears away what killed ones were
        writing."""
        import fcntl

        with (self.out / ".lock").open("w") as lock:
            if self.processes.index == 0:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(
                        f"another evaluation is running in {self.out}: name another --out"
                    ) from None
                for path in self.out.rglob(".odelt-fast-*"):
                    path.unlink(missing_ok=True)
                for cell in self.cells:
                    if self._cell_path(cell).exists():
                        self._files(cell).delete()
            self.processes.barrier()
            yield

    # What is compared, and with what

    def _decoder(self) -> Any:
        if self.settings.decoder is None:
            if self.config.channels not in (1, 3):
                raise ValueError(
                    f"the model makes latents of {self.config.channels} channels: give --decoder,"
                    " such as stabilityai/sd-vae-ft-mse"
                )
            return None
        from odelt_fast.sampling.decoder import load_decoder

        return load_decoder(self.settings.decoder, self.device)

    def _image_shape(self) -> tuple[int, int]:
        """Channels and side of the images that are compared; a decoder is asked with one latent of
        zeros."""
        if self.decoder is None:
            return self.config.channels, self.config.image_size
        side = self.config.image_size
        images = self.decoder(torch.zeros(1, self.config.channels, side, side, device=self.device))
        return images.shape[1], images.shape[-1]

    def _network(self) -> FeatureNetwork:
        settings, name = self.settings, self.settings.features
        if name == "auto":
            fitting = bundled_for(self.channels, self.image_size)
            name = fitting if fitting and not settings.inception_weights else "inception"
        return load_features(
            name,
            self.device,
            inception_weights=settings.inception_weights,
            trust=settings.trust_features,
        )

    def _source(self) -> ImageSource | None:
        if self.settings.data is None:
            return None
        source = open_source(
            self.settings.data,
            image_size=self.image_size,
            channels=self.channels,
            split=self.settings.split,
        )
        if self.settings.labels == "data" and source.num_classes > self.config.num_classes > 1:
            raise ValueError(
                f"--labels data: {self.settings.data} has {source.num_classes} classes, the model"
                f" {self.config.num_classes}"
            )
        return source

    def _statistics(self) -> Statistics | None:
        if self.settings.stats is None:
            return None
        statistics = read_statistics(self.settings.stats)
        check_statistics(statistics, self.settings.stats, self.network, self.settings.protocol)
        return statistics

    def _check_counts(self) -> None:
        settings, dimensions = self.settings, self.network.dimensions
        counts = [settings.num_images] + ([] if self.source is None else [len(self.source)])
        if (
            "frechet" in settings.metrics
            and min(counts) <= dimensions
            and not settings.allow_few_samples
        ):
            raise ValueError(
                f"{min(counts)} images are too few for the {dimensions} features of"
                f" {self.network.name}: take more than {dimensions}, or, if you know what the"
                " number then means, --allow-few-samples"
            )
        if min(counts) < 10 and set(settings.metrics) - {"frechet", "recognised"}:
            raise ValueError(
                f"{', '.join(settings.metrics)} of {min(counts)} images mean nothing: take at"
                " least 10"
            )

    def _bind(self) -> None:
        """Writes settings.json, or compares with what is there: a folder holds one evaluation,
        which may get more cells."""
        bound: dict[str, Any] = {
            name: value for name, value in asdict(self.settings).items() if name not in _EXTENDABLE
        }
        bound |= {
            "model_sha256": self.model_sha256,
            "features_sha256": self.network.fingerprint,
            "dtype": str(self.dtype),
        }
        bound |= {"features": self.network.name, "device": torch.device(self.device).type}
        if self.settings.stats is not None:
            bound["stats_sha256"] = file_hash(Path(self.settings.stats))
        if self.source is not None:
            bound["data_images"] = len(self.source)
        bound = json.loads(json.dumps(bound))
        path = self.out / "settings.json"
        if self.processes.index == 0 and not path.exists():
            _write_json(path, bound)
        self.processes.barrier()
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            raise ValueError(f"{path} is damaged: name another --out") from None
        for name in bound:
            if found.get(name) != bound[name]:
                raise ValueError(
                    f"{self.out} holds an evaluation with {name} {found.get(name)!r}, not"
                    f" {bound[name]!r}: name another --out"
                )

    def _reference(self) -> Reference | None:
        """None if no metric compares with real images. Their batches are shared among the
        processes, and resumed, as those of a cell."""
        settings = self.settings
        if not {"frechet", "kid", "precision_recall"} & set(settings.metrics):
            return None
        if self.statistics is not None:
            return Reference(self.statistics, None)
        assert self.source is not None
        if not (self.out / "reference.npz").exists():
            files = BatchFiles(
                self.out / "partial" / "reference", len(self.source), settings.batch_size
            )
            todo = files.missing(self.processes.index, self.processes.count)
            for batch in tqdm(
                todo, desc="real images", leave=False, disable=None if self.show else True
            ):
                features = features_of(
                    self.source, files.images(batch), self.network, settings.protocol, self.device
                )
                files.write(batch, features=features)
            self.processes.barrier()
            if self.processes.index == 0:
                merge_reference(
                    files, self.out, self.network, settings.protocol, settings.allow_few_samples
                )
        self.processes.barrier()
        return stored_reference(self.out)

    # One cell

    def _files(self, cell: Cell) -> BatchFiles:
        return BatchFiles(
            self.out / "partial" / cell.key, self.settings.num_images, self.settings.batch_size
        )

    def _cell_path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.key}.json"

    def _labels(self, seed: int, images: range) -> np.ndarray:
        classes = self.config.num_classes
        if self.settings.labels == "drawn" or classes == 1:
            return drawn_labels(seed, images, classes)
        if self.settings.labels == "balanced":
            return np.arange(images.start, images.stop) % classes
        assert self.source is not None
        return self.source.labels[np.arange(images.start, images.stop) % len(self.source)]

    def _noise(self, seed: int, images: range) -> Tensor:
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        return torch.from_numpy(np.stack([image_noise(seed, index, shape) for index in images]))

    def _generate(
        self, cell: Cell, sampler: Sampler, files: BatchFiles, advance: Callable[[float], None]
    ) -> None:
        """Makes the batches of this process that are missing. Noise is drawn ahead, while the
        device is busy."""
        todo = files.missing(self.processes.index, self.processes.count)
        if self.processes.index == 0:
            advance(
                cell.cost(cell.live_blocks(self.config))
                * (files.count - len(todo) * self.processes.count)
            )
        warm = False
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._noise, cell.seed, files.images(todo[0])) if todo else None
            for batch, following in zip(todo, [*todo[1:], None]):
                assert coming is not None
                noise = coming.result().to(self.device)
                coming = (
                    None
                    if following is None
                    else pool.submit(self._noise, cell.seed, files.images(following))
                )
                images = files.images(batch)
                labels = self._labels(cell.seed, images)
                samples, seconds, peak = self._timed(
                    sampler, noise, labels, cell.seed, images.start
                )
                pictures = samples if self.decoder is None else self.decoder(samples)
                features, logits = self.network(pictures, self.settings.protocol)
                arrays = {
                    "features": check_features(features.cpu().numpy()),
                    "labels": labels,
                    "warm": np.array(warm),
                }
                arrays |= {
                    "seconds": np.array(seconds),
                    "evaluations": np.array(sampler.stats["evaluations"]),
                    "peak": np.array(peak),
                }
                if logits is not None and {"inception_score", "recognised"} & set(
                    self.settings.metrics
                ):
                    arrays["logits"] = logits.cpu().numpy()
                if self.settings.npz:
                    arrays["images"] = to_uint8(pictures)
                files.write(batch, **arrays)
                warm = True
                if self.processes.index == 0:
                    advance(cell.cost(cell.live_blocks(self.config)) * self.processes.count)

    def _timed(
        self, sampler: Sampler, noise: Tensor, labels: np.ndarray, seed: int, first: int
    ) -> tuple[Tensor, float, int]:
        """Samples of one batch, the seconds that they took on an idle device, and the peak memory
        in bytes (-1: unknown)."""
        self.memory.start()
        start = time.perf_counter()
        samples = sampler(noise=noise, labels=labels, seed=seed, first_image=first)
        if samples.is_cuda:
            torch.cuda.synchronize(samples.device)
        return samples, time.perf_counter() - start, self.memory.peak()

    def _measure(
        self, cell: Cell, sampler: Sampler, files: BatchFiles, reference: Reference | None
    ) -> dict[str, Any]:
        """The record of a cell whose batches are all there."""
        settings = self.settings
        if settings.npz:
            files.write_npz(self.out / "samples" / f"{cell.key}.npz", "images", "labels")
        seconds, warm, peaks = (
            [part.item() for part in files.parts(name)] for name in ("seconds", "warm", "peak")
        )
        full = [
            s
            for batch, s in enumerate(seconds)
            if warm[batch] and len(files.images(batch)) == settings.batch_size
        ]
        if (
            not full
        ):  # too few batches for a warm one: once more, of images that nothing is measured of
            images = range(settings.num_images, settings.num_images + settings.batch_size)
            noise, labels = (
                self._noise(cell.seed, images).to(self.device),
                self._labels(cell.seed, images),
            )
            full = [
                self._timed(sampler, noise, labels, cell.seed, images.start)[1] for _ in range(2)
            ][1:]
        return {
            **{
                name: getattr(cell, name)
                for name in ("depth", "solver", "steps", "tolerance", "seed", "guidance_scale")
            },
            **({"schedule": cell.schedule} if cell.schedule else {}),
            "live_blocks": cell.live_blocks(self.config),
            "evaluations": (
                sum(part.item() for part in files.parts("evaluations")) / settings.num_images
            ),
            "metrics": compare(
                files,
                settings.metrics,
                self.network,
                reference,
                allow_few=settings.allow_few_samples,
            ),
            "latency": float(np.median(full)),
            "peak_memory": max(peaks) if max(peaks) >= 0 else None,
        }

    @contextlib.contextmanager
    def _progress(self, waiting: Sequence[Cell]) -> Iterator[Callable[[float], None]]:
        """A bar on stderr with the time left, in blocks of the network: cells cost very different
        times."""
        total = sum(
            cell.cost(cell.live_blocks(self.config)) * self._files(cell).count for cell in waiting
        )
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
        hidden = None if self.show and self.processes.index == 0 else True
        with tqdm(total=total, bar_format=form, leave=False, disable=hidden) as bar:

            def advance(cost: float) -> None:
                bar.update(min(cost, total - bar.n))

            yield advance

    def _write_results(self) -> dict[str, Any]:
        done = [
            json.loads(path.read_text())
            for path in map(self._cell_path, self.cells)
            if path.exists()
        ]
        known = {
            "name": self.network.name,
            "dimensions": self.network.dimensions,
            "sha256": self.network.fingerprint,
        }
        results = {
            "format": FORMAT,
            "complete": len(done) == len(self.cells),
            "settings": asdict(self.settings),
            "model": self.config.to_dict(),
            "model_sha256": self.model_sha256,
            "features": known,
            "environment": environment(self.device, self.dtype, self.processes.count),
            "rows": summarise(done),
        }
        _write_json(self.out / "results.json", results)
        write_whole(self.out / "results.md", lambda file: file.write(to_markdown(results).encode()))
        return results


def _write_json(path: Path, values: Any) -> None:
    write_whole(path, lambda file: file.write(json.dumps(values, indent=1).encode() + b"\n"))


def sample_depths_by_steps(
    model: DiT,
    depths: Sequence[int],
    steps: Sequence[int],
    num_images: int,
    *,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
) -> list[list[np.ndarray]]:
    """Images (N, H, W, C) uint8 for every depth l (rows) and number of steps T (columns), from the
    same noise and labels.

    labels None counts through the classes. Raises ValueError for what `Sampler` refuses.
    """
    if labels is None and model.config.num_classes > 1:
        labels = [index % model.config.num_classes for index in range(num_images)]
    samplers = [
        [Sampler(model, depth, count, guidance_scale=guidance_scale) for count in steps]
        for depth in depths
    ]  # refuses first
    return [[to_uint8(sampler(num_images, labels, seed)) for sampler in row] for row in samplers]
