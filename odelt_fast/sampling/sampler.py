"""Seeds -> noise -> integration -> decoding: sampling a model at any depth l and number of steps T.
Where noise comes from: noise.py."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odelt_fast.checks import check_seed, one_of, whole
from odelt_fast.engine import availability
from odelt_fast.engine.compiled import compiled
from odelt_fast.engine.cpu import CpuNetwork, choose
from odelt_fast.engine.fused import Fused, choose_fused
from odelt_fast.engine.graphs import MOST_GRAPHS, is_bug
from odelt_fast.engine.operators import ATTENTIONS, PRECISIONS
from odelt_fast.engine.plans import PLAN_CHOICES
from odelt_fast.files import one_line
from odelt_fast.model import DiT
from odelt_fast.operation import DepthSchedule, Operation

from .batches import Batches, default_batch, evaluating, statistics
from .decoder import Decoder, Overlapped
from .host import Host
from .noise import check_labels, drawn_labels, stack_noise
from .prepared import Labels, Prepared, Progress, Shape, check_sizes

BACKENDS = ("auto", "eager", "compile", "fused")

logger = logging.getLogger(__name__)


class Sampler:
    """Draws samples of `model` by one operation, in the model's own dtype and on its device.

    >>> images = Sampler(model, depth=4, steps=1)(num_images=16, labels=3, seed=0)
    >>> images.shape  # float32, as the solver leaves them
    torch.Size([16, C, H, W])

    `operation` is how it samples, with the depth that it means for this model. `stats` holds, of
    the last call, images, evaluations (of the network, in all), evaluations_per_image and seconds;
    and, for each image, accepted and rejected steps, evaluations_needed (the rest of its batch may
    have needed more) and status (`solvers.step_control.STATUSES`).

    Args:
        depth: number of active blocks l (None: all that are loaded).
        steps: number of time steps T, of solvers that take equal ones.
        solver: euler, midpoint, heun2, ralston, kutta3, rk4, rk38 take `steps` steps;
            adaptive_heun, bosh3, dopri5, tsit5, dop853 choose theirs by rtol, atol and error_norm,
            at most max_steps for each image ("fixed:dopri5" takes `steps` equal ones);
            torchdiffeq:NAME is torchdiffeq's, with one error for the whole batch. Consistency
            models have a rule of their own in euler's place and take no other.
        guidance_scale: w; None = labels alone, 0 = null label alone, otherwise v_null + w (v_label
            - v_null), two evaluations; one of a model that is told w (`DiTConfig.guidance_max`).
        backend: "fused" runs our kernels, as CUDA graphs (NVIDIA GPUs); "eager" the model,
            "compile" its torch.compile form. "auto" is fused where it can run and else eager, which
            on a GPU warns once with the reason; a backend that was asked for by name raises
            ValueError. `explain()` says what really runs.
        batch_size: images at a time (None: by the number of tokens); it changes no picture.
        decoder: a callable from latents (B, C, H, W) float32 to images, applied to every batch. A
            `Decoder` must be that of the latents that the model was trained on.
        attention: of the fused backend, "auto" or one of `engine.operators.ATTENTIONS` by name.
        precision: of the fused backend. None is the model's dtype; "fp8" runs most matrix products
            in float8, with an error of a few percent of one evaluation.
        plan: of the fused backend, which launches it makes: one of `engine.plans.PLANS` by name, or
            "auto", the one that was measured to be fastest on this GPU.
        error_norm: "per_sample" (each image has its own steps) or "batch".
        time_grid: "uniform", or "shift:3.0" with more steps near the noise; for equal steps.
        guidance_interval: (t_lo, t_hi): guidance at times from t_lo to t_hi only (0 is noise, 1
            data); steps outside cost one evaluation with a solver of equal steps.
        depth_schedule: in place of depth, pairs (t, l) with t rising from 0, or a function t -> l;
            an adaptive solver then needs error_norm="batch".

    Raises:
        ValueError: for every value that cannot be used, naming what is allowed.
    """

    def __init__(
        self,
        model: DiT,
        depth: int | None = Operation.depth,
        steps: int | None = Operation.steps,
        solver: str = Operation.solver,
        *,
        rtol: float = Operation.rtol,
        atol: float = Operation.atol,
        guidance_scale: float | None = Operation.guidance_scale,
        backend: str = "auto",
        batch_size: int | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        attention: str = "auto",
        precision: str | None = None,
        plan: str = "auto",
        max_steps: int = Operation.max_steps,
        error_norm: str = Operation.error_norm,
        time_grid: str | tuple[str, float] = Operation.time_grid,
        depth_schedule: DepthSchedule | None = Operation.depth_schedule,
        guidance_interval: tuple[float, float] | None = Operation.guidance_interval,
    ) -> None:
        operation = Operation(
            depth=depth,
            steps=steps,
            solver=solver,
            rtol=rtol,
            atol=atol,
            guidance_scale=guidance_scale,
            max_steps=max_steps,
            error_norm=error_norm,
            time_grid=time_grid,
            depth_schedule=depth_schedule,
            guidance_interval=guidance_interval,
        )
        if not isinstance(model, DiT):
            raise ValueError(
                f"model must be a DiT, as load_model returns, not {type(model).__name__}"
            )
        if decoder is not None and not callable(decoder):
            raise ValueError(
                f"decoder must be a callable from latents to images, not {type(decoder).__name__}"
            )
        if isinstance(decoder, Decoder | Overlapped):
            decoder.check_latents(model.trained_on.latents)
        self.model, self.decoder, self.operation = model, decoder, operation.for_model(model)
        self.backend = one_of("backend", backend, BACKENDS)
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size)
        one_of("attention", attention, ATTENTIONS)
        one_of("precision", precision, PRECISIONS)
        one_of("plan", plan, PLAN_CHOICES)
        self._stats: dict[str, Any] | Callable[[], dict[str, Any]] = {}
        self._known: dict[Sequence[int], Shape] = {}
        self._batch: tuple[int, ...] | None = None  # shape of the last batch
        self._said = set[str]()
        self.network: Callable[..., Tensor] = model  # what runs where the fused backend does not
        if backend in ("compile", "auto"):
            self.network = compiled(model) if backend == "compile" else choose(model)
        self.fused, self.not_fused = choose_fused(
            model, self.operation, backend, attention, precision, plan
        )
        on_gpu = model.device.type == "cuda"
        able = on_gpu or availability.fused_unavailable(model) is None
        if backend == "auto" and not self.fused and able:
            self.say(
                f"the fused backend cannot run: {self.not_fused}; the model itself runs, which is"
                " slower"
            )

    @classmethod
    def of(cls, model: DiT, operation: Operation, **options: Any) -> Sampler:
        """The sampler of an operation; options: the other arguments, by name."""
        dials = {name: value for name, value in vars(operation).items() if name != "told"}
        return cls(model, **dials, **options)

    def __call__(
        self,
        num_images: int | None = None,
        labels: Labels = None,
        seed: int = 0,
        *,
        noise: Tensor | None = None,
        first_image: int = 0,
        progress: Progress = None,
    ) -> Tensor:
        """Samples (N, C, H, W) float32 on the model's device, as the solver leaves them: data lies
        in [-1, 1], nothing is clipped.

        Args:
            num_images: N (16 if neither it nor noise is given).
            labels: None (drawn from (seed, index); the null label for one-class models), one label
                for all images, or one each; num_classes is the null label.
            seed: in [0, 2^64).
            noise: (N, C, H, W), the state at t = 0 instead of the seed's; H and W may be other
                multiples of the patch size than the model's own.
            first_image: index of the first image, to draw a part of a seed's images.
            progress: called with n when n images have been advanced by one step.

        Raises:
            ValueError: for arguments that do not fit, and naming the images that the solver could
                not finish or that are not finite.
        """
        seed, first_image = check_seed(seed), whole("first_image", first_image, 0)
        if noise is None:
            count = 16 if num_images is None else whole("num_images", num_images)
            shape: Sequence[int] = (count, *self.model.config.image_shape)
        else:
            noise = torch.as_tensor(noise)
            if num_images is not None:
                self._check_shape(noise, num_images)
            shape = noise.shape
        known = self._known.get(shape)
        if known:
            images = known.replay(self, noise, labels, seed, first_image, progress)
            if images is not None:
                return images
        return self.draw(shape, noise, labels, seed, first_image, progress)

    def prepare(self, num_images: int, *, size: tuple[int, int] | None = None) -> Prepared:
        """The call for a fixed number and size of images, for servers and loops: it copies, replays
        and copies (`Prepared`), with the same images.

        Args:
            num_images: N.
            size: (H, W), multiples of the patch size; None: the model's own.

        Raises:
            ValueError: for a number or a size that cannot be.
        """
        shape = check_sizes(self.model.config, num_images, size)
        return Prepared(self, shape, self._at_once(shape))

    def _at_once(self, shape: Sequence[int]) -> Shape | None:
        """What is known of images (N, C, H, W), if they are one batch of the fused backend."""
        size = self.batch_size or default_batch(self, shape[1:])
        if not self.fused or not self.fused.replays or size < shape[0]:
            return None
        if len(self._known) >= MOST_GRAPHS:
            self._known = {}
        return self._known.setdefault(torch.Size(shape), Shape(shape))

    def draw(
        self,
        size: Sequence[int],
        noise: Tensor | None,
        labels: Labels,
        seed: int,
        first_image: int,
        progress: Progress,
    ) -> Tensor:
        """The call of any number of images (N, C, H, W), batch by batch, where one replay does not
        do; the arguments are those of a call."""
        if noise is not None:
            noise = self._check_noise(noise)
        config, (count, *shape) = self.model.config, size
        given = check_labels(labels, count, config.num_classes)
        start = time.perf_counter()
        batches = Batches(self, count, shape, noise=noise, allocate=self.decoder is None)
        with evaluating(self.model), torch.inference_mode():
            for rows in batches:
                owned = range(first_image + rows.start, first_image + rows.stop)
                x = stack_noise(seed, owned, shape) if noise is None else noise[rows]
                chosen = (
                    drawn_labels(seed, owned, config.num_classes) if given is None else given[rows]
                )
                fresh = partial(stack_noise, seed, owned, shape, "renoise")
                with batches:
                    result = self.integrator.solve(x, chosen, fresh, progress)
                    batches.add(result, self.decoder(result.x) if self.decoder else None)
        seconds = time.perf_counter() - start
        self.ended(x.shape, partial(statistics, self.operation, batches.counts, seconds))
        if self.fused and self.fused.has_graph(self.fused.last_key):
            self._at_once(size)  # the next call of this shape need not look at anything again
        return batches.x

    def ended(self, batch: Sequence[int], stats: Callable[[], dict[str, Any]]) -> None:
        """Notes the shape of a call's last batch, and what makes its `stats`."""
        self._batch, self._stats = tuple(batch), stats

    @property
    def stats(self) -> dict[str, Any]:
        """Of the last call; see the class."""
        if not isinstance(self._stats, dict):
            self._stats = self._stats()
        return self._stats

    @stats.setter
    def stats(self, stats: dict[str, Any]) -> None:
        self._stats = stats

    @property
    def integrator(self) -> Fused | Host:
        """What solves a batch: the fused backend where it makes the steps itself, or the host."""
        if self.fused and self.fused.trajectory:
            return self.fused
        return Host(self.model, self.operation, self.evaluate)

    @property
    def evaluate(self) -> Callable[..., Tensor]:
        """What evaluates the model, with its signature."""
        return self.fused.network if self.fused else self.network

    def explain(self) -> dict[str, Any]:
        """What really runs: backend and why no other, device, dtype, depth, live blocks, solver,
        steps, evaluations, attention, graph."""
        config, how = self.model.config, self.operation
        shape = self._batch or (self.batch_size or 1, *config.image_shape)
        dtype = str(self.model.dtype).removeprefix("torch.")
        reasons = {} if self.fused else {"fused": self.not_fused}
        if self.backend != "compile":
            reasons["compile"] = (
                "only runs when asked for by name: compiling takes longer than most sampling"
            )
        if self.fused or self.backend == "compile":
            asked = f"backend {self.backend} was asked for"
            reasons["eager"] = "slower than fused" if self.backend == "auto" else asked
        depth = how.depth or self.model.max_depth
        native = {"native_operators": isinstance(self.network, CpuNetwork)}
        evaluations = how.evaluations_per_image or self.stats.get("evaluations_per_image")
        about: dict[str, Any] = {
            "backend": "compile" if self.backend == "compile" else "eager",
            "not_taken": reasons,
            **(native if self.model.device.type == "cpu" else {}),
            "device": str(self.model.device),
            "dtype": dtype,
            "depth": "by schedule" if how.depth_schedule else how.depth,
            "live_blocks": config.live_blocks(depth),
            "sampling": config.sampling,
            "solver": how.solver,
            "steps": "adaptive" if how.adaptive else how.steps,
            **(asdict(how.limits) if how.adaptive else {}),
            "time_grid": how.time_grid,
            "step_index": how.step_index(config.sampling) if config.step_conditioned else 0,
            "guidance_scale": how.guidance_scale,
            "guidance_interval": how.guidance_interval,
            "evaluations_per_image": evaluations,
            "batch_size": self.batch_size or "by tokens",
            "attention": "sdpa",
            "precision": dtype,
        }
        if self.fused:
            rows, tokens = shape[0] * how.rows_per_image, shape[2] * shape[3]
            about["backend"] = "fused"
            about |= self.fused.explain(rows, tokens // config.patch_size**2, depth)
        return about

    def say(self, sentence: str, once: str | None = None) -> None:
        """Warns the caller, once for each sentence (or for each `once`)."""
        if (once or sentence) in self._said:
            return
        self._said.add(once or sentence)
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
            level, frame = level + 1, frame.f_back
        warnings.warn(sentence, RuntimeWarning, stacklevel=level)

    def leave_fused(self, error: BaseException) -> bool:
        """Whether the model itself runs from now on, because the fused backend failed: a kernel
        that does not compile for this GPU, for example."""
        if not self.fused:
            return False
        availability.check_context(self.model.device, error)
        if self.backend == "fused" or is_bug(error):
            return False
        logger.warning("the fused backend failed", exc_info=error)
        self.fused, self.not_fused = None, one_line(error)
        self.say(
            f"the fused backend failed ({self.not_fused}): the model itself runs, which is slower"
        )
        return True

    def _check_shape(self, noise: Tensor, num_images: int | None = None) -> None:
        config, patch = self.model.config, self.model.config.patch_size
        fits = noise.dim() == 4 and noise.shape[1] == config.channels and noise.numel() > 0
        if not fits or noise.shape[2] % patch or noise.shape[3] % patch:
            raise ValueError(
                f"noise must have shape (N, {', '.join(map(str, config.image_shape))}), or other"
                f" multiples of {patch} as sides, not {tuple(noise.shape)}"
            )
        if num_images is not None and num_images != len(noise):
            raise ValueError(
                f"num_images is {num_images}, but there is noise for {len(noise)} images"
            )

    def _check_noise(self, noise: Tensor) -> Tensor:
        self._check_shape(noise)
        noise = noise.detach().float()
        # On a GPU waiting for the answer takes as long as a small sample: there it is asked when
        # samples come out that are not finite.
        late = noise.is_cuda and isinstance(self.integrator, Fused)
        if not late and not torch.isfinite(noise).all():
            raise ValueError("noise holds values that are not finite")
        return noise


_OURS = ("odelt_fast", "torch", "contextlib")  # frames that a warning does not point at
