"""Seeds -> noise -> integration -> decoding: sampling a model at any depth l and number of steps T.
Where noise comes from: noise.py."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.engine.fused import Fused
from odelt_fast.model import DiT
from odelt_fast.sampling.batch_solver import BatchSolver
from odelt_fast.sampling.noise import STREAMS, check_labels, drawn_labels, image_noise, stack_noise
from odelt_fast.sampling.settings import BACKENDS, SamplerSettings, whole
from odelt_fast.sampling.velocity import DepthSchedule
from odelt_fast.solvers.fixed import MAX_STEPS, NON_FINITE, STATUSES

__all__ = ["BACKENDS", "STREAMS", "Sampler", "check_labels", "drawn_labels", "image_noise"]

# Tokens of a batch when no batch size is given: activations of DiT-XL stay below 1 GiB on a CPU; a
# GPU needs more rows to be busy.
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**16}


class Sampler:
    """Draws samples of `model` at one depth, number of steps and guidance scale, in the model's own
    dtype and on its device.

    >>> images = Sampler(model, depth=4, steps=1)(num_images=16, labels=3, seed=0)    # (16, C, H,
    W) float32

    depth: number of active blocks l (None: all that are loaded). steps: number of time steps T.
    guidance_scale w: None = labels only, 0 = null label only, otherwise v_null + w (v_label -
    v_null). batch_size: images at a time (None: by the number of tokens); it changes no picture.
    decoder: a callable from latents (B, C, H, W) float32 to images, applied to every batch.

    backend: "fused" runs our kernels, as CUDA graphs (NVIDIA GPUs); "eager" the model, "compile"
    its torch.compile form. "auto" is fused where it can run and else eager, which on a GPU warns
    once with the reason; a backend that was asked for by name raises ValueError. attention (fused):
    "auto" or one of `operators.ATTENTIONS` by name. precision (fused): None is the model's dtype;
    "fp8" runs most matrix products in float8, with an error of at most 4e-2 of one evaluation.
    `explain()` says what really runs.

    solver: euler, midpoint, heun2, ralston, kutta3, rk4, rk38 take `steps` steps; adaptive_heun,
    bosh3, dopri5, tsit5, dop853 choose theirs by rtol, atol and error_norm, at most max_steps for
    each image ("fixed:dopri5" takes `steps` equal ones); torchdiffeq:NAME is torchdiffeq's, with
    one error for the whole batch. Consistency models have a rule of their own in euler's place and
    take no other. error_norm: "per_sample" (each image has its own steps) or "batch". time_grid:
    "uniform", or "shift:3.0" with more steps near the noise (`solvers.time_grid`); for fixed steps.
    depth_schedule, in place of depth: pairs (t, l) with t rising from 0, or a function t -> l; an
    adaptive solver then needs error_norm="batch", since the images of a batch must agree on the
    time. The step index is that of `step_index`: log2 T for Euler's equal steps, else 7.

    `stats` holds, of the last call, images, evaluations (of the network, in all),
    evaluations_per_image and seconds; and, for each image, accepted and rejected steps,
    evaluations_needed (the rest of its batch may have needed more) and status (`solvers.STATUSES`).
    Raises ValueError for every value that cannot be used, naming what is allowed.
    """

    def __init__(
        self,
        model: DiT,
        depth: int | None = None,
        steps: int = 4,
        solver: str = "euler",
        *,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        guidance_scale: float | None = None,
        backend: str = "auto",
        batch_size: int | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        attention: str = "auto",
        precision: str | None = None,
        max_steps: int = 4096,
        error_norm: str = "per_sample",
        time_grid: str | tuple[str, float] = "uniform",
        depth_schedule: DepthSchedule | None = None,
    ) -> None:
        if not isinstance(model, DiT):
            raise ValueError(
                f"model must be a DiT, as load_model returns, not {type(model).__name__}"
            )
        if decoder is not None and not callable(decoder):
            raise ValueError(
                f"decoder must be a callable from latents to images, not {type(decoder).__name__}"
            )
        settings = SamplerSettings.of(
            model, depth, steps, solver, rtol=rtol, atol=atol, guidance_scale=guidance_scale, backend=backend, batch_size=batch_size,
            attention=attention, precision=precision, max_steps=max_steps, error_norm=error_norm, time_grid=time_grid,
            depth_schedule=depth_schedule,
        )  # fmt: skip
        self.model, self.decoder, self.settings = model, decoder, settings
        self.depth, self.depth_schedule, self.steps, self.solver = (
            settings.depth,
            settings.depth_schedule,
            settings.steps,
            settings.solver,
        )
        self.adaptive, self.shift, self.step_index = (
            settings.adaptive,
            settings.shift,
            settings.step_index,
        )
        self.rtol, self.atol = settings.limits.rtol, settings.limits.atol
        self.max_steps, self.error_norm = settings.limits.max_steps, settings.limits.error_norm
        self.guidance_scale, self.backend, self.batch_size = (
            settings.guidance_scale,
            settings.backend,
            settings.batch_size,
        )
        self.attention, self.precision, self.time_grid = (
            settings.attention,
            settings.precision,
            settings.time_grid,
        )
        self.batches = BatchSolver(model, settings)
        self.stats: dict[str, Any] = {}
        self._batch: tuple[int, ...] | None = None  # shape of the last batch
        self._shrunk = False

    def __call__(
        self,
        num_images: int | None = None,
        labels: int | Sequence[int] | np.ndarray | Tensor | None = None,
        seed: int = 0,
        *,
        noise: Tensor | None = None,
        first_image: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Samples (N, C, H, W) float32 on the model's device, as the solver leaves them: data lies
        in [-1, 1], nothing is clipped.

        num_images: N (16 if neither it nor noise is given). labels: None (drawn from (seed, index);
        the null label for one-class models), one label for all images, or one each; num_classes is
        the null label. seed in [0, 2^64). noise (N, C, H, W): the state at t = 0 instead of the
        seed's; H and W may be other multiples of the patch size than the model's own. first_image:
        index of the first image, to draw a part of a seed's images. progress(n) is called when n
        images have been advanced by one step.

        Raises ValueError for arguments that do not fit, and naming the images that the solver could
        not finish or that are not finite.
        """
        config = self.model.config
        seed = whole("seed", seed, 0)
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, not {seed}")
        shape: tuple[int, ...] = (config.channels, config.image_size, config.image_size)
        if noise is not None:
            noise = self._check_noise(noise, num_images)
            num_images, shape = len(noise), tuple(noise.shape[1:])
        count = 16 if num_images is None else whole("num_images", num_images)
        first_image = whole("first_image", first_image, 0)
        given = check_labels(labels, count, config.num_classes)
        batch = min(self.batch_size or self.default_batch(shape), count)
        out = (
            None
            if self.decoder or (self.fused and batch == count)
            else _allocate((count, *shape), self.model.device)
        )
        training, start, evaluations = self.model.training, time.perf_counter(), 0
        each: dict[str, list[Any]] = {
            "accepted": [],
            "rejected": [],
            "evaluations_needed": [],
            "status": [],
        }
        if (
            training
        ):  # both walk through all modules, which takes longer than a step of a small batch
            self.model.eval()
        try:
            with torch.inference_mode():
                first = 0
                while first < count:
                    indices = range(first, min(first + batch, count))
                    owned = range(first_image + first, first_image + indices.stop)
                    chosen = (
                        drawn_labels(seed, owned, config.num_classes)
                        if given is None
                        else given[first : indices.stop]
                    )
                    x = (
                        stack_noise(seed, owned, shape)
                        if noise is None
                        else noise[first : indices.stop]
                    )
                    self._batch = tuple(x.shape)
                    try:
                        solved = self.batches.solve(x, chosen, seed, owned, progress)
                        images = self.decoder(solved.x) if self.decoder else solved.x
                    except torch.OutOfMemoryError:
                        if self.backend != "auto" or batch == 1:
                            raise
                        images = None
                    if images is None:  # here, since the error held on to the memory
                        batch = self._shrink(batch)
                        continue
                    if (
                        "non_finite" in solved.record["status"]
                        and noise is not None
                        and not torch.isfinite(noise).all()
                    ):
                        raise ValueError("noise holds values that are not finite")
                    self._check_done(solved.record["status"], first, count)
                    evaluations += solved.evaluations * len(indices)
                    for name, values in solved.record.items():
                        each[name] += values
                    if len(indices) == count and not images.is_inference():
                        out = images
                    else:
                        if out is None:
                            with torch.inference_mode(False):
                                out = _allocate((count, *images.shape[1:]), images.device)
                        out[first : indices.stop] = images
                    first = indices.stop
        finally:
            if training:
                self.model.train()
        assert out is not None
        seconds = time.perf_counter() - start
        cost = {
            "images": count,
            "evaluations": evaluations,
            "evaluations_per_image": evaluations / count,
            "seconds": seconds,
        }
        self.stats = {**cost, **each}
        return out

    def explain(self) -> dict[str, Any]:
        """What really runs: backend and why no other, device, dtype, depth, live blocks, solver,
        steps, evaluations, attention, graph."""
        config = self.model.config
        shape = self._batch or (
            self.batch_size or 1,
            config.channels,
            config.image_size,
            config.image_size,
        )
        return self.batches.explain(shape, self.stats.get("evaluations_per_image"))

    @property
    def fused(self) -> Fused | None:
        """The fused backend if it runs."""
        return self.batches.fused

    @property
    def network(self) -> Callable[..., Tensor]:
        """What evaluates the model where the fused backend does not."""
        return self.batches.network

    @network.setter
    def network(self, network: Callable[..., Tensor]) -> None:
        self.batches.network = network

    def _shrink(self, batch: int) -> int:
        """Half the batch, after memory has run out."""
        self.batches.release()
        if not self._shrunk:
            warnings.warn(
                f"out of memory with {batch} images at a time: fewer are taken, the images stay the"
                " same",
                RuntimeWarning,
                3,
            )
        self._shrunk = True
        return batch // 2

    def _check_noise(self, noise: Tensor, num_images: int | None) -> Tensor:
        config = self.model.config
        noise = torch.as_tensor(noise)
        fits = noise.dim() == 4 and noise.shape[1] == config.channels and noise.numel() > 0
        if not fits or noise.shape[2] % config.patch_size or noise.shape[3] % config.patch_size:
            wanted = f"(N, {config.channels}, {config.image_size}, {config.image_size})"
            raise ValueError(
                f"noise must have shape {wanted}, or other multiples of {config.patch_size} as"
                f" sides, not {tuple(noise.shape)}"
            )
        if num_images is not None and num_images != len(noise):
            raise ValueError(
                f"num_images is {num_images}, but there is noise for {len(noise)} images"
            )
        noise = noise.detach().float()
        # On a GPU waiting for the answer takes as long as a small sample: there it is asked when
        # samples come out that are not finite.
        if (
            not (noise.is_cuda and self.fused and self.fused.trajectory)
            and not torch.isfinite(noise).all()
        ):
            raise ValueError("noise holds values that are not finite")
        return noise

    def _check_done(self, status: Sequence[str], first: int, count: int) -> None:
        """ValueError naming the images of the batch from `first` on whose status is not done, and
        what to do about the worst of them."""
        worst = max(map(STATUSES.index, status))
        if worst == 0:
            return
        bad = [row for row, name in enumerate(status) if name == STATUSES[worst]]
        names = ", ".join(str(first + row) for row in bad[:8]) + (", ..." if len(bad) > 8 else "")
        if worst == NON_FINITE:
            half = self.model.dtype == torch.float16
            advice = (
                "use bfloat16 or float32"
                if half
                else "check the weights, the guidance scale and the noise"
            )
            raise ValueError(f"samples are not finite (images {names} of {count}): {advice}")
        reason = (
            f"took {self.max_steps} steps"
            if worst == MAX_STEPS
            else "cannot make its steps small enough"
        )
        advice = (
            "raise max_steps, or rtol and atol" if worst == MAX_STEPS else "raise rtol and atol"
        )
        raise ValueError(
            f"{self.solver} {reason} and did not reach t = 1 at rtol {self.rtol:g}, atol"
            f" {self.atol:g} ({STATUSES[worst]}: images {names} of {count}): {advice}"
        )

    def default_batch(self, shape: Sequence[int]) -> int:
        tokens = shape[1] * shape[2] // self.model.config.patch_size**2
        return max(
            1,
            _BATCH_TOKENS.get(self.model.device.type, _BATCH_TOKENS["cpu"])
            // (tokens * self.settings.rows),
        )


def _allocate(shape: Sequence[int], device: torch.device) -> Tensor:
    try:
        return torch.empty(tuple(shape), dtype=torch.float32, device=device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"no memory for {shape[0]} images of shape {tuple(shape[1:])}: draw fewer at a time"
        ) from error
