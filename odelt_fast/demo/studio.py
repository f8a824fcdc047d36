"""Draws for the page of `odelt-fast demo`: one picture at a time, each with what it cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.evaluation.charts import Point
from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.planning.quality import Quality, Value
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler

from .settings import STEPS, TOLERANCES, Setting, offered, solvers, time_label

MeasuredQuality = Mapping[Operation, Value]
GRID_STEPS = (128, 4, 1)  # columns of the paper's Figure 1
# How many are kept: samplers, operations with their latencies, latencies of an operation.
_SAMPLERS, _OPERATIONS, _REPEATS = 16, 1000, 9


class Drawing(NamedTuple):
    """images (N, H, W, C) uint8; seconds of the batch, without the decoder; evaluations of an
    image."""

    images: np.ndarray
    seconds: float
    evaluations: float


class Cost(NamedTuple):
    """What an operation cost here: seconds of its last drawings, evaluations that an image took."""

    seconds: tuple[float, ...]
    evaluations: float


class Studio:
    """Draws pictures of `model` for many visitors, one at a time.

    In a thread of its own, so that a latency does not depend on who asks.

    Args:
        decoder: from latents to images, not part of the measured time.
        num_images: of a picture.
        max_seconds: a drawing that takes longer is given up.
    """

    def __init__(
        self,
        model: DiT,
        *,
        decoder: Callable[[Tensor], Tensor] | None = None,
        num_images: int = 10,
        max_seconds: float = 60.0,
    ) -> None:
        self.model, self.config, self.decoder = model, model.config, decoder
        self.num_images, self.max_seconds = num_images, max_seconds
        self._costs: dict[Operation, Cost] = {}
        self._sampler = lru_cache(_SAMPLERS)(partial(Sampler.of, model))
        self._worker = ThreadPoolExecutor(1, "studio")
        # What only the first call of a shape pays would otherwise be measured.
        for depth in self.config.depths:
            self.draw(Setting(Operation(depth=depth, steps=1)))
        self._costs.clear()

    def draw(self, setting: Setting) -> Drawing:
        """The drawing of a setting, whose latency is remembered.

        Raises:
            ValueError: it takes too long or too much memory, or `Sampler` refuses it.
        """
        return self._worker.submit(self._draw, setting).result()

    def measure(self, operations: Iterable[Operation], seconds: float) -> None:
        """Draws with one operation after another for about `seconds`.

        Their latencies are then known before anybody asks.
        """
        end = time.monotonic() + seconds
        for operation in operations:
            if time.monotonic() > end:
                return
            self.draw(Setting(operation))

    def grid(self, setting: Setting) -> Iterator[tuple[int, int, Drawing]]:
        """Depths l (greatest first) by steps T (`GRID_STEPS`), of the same noise and labels.

        Yields (row, column, drawing), one by one.

        Of Euler's steps where the setting's solver chooses its own. Other visitors' drawings may
        come in between.
        """
        solver = "euler" if setting.operation.adaptive else setting.operation.solver
        for row, depth in enumerate(self.grid_depths):
            for column, steps in enumerate(GRID_STEPS):
                operation = offered(depth, steps, solver, None, setting.operation.guidance_scale)
                yield row, column, self.draw(replace(setting, operation=operation))

    @property
    def grid_depths(self) -> tuple[int, ...]:
        """Up to three depths, the greatest, a middle one and the least."""
        depths = self.config.depths[::-1]
        return depths if len(depths) <= 3 else (depths[0], depths[len(depths) // 2], depths[-1])

    def points(self, quality: MeasuredQuality | None = None) -> dict[Operation, Point]:
        """What was drawn here, with its median latency here.

        The value is its quality, where that was measured.

        Args:
            quality: mean and deviation; None: the value is the number of network evaluations that
                an image takes.
        """
        found = {}
        for operation, cost in list(self._costs.items()):
            if quality is None or operation in quality:
                value, std = (cost.evaluations, None) if quality is None else quality[operation]
                depth, label = operation.depth or 0, time_label(operation)
                latency = statistics.median(cost.seconds)
                found[operation] = Point(latency, value, depth, operation.solver, label, std)
        return found

    def _draw(self, setting: Setting) -> Drawing:
        try:
            return self._timed(setting)
        except (MemoryError, torch.OutOfMemoryError):
            raise ValueError(
                f"there is not enough memory for {self.num_images} images at l ="
                f" {setting.operation.depth}"
            ) from None

    def _timed(self, setting: Setting) -> Drawing:
        operation, count, classes = setting.operation, self.num_images, self.config.num_classes
        labels = np.resize(setting.labels or np.arange(classes), count) if classes > 1 else None
        end = time.monotonic() + self.max_seconds

        def give_up_in_time(_: int) -> None:
            if time.monotonic() > end:
                raise ValueError(
                    f"stopped after {self.max_seconds:g} s: fewer steps, fewer blocks or a larger"
                    " tolerance take less time"
                )

        sampler = self._sampler(operation)
        prepared = sampler.prepare(count)
        sample = partial(prepared, None, labels, setting.seed, progress=give_up_in_time)
        # The second call of a shape captures its graph.
        for _ in range(2 if self.model.device.type == "cuda" and not sampler.stats else 0):
            sample()
        start = time.perf_counter()
        latents = sample()
        if latents.is_cuda:
            torch.cuda.current_stream(latents.device).synchronize()
        seconds = time.perf_counter() - start
        evaluations = sampler.stats["evaluations_per_image"]
        before = self._costs.pop(operation, Cost((), 0))
        self._costs[operation] = Cost((*before.seconds, seconds)[-_REPEATS:], evaluations)
        if len(self._costs) > _OPERATIONS:
            del self._costs[next(iter(self._costs))]
        with torch.inference_mode():
            images = to_uint8(self.decoder(latents) if self.decoder else latents)
        return Drawing(images, seconds, evaluations)


def measured_operations(config: DiTConfig, table: Quality, metric: str) -> dict[Operation, Value]:
    """Quality of what an evaluation measured and the page offers, the cheapest first."""
    found = {
        operation: values[metric]
        for operation, values in table.rows.items()
        if operation.depth is not None
        and operation.solver in solvers(config)
        and (operation.steps in STEPS or operation.tolerance in TOLERANCES)
    }
    return dict(
        sorted(found.items(), key=lambda item: (item[0].depth or 0) * (item[0].steps or 16))
    )
