"""Seeds -> noise -> integration -> decoding: sampling a model at any depth l and number of steps T. Where noise comes from: noise.py."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.backends import ATTENTIONS, PRECISIONS
from odelt_fast.cpu_network import CpuNetwork, choose
from odelt_fast.fused import Fused, choose_fused
from odelt_fast.model import DiT
from odelt_fast.noise import STREAMS, check_labels, drawn_labels, image_noise, stack_noise
from odelt_fast.solvers import (
    ERROR_NORMS,
    MAX_STEPS,
    NON_FINITE,
    STATUSES,
    Solution,
    check_solver,
    check_time_grid,
    check_tolerances,
    integrate_adaptive,
    integrate_fixed,
    integrate_torchdiffeq,
    is_adaptive,
    predict_and_renoise,
    time_grid,
)
from odelt_fast.tableau import find_tableau
from odelt_fast.velocity import DepthSchedule, VelocityField, check_depth_schedule, check_guidance, compiled, step_index

__all__ = ["BACKENDS", "STREAMS", "Sampler", "check_labels", "drawn_labels", "image_noise"]

BACKENDS = ("auto", "eager", "compile", "fused")
# Tokens of a batch when no batch size is given: activations of DiT-XL stay below 1 GiB on a CPU; a GPU needs more rows to be busy.
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**16}


class Sampler:
    """Draws samples of `model` at one depth, number of steps and guidance scale, in the model's own dtype and on its device.

    >>> images = Sampler(model, depth=4, steps=1)(num_images=16, labels=3, seed=0)    # (16, C, H, W) float32

    depth: number of active blocks l (None: all that are loaded). steps: number of time steps T. guidance_scale w: None = labels only,
    0 = null label only, otherwise v_null + w (v_label - v_null). batch_size: images at a time (None: by the number of tokens); it changes
    no picture. decoder: a callable from latents (B, C, H, W) float32 to images, applied to every batch.

    backend: "fused" runs our kernels, as CUDA graphs (NVIDIA GPUs); "eager" the model, "compile" its torch.compile form. "auto" is fused
    where it can run and else eager, which on a GPU warns once with the reason; a backend that was asked for by name raises ValueError.
    attention (fused): "auto" or one of `backends.ATTENTIONS` by name. precision (fused): None is the model's dtype; "fp8" runs most matrix
    products in float8, with an error of at most 4e-2 of one evaluation. `explain()` says what really runs.

    solver: euler, midpoint, heun2, ralston, kutta3, rk4, rk38 take `steps` steps; adaptive_heun, bosh3, dopri5, tsit5, dop853 choose theirs
    by rtol, atol and error_norm, at most max_steps for each image ("fixed:dopri5" takes `steps` equal ones); torchdiffeq:NAME is
    torchdiffeq's, with one error for the whole batch. Consistency models have a rule of their own in euler's place and take no other.
    error_norm: "per_sample" (each image has its own steps) or "batch". time_grid: "uniform", or "shift:3.0" with more steps near the noise
    (`solvers.time_grid`); for fixed steps. depth_schedule, in place of depth: pairs (t, l) with t rising from 0, or a function t -> l;
    an adaptive solver then needs error_norm="batch", since the images of a batch must agree on the time. The step index is that of
    `step_index`: log2 T for Euler's equal steps, else 7.

    `stats` holds, of the last call, images, evaluations (of the network, in all), evaluations_per_image and seconds; and, for each image,
    accepted and rejected steps, evaluations_needed (the rest of its batch may have needed more) and status (`solvers.STATUSES`).
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
            raise ValueError(f"model must be a DiT, as load_model returns, not {type(model).__name__}")
        self.model = model
        self.depth = model.check_depth(depth)
        self.steps = _whole("steps", steps)
        self.solver = check_solver(solver)
        self.adaptive = is_adaptive(self.solver)
        self.shift = check_time_grid(time_grid)
        if self.adaptive and self.shift != 1:
            raise ValueError(f"time_grid {time_grid!r} is for solvers with fixed steps: {self.solver} chooses its own")
        if self.solver.endswith("_adams") and self.shift != 1:
            raise ValueError(f"time_grid {time_grid!r} does not go with {self.solver}, whose weights hold for equal steps only")
        if model.config.sampling == "consistency" and (self.solver != "euler" or self.shift != 1):
            raise ValueError(
                "a consistency model predicts the data and adds noise anew, in equal steps: solver euler, time_grid uniform only"
            )
        jumps = self.solver in ("euler", "fixed:euler", "torchdiffeq:euler") and self.shift == 1
        self.step_index = step_index(model.config.sampling, None if self.adaptive else self.steps, jumps)
        self.guidance_scale = check_guidance(guidance_scale)
        self.backend = _one_of("backend", backend, BACKENDS)
        self.batch_size = None if batch_size is None else _whole("batch_size", batch_size)
        if decoder is not None and not callable(decoder):
            raise ValueError(f"decoder must be a callable from latents to images, not {type(decoder).__name__}")
        self.decoder = decoder
        self.attention = _one_of("attention", attention, ATTENTIONS)
        self.precision = _one_of("precision", precision, PRECISIONS)
        self.rtol, self.atol = check_tolerances(rtol, atol)
        self.max_steps = _whole("max_steps", max_steps)
        self.error_norm = _one_of("error_norm", error_norm, ERROR_NORMS)
        self.time_grid = time_grid
        self.depth_schedule = None if depth_schedule is None else check_depth_schedule(model, depth_schedule)
        if self.depth_schedule and depth is not None:
            raise ValueError(f"depth {depth} and depth_schedule are both given: leave one out")
        if self.depth_schedule and self.adaptive and error_norm == "per_sample" and not self.solver.startswith("torchdiffeq:"):
            raise ValueError(f"depth_schedule with {self.solver} needs error_norm='batch': with per_sample every image has its own time")
        self.network: Callable[..., Tensor] = compiled(model) if backend == "compile" else choose(model) if backend == "auto" else model
        self.stats: dict[str, Any] = {}
        self._batch: tuple[int, ...] | None = None  # shape of the last batch
        self._shrunk = False
        self.fused, self.not_fused = self._choose_fused()

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
        """Samples (N, C, H, W) float32 on the model's device, as the solver leaves them: data lies in [-1, 1], nothing is clipped.

        num_images: N (16 if neither it nor noise is given). labels: None (drawn from (seed, index); the null label for one-class models),
        one label for all images, or one each; num_classes is the null label. seed in [0, 2^64). noise (N, C, H, W): the state at t = 0
        instead of the seed's; H and W may be other multiples of the patch size than the model's own. first_image: index of the first image,
        to draw a part of a seed's images. progress(n) is called when n images have been advanced by one step.

        Raises ValueError for arguments that do not fit, and naming the images that the solver could not finish or that are not finite.
        """
        config = self.model.config
        seed = _whole("seed", seed, 0)
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, not {seed}")
        shape: tuple[int, ...] = (config.channels, config.image_size, config.image_size)
        if noise is not None:
            noise = self._check_noise(noise, num_images)
            num_images, shape = len(noise), tuple(noise.shape[1:])
        count = 16 if num_images is None else _whole("num_images", num_images)
        first_image = _whole("first_image", first_image, 0)
        given = check_labels(labels, count, config.num_classes)
        batch = min(self.batch_size or self.default_batch(shape), count)
        out = None if self.decoder or (self.fused and batch == count) else _allocate((count, *shape), self.model.device)
        training, start, evaluations = self.model.training, time.perf_counter(), 0
        each: dict[str, list[Any]] = {"accepted": [], "rejected": [], "evaluations_needed": [], "status": []}
        if training:  # both walk through all modules, which takes longer than a step of a small batch
            self.model.eval()
        try:
            with torch.inference_mode():
                first = 0
                while first < count:
                    indices = range(first, min(first + batch, count))
                    owned = range(first_image + first, first_image + indices.stop)
                    chosen = drawn_labels(seed, owned, config.num_classes) if given is None else given[first : indices.stop]
                    x = stack_noise(seed, owned, shape) if noise is None else noise[first : indices.stop]
                    self._batch = tuple(x.shape)
                    try:
                        x, per_image, record = self._solve(x, chosen, seed, owned, progress)
                        images = self.decoder(x) if self.decoder else x
                    except torch.OutOfMemoryError:
                        if self.backend != "auto" or batch == 1:
                            raise
                        images = None
                    if images is None:  # here, since the error held on to the memory
                        batch = self._shrink(batch)
                        continue
                    if "non_finite" in record["status"] and noise is not None and not torch.isfinite(noise).all():
                        raise ValueError("noise holds values that are not finite")
                    self._check_done(record["status"], first, count)
                    evaluations += per_image * len(indices)
                    for name, values in record.items():
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
        cost = {"images": count, "evaluations": evaluations, "evaluations_per_image": evaluations / count, "seconds": seconds}
        self.stats = {**cost, **each}
        return out

    def explain(self) -> dict[str, Any]:
        """What really runs: backend and why no other, device, dtype, depth, live blocks, solver, steps, evaluations, attention."""
        why = {} if self.fused else {"fused": self.not_fused}
        if self.backend != "compile":
            why["compile"] = "only runs when asked for by name: compiling takes longer than most sampling"
        if self.fused or self.backend == "compile":
            why["eager"] = "slower than fused" if self.backend == "auto" else f"backend {self.backend} was asked for"
        per_step = self._rows
        if not self.solver.startswith("torchdiffeq:"):
            tableau = find_tableau(self.solver)[0]
            per_step *= tableau.stages - tableau.fsal
        known = not self.adaptive and (not self.solver.startswith("torchdiffeq:") or self.solver == "torchdiffeq:euler")
        return {
            "backend": "fused" if self.fused else "compile" if self.backend == "compile" else "eager",
            "not_taken": why,
            **({"native_operators": isinstance(self.network, CpuNetwork)} if self.model.device.type == "cpu" else {}),
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "depth": "by schedule" if self.depth_schedule else self.depth,
            "live_blocks": self.model.config.live_blocks(self.depth),
            "sampling": self.model.config.sampling,
            "solver": self.solver,
            "steps": "adaptive" if self.adaptive else self.steps,
            **({"rtol": self.rtol, "atol": self.atol, "max_steps": self.max_steps, "error_norm": self.error_norm} if self.adaptive else {}),
            "time_grid": self.time_grid,
            "step_index": self.step_index if self.model.config.step_conditioned else 0,
            "guidance_scale": self.guidance_scale,
            "evaluations_per_image": self.steps * per_step if known else self.stats.get("evaluations_per_image"),
            "batch_size": self.batch_size or "by tokens",
            "attention": "sdpa",
            "precision": str(self.model.dtype).removeprefix("torch."),
            **(self._explain_fused(self.fused) if self.fused else {}),
        }

    def _explain_fused(self, fused: Fused) -> dict[str, Any]:
        config = self.model.config
        shape = self._batch or (self.batch_size or 1, config.channels, config.image_size, config.image_size)
        return fused.explain(shape[0] * self._rows, shape[2] * shape[3] // config.patch_size**2, self.depth)

    def _choose_fused(self) -> tuple[Fused | None, str]:
        """The fused backend if it is to run, else None and the reason."""
        settings: dict[str, Any] = {}
        if not self.adaptive and not self.solver.startswith("torchdiffeq:"):
            settings = {
                "tableau": None if self.model.config.sampling == "consistency" else find_tableau(self.solver)[0],
                "times": time_grid(self.steps, self.shift),
                "log2_steps": self.step_index,
                "depth": self.depth_schedule or self.depth,
                "guidance": None if self.guidance_scale in (0, 1) else self.guidance_scale,
            }
        return choose_fused(self.model, self.backend, self.attention, self.precision, **settings)

    def _shrink(self, batch: int) -> int:
        """Half the batch, after memory has run out."""
        if self.fused and self.fused.graphs:
            self.fused.graphs.clear()
        if not self._shrunk:
            warnings.warn(f"out of memory with {batch} images at a time: fewer are taken, the images stay the same", RuntimeWarning, 3)
        self._shrunk = True
        return batch // 2

    def _solve(
        self, x: Tensor, labels: np.ndarray, seed: int, indices: range, progress: Callable[[int], None] | None
    ) -> tuple[Tensor, int, dict[str, list[Any]]]:
        """x at t = 1 of one batch, the network evaluations that each of its images took, and the entries of `stats` for each image."""
        try:
            if self.fused:
                self.fused.refresh()
                if self.fused.trajectory:
                    return self._solve_fused(self.fused, x, labels, seed, indices, progress)
            return self._integrate(x, labels, seed, indices, progress)
        except (torch.OutOfMemoryError, ValueError):
            raise
        except Exception as error:
            if not self.fused or self.backend == "fused":
                raise
            # Such as a kernel that does not compile for this GPU.
            self.fused, self.not_fused = None, " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(f"the fused backend failed ({self.not_fused}): the model itself runs, which is slower", RuntimeWarning, 3)
        return self._integrate(x, labels, seed, indices, progress)

    def _solve_fused(
        self, fused: Fused, x: Tensor, labels: np.ndarray, seed: int, indices: range, progress: Callable[[int], None] | None
    ) -> tuple[Tensor, int, dict[str, list[Any]]]:
        fresh = None
        if self.model.config.sampling == "consistency" and self.steps > 1:
            fresh = torch.stack([stack_noise(seed, indices, x.shape[1:], "renoise", i) for i in range(self.steps - 1)])
        if self.guidance_scale == 0:
            labels = np.full_like(labels, self.model.config.num_classes)
        x, finite = fused.solve(x, labels, fresh)
        status = ["done" if each else "non_finite" for each in finite.tolist()]
        for _ in range(self.steps if progress else 0):
            progress(len(x))  # type: ignore[misc]
        evaluations = fused.trajectory.evaluations * self._rows  # type: ignore[union-attr]
        count = len(status)
        each: dict[str, list[Any]] = {"accepted": [self.steps] * count, "rejected": [0] * count}
        each |= {"evaluations_needed": [evaluations] * count, "status": status}
        return x, evaluations, each

    def _integrate(
        self, x: Tensor, labels: np.ndarray, seed: int, indices: range, progress: Callable[[int], None] | None
    ) -> tuple[Tensor, int, dict[str, list[Any]]]:
        solution, per_image = self._solution(x.to(self.model.device), labels, seed, indices, progress)
        record = {
            "accepted": solution.accepted.tolist(),
            "rejected": solution.rejected.tolist(),
            "evaluations_needed": (solution.evaluations * self._rows).tolist(),
            "status": [STATUSES[status] for status in solution.status.tolist()],
        }
        return solution.x, per_image, record

    def _solution(
        self, x: Tensor, labels: np.ndarray, seed: int, indices: range, progress: Callable[[int], None] | None
    ) -> tuple[Solution, int]:
        """Solution at t = 1 of one batch without the fused trajectory, and the network evaluations that each of its images took."""
        depth, network = self.depth_schedule or self.depth, self.fused.network if self.fused else self.network
        field = VelocityField(self.model, depth, torch.from_numpy(labels).to(x.device), self.guidance_scale, network)

        def on_step(i: int) -> None:
            if progress:
                progress(len(indices))

        if self.model.config.sampling == "consistency":

            def fresh(i: int) -> Tensor:
                return stack_noise(seed, indices, x.shape[1:], "renoise", i).to(x.device)

            end = predict_and_renoise(field, x, self.steps, self.step_index, fresh, on_step)
            return Solution.of_fixed_steps(end, self.steps, self.steps), field.evaluations
        times = time_grid(self.steps, self.shift)
        limits: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "max_steps": self.max_steps, "on_step": on_step}
        if self.solver.startswith("torchdiffeq:"):
            method = self.solver.removeprefix("torchdiffeq:")
            return integrate_torchdiffeq(field, x, times, self.step_index, method, **limits), field.evaluations
        tableau = find_tableau(self.solver)[0]
        if not self.adaptive:
            return integrate_fixed(field, x, times, self.step_index, tableau, on_step), field.evaluations
        return integrate_adaptive(field, x, self.step_index, tableau, error_norm=self.error_norm, **limits), field.evaluations

    def _check_noise(self, noise: Tensor, num_images: int | None) -> Tensor:
        config = self.model.config
        noise = torch.as_tensor(noise)
        fits = noise.dim() == 4 and noise.shape[1] == config.channels and noise.numel() > 0
        if not fits or noise.shape[2] % config.patch_size or noise.shape[3] % config.patch_size:
            wanted = f"(N, {config.channels}, {config.image_size}, {config.image_size})"
            raise ValueError(
                f"noise must have shape {wanted}, or other multiples of {config.patch_size} as sides, not {tuple(noise.shape)}"
            )
        if num_images is not None and num_images != len(noise):
            raise ValueError(f"num_images is {num_images}, but there is noise for {len(noise)} images")
        noise = noise.detach().float()
        # On a GPU waiting for the answer takes as long as a small sample: there it is asked when samples come out that are not finite.
        if not (noise.is_cuda and self.fused and self.fused.trajectory) and not torch.isfinite(noise).all():
            raise ValueError("noise holds values that are not finite")
        return noise

    def _check_done(self, status: Sequence[str], first: int, count: int) -> None:
        """ValueError naming the images of the batch from `first` on whose status is not done, and what to do about the worst of them."""
        worst = max(map(STATUSES.index, status))
        if worst == 0:
            return
        bad = [row for row, name in enumerate(status) if name == STATUSES[worst]]
        names = ", ".join(str(first + row) for row in bad[:8]) + (", ..." if len(bad) > 8 else "")
        if worst == NON_FINITE:
            half = self.model.dtype == torch.float16
            advice = "use bfloat16 or float32" if half else "check the weights, the guidance scale and the noise"
            raise ValueError(f"samples are not finite (images {names} of {count}): {advice}")
        reason = f"took {self.max_steps} steps" if worst == MAX_STEPS else "cannot make its steps small enough"
        advice = "raise max_steps, or rtol and atol" if worst == MAX_STEPS else "raise rtol and atol"
        raise ValueError(
            f"{self.solver} {reason} and did not reach t = 1 at rtol {self.rtol:g}, atol {self.atol:g} ({STATUSES[worst]}: "
            f"images {names} of {count}): {advice}"
        )

    def default_batch(self, shape: Sequence[int]) -> int:
        tokens = shape[1] * shape[2] // self.model.config.patch_size**2
        return max(1, _BATCH_TOKENS.get(self.model.device.type, _BATCH_TOKENS["cpu"]) // (tokens * self._rows))

    @property
    def _rows(self) -> int:
        """Rows that the network evaluates for one image."""
        return 1 if self.guidance_scale in (None, 0, 1) else 2


def _allocate(shape: Sequence[int], device: torch.device) -> Tensor:
    try:
        return torch.empty(tuple(shape), dtype=torch.float32, device=device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no memory for {shape[0]} images of shape {tuple(shape[1:])}: draw fewer at a time") from error


def _whole(name: str, value: Any, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(value is option or (isinstance(value, str) and value == option) for option in allowed):
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be {'one of ' if len(allowed) > 1 else ''}{listed}, not {value!r}")
    return value
