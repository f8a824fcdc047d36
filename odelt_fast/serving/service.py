"""What a client may ask for, and what becomes of it.

A checked request is a job, a batch of jobs is images, images are an answer.

Nothing here knows HTTP (server.py) or threads (batching.py).
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import io
import itertools
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch

from odelt_fast import __version__
from odelt_fast.model import DiT
from odelt_fast.operation import Operation, effective_guidance
from odelt_fast.sampling.decoder import Decoder
from odelt_fast.sampling.labels import label_from_text
from odelt_fast.sampling.noise import check_labels, drawn_labels, stack_noise
from odelt_fast.sampling.pictures import to_uint8
from odelt_fast.sampling.sampler import Sampler
from odelt_fast.solvers.tableau import TABLEAUS, find_tableau

from .batching import MISSING, Batcher, Job, Key, Part, Rejected

try:
    from pydantic import BaseModel, ConfigDict, Field
except ImportError:
    raise ImportError(MISSING) from None

MAX_GUIDANCE = 100  # far more makes no pictures
SAMPLERS = 64  # that are kept: clients choose depth, steps, solver and guidance scale


@dataclass(frozen=True)
class RequestLimits:
    """Of a request: images, steps, evaluations of the network in all (images x steps x stages,
    twice if guided), seconds until it is given up if its client sets no earlier deadline. Of the
    service: images in a batch (None: 32 on a CPU, 128 on a GPU), images that wait, images of one
    client (address) that wait."""

    max_images: int = 64
    max_steps: int = 128
    max_evaluations: int = 8192
    timeout: float = 60.0
    max_batch: int | None = None
    max_queue: int = 1024
    max_client: int = 1024

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")


# (images, guidance scale, seconds) -> the best that takes no longer; ValueError, saying what the
# nearest is, if nothing does.
Plan = Callable[[int, float | None, float], Operation]
_MARGIN = 1.15  # what is planned for takes up to 15 % longer than its profile says


Seed = Annotated[int, Field(ge=0, lt=2**64)] | Annotated[str, Field(pattern="^[0-9]{1,20}$")]


class GenerateRequest(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    num_images: Annotated[int, Field(ge=1)] | None = Field(
        None, description="1, or as many as there are labels"
    )
    labels: int | str | list[int | str] | None = Field(
        None,
        description=(
            "one label for all images or one each, by number or name; null: drawn from the seed"
        ),
    )
    seed: Seed | None = Field(
        None,
        description=(
            "from 0 to 2^64 - 1, as a number or, where numbers above 2^53 are not exact, as a"
            " string; null: drawn"
        ),
    )
    depth: int | None = Field(
        None, description="active blocks l; null: all, or what the deadline allows"
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="time steps T; null: 4, or what the deadline allows"
    )
    solver: Annotated[str, Field(max_length=40)] | None = Field(
        None, description="with fixed steps; null: euler"
    )
    guidance_scale: float | None = Field(
        None, description="w in v_null + w (v_label - v_null); null: labels only"
    )
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="guidance at times from t_lo to t_hi only (0: noise); null: at all"
    )
    deadline_ms: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="from the arrival of the request"
    )
    format: Literal["png", "json", "npz"] | None = Field(
        None,
        description=(
            "png: one image; json: PNGs in base64; npz: arr_0 (N, H, W, C) uint8, arr_1 labels."
            " null: png or json"
        ),
    )


class Service:
    """Draws what requests ask for, with one model.

    plan: turns deadlines into (l, T), as `evidence.deadline_planner` makes it; or the reason why
    there is none.
    """

    def __init__(
        self,
        model: DiT,
        limits: RequestLimits | None = None,
        *,
        name: str = "model",
        decoder: Decoder | None = None,
        plan: Plan | str = "this server has no planner",
    ) -> None:
        self.model, self.name, self.decoder, self.plan = model, name, decoder, plan
        self.limits, config = limits or RequestLimits(), model.config
        self.decoding = 0.0  # seconds an image, which profiles leave out
        self.channels = decoder.channels if decoder else config.channels
        self.shape = config.image_shape
        self.formats = ("png", "json", "npz") if self.channels in (1, 3) else ("npz",)
        # Every batch size is a graph of its own there: powers of two only.
        self.pads = model.device.type != "cpu"
        sampler_of = functools.partial(Sampler.of, model, decoder=decoder)
        self.sampler = functools.lru_cache(SAMPLERS)(sampler_of)
        self._alone = itertools.count(1)
        self.batcher = Batcher(
            self.draw,
            max_batch=self.limits.max_batch or (128 if self.pads else 32),
            max_queue=self.limits.max_queue,
            max_client=self.limits.max_client,
        )

    def warm_up(self) -> None:
        """One image at full depth: what fails, fails before anybody asks."""
        self.sampler(Operation().for_model(self.model))(1)
        if self.decoder:
            latents = torch.zeros(1, *self.shape, device=self.model.device)
            start = time.perf_counter()
            with torch.inference_mode():
                self.decoder(latents).cpu()
            self.decoding = time.perf_counter() - start

    def draw(self, key: Key, parts: Sequence[Part]) -> np.ndarray:
        """The images of a batch (N, H, W, C), uint8, or float32 where they make no picture; called
        in the batcher's thread. MemoryError where there is no memory for it."""
        try:
            return self._draw(key, parts)
        except torch.OutOfMemoryError:
            raise MemoryError from None

    def _draw(self, key: Key, parts: Sequence[Part]) -> np.ndarray:
        sampler, classes = self.sampler(key.operation), self.model.config.num_classes
        for job, _ in parts:
            if job.labels is None:
                job.labels = drawn_labels(job.seed, range(job.num_images), classes)
        labels = np.concatenate([job.labels[part.start : part.stop] for job, part in parts])  # type: ignore[index]
        count = len(labels)
        if key.alone:
            [(job, indices)] = parts
            images = sampler(count, labels, job.seed, first_image=indices.start)
        else:
            noise = torch.cat([stack_noise(job.seed, part, self.shape) for job, part in parts])
            if self.pads:
                rows = np.arange(1 << (count - 1).bit_length()).clip(max=count - 1)
                noise, labels = noise[rows], labels[rows]
            images = sampler.prepare(len(noise))(noise, labels)[:count]
        if "png" in self.formats:
            return to_uint8(images)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def job(
        self,
        wanted: GenerateRequest,
        client: str,
        future: asyncio.Future[bytes],
        waited: float = 0.0,
    ) -> tuple[Job, str]:
        """A request's job and the format of its answer. waited: seconds since it came.

        Raises:
            ValueError: the model or the limits forbid it.
            Rejected: others have used up its deadline.
        """
        limits, labels = self.limits, wanted.labels
        now = time.monotonic() - waited
        count = wanted.num_images or (len(labels) if isinstance(labels, list) else 1)
        if not 1 <= count <= limits.max_images:
            raise ValueError(f"num_images must be from 1 to {limits.max_images}, not {count}")
        classes = self.model.config.num_classes
        try:
            chosen = check_labels(self._numbers(labels), count, classes)
        except OverflowError:
            raise ValueError(f"labels must be whole numbers from 0 to {classes}") from None
        seed = secrets.randbits(64) if wanted.seed is None else int(wanted.seed)
        if seed >= 2**64:
            raise ValueError("seed must be from 0 to 2^64 - 1")
        form = self._format(wanted.format, count)
        deadline = now + min(limits.timeout, (wanted.deadline_ms or 1e9) / 1e3)
        key = self._key(wanted, count, deadline - time.monotonic())
        encode = functools.partial(self.encode, form=form)
        return Job(key, seed, count, chosen, deadline, client, future, encode), form

    def _numbers(self, labels: int | str | list[int | str] | None) -> int | list[int] | None:
        """Labels with numbers for names."""
        known, classes = self.model.trained_on, self.model.config.num_classes
        if isinstance(labels, list):
            return [x if isinstance(x, int) else label_from_text(known, x, classes) for x in labels]
        return label_from_text(known, labels, classes) if isinstance(labels, str) else labels

    def _format(self, wanted: str | None, count: int) -> str:
        allowed = [name for name in self.formats if name != "png" or count == 1]
        form = wanted or allowed[0]
        if form not in allowed:
            raise ValueError(
                f"format must be {' or '.join(allowed)} for {count} image{'s' * (count > 1)} of"
                f" this model, not {form}"
            )
        return form

    def _key(self, wanted: GenerateRequest, count: int, seconds: float) -> Key:
        """What decides about company: for `count` images in so many seconds."""
        limits, model = self.limits, self.model
        guidance = effective_guidance(wanted.guidance_scale)
        if guidance is not None and abs(guidance) > MAX_GUIDANCE:
            raise ValueError(
                f"guidance_scale must be from {-MAX_GUIDANCE} to {MAX_GUIDANCE}, not {guidance:g}"
            )
        dials: GenerateRequest | Operation = wanted
        own = wanted.depth, wanted.steps, wanted.solver, wanted.guidance_interval
        if wanted.deadline_ms and not any(each is not None for each in own):
            dials = self.planned(count, guidance, seconds)
        steps, solver = dials.steps or 4, fixed_solver(dials.solver or Operation.solver)
        if steps > limits.max_steps:
            raise ValueError(f"steps must be from 1 to {limits.max_steps}, not {steps}")
        operation = Operation(
            depth=dials.depth,
            steps=steps,
            solver=solver,
            guidance_scale=guidance,
            guidance_interval=dials.guidance_interval,  # type: ignore[arg-type]
        ).for_model(model)
        evaluations = count * (operation.evaluations_per_image or 0)
        if evaluations > limits.max_evaluations:
            raise ValueError(
                f"that takes {evaluations} evaluations of the network; a request may take"
                f" {limits.max_evaluations}"
            )
        # Noise that is drawn on the way comes from the sampler's one seed.
        alone = model.config.sampling == "consistency" and steps > 1
        return Key(operation, next(self._alone) if alone else 0)

    def planned(self, images: int, guidance: float | None, seconds: float) -> Operation:
        """The best (l, T) for a deadline in so many seconds, after the work that waits."""
        if isinstance(self.plan, str):
            raise ValueError(f"a deadline needs depth, steps or solver beside it here: {self.plan}")
        wait = self.batcher.backlog()
        least = images * self.decoding  # at most: a batch takes no longer than one by one
        alone = max((seconds - least) / _MARGIN, 1e-9)
        try:
            if seconds > wait + least:
                return self.plan(images, guidance, (seconds - wait - least) / _MARGIN)
        except ValueError:
            if not wait:
                raise
        self.plan(images, guidance, alone)  # raises what is true without a queue
        raise Rejected.hopeless(wait)

    def about(self, job: Job) -> dict[str, Any]:
        """What made the images of a job: labels, seed (as a string: JSON's numbers are exact up to
        2^53 only), and its key."""
        assert job.labels is not None
        operation = job.key.operation
        names = ("depth", "steps", "solver", "guidance_scale", "guidance_interval")
        return {
            "labels": job.labels.tolist(),
            "seed": str(job.seed),
            **{name: getattr(operation, name) for name in names},
        }

    def encode(self, job: Job, form: str) -> bytes:
        """The body of the answer."""
        images = np.concatenate(job.images)
        if form == "npz":
            file = io.BytesIO()
            np.savez(file, arr_0=images, arr_1=job.labels)  # type: ignore[arg-type]
            return file.getvalue()
        pictures = [png(image) for image in images]
        if form == "png":
            return pictures[0]
        encoded = [base64.b64encode(picture).decode() for picture in pictures]
        return json.dumps({"images": encoded, **self.about(job)}).encode()

    def describe(self) -> dict[str, Any]:
        """What may be asked: for GET /."""
        config, factor = self.model.config, self.decoder.factor if self.decoder else 1
        solvers = [fixed_solver(f"fixed:{name}") for name in TABLEAUS]
        return {
            "odelt_fast": __version__,
            "model": self.name,
            "image": [self.channels, *(side * factor for side in self.shape[1:])],
            "depths": [depth for depth in config.depths if depth <= self.model.max_depth],
            "solvers": ["euler"] if config.sampling == "consistency" else solvers,
            "labels": {
                "classes": config.num_classes,
                "null": config.num_classes,
                "names": list(self.model.trained_on.class_names),
            },
            "formats": self.formats,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "deadline_chooses": not isinstance(self.plan, str),
            "limits": {
                **dataclasses.asdict(self.limits),
                "max_batch": self.batcher.max_batch,
                "max_guidance": MAX_GUIDANCE,
            },
        }


def fixed_solver(name: str) -> str:
    """One name for each solver with fixed steps; ValueError for another."""
    tableau, adaptive = find_tableau(name)
    if adaptive:
        raise ValueError(
            f"solver {name} chooses its own steps, as many as it likes: take fixed:{tableau.name},"
            " or one with fixed steps"
        )
    return tableau.name if tableau.error is None else f"fixed:{tableau.name}"


def png(image: np.ndarray) -> bytes:
    """(H, W, C) uint8 as PNG, quickly."""
    from PIL import Image

    file, picture = io.BytesIO(), image[:, :, 0] if image.shape[2] == 1 else image
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
