"""Draws for the page of `odelt-fast demo`: one picture at a time, each with what it cost on this
machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from odelt_fast.config import DiTConfig
from odelt_fast.demo.settings import STEPS, TOLERANCES, Setting, solvers
from odelt_fast.evaluation.charts import Point
from odelt_fast.model import DiT
from odelt_fast.planning.quality import Quality, Value
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler

Known = Mapping[tuple[Any, ...], Value]  # quality by `Setting.cost_key`
GRID_STEPS = (128, 4, 1)  # columns of the paper's Figure 1
_SAMPLERS, _SETTINGS, _REPEATS = (
    16,
    1000,
    9,
)  # how many are kept: samplers, settings with their latencies, latencies of a setting


class Drawing(NamedTuple):
    """images (N, H, W, C) uint8; seconds of the batch, without the decoder; evaluations of an
    image; blocks that ran in each."""

    images: np.ndarray
    seconds: float
    evaluations: float
    live_blocks: int


class Cost(NamedTuple):
    """What a setting cost here: seconds of its last drawings, evaluations that an image took."""

    seconds: tuple[float, ...]
    evaluations: float


class Studio:
    """Draws `num_images` images of `model` at any setting, for many visitors, one drawing at a
    time, in at most `max_seconds` each.

    decoder: from latents to images, not part of the measured time. All work is done in one thread
    of its own, so that a latency does not depend on who asks. ValueError for a drawing that takes
    too long or too much memory, and for what `Sampler` refuses.
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
        self._costs: dict[tuple[Any, ...], Cost] = {}
        self._samplers: dict[tuple[Any, ...], Sampler] = {}
        self._worker = ThreadPoolExecutor(1, "studio")
        for depth in (
            self.config.depths
        ):  # what only the first call of a shape pays would otherwise be measured
            self.draw(Setting(depth, 1, "euler", 1e-2, None, 0, ()))
        self._costs.clear()

    def draw(self, setting: Setting) -> Drawing:
        """The drawing of a setting, whose latency is remembered."""
        return self._worker.submit(self._draw, setting).result()

    def measure(self, settings: Iterable[Setting], seconds: float) -> None:
        """Draws settings one after another for about `seconds`, so that their latencies are known
        before anybody asks."""
        end = time.monotonic() + seconds
        for setting in settings:
            if time.monotonic() > end:
                return
            self.draw(setting)

    def grid(self, setting: Setting) -> Iterator[tuple[int, int, Drawing]]:
        """Depths l (greatest first) by steps T (`GRID_STEPS`), same noise and labels: (row, column,
        drawing), one by one.

        Of Euler's steps where the setting's solver chooses its own. Other visitors' drawings may
        come in between.
        """
        solver = "euler" if setting.adaptive else setting.solver
        for row, depth in enumerate(self.grid_depths):
            for column, steps in enumerate(GRID_STEPS):
                yield (
                    row,
                    column,
                    self.draw(replace(setting, depth=depth, steps=steps, solver=solver)),
                )

    @property
    def grid_depths(self) -> tuple[int, ...]:
        """Up to three depths, the greatest, a middle one and the least."""
        depths = self.config.depths[::-1]
        return depths if len(depths) <= 3 else (depths[0], depths[len(depths) // 2], depths[-1])

    def point(self, setting: Setting, quality: Known | None = None) -> Point | None:
        """A setting with its median latency here; None if it was not drawn, or has no quality. See
        `points`."""
        return next(
            (point for key, point in self._points(quality) if key == setting.cost_key), None
        )

    def points(self, quality: Known | None = None) -> list[Point]:
        """What was drawn here, with its median latency here: the value is its quality, where that
        was measured.

        quality: mean and deviation by `Setting.cost_key`; None: the value is the number of network
        evaluations that an image takes.
        """
        return [point for _, point in self._points(quality)]

    def _points(self, quality: Known | None) -> Iterator[tuple[tuple[Any, ...], Point]]:
        for key, cost in list(self._costs.items()):
            if quality is None or key in quality:
                value, deviation = (cost.evaluations, None) if quality is None else quality[key]
                solver, depth, at, _ = key
                yield (
                    key,
                    Point(statistics.median(cost.seconds), value, depth, solver, at, deviation),
                )

    def _draw(self, setting: Setting) -> Drawing:
        try:
            return self._timed(setting)
        except (MemoryError, torch.OutOfMemoryError):
            raise ValueError(
                f"there is not enough memory for {self.num_images} images at l = {setting.depth}"
            ) from None

    def _timed(self, setting: Setting) -> Drawing:
        labels = (
            np.resize(setting.labels or np.arange(self.config.num_classes), self.num_images)
            if self.config.num_classes > 1
            else None
        )
        end = time.monotonic() + self.max_seconds

        def watch(_: int) -> None:
            if time.monotonic() > end:
                raise ValueError(
                    f"stopped after {self.max_seconds:g} s: fewer steps, fewer blocks or a larger"
                    " tolerance take less time"
                )

        sampler = self._sampler(
            setting, lambda made: made(self.num_images, labels, setting.seed, progress=watch)
        )
        start = time.perf_counter()
        latents = sampler(self.num_images, labels, setting.seed, progress=watch)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        seconds = time.perf_counter() - start
        evaluations = sampler.stats["evaluations_per_image"]
        before = self._costs.pop(setting.cost_key, Cost((), 0))
        _limit(
            self._costs,
            setting.cost_key,
            Cost((*before.seconds, seconds)[-_REPEATS:], evaluations),
            _SETTINGS,
        )
        with torch.inference_mode():
            images = self.decoder(latents) if self.decoder else latents
        return Drawing(
            to_uint8(images), seconds, evaluations, self.config.live_blocks(setting.depth)
        )

    def _sampler(self, setting: Setting, warm: Callable[[Sampler], object]) -> Sampler:
        made = self._samplers.pop(setting.cost_key, None)
        if made is None:
            made = Sampler(
                self.model,
                setting.depth,
                setting.steps,
                setting.solver,
                rtol=setting.tolerance,
                atol=setting.tolerance,
                guidance_scale=setting.guidance_scale,
            )
            for _ in range(
                2 if self.model.device.type == "cuda" else 0
            ):  # the second call of a shape captures its graph
                warm(made)
        _limit(self._samplers, setting.cost_key, made, _SAMPLERS)
        return made


def measured_settings(config: DiTConfig, table: Quality, metric: str) -> dict[Setting, Value]:
    """Of what an evaluation measured, the settings that the page offers, the cheapest first, with
    their quality."""
    found = {}
    for (operation, scale), values in table.rows.items():
        offered = (
            operation.steps in STEPS or operation.tolerance in TOLERANCES
        ) and operation.solver in solvers(config)
        if offered and not operation.schedule:
            tolerance = operation.tolerance or TOLERANCES[0]
            found[
                Setting(
                    operation.depth, operation.steps or 1, operation.solver, tolerance, scale, 0, ()
                )
            ] = values[metric]
    return dict(
        sorted(
            found.items(),
            key=lambda item: item[0].depth * (16 if item[0].adaptive else item[0].steps),
        )
    )


def _limit(kept: dict[Any, Any], key: Any, value: Any, count: int) -> None:
    """Puts a value last, and drops the first ones above `count`."""
    kept[key] = value
    while len(kept) > count:
        del kept[next(iter(kept))]
