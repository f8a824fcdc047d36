"""One batch of a Sampler from noise to t = 1: by the fused backend where it runs, else by a solver
on the host with the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odelt_fast.engine.adaptive import AdaptiveTrajectory
from odelt_fast.engine.cpu import CpuNetwork, choose
from odelt_fast.engine.fused import Fused, choose_fused
from odelt_fast.model import DiT
from odelt_fast.sampling.noise import stack_noise
from odelt_fast.sampling.settings import SamplerSettings
from odelt_fast.sampling.velocity import VelocityField, compiled
from odelt_fast.solvers.fixed import (
    STATUSES,
    Solution,
    integrate_adaptive,
    integrate_fixed,
    integrate_torchdiffeq,
    predict_and_renoise,
    time_grid,
)
from odelt_fast.solvers.tableau import find_tableau

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) at t = 1; the network evaluations that each image took (in all, not those that
    it needed); and, for each image, the entries of `Sampler.stats`: accepted, rejected,
    evaluations_needed, status."""

    x: Tensor
    evaluations: int
    record: dict[str, list[Any]]

    @classmethod
    def of(cls, solution: Solution, evaluations: int, rows: int) -> Batch:
        record: dict[str, list[Any]] = {
            "accepted": solution.accepted.tolist(),
            "rejected": solution.rejected.tolist(),
            "evaluations_needed": (solution.evaluations * rows).tolist(),
            "status": [STATUSES[status] for status in solution.status.tolist()],
        }
        return cls(solution.x, evaluations, record)


class BatchSolver:
    """`solve(x, labels, ...)` integrates one batch with a model and settings.

    network: what evaluates the model where `fused` is None, and not_fused says why it is. Raises
    ValueError for a backend, an attention or a precision that was asked for by name and cannot run.
    """

    def __init__(self, model: DiT, settings: SamplerSettings) -> None:
        self.model, self.settings = model, settings
        self.network: Callable[..., Tensor] = model
        if settings.backend in ("compile", "auto"):
            self.network = compiled(model) if settings.backend == "compile" else choose(model)
        options: dict[str, Any] = {
            "depth": settings.depth_schedule or settings.depth,
            "log2_steps": settings.step_index,
            "guidance": None if settings.guidance_scale in (0, 1) else settings.guidance_scale,
        }
        if not settings.torchdiffeq and model.config.sampling != "consistency":
            options["tableau"] = find_tableau(settings.solver)[0]
        if settings.adaptive:
            # A depth that changes with time, which is known on the device alone, leaves the loop to
            # the host.
            options["limits"] = (
                None if settings.torchdiffeq or settings.depth_schedule else settings.limits
            )
        elif not settings.torchdiffeq:
            options["times"] = time_grid(settings.steps, settings.shift)
        self.fused, self.not_fused = choose_fused(
            model, settings.backend, settings.attention, settings.precision, **options
        )

    def solve(
        self,
        x: Tensor,
        labels: np.ndarray,
        seed: int,
        indices: range,
        progress: Progress | None = None,
    ) -> Batch:
        """x (B, C, H, W) at t = 0 on any device, labels (B,) int64. seed, indices: of the fresh
        noise that a consistency model wants. progress(B) is called for each step."""
        try:
            if self.fused:
                self.fused.refresh()
                if self.fused.trajectory:
                    return self._solve_fused(self.fused, x, labels, seed, indices, progress)
            return self._solve_on_host(x.to(self.model.device), labels, seed, indices, progress)
        except (torch.OutOfMemoryError, ValueError):
            raise
        except Exception as error:
            if not self.fused or self.settings.backend == "fused":
                raise
            # Such as a kernel that does not compile for this GPU.
            self.fused, self.not_fused = (
                None,
                " ".join(str(error).split())[:200] or type(error).__name__,
            )
            warnings.warn(
                f"the fused backend failed ({self.not_fused}): the model itself runs, which is"
                " slower",
                RuntimeWarning,
                3,
            )
        return self._solve_on_host(x.to(self.model.device), labels, seed, indices, progress)

    def release(self) -> None:
        """Gives back the memory of all graphs."""
        if self.fused and self.fused.graphs:
            self.fused.graphs.clear()

    def _solve_fused(
        self,
        fused: Fused,
        x: Tensor,
        labels: np.ndarray,
        seed: int,
        indices: range,
        progress: Progress | None,
    ) -> Batch:
        trajectory, rows, count = fused.trajectory, self.settings.rows, len(x)
        fresh, steps = None, self.settings.steps
        if self.model.config.sampling == "consistency" and steps > 1:
            fresh = torch.stack(
                [stack_noise(seed, indices, x.shape[1:], "renoise", i) for i in range(steps - 1)]
            )
        if self.settings.guidance_scale == 0:
            labels = np.full_like(labels, self.model.config.num_classes)
        if isinstance(trajectory, AdaptiveTrajectory):
            solution, steps = fused.solve_adaptive(x, labels)
            batch = Batch.of(solution, trajectory.evaluations(steps) * rows, rows)
        else:
            x, finite = fused.solve(x, labels, fresh)
            status = ["done" if each else "non_finite" for each in finite.tolist()]
            evaluations = trajectory.evaluations * rows  # type: ignore[union-attr]
            # Lists at once: by way of tensors they would take as long as a small sample.
            record: dict[str, list[Any]] = {"accepted": [steps] * count, "rejected": [0] * count}
            batch = Batch(
                x,
                evaluations,
                record | {"evaluations_needed": [evaluations] * count, "status": status},
            )
        for _ in range(steps if progress else 0):
            progress(count)  # type: ignore[misc]
        return batch

    def _solve_on_host(
        self, x: Tensor, labels: np.ndarray, seed: int, indices: range, progress: Progress | None
    ) -> Batch:
        settings, network = self.settings, self.fused.network if self.fused else self.network
        depth = settings.depth_schedule or settings.depth
        field = VelocityField(
            self.model,
            depth,
            torch.from_numpy(labels).to(x.device),
            settings.guidance_scale,
            network,
        )

        def on_step(i: int) -> None:
            if progress:
                progress(len(indices))

        def fresh(i: int) -> Tensor:
            return stack_noise(seed, indices, x.shape[1:], "renoise", i).to(x.device)

        index, limits = settings.step_index, settings.limits
        tolerances: dict[str, Any] = {
            "rtol": limits.rtol,
            "atol": limits.atol,
            "max_steps": limits.max_steps,
            "on_step": on_step,
        }
        times = time_grid(settings.steps, settings.shift)
        if self.model.config.sampling == "consistency":
            end = predict_and_renoise(field, x, settings.steps, index, fresh, on_step)
            solution = Solution.of_fixed_steps(end, settings.steps, settings.steps)
        elif settings.torchdiffeq:
            solution = integrate_torchdiffeq(
                field, x, times, index, settings.torchdiffeq, **tolerances
            )
        elif settings.adaptive:
            tableau = find_tableau(settings.solver)[0]
            solution = integrate_adaptive(
                field, x, index, tableau, error_norm=limits.error_norm, **tolerances
            )
        else:
            solution = integrate_fixed(
                field, x, times, index, find_tableau(settings.solver)[0], on_step
            )
        return Batch.of(solution, field.evaluations, settings.rows)

    def explain(
        self, shape: tuple[int, ...], evaluations_per_image: float | None
    ) -> dict[str, Any]:
        """What runs on batches of that shape (B, C, H, W); evaluations_per_image: those of the last
        call."""
        settings, config, dtype = (
            self.settings,
            self.model.config,
            str(self.model.dtype).removeprefix("torch."),
        )
        why = {} if self.fused else {"fused": self.not_fused}
        if settings.backend != "compile":
            why["compile"] = (
                "only runs when asked for by name: compiling takes longer than most sampling"
            )
        if self.fused or settings.backend == "compile":
            why["eager"] = (
                "slower than fused"
                if settings.backend == "auto"
                else f"backend {settings.backend} was asked for"
            )
        per_step = settings.rows
        if not settings.torchdiffeq:
            tableau = find_tableau(settings.solver)[0]
            per_step *= tableau.stages - tableau.fsal
        known = not settings.adaptive and settings.torchdiffeq in (None, "euler")
        limits = settings.limits
        told = {
            "rtol": limits.rtol,
            "atol": limits.atol,
            "max_steps": limits.max_steps,
            "error_norm": limits.error_norm,
        }
        tokens = shape[2] * shape[3] // config.patch_size**2
        return {
            "backend": (
                "fused" if self.fused else "compile" if settings.backend == "compile" else "eager"
            ),
            "not_taken": why,
            **(
                {"native_operators": isinstance(self.network, CpuNetwork)}
                if self.model.device.type == "cpu"
                else {}
            ),
            "device": str(self.model.device),
            "dtype": dtype,
            "depth": "by schedule" if settings.depth_schedule else settings.depth,
            "live_blocks": config.live_blocks(settings.depth),
            "sampling": config.sampling,
            "solver": settings.solver,
            "steps": "adaptive" if settings.adaptive else settings.steps,
            **(told if settings.adaptive else {}),
            "time_grid": settings.time_grid,
            "step_index": settings.step_index if config.step_conditioned else 0,
            "guidance_scale": settings.guidance_scale,
            "evaluations_per_image": settings.steps * per_step if known else evaluations_per_image,
            "batch_size": settings.batch_size or "by tokens",
            "attention": "sdpa",
            "precision": dtype,
            **(
                self.fused.explain(shape[0] * settings.rows, tokens, settings.depth)
                if self.fused
                else {}
            ),
        }
