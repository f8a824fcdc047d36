"""Many images, a batch at a time: which rows are next, what becomes of them, and what happens where
memory runs out or a backend fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odelt_fast.model import DiT
from odelt_fast.operation import Operation
from odelt_fast.solvers.solution import BatchResult, Counts, Solution
from odelt_fast.solvers.step_control import DONE, MAX_STEPS, NON_FINITE, STATUSES

if TYPE_CHECKING:
    from .sampler import Sampler

# Tokens of a batch when no batch size is given: activations of DiT-XL stay below 1 GiB on a CPU; a
# GPU needs more rows to be busy.
_BATCH_TOKENS = {"cpu": 2**14, "cuda": 2**16}


class Batches:
    """The rows of `count` images of a sampler, batch by batch, and their results.

    >>> for rows in (batches := Batches(sampler, count, shape)):
    ...     with batches:
    ...         batches.add(sampler.integrator.solve(x[rows], labels[rows]))
    >>> batches.x

    Where memory runs out inside the `with`, the same rows come again, fewer at a time; where the
    fused backend fails they come again for the model itself (both for backend "auto" only).

    Args:
        shape: (C, H, W) of an image.
        batch_size: images at a time; None: the sampler's, or by the number of tokens.
        noise: what the images started from, if it was given: to be blamed where it is not finite.
        allocate: take the memory of all results now; ValueError if there is none.
        end: the time that the solver goes to.
    """

    def __init__(
        self,
        sampler: Sampler,
        count: int,
        shape: Sequence[int],
        batch_size: int | None = None,
        *,
        noise: Tensor | None = None,
        allocate: bool = False,
        end: float = 1.0,
    ) -> None:
        size = batch_size or sampler.batch_size or default_batch(sampler, shape)
        self.sampler, self.count, self.size, self.noise = sampler, count, min(size, count), noise
        self.done, self.end, self.counts = 0, end, list[Counts]()
        self._states = list[Tensor]()  # trajectories
        self._x: Tensor | None = None
        self._out_of_memory = False
        if allocate and not (sampler.fused and self.size == count):
            self._x = _allocate((count, *shape), torch.float32, sampler.model.device)

    def __iter__(self) -> Iterator[slice]:
        while self.done < self.count:
            if self._out_of_memory:  # not earlier: the error held on to the memory
                self._halve()
            if self.sampler.fused:
                self.sampler.fused.refresh()
            yield slice(self.done, min(self.done + self.size, self.count))

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            for sentence in self.sampler.fused.fallbacks if self.sampler.fused else ():
                self.sampler.say(sentence)
            return False
        if isinstance(error, torch.OutOfMemoryError):
            self._out_of_memory = self.sampler.backend == "auto" and self.size > 1
            return self._out_of_memory
        expected = isinstance(error, ValueError) or not isinstance(error, Exception)
        return not expected and self.sampler.leave_fused(error)

    def add(self, result: BatchResult, images: Tensor | None = None) -> None:
        """What the rows that came last have become; images: what is kept of them (None: x).

        Raises:
            ValueError: naming the images that the solver could not finish or that are not finite.
        """
        self._check(result.counts.status)
        x = result.x if images is None else images
        end = self.done + len(result.counts.status)
        if len(x) == self.count and not x.is_inference():
            self._x = x
        else:
            if self._x is None:
                with torch.inference_mode(False):
                    self._x = _allocate((self.count, *x.shape[1:]), x.dtype, x.device)
            self._x[self.done : end] = x
        self.counts.append(result.counts)
        if result.trajectory is not None:
            self._states.append(result.trajectory)
        self.done = end

    @property
    def x(self) -> Tensor:
        """What was added, in one tensor."""
        assert self._x is not None
        return self._x

    @property
    def solution(self) -> Solution:
        """All results in one."""
        names = ("status", "accepted", "rejected", "evaluations")
        device = self.x.device
        all_of = {name: chain.from_iterable(map(attrgetter(name), self.counts)) for name in names}
        counts = {name: torch.tensor([*each], device=device) for name, each in all_of.items()}
        states = torch.cat(self._states, 1) if self._states else None
        return Solution(self.x, trajectory=states, **counts)

    def _halve(self) -> None:
        if self.sampler.fused:
            self.sampler.fused.release()
        self.sampler.say(
            f"out of memory with {self.size} images at a time: fewer are taken, the images stay the"
            " same",
            once="out of memory",
        )
        self.size, self._out_of_memory = self.size // 2, False

    def _check(self, status: Sequence[int]) -> None:
        """ValueError that names the unfinished images and says what to do about the worst."""
        worst = max(status)
        if worst == DONE:
            return
        noise = self.noise
        if NON_FINITE in status and noise is not None and not torch.isfinite(noise).all():
            raise ValueError("noise holds values that are not finite")
        bad = [str(self.done + row) for row, each in enumerate(status) if each == worst]
        names = f"{', '.join(bad[:8])}{', ...' if len(bad) > 8 else ''} of {self.count}"
        if worst == NON_FINITE:
            advice = "check the weights, the guidance scale and the noise"
            if self.sampler.model.dtype == torch.float16:
                advice = "use bfloat16 or float32"
            raise ValueError(f"samples are not finite (images {names}): {advice}")
        how, reason = self.sampler.operation, "cannot make its steps small enough"
        advice = "raise rtol and atol"
        if worst == MAX_STEPS:
            reason, advice = f"took {how.max_steps} steps", "raise max_steps, or rtol and atol"
        raise ValueError(
            f"{how.solver} {reason} and did not reach t = {self.end:g} at rtol {how.rtol:g}, atol"
            f" {how.atol:g} ({STATUSES[worst]}: images {names}): {advice}"
        )


def statistics(operation: Operation, counts: Sequence[Counts], seconds: float) -> dict[str, Any]:
    """`Sampler.stats` of batches."""

    def all_of(name: str) -> list[int]:
        return [value for each in counts for value in getattr(each, name)]

    status = [STATUSES[each] for each in all_of("status")]
    evaluations = sum(each.calls * len(each.status) for each in counts)
    return {
        "images": len(status),
        "evaluations": evaluations,
        "evaluations_per_image": evaluations / len(status),
        "accepted": all_of("accepted"),
        "rejected": all_of("rejected"),
        "evaluations_needed": list(map(operation.network_evaluations, all_of("evaluations"))),
        "status": status,
        "seconds": seconds,
    }


def default_batch(sampler: Sampler, shape: Sequence[int]) -> int:
    """Images of (C, H, W) at a time when no batch size is given."""
    tokens = shape[1] * shape[2] // sampler.model.config.patch_size**2
    most = _BATCH_TOKENS.get(sampler.model.device.type, _BATCH_TOKENS["cpu"])
    return max(1, most // (tokens * sampler.operation.rows_per_image))


@contextlib.contextmanager
def evaluating(model: DiT) -> Iterator[None]:
    """The model in eval mode."""
    training = model.training
    if training:  # both walk through all modules, which takes longer than a step of a small batch
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"no memory for {shape[0]} images of shape {tuple(shape[1:])}: draw fewer at a time"
        ) from error
